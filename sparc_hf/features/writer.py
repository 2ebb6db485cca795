"""Feature datasets as they are written: columns, rows checked against them, and shards that survive interruption."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sparc_hf.features.columns import fixed_size_lists, missing_rows
from sparc_hf.features.shard_folder import ShardFolder
from sparc_hf.features.shards import check_target
from sparc_hf.files.folder_lock import locked_folder
from sparc_hf.model.stream_record import StreamRecords, checked_stream_records

logger = logging.getLogger(__name__)

FLOAT_TYPES = ("float32", "float16")


class RowSchema:
    """The stream columns and the other columns of a feature dataset.

    Args:
        streams: stream records in order (or a dict name -> record), each with `name` and `hidden_size`.
        dtype: how the numbers are stored, "float32" or "float16".
        extra_columns: the other columns, among `id`, `image`, `text`, `captions` and `labels`, or a dict column name
            -> datasets feature.
        measured: see `checked_stream_records`.

    Raises:
        ValueError: for bad records, another dtype, or columns without a type or with the name of a stream.
    """

    def __init__(
        self,
        streams: StreamRecords,
        dtype: str,
        extra_columns: Sequence[str] | Mapping[str, Any] = (),
        measured: bool = True,
    ):
        from datasets import Features, List, Value

        if dtype not in FLOAT_TYPES:
            raise ValueError(f"`dtype` must be one of {list(FLOAT_TYPES)}, but it is {dtype!r}")
        self.streams, self.dtype = checked_stream_records(streams, measured=measured), dtype
        self.extra_features = _extra_features(extra_columns, self.streams)
        columns = {record["name"]: List(Value(dtype), length=record["hidden_size"]) for record in self.streams}
        self.arrow_schema: pa.Schema = Features({**columns, **self.extra_features}).arrow_schema

    @property
    def column_types(self) -> dict[str, str]:
        """Column name -> Arrow type, as strings."""
        return {field.name: str(field.type) for field in self.arrow_schema}

    def checked(
        self, batch: Mapping[str, Any], first_row: int = 0, present: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, pa.Array], int]:
        """Return the stream arrays, NaN in rows without that stream, the other columns and the number of rows.

        Args:
            batch: every stream as an array [rows, hidden_size], every other column as a list of `rows` values.
            first_row: what to call its first row in an error.
            present: stream -> bool [rows], which rows have it; streams without an entry are in every row.

        Raises:
            ValueError: for missing or unknown columns, another width or row count, a number that is not finite (also
                after conversion to `dtype`) in a row that is there, a row without any stream, or a value its column
                cannot hold.
        """
        names = self.arrow_schema.names
        if set(batch) != set(names):
            raise ValueError(
                f"a batch must have the columns {names}; missing are {sorted(set(names) - set(batch))}, "
                f"not expected are {sorted(set(batch) - set(names))}"
            )
        lengths = {name: len(values) for name, values in batch.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"all columns of a batch must have the same number of rows, but they have {lengths}")
        rows = next(iter(lengths.values()))
        missing = self._missing(present or {}, rows, first_row)
        arrays = {
            record["name"]: self._checked_array(record, batch[record["name"]], first_row, missing.get(record["name"]))
            for record in self.streams
        }
        extras = {name: self._checked_extra(name, batch[name]) for name in self.extra_features}
        return arrays, extras, rows

    def _missing(self, present: Mapping[str, Any], rows: int, first_row: int) -> dict[str, np.ndarray]:
        """Return stream -> bool [rows] of those that some of the rows lack."""
        names = [record["name"] for record in self.streams]
        if unknown := sorted(set(present) - set(names)):
            raise ValueError(f"`present` names {unknown}, but the streams are {names}")
        masks = {name: missing_rows(name, present[name], rows) for name in present}
        masks = {name: mask for name, mask in masks.items() if mask.any()}
        if len(masks) == len(names):
            empty = np.flatnonzero(np.logical_and.reduce(list(masks.values())))
            if len(empty):
                raise ValueError(f"row {first_row + int(empty[0])} has none of the streams {names}; leave it out")
        return masks

    def _checked_array(
        self, record: Mapping[str, Any], values: Any, first_row: int, missing: np.ndarray | None
    ) -> np.ndarray:
        array = np.asarray(values)
        if array.ndim != 2 or array.shape[1] != record["hidden_size"]:
            raise ValueError(
                f"stream `{record['name']}` needs an array [rows, {record['hidden_size']}], "
                f"but got one of shape {list(array.shape)}"
            )
        with np.errstate(over="ignore"):
            array = array.astype(self.dtype, copy=missing is not None)
        finite = np.isfinite(array).all(axis=1)
        if missing is not None:
            finite |= missing
            array[missing] = np.nan
        if not finite.all():
            row = first_row + int(np.argmin(finite))
            hint = "" if self.dtype == "float32" else " (float16 ends at 65504; float32 holds larger numbers)"
            raise ValueError(f"stream `{record['name']}` has a NaN or infinite number in row {row}{hint}")
        return array

    def _checked_extra(self, name: str, values: Any) -> pa.Array:
        from datasets import Features

        try:
            feature = Features({name: self.extra_features[name]})
            encoded = feature.encode_batch({name: list(values)})[name]
            return pa.array(encoded, type=self.arrow_schema.field(name).type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            kind = self.arrow_schema.field(name).type
            raise ValueError(f"column `{name}` holds {kind}, which a value of this batch is not: {error}") from error


class ShardWriter:
    """The shards of a feature dataset, one of which grows in memory; several processes may write some each.

    Args:
        path: the finished folder.
        schema: its columns.
        rows_per_shard: only noted; the caller decides where a shard ends.
        label_names: names of the label classes.
        taxonomy: nested label hierarchy.
        source: how the features were made.
        repair: see `ShardFolder`.

    Attributes:
        folder: where the shards lie.
        number: of the shard that grows; None where there is none.
        rows: it has so far.

    Raises:
        ValueError: as `ShardFolder`.
    """

    def __init__(
        self,
        path: Path,
        schema: RowSchema,
        *,
        rows_per_shard: int,
        label_names: Sequence[str] | None = None,
        taxonomy: Any = None,
        source: Any = None,
        repair: bool = False,
    ):
        self.schema = schema
        self._facts = {
            "streams": schema.streams,
            "label_names": None if label_names is None else list(label_names),
            "taxonomy": taxonomy,
            "source": source,
        }
        settings = {**self._facts, "columns": schema.column_types, "rows_per_shard": rows_per_shard}
        self.folder = ShardFolder(path, settings, repair=repair)
        self.number: int | None = None

    def begin(self, number: int) -> None:
        """Let what is added from now on belong to shard `number`."""
        self.number, self.rows = number, 0
        self._arrays: dict[str, list[np.ndarray]] = {record["name"]: [] for record in self.schema.streams}
        self._extras: dict[str, list[pa.Array]] = {name: [] for name in self.schema.extra_features}
        self._skipped: list[dict[str, Any]] | None = None
        self._incomplete: list[dict[str, Any]] | None = None

    def add(self, arrays: Mapping[str, np.ndarray], extras: Mapping[str, pa.Array]) -> None:
        """Add rows that `RowSchema.checked` gave, or some of them; the arrays are copied."""
        for name, array in arrays.items():
            self._arrays[name].append(array.copy())
        for name, values in extras.items():
            self._extras[name].append(values)
        self.rows += len(next(iter(arrays.values())))

    def skip(self, failures: Sequence[Mapping[str, Any]]) -> None:
        """Note rows of the source that the shard does without; its entry lists them, none where there are none."""
        self._skipped = [*(self._skipped or ()), *map(dict, failures)]

    def keep_incomplete(self, failures: Sequence[Mapping[str, Any]]) -> None:
        """Note rows of the shard that lack streams which could not be made; its entry lists them."""
        self._incomplete = [*(self._incomplete or ()), *map(dict, failures)]

    def save(self) -> dict[str, Any] | None:
        """Write the shard that grows, if any, and return its manifest entry.

        Raises:
            OSError: as `ShardFolder.save`; its rows are kept in memory, so that this can be tried again.
        """
        if self.number is None:
            return None
        if self._skipped:
            logger.warning("%d rows of shard %d are left out", len(self._skipped), self.number)
        if self._incomplete:
            logger.warning("%d rows of shard %d lack streams", len(self._incomplete), self.number)
        facts = {} if self._skipped is None else {"skipped": self._skipped}
        facts |= {} if self._incomplete is None else {"incomplete": self._incomplete}
        entry = self.folder.save(self.number, self._record_batch() if self.rows else None, **facts)
        self.number = None
        return entry

    def finish(self, shards: int, streams: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Write the manifest over all shards, and give the folder its final name; see `ShardFolder.finish`.

        Args:
            shards: how many there are.
            streams: the stream records, where more of them is known by now.
        """
        facts = self._facts if streams is None else {**self._facts, "streams": streams}
        self.folder.finish(self.schema.arrow_schema, facts, shards)

    def _record_batch(self) -> pa.RecordBatch:
        for name, pieces in self._arrays.items():  # one by one, so that only one stream is in memory twice
            self._arrays[name] = [np.concatenate(pieces)] if len(pieces) > 1 else pieces
        # Rows that are there hold no NaN.
        columns = [fixed_size_lists(pieces[0], np.isnan(pieces[0][:, 0])) for pieces in self._arrays.values()]
        columns += [pa.concat_arrays(pieces) for pieces in self._extras.values()]
        return pa.record_batch(columns, schema=self.schema.arrow_schema)


class FeatureWriter:
    """Write a feature dataset batch by batch, holding one shard in memory and surviving interruption.

    Shards go to `<path>.partial`; `close` adds the manifest and renames the folder to `path`. A writer opened again
    with the same settings goes on behind the rows in `rows_done`. As a context manager it closes on success; on an
    exception the finished rows stay for the next run.

    Args:
        path: the folder to make.
        streams: stream records in order (or a dict name -> record), each with `name` and `hidden_size`.
        dtype: how the numbers are stored.
        rows_per_shard: rows of a shard, which is also what is held in memory.
        label_names: names of the label classes; class id i is `label_names[i]`.
        taxonomy: nested label hierarchy, any JSON value.
        source: how the features were made, any JSON value; it must be the same when a run resumes.
        extra_columns: the other columns of every batch; see `RowSchema`.

    Raises:
        ValueError: for unusable settings, a `path` that already holds something or that another process writes into,
            or a `.partial` folder that was begun with other settings.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        streams: StreamRecords,
        *,
        dtype: Literal["float32", "float16"] = "float32",
        rows_per_shard: int = 4096,
        label_names: Sequence[str] | None = None,
        taxonomy: Any = None,
        source: Any = None,
        extra_columns: Sequence[str] | Mapping[str, Any] = (),
    ):
        if rows_per_shard < 1:
            raise ValueError(f"`rows_per_shard` must be at least 1, but it is {rows_per_shard}")
        self.path = Path(path)
        schema = RowSchema(streams, dtype, extra_columns)
        self.streams = schema.streams
        self.rows_per_shard = rows_per_shard
        with ExitStack() as opened:
            opened.enter_context(locked_folder(self.path))
            check_target(self.path)
            self._writer = ShardWriter(
                self.path,
                schema,
                rows_per_shard=rows_per_shard,
                label_names=label_names,
                taxonomy=taxonomy,
                source=source,
            )
            self._lock = opened.pop_all()
        self._shards: list[dict[str, Any]] = []
        while (entry := self._writer.folder.entry(len(self._shards))) is not None:
            self._shards.append(entry)
        self._writer.begin(len(self._shards))

    @property
    def rows_done(self) -> int:
        """Rows that are safe on disk, so that a resuming run can skip them."""
        return sum(shard["rows"] for shard in self._shards)

    def __len__(self) -> int:
        """Rows appended so far, safe or still in memory."""
        return self.rows_done + self._writer.rows

    def append(self, batch: Mapping[str, Any], present: Mapping[str, Any] | None = None) -> None:
        """Append rows.

        Args:
            batch: every stream as an array [rows, hidden_size], every extra column as a list of `rows` values.
            present: stream -> bool [rows], which rows have it; what stands in the others is not kept. Streams without
                an entry are in every row.

        Raises:
            ValueError: as `RowSchema.checked`. Nothing of the batch is then kept.
        """
        arrays, extras, rows = self._writer.schema.checked(batch, first_row=len(self), present=present)
        start = 0
        while start < rows:
            stop = min(rows, start + self.rows_per_shard - self._writer.rows)
            self._writer.add(
                {name: array[start:stop] for name, array in arrays.items()},
                {name: values.slice(start, stop - start) for name, values in extras.items()},
            )
            start = stop
            if self._writer.rows == self.rows_per_shard:
                self._flush()

    def close(self) -> None:
        """Write the last shard and the manifest, and give the folder its final name.

        Raises:
            ValueError: if there are no rows at all.
        """
        with self._lock:
            self._flush()
            self._writer.finish(len(self._shards))

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            with self._lock:
                self._flush()
        except OSError as flush_error:  # a full disk must not hide the first exception
            logger.warning("the last %d rows could not be saved: %s", self._writer.rows, flush_error)
        logger.warning("stopped after %d rows, which are kept in %s", self.rows_done, self._writer.folder.partial)

    def _flush(self) -> None:
        if self._writer.rows and (entry := self._writer.save()):
            self._shards.append(entry)
            self._writer.begin(len(self._shards))


def _extra_features(
    columns: Sequence[str] | Mapping[str, Any], streams: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return column name -> datasets feature for the columns beside the streams."""
    from datasets import Image, List, Value

    usual_types = {
        "id": Value("string"),
        "image": Image(),
        "text": Value("string"),
        "captions": List(Value("string")),
        "labels": List(Value("int32")),
        "sample": Value("int64"),
        "token": Value("int32"),
    }
    if not isinstance(columns, Mapping):
        unknown = sorted(set(columns) - set(usual_types))
        if unknown:
            raise ValueError(f"columns {unknown} need a type; pass `extra_columns` as a dict name -> datasets feature")
        columns = {name: usual_types[name] for name in columns}
    taken = sorted({record["name"] for record in streams} & set(columns))
    if taken:
        raise ValueError(f"columns {taken} carry the name of a stream; rename the stream or the column")
    return dict(columns)
