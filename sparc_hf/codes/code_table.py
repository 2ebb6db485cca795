"""Code tables: the codes of a whole dataset, k latents and k values a row and stream, in memory and on disk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from sparc_hf.codes.incomplete import check_complete, check_encodable, codes_of_incomplete, streams_lacked
from sparc_hf.features.batches import FeatureBatches
from sparc_hf.features.columns import fixed_size_lists
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.shards import (
    FolderKind,
    Manifest,
    check_files,
    check_target,
    finish_folder,
    joined,
    open_shard,
    read_manifest,
    write_shard,
)
from sparc_hf.files.atomic_files import checksums_of, writing
from sparc_hf.files.atomic_folders import new_folder
from sparc_hf.files.checked_reading import Limit
from sparc_hf.files.folder_lock import locked_folder
from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.model.outputs import SparseCodes

if TYPE_CHECKING:
    from scipy.sparse import csr_array

ENCODINGS = ("joint", "single", "single_ignoring")
# An array of one double per latent then takes a gigabyte.
MOST_LATENTS = 2**27


class CodeManifest(Manifest):
    """The manifest of a code table."""

    streams: list[str]
    num_latents: Annotated[int, Limit(f"a number from 1 to {MOST_LATENTS}", lambda value: 1 <= value <= MOST_LATENTS)]
    encoding: Literal["joint", "single", "single_ignoring"]


CODE_FOLDER = FolderKind(
    "sparc_codes.json",
    CodeManifest,
    "code table",
    "make one with `sparc encode`",
    "copy it again, or make it again with `sparc encode --overwrite`",
    ("top_samples.parquet",),
)


class CodeTable:
    """Codes of a dataset's rows, in the order of the rows; never N wide.

    On disk it is a folder that `datasets.load_from_disk` opens (columns `<stream>_indices` int32 [k] and
    `<stream>_values` float32 [k]) plus `sparc_codes.json`. A loaded table is mapped into memory, not read. Make one
    with `encode_features`, `load` or `from_arrays`. Where rows of the dataset lacked a stream, a column
    `<stream>_given` tells which had it: the codes of the others are of imputed rows under "joint" encoding, and else
    empty, all values 0.

    Args:
        table: Arrow table with these columns.
        num_latents: N.
        encoding: "joint" (all streams given, selecting as the model's config says), "single" (each stream alone, the
            others imputed where the model can) or "single_ignoring" (each stream alone, as if there were no others).
    """

    def __init__(self, table: pa.Table, *, num_latents: int, encoding: str):
        self.table = table
        self.num_latents = num_latents
        self.encoding = encoding

    @classmethod
    def from_arrays(
        cls, indices: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], num_latents: int, encoding: str
    ) -> "CodeTable":
        """Make a table of stream -> int32 [rows, k] latents and stream -> float32 [rows, k] values, not copied."""
        return cls(pa.table(_columns(indices, values)), num_latents=num_latents, encoding=encoding)

    @classmethod
    def load(cls, path: str | Path, verify: bool = True) -> "CodeTable":
        """Open a code table, memory-mapped.

        Args:
            path: its folder.
            verify: compare the SHA-256 of every file, which reads all of it once; without it only sizes and row counts
                are compared.

        Raises:
            FileNotFoundError: if there is no folder, or no code table in it, or a shard is missing.
            ValueError: for a newer format, a file that is not the one that was written, or columns that do not fit the
                manifest.
        """
        folder = Path(path)
        manifest = read_manifest(folder, CODE_FOLDER)
        check_files(folder, manifest, CODE_FOLDER, verify)
        opened = [open_shard(folder, shard, verify, CODE_FOLDER) for shard in manifest["shards"]]
        table = joined(opened, folder, CODE_FOLDER)
        if table.num_rows != manifest["rows"]:
            raise ValueError(
                f"`{folder}` should have {manifest['rows']} rows, but its shards have {table.num_rows}; make it again"
            )
        for stream in manifest["streams"]:
            _check_columns(table, stream, folder)
        return cls(table, num_latents=manifest["num_latents"], encoding=manifest["encoding"])

    @property
    def streams(self) -> list[str]:
        """Names of the streams, in order."""
        ending = "_indices"
        return [name.removesuffix(ending) for name in self.table.column_names if name.endswith(ending)]

    def __len__(self) -> int:
        return self.table.num_rows

    def __repr__(self) -> str:
        return f"CodeTable({len(self)} rows; {', '.join(self.streams)}; {self.num_latents} latents; {self.encoding})"

    def indices(self, stream: str) -> np.ndarray:
        """Return int32 [rows, k]: the selected latents of a stream.

        Raises:
            ValueError: for latents beyond `num_latents`, which would be read and written out of bounds.
        """
        indices = self._array(f"{stream}_indices", stream)
        least, largest = indices.min(initial=0), indices.max(initial=0)
        if least < 0 or largest >= self.num_latents:
            raise ValueError(
                f"the code table has latents from {least} to {largest} in stream `{stream}`, but only "
                f"{self.num_latents} latents; make it again"
            )
        return indices

    def values(self, stream: str) -> np.ndarray:
        """Return float32 [rows, k]: their values, 0 where a selected pre-activation was negative."""
        return self._array(f"{stream}_values", stream)

    def given(self, stream: str) -> np.ndarray:
        """Return bool [rows]: which rows had the stream when they were encoded."""
        if stream not in self.streams:
            raise ValueError(f"the code table has no stream `{stream}`; it has {self.streams}")
        column = f"{stream}_given"
        if column not in self.table.column_names:
            return np.ones(len(self), dtype=bool)
        return self.table.column(column).to_numpy()

    def csr(self, stream: str) -> "csr_array":
        """Return the positive values of a stream as a scipy CSR array [rows, N] of its own memory.

        Raises:
            ValueError: for an unknown stream, latents that are none of the N, or values that are not finite.
        """
        from scipy.sparse import csr_array

        from sparc_hf.metrics.latent_liveness.checked_input import checked_matrix

        indices = self.indices(stream)
        rows, k = indices.shape
        data = (self.values(stream).reshape(-1), indices.reshape(-1), np.arange(0, rows * k + 1, k))
        # Copied, because the clean-up below works in place.
        csr = csr_array(data, shape=(rows, self.num_latents), copy=True)
        csr.eliminate_zeros()
        csr.sort_indices()
        return checked_matrix(csr, f"the codes of `{stream}`")

    def rows(self, start: int, stop: int) -> "CodeTable":
        """Return the table of rows `start` to `stop`, exclusive, without copying."""
        table = self.table.slice(start, max(stop - start, 0))
        return CodeTable(table, num_latents=self.num_latents, encoding=self.encoding)

    def save(self, path: str | Path, *, rows_per_shard: int = 16384, overwrite: bool = False) -> None:
        """Write the table as a folder, which appears under its name only when it is whole.

        Raises:
            ValueError: if `path` holds something that may not be replaced, or another process writes into it.
            OSError: saying what to do, if something cannot be written.
        """
        facts = {"num_latents": self.num_latents, "encoding": self.encoding}
        with CodeTableWriter(path, **facts, rows_per_shard=rows_per_shard, overwrite=overwrite) as writer:
            for start in range(0, len(self), rows_per_shard):
                writer.append(self.table.slice(start, rows_per_shard))

    def _array(self, column: str, stream: str) -> np.ndarray:
        if stream not in self.streams:
            raise ValueError(f"the code table has no stream `{stream}`; it has {self.streams}")
        chunked = self.table.column(column)
        arrays = [np.asarray(chunk.flatten()) for chunk in chunked.chunks if len(chunk)]
        arrays = arrays or [np.empty(0, chunked.type.value_type.to_pandas_dtype())]
        flat = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return flat.reshape(-1, chunked.type.list_size)


def _check_columns(table: pa.Table, stream: str, folder: Path) -> None:
    """Raise ValueError where a stream has no columns of k latents and k values a row."""
    kinds = {f"{stream}_indices": pa.int32(), f"{stream}_values": pa.float32()}
    if missing := [name for name in kinds if name not in table.column_names]:
        raise ValueError(f"`{folder}` lacks the columns {missing}; it has {table.column_names}")
    types = [table.schema.field(name).type for name in kinds]
    width = getattr(types[0], "list_size", 0)
    if width < 1 or types != [pa.list_(kind, width) for kind in kinds.values()]:
        raise ValueError(f"`{folder}` has no codes of stream `{stream}`: its columns are {types}")
    chunks = [chunk for name in kinds for chunk in table.column(name).chunks]
    given = f"{stream}_given"
    if given in table.column_names:
        if table.schema.field(given).type != pa.bool_():
            raise ValueError(f"`{folder}` has a column `{given}` that does not hold true or false; make it again")
        chunks += table.column(given).chunks
    nulls = (chunk.null_count or getattr(chunk, "values", chunk).null_count for chunk in chunks)
    if any(nulls):
        raise ValueError(f"`{folder}` lacks some of the codes of stream `{stream}`; make it again")


class CodeTableWriter:
    """Write a code table batch by batch, holding about one shard in memory.

    The folder appears under its name on `close`, whole; until then an older one stays as it was. As a context manager
    it closes on success and removes what it wrote on an exception.

    Args:
        path: the folder to make.
        num_latents: N.
        encoding: "joint" or "single".
        rows_per_shard: a shard is written as soon as it has this many rows.
        overwrite: replace a code table that is there.
        complete: given the whole table and its folder, adds files that belong to it, such as top samples.

    Raises:
        ValueError: if `path` holds something that may not be replaced, or another process writes into it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        num_latents: int,
        encoding: str,
        rows_per_shard: int = 16384,
        overwrite: bool = False,
        complete: Callable[[CodeTable, Path], None] | None = None,
    ):
        self.path = Path(path).resolve()
        self.rows_per_shard, self._complete = rows_per_shard, complete
        self._facts: dict[str, Any] = {"num_latents": num_latents, "encoding": encoding}
        with ExitStack() as opened:
            opened.enter_context(locked_folder(self.path))
            check_target(self.path, overwrite, CODE_FOLDER)
            self._folder = opened.enter_context(new_folder(self.path, CODE_FOLDER.owns, last=CODE_FOLDER.manifest))
            self._opened = opened.pop_all()
        self._pending: list[pa.Table] = []
        self._shards: list[dict] = []
        self._schema = pa.schema([])

    def append(self, codes: pa.Table) -> None:
        """Append rows, as a table of the columns of a `CodeTable`."""
        self._schema = codes.schema
        self._pending.append(codes)
        if sum(table.num_rows for table in self._pending) >= self.rows_per_shard:
            with self._writing():
                self._flush()

    def close(self) -> None:
        """Write the last shard and the manifest, and give the folder its final name; ValueError without rows."""
        with self._writing(), self._opened:
            self._flush()
            if not self._shards:
                raise ValueError(f"no rows were appended to `{self.path}`; a code table needs at least one row")
            streams = CodeTable(self._schema.empty_table(), num_latents=0, encoding="").streams
            facts = {"streams": streams, **self._facts}
            if self._complete is not None:
                before = set(self._folder.iterdir())
                self._complete(self._written(), self._folder)
                added = sorted(path.name for path in self._folder.iterdir() if path not in before)
                facts["files"] = checksums_of(self._folder, added)
            finish_folder(self._folder, self._schema, self._shards, facts, CODE_FOLDER)

    def __enter__(self) -> "CodeTableWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._opened.__exit__(kind, error, traceback)

    def _writing(self) -> AbstractContextManager:
        return writing(f"`{self.path}`", "what was there before is kept; make room and run the same again")

    def _written(self) -> CodeTable:
        tables = [open_shard(self._folder, shard, verify=False, kind=CODE_FOLDER) for shard in self._shards]
        return CodeTable(pa.concat_tables(tables), **self._facts)

    def _flush(self) -> None:
        rows = pa.concat_tables(self._pending).combine_chunks().to_batches() if self._pending else []
        for batch in rows:
            self._shards.append(write_shard(self._folder, f"data-{len(self._shards):05d}.arrow", batch))
        self._pending = []


def encode_features(
    model: SparcModel,
    features: FeatureDataset,
    *,
    encoding: str = "joint",
    batch_size: int = 1024,
    output: str | Path | None = None,
    overwrite: bool = False,
    complete: Callable[[CodeTable, Path], None] | None = None,
) -> CodeTable:
    """Encode every row of a feature dataset.

    Args:
        model: its streams must be in the dataset.
        features: the rows.
        encoding: "joint" gives the model all streams together; "single" gives each stream alone, the code it has
            when nothing else is known of the sample; "single_ignoring" likewise, without imputing the others. Where
            a row lacks a stream, "joint" encodes its imputed row, and alone its code is empty (all values 0).
        batch_size: rows at a time.
        output: folder the codes are streamed to as they are made; without it they are collected in memory.
        overwrite: replace a code table at `output`.
        complete: adds files to `output`, see `CodeTableWriter`.

    Raises:
        ValueError: for another encoding, streams the dataset lacks, rows that lack streams where the model cannot
            impute them, an `output` that may not be replaced, or one that another process writes into.
        OSError: saying what to do, if something cannot be written.
    """
    check_encoding(encoding)
    check_streams(model, features)
    check_encodable(model, features, encoding)
    facts = {"num_latents": model.config.num_latents, "encoding": encoding}
    if lacking := streams_lacked(model, features):
        tables = (
            code_columns(codes, {name: given[name] for name in lacking})
            for given, codes in codes_of_incomplete(model, features, encoding, batch_size)
        )
    else:
        tables = (code_columns(codes) for _, codes in code_batches(model, features, encoding, batch_size))
    if output is None:
        return CodeTable(pa.concat_tables(tables).combine_chunks(), **facts)
    with CodeTableWriter(output, **facts, overwrite=overwrite, complete=complete) as writer:
        for table in tables:
            writer.append(table)
    return CodeTable.load(output, verify=False)  # these very files were just written


def code_batches(
    model: SparcModel, features: FeatureDataset, encoding: str, batch_size: int
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, SparseCodes]]]:
    """Yield stream -> feature rows [batch, hidden_size] and stream -> codes of consecutive rows, with a progress bar.

    Arguments as for `encode_features`; every row has all streams.
    """
    for batch, codes in codes_for_targets(model, features, encoding, batch_size, []):
        yield batch, {name: own[name] for name, own in codes.items()}


def codes_for_targets(
    model: SparcModel, features: FeatureDataset, encoding: str, batch_size: int, targets: Sequence[str]
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, dict[str, SparseCodes]]]]:
    """Yield rows as `code_batches`, and source -> target -> the source's code as it is decoded to that target.

    That is the source's own code, but where a model imputes the target from the source alone: then the code of the
    imputed target.

    Args:
        model, features, encoding, batch_size: as for `encode_features`.
        targets: streams to decode to, besides the source itself.
    """
    streams = model.config.stream_names
    check_complete(features, streams)
    missing = "ignore" if encoding == "single_ignoring" else None
    imputes = encoding == "single" and model.imputation is not None
    batches = FeatureBatches(features, batch_size=min(batch_size, len(features)), streams=streams, shuffle=False)
    with torch.no_grad():
        for batch in tqdm(batches, desc=f"encoding ({encoding.replace('_', ', ')})", unit="batch", leave=False):
            codes = {}
            joint = model.encode(batch) if encoding == "joint" else {}
            for name, rows in batch.items():
                if imputes:
                    codes[name] = model.encode({name: rows}, streams=dict.fromkeys([name, *targets]))
                else:
                    own = joint[name] if joint else model.encode({name: rows}, missing=missing)[name]
                    codes[name] = dict.fromkeys([name, *targets], own)
            yield batch, codes


@torch.no_grad()
def decoded_rows(model: SparcModel, codes: CodeTable, source: str, target: str, batch_size: int = 1024) -> np.ndarray:
    """Return float32 [rows, hidden_size of the target]: the codes of one stream decoded to another, or to itself."""
    indices, values = codes.indices(source), codes.values(source)
    rows = np.empty((len(codes), model.config.hidden_sizes[target]), np.float32)
    for start in range(0, len(codes), batch_size):
        block = slice(start, start + batch_size)
        # Copied, because mapped files are read-only.
        latents, strengths = torch.from_numpy(indices[block].astype(np.int64)), torch.from_numpy(values[block].copy())
        rows[block] = model.decode(SparseCodes(latents, strengths, codes.num_latents), to=target).float().cpu().numpy()
    return rows


@torch.no_grad()
def normalized_rows(model: SparcModel, features: FeatureDataset, stream: str) -> np.ndarray:
    """Return float32 [rows, hidden_size]: a stream's rows, all of which have it, as the model normalises them."""
    check_complete(features, [stream])
    return model.normalize({stream: torch.from_numpy(features.array(stream))})[stream].float().cpu().numpy()


def check_streams(model: SparcModel, features: FeatureDataset) -> None:
    """Raise ValueError where a dataset lacks a stream of the model."""
    if missing := [name for name in model.config.stream_names if name not in features.stream_names]:
        raise ValueError(f"the model needs the streams {missing}, but the features have {features.stream_names}")


def check_encoding(encoding: str) -> None:
    """Raise ValueError where `encoding` is none of `ENCODINGS`."""
    if encoding not in ENCODINGS:
        raise ValueError(f"`encoding` must be one of {list(ENCODINGS)}, but it is {encoding!r}")


def code_columns(codes: Mapping[str, SparseCodes], given: Mapping[str, np.ndarray] | None = None) -> pa.Table:
    """Return the columns of a code table for one batch, stream -> codes and stream -> bool [batch], who had it."""
    indices = {name: code.indices.to(torch.int32).cpu().numpy() for name, code in codes.items()}
    values = {name: code.values.float().cpu().numpy() for name, code in codes.items()}
    marks = {f"{name}_given": pa.array(rows) for name, rows in (given or {}).items()}
    return pa.table(_columns(indices, values) | marks)


def _columns(indices: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]) -> dict[str, pa.Array]:
    if list(indices) != list(values) or not indices:
        raise ValueError(f"indices and values must have the same streams, but have {list(indices)}, {list(values)}")
    columns: dict[str, pa.Array] = {}
    for name in indices:
        if indices[name].shape != values[name].shape:
            raise ValueError(
                f"stream `{name}` has indices {indices[name].shape} but values {values[name].shape}; both must be "
                "[rows, k]"
            )
        columns[f"{name}_indices"] = fixed_size_lists(indices[name].astype(np.int32, copy=False))
        columns[f"{name}_values"] = fixed_size_lists(values[name].astype(np.float32, copy=False))
    return columns
