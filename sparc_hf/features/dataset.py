"""FeatureDataset: what several frozen encoders say about the same samples, on disk and in memory."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from sparc_hf.features.columns import (
    ColumnRows,
    check_texts,
    checked_floats,
    class_ids_per_row,
    fixed_size_lists,
    label_matrix,
    list_width,
    missing_rows,
    with_fixed_widths,
)
from sparc_hf.features.parquet import FACTS, is_parquet_address, open_parquet
from sparc_hf.features.shards import (
    FEATURE_FOLDER,
    check_files,
    check_missing_rows,
    check_target,
    finish_folder,
    joined,
    open_shard,
    read_manifest,
    write_shard,
)
from sparc_hf.features.stream_records import completed_records
from sparc_hf.files.atomic_files import writing
from sparc_hf.files.atomic_folders import new_folder
from sparc_hf.files.folder_lock import locked_folder
from sparc_hf.model.stream_record import StreamRecords, checked_stream_records

if TYPE_CHECKING:
    import datasets
    import PIL.Image
    import scipy.sparse

Rows = Sequence[int] | np.ndarray | slice
FEW_ROWS = 32


class FeatureDataset:
    """Rows of features, one fixed-width float column per stream, with the facts that repeat them.

    On disk it is a folder that `datasets.load_from_disk` opens, plus `sparc_features.json`: the stream records, label
    names, and rows and SHA-256 of every shard. Rows are stored as the encoders gave them; the model normalises.
    A row may lack some of the streams, never all: there its column has a null. Make one with `load`, `from_arrays` or
    `from_dataset`.

    Args:
        table: Arrow table with a fixed-size list column per stream.
        streams: stream records in order.
        rows: the rows of `table` this dataset consists of, in order; all by default.
        label_names: names of the label classes.
        taxonomy: nested label hierarchy.
        source: how the features were made.

    Attributes:
        rows_skipped: samples of the source that were left out when it was extracted; `skipped.jsonl` lists them.
        rows_left_out: rows beside these ones that lack a stream, where these were chosen for lacking none.
        row_numbers: int64 [rows], what to call the rows where they were so chosen; else None.

    Raises:
        ValueError: for streams without a column, rows of another width or with a null in place of a number, or a row
            that lacks every stream.
    """

    def __init__(
        self,
        table: pa.Table,
        streams: StreamRecords,
        *,
        rows: np.ndarray | None = None,
        label_names: Sequence[str] | None = None,
        taxonomy: Any = None,
        source: Any = None,
    ):
        self.streams = checked_stream_records(streams)
        self.table = with_fixed_widths(table, self.streams)
        self.label_names = None if label_names is None else list(label_names)
        self.taxonomy = taxonomy
        self.source = source
        self.rows_skipped = 0
        self.rows_left_out = 0
        self.row_numbers: np.ndarray | None = None
        self._rows = rows
        self._columns = {name: ColumnRows(self.table.column(name)) for name in self.stream_names}
        self._refuse_rows_without_streams()

    @classmethod
    def load(cls, path: str | os.PathLike, verify: bool = True) -> "FeatureDataset":
        """Open a feature dataset, memory-mapped.

        Args:
            path: its folder, or where it was pushed: `hf://datasets/<owner>/<name>[@<revision>][/<split>]`, or the
                folder of Parquet files of a dry run.
            verify: compare the SHA-256 of every shard, which reads all of it once; without it only sizes and row
                counts are compared.

        Raises:
            FileNotFoundError: if the folder, its manifest or a shard is missing.
            ValueError: for a pushed dataset that cannot be opened (see `open_parquet`), a newer format, or a shard
                that is not the one that was written.
        """
        if is_parquet_address(path):
            split = open_parquet(path, verify=verify)
            dataset = cls(split.read_table(), **{name: split.facts[name] for name in FACTS})
            check_missing_rows(dataset.rows_without, split.facts, f"{path}")
            return dataset
        folder = Path(path)
        manifest = read_manifest(folder)
        check_files(folder, manifest, FEATURE_FOLDER, verify)
        with ThreadPoolExecutor() as pool:  # checksums leave Python's lock alone
            opened = pool.map(lambda shard: open_shard(folder, shard, verify), manifest["shards"])
            # A bar appears only where this takes long.
            tables = list(
                tqdm(opened, total=len(manifest["shards"]), desc="check", unit=" shards", delay=2, leave=False)
            )
        table = joined(tables, folder)
        if table.num_rows != manifest["rows"]:
            raise ValueError(
                f"`{folder}` should have {manifest['rows']} rows, but its shards have {table.num_rows}; make it again"
            )
        facts = {key: manifest.get(key) for key in ("label_names", "taxonomy", "source")}
        dataset = cls(table, manifest["streams"], **facts)
        check_missing_rows(dataset.rows_without, manifest, f"{folder}")
        dataset.rows_skipped = int(manifest.get("rows_skipped", 0))
        return dataset

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Any],
        *,
        streams: StreamRecords | None = None,
        present: Mapping[str, Any] | None = None,
        ids: Sequence[str] | None = None,
        text: Sequence[str] | None = None,
        labels: Any = None,
        label_names: Sequence[str] | None = None,
        taxonomy: Any = None,
        source: Any = None,
    ) -> "FeatureDataset":
        """Make a feature dataset in memory.

        Args:
            arrays: stream name -> numbers [rows, hidden_size]; float32 and float16 are kept, others become float32.
            streams: what is known of the streams beside name and width, as records or a dict name -> record.
            present: stream name -> bool [rows], which rows have that stream; what stands in the others is not kept.
                Streams without an entry are in every row.
            ids: a string per row.
            text: a string per row.
            labels: class ids per row (list of lists), or a 0/1 matrix [rows, classes].
            label_names: names of the classes.
            taxonomy: nested label hierarchy.
            source: how the features were made.

        Raises:
            ValueError: for arrays that do not fit together, records that do not fit the arrays, or a row that lacks
                every stream.
        """
        floats = {name: checked_floats(name, values) for name, values in arrays.items()}
        if unknown := sorted(set(present or ()) - set(floats)):
            raise ValueError(f"`present` names {unknown}, but the streams are {list(floats)}")
        missing = {name: missing_rows(name, given, len(floats[name])) for name, given in (present or {}).items()}
        columns: dict[str, pa.Array] = {
            name: fixed_size_lists(values, missing.get(name)) for name, values in floats.items()
        }
        extras = {"id": ids, "text": text}
        columns |= {name: pa.array(list(values), pa.string()) for name, values in extras.items() if values is not None}
        if labels is not None:
            columns["labels"] = pa.array(class_ids_per_row(labels), pa.list_(pa.int32()))
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"all columns must have the same number of rows, but they have {lengths}")
        records = completed_records(streams, {name: values.shape[1] for name, values in floats.items()})
        return cls(pa.table(columns), records, label_names=label_names, taxonomy=taxonomy, source=source)

    @classmethod
    def from_dataset(
        cls,
        dataset: "datasets.Dataset",
        *,
        streams: StreamRecords | Sequence[str] | None = None,
        label_names: Sequence[str] | None = None,
        taxonomy: Any = None,
        source: Any = None,
    ) -> "FeatureDataset":
        """Use the table of a datasets.Dataset, for example one that `load_dataset` read from parquet, without copying.

        Args:
            dataset: its stream columns hold lists of floats, all of one length, and None in rows without that stream.
            streams: names or records of the stream columns; by default every column of fixed-length float lists.
            label_names: names of the classes in a `labels` column.
            taxonomy: nested label hierarchy.
            source: how the features were made.

        Raises:
            ValueError: if a stream has no such column, or rows of several widths, or a row lacks every stream.
        """
        table = dataset.data.table.replace_schema_metadata(dataset.features.arrow_schema.metadata)
        widths = {
            field.name: field.type.list_size
            for field in table.schema
            if pa.types.is_fixed_size_list(field.type) and pa.types.is_floating(field.type.value_type)
        }
        if streams is not None and not isinstance(streams, Mapping):
            streams = [{"name": record} if isinstance(record, str) else record for record in streams]
            for record in streams:
                if record["name"] not in widths:
                    known = record.get("hidden_size") if record["name"] in table.column_names else None
                    widths[record["name"]] = known or list_width(table, record["name"])
            widths = {record["name"]: widths[record["name"]] for record in streams}
        if not widths:
            raise ValueError("there is no column of fixed-length float lists; name the columns with `streams`")
        indices = dataset._indices  # select() and shuffle() of a datasets.Dataset keep the table and set these
        rows = None if indices is None else indices.column(0).to_numpy().astype(np.int64)
        records = completed_records(streams, widths)
        return cls(table, records, rows=rows, label_names=label_names, taxonomy=taxonomy, source=source)

    def __len__(self) -> int:
        return self.table.num_rows if self._rows is None else len(self._rows)

    def __repr__(self) -> str:
        widths = ", ".join(f"{record['name']} {record['hidden_size']}" for record in self.streams)
        lacking = "".join(f"; {count} lack {name}" for name, count in self.rows_without.items())
        return f"FeatureDataset({len(self)} rows; {widths}{lacking})"

    @property
    def stream_names(self) -> list[str]:
        """Names of the streams, in order."""
        return [record["name"] for record in self.streams]

    @property
    def column_names(self) -> list[str]:
        """Names of all columns."""
        return self.table.column_names

    @cached_property
    def dataset(self) -> "datasets.Dataset":
        """The rows as a datasets.Dataset, for its images and for mapping; nothing is copied."""
        import datasets

        dataset = datasets.Dataset(self.table)  # pyright: ignore[reportArgumentType] wraps a plain Arrow table too
        return dataset if self._rows is None else dataset.select(self._rows)

    @property
    def ids(self) -> list[str] | None:
        """The `id` column, or None."""
        return self.column("id") if "id" in self.column_names else None

    @property
    def text(self) -> list[str] | None:
        """The `text` column, "" where a row has none; or None without such a column.

        Raises:
            ValueError: for a column of that name that holds no texts.
        """
        if "text" not in self.column_names:
            return None
        check_texts("text", self.table.schema.field("text").type)
        return [text or "" for text in self.column("text")]

    def array(self, stream: str, rows: Rows | None = None) -> np.ndarray:
        """Return new float32 memory [rows, hidden_size] of one stream, NaN in rows without it; all rows by default."""
        column = self._column_rows(stream)
        table_rows = self._table_rows(rows)
        return column.all() if table_rows is None else column.gather(table_rows)

    def present(self, stream: str, rows: Rows | None = None) -> np.ndarray:
        """Return bool [rows], which rows have a stream; all rows by default."""
        missing, table_rows = self._column_rows(stream).missing, self._table_rows(rows)
        if missing is None:
            return np.ones(self.table.num_rows if table_rows is None else len(table_rows), dtype=bool)
        return ~(missing if table_rows is None else missing[table_rows])

    def complete_rows(self, streams: Iterable[str] | None = None) -> np.ndarray:
        """Return int64 [complete rows], the numbers of the rows that have all these streams, by default all."""
        names = self.stream_names if streams is None else list(streams)
        has_all = np.ones(len(self), dtype=bool)
        for name in names:
            has_all &= self.present(name)
        return np.flatnonzero(has_all)

    @property
    def rows_without(self) -> dict[str, int]:
        """Stream -> how many rows lack it; only streams that some row lacks."""
        return self._rows_without

    @cached_property
    def _rows_without(self) -> dict[str, int]:
        lacking = [name for name, column in self._columns.items() if column.missing is not None]
        counts = {name: len(self) - int(self.present(name).sum()) for name in lacking}
        return {name: count for name, count in counts.items() if count}

    @property
    def is_incomplete(self) -> bool:
        """Whether any row lacks a stream."""
        return bool(self.rows_without)

    def column(self, name: str, rows: Rows | None = None) -> list[Any]:
        """Return one column as a list of Python values; images come as dicts of bytes and path."""
        if name not in self.column_names:
            raise ValueError(f"there is no column `{name}`; the columns are {self.column_names}")
        table_rows = self._table_rows(rows)
        column = self.table.column(name)
        if table_rows is not None and len(table_rows) <= FEW_ROWS:  # `take` would copy the whole column first
            return [column[row].as_py() for row in table_rows.tolist()]
        return (column if table_rows is None else column.take(pa.array(table_rows))).to_pylist()

    def image(self, row: int) -> "PIL.Image.Image | None":
        """Return the image of one sample, upright and in RGB as its encoders saw it; None where it has none.

        Raises:
            ValueError: if it cannot be read.
        """
        from sparc_hf.encoders.inputs import stored_image

        return stored_image(self.column("image", [row])[0]) if "image" in self.column_names else None

    def select(self, rows: Rows) -> "FeatureDataset":
        """Return the dataset of these rows, in this order, without copying features."""
        facts = {"label_names": self.label_names, "taxonomy": self.taxonomy, "source": self.source}
        return FeatureDataset(self.table, self.streams, rows=self._table_rows(rows), **facts)

    def split(self, first: int | float) -> tuple["FeatureDataset", "FeatureDataset"]:
        """Return the first rows and the rest; `first` is a number of rows, or a fraction between 0 and 1."""
        count = round(first * len(self)) if isinstance(first, float) else first
        if not 0 < count < len(self):
            raise ValueError(f"`first` must leave rows on both sides of {len(self)}, but it is {first}")
        return self.select(slice(0, count)), self.select(slice(count, None))

    def labels_csr(self) -> "scipy.sparse.csr_array":
        """Return the labels as a 0/1 float32 matrix [rows, classes].

        Without label names, ids that are larger than there are labels, such as hashes and numbers of a catalogue, are
        numbered anew in their order, because what is measured of labels is as wide as there are classes.

        Raises:
            ValueError: if there is no `labels` column, or a class id without a name.
        """
        if "labels" not in self.column_names:
            raise ValueError(f"this dataset has no `labels` column; its columns are {self.column_names}")
        rows = self._table_rows(None)
        column = self.table.column("labels")
        return label_matrix(column if rows is None else column.take(pa.array(rows)), self.label_names)

    def check_rows(self, streams: Iterable[str] | None = None, rows_at_once: int = 1024) -> None:
        """Read every row once, in blocks of `rows_at_once`, but those that are missing.

        Raises:
            ValueError: naming stream and row of the first row with a NaN or infinite number, or of zeros only.
        """
        for name in self.stream_names if streams is None else streams:
            for start in range(0, len(self), rows_at_once):
                rows = slice(start, start + rows_at_once)
                block = self.array(name, rows)
                squares = np.einsum("ij,ij->i", block, block)
                # Squares overflow and underflow before the numbers do, so the suspects are looked at again.
                is_suspect = ~np.isfinite(squares) | (squares == 0)
                for row in np.flatnonzero(is_suspect & self.present(name, rows) if is_suspect.any() else is_suspect):
                    peak = np.abs(block[row]).max()
                    if peak == 0 or not np.isfinite(peak):
                        kind = "only zeros" if peak == 0 else "a NaN or infinite number"
                        place = self.row_name(start + int(row))
                        raise ValueError(f"stream `{name}` has {kind} in {place}; remove or repair that row")

    def row_name(self, row: int) -> str:
        """Return what an error message calls a row: its number and, where there is one, its id."""
        name = f"row {self.number_of(row)}"
        return name + (f" (id {self.column('id', [row])[0]!r})" if "id" in self.column_names else "")

    def number_of(self, row: int) -> int:
        """Return the number that tells a row to a user, see `row_numbers`."""
        return row if self.row_numbers is None else int(self.row_numbers[row])

    def save(self, path: str | os.PathLike, *, rows_per_shard: int = 4096, overwrite: bool = False) -> None:
        """Write the dataset as a folder, which appears under its name only when it is whole.

        Args:
            path: the folder.
            rows_per_shard: rows of one file.
            overwrite: replace a feature dataset that is there, which may be the one this was loaded from.

        Raises:
            ValueError: if `path` holds something that may not be replaced, or another process writes into it.
            OSError: saying what to do, if something cannot be written.
        """
        target = Path(path).resolve()
        facts = {"label_names": self.label_names, "taxonomy": self.taxonomy, "source": self.source}
        with locked_folder(target), writing(f"`{path}`", "what was there before is kept; make room and try again"):
            check_target(target, overwrite)
            with new_folder(target, FEATURE_FOLDER.owns, last=FEATURE_FOLDER.manifest) as folder:
                shards = []
                for start in range(0, len(self), rows_per_shard):
                    batch = self.record_batch(slice(start, start + rows_per_shard))
                    shards.append(write_shard(folder, f"data-{len(shards):05d}.arrow", batch, self.stream_names))
                finish_folder(folder, self.table.schema, shards, {"streams": self.streams, **facts})

    def record_batch(self, rows: slice) -> pa.RecordBatch:
        """Return rows with all their columns, as they are stored."""
        table_rows = self._table_rows(rows)
        assert table_rows is not None
        columns = []
        for field in self.table.schema:
            if field.name in self._columns:
                values = self.array(field.name, rows).astype(field.type.value_type.to_pandas_dtype(), copy=False)
                missing = None if self._columns[field.name].missing is None else ~self.present(field.name, rows)
                columns.append(fixed_size_lists(values, missing))
            else:
                taken = self.table.column(field.name).take(pa.array(table_rows))
                columns.append(pa.concat_arrays(taken.chunks))
        return pa.record_batch(columns, schema=self.table.schema)

    def _column_rows(self, stream: str) -> ColumnRows:
        if stream not in self._columns:
            raise ValueError(f"there is no stream `{stream}`; the streams are {self.stream_names}")
        return self._columns[stream]

    def _refuse_rows_without_streams(self) -> None:
        masks = [column.missing for column in self._columns.values()]
        if any(mask is None for mask in masks):
            return
        empty = np.flatnonzero(~np.logical_or.reduce([self.present(name) for name in self.stream_names]))
        if len(empty):
            raise ValueError(
                f"{self.row_name(int(empty[0]))} has none of the streams {self.stream_names}, which no row may "
                f"({len(empty)} do); leave such rows out"
            )

    def _table_rows(self, rows: Rows | None) -> np.ndarray | None:
        """Translate row numbers of this dataset into those of its table, int64; None means all of the table."""
        if rows is None:
            return self._rows
        if isinstance(rows, slice):
            numbers = np.arange(*rows.indices(len(self)))
        else:
            numbers = np.asarray(rows, dtype=np.int64)
            if len(numbers) and not -len(self) <= numbers.min() <= numbers.max() < len(self):
                raise ValueError(f"row numbers must be from 0 to {len(self) - 1}, but reach {numbers.max()}")
            numbers = np.where(numbers < 0, numbers + len(self), numbers)
        return numbers if self._rows is None else self._rows[numbers]
