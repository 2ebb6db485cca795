"""HDF5 files of the earlier SPARC project, block by block: feature files of the streams, and the analysis cache."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from sparc_hf.files.atomic_files import sha256_of
from sparc_hf.files.checked_reading import checked, read_json
from sparc_hf.legacy.declared_sizes import check_declared
from sparc_hf.model.stream_record import check_stream_name

ROWS_AT_ONCE = 1024


class FeatureFiles:
    """One HDF5 file per stream with `features` [rows, width] and `indices` [rows], all in the same row order.

    Args:
        files: stream name -> file, in the order of the streams.

    Attributes:
        records: stream records (name, hidden_size, normalize); that project brought rows to unit norm on reading.
        rows: number of rows.
        source: where the rows came from, as JSON values.
        columns: the columns beside the streams.

    Raises:
        ValueError: for a file that cannot be read or has another layout, or two files that differ in length, naming
            both.
    """

    columns = ("id",)
    label_names = None

    def __init__(self, files: Mapping[str, Path]):
        for name in files:
            check_stream_name(name)
        self._opened = ExitStack()
        try:
            self._files = {name: self._opened.enter_context(open_hdf5(path)) for name, path in files.items()}
            self._paths = dict(files)
            self._matrices = {name: self._matrix(name) for name in files}
            self._indices = self._index_columns()
        except BaseException:
            self._opened.close()
            raise
        self.records = [
            {"name": name, "hidden_size": int(matrix.shape[1]), "normalize": "l2"}
            for name, matrix in self._matrices.items()
        ]
        self.rows = next(iter(self._matrices.values())).shape[0]
        self.source = {
            "imported_from": "HDF5 feature files of the earlier SPARC project",
            "files": {name: _facts_of(path) for name, path in files.items()},
        }

    def __enter__(self) -> "FeatureFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def blocks(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield batches of rows from row `start` on: each stream as an array [rows, width], and `id`, the index.

        Raises:
            ValueError: where two files give a row different indices, naming both.
        """
        for first in range(start, self.rows, ROWS_AT_ONCE):
            rows = slice(first, min(first + ROWS_AT_ONCE, self.rows))
            numbers = self._checked_indices(rows)
            # numpy's own floats: the files may hold another byte order.
            block: dict[str, Any] = {name: _floats(matrix[rows]) for name, matrix in self._matrices.items()}
            yield block | {"id": [str(number) for number in numbers]}

    def _matrix(self, name: str) -> Any:
        try:
            return _dataset(self._files[name], "features", "f", 2)
        except ValueError as error:
            content = sorted(self._files[name])
            raise ValueError(
                f"`{self._paths[name]}` has no `features` [rows, width] of floats ({error}); it holds {content}. A "
                "feature file of that project has `features` and `indices`"
            ) from error

    def _index_columns(self) -> dict[str, Any]:
        names = list(self._matrices)
        for name in names[1:]:
            ours, theirs = (self._matrices[key].shape[0] for key in (names[0], name))
            if ours != theirs:
                raise ValueError(
                    f"`{self._paths[names[0]]}` has {ours} rows but `{self._paths[name]}` has {theirs}; all streams "
                    "must hold the same samples in the same order"
                )
        columns = {name: self._files[name].get("indices") for name in names}
        for name, column in columns.items():
            rows = self._matrices[name].shape[0]
            if getattr(column, "shape", None) != (rows,):
                state = "none" if column is None else f"an array {list(getattr(column, 'shape', ()))}"
                raise ValueError(
                    f"`{self._paths[name]}` needs `indices` with one number for each of its {rows} rows, so that the "
                    f"order can be compared between files, but it has {state}"
                )
        return {name: _dataset(self._files[name], "indices", "iu", 1) for name in names}

    def _checked_indices(self, rows: slice) -> np.ndarray:
        first, *others = self._indices
        numbers = self._indices[first][rows]
        for name in others:
            differing = np.flatnonzero(numbers != self._indices[name][rows])
            if len(differing):
                row = int(differing[0])
                theirs = self._indices[name][rows][row]
                raise ValueError(
                    f"the files are not in the same order: row {rows.start + row} has index {numbers[row]} in "
                    f"`{self._paths[first]}` but {theirs} in `{self._paths[name]}`; extract both over the same samples"
                )
        return numbers


class AnalysisCache:
    """The raw rows of an analysis cache, which that project wrote while it evaluated a model.

    `<stream>/raw/batch_<i>` holds the rows after normalisation, `dataset_indices/batch_<i>` their sample numbers.
    Streams come in the order of a `run_config.json` beside the file, else by name.

    Args:
        path: the file.

    Raises:
        ValueError: for a file that cannot be read, has another layout, or a stream that lacks a batch.
    """

    columns = ("id",)
    label_names = None

    def __init__(self, path: Path):
        self.path = path
        self._file = open_hdf5(path)
        try:
            self._streams = self._ordered_streams()
            for name in self._streams:
                check_stream_name(name)
            self._batches = self._batch_names()
            self.records = [self._record(name) for name in self._streams]
        except BaseException:
            self._file.close()
            raise
        self.rows = sum(rows for _, rows in self._batches)
        self.source = {
            "imported_from": "analysis cache of the earlier SPARC project (rows at unit norm)",
            "files": {"all": _facts_of(path)},
        }

    def __enter__(self) -> "AnalysisCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield batches of rows from row `start` on: each stream as an array [rows, width], and `id`."""
        first = 0
        for batch, rows in self._batches:
            skipped = min(max(start - first, 0), rows)
            first += rows
            if skipped == rows:
                continue
            block: dict[str, Any] = {name: _floats(self._file[name]["raw"][batch][skipped:]) for name in self._streams}
            numbers = self._file["dataset_indices"][batch][skipped:]
            yield block | {"id": [str(number) for number in numbers]}

    def _ordered_streams(self) -> list[str]:
        streams = [name for name, group in self._file.items() if _is_group(group) and _is_group(group.get("raw"))]
        if not _is_group(self._file.get("dataset_indices")) or not streams:
            raise ValueError(
                f"`{self.path}` is no analysis cache: that has `dataset_indices` and groups with `raw`, but this "
                f"holds {sorted(self._file)}"
            )
        run_config = self.path.with_name("run_config.json")
        if not run_config.is_file():
            return streams
        trained_streams = stream_order(read_json(run_config, RunConfig).get("config_file_content"))
        return trained_streams if sorted(trained_streams) == sorted(streams) else streams

    def _batch_names(self) -> list[tuple[str, int]]:
        numbered = self._file["dataset_indices"]
        if odd := [name for name in numbered if not re.fullmatch(r"\D*_\d{1,9}", name)] or not len(numbered):
            raise ValueError(f"`{self.path}` needs `dataset_indices/batch_<number>`, but it has {odd or 'none'}")
        names = sorted(numbered, key=lambda name: int(name.rpartition("_")[2]))
        batches = [(name, _dataset(numbered, name, "iu", 1).shape[0]) for name in names]
        for stream in self._streams:
            raw = self._file[stream]["raw"]
            width = {_dataset(raw, name, "f", 2).shape[1] for name in names if name in raw}
            if len(width) > 1:
                raise ValueError(f"`{self.path}`: the batches of `{stream}` have several widths, {sorted(width)}")
            for name, rows in batches:
                rows_here = raw[name].shape[0] if name in raw else 0
                if rows_here != rows:
                    raise ValueError(
                        f"`{self.path}`: `dataset_indices/{name}` has {rows} rows but `{stream}/raw/{name}` has "
                        f"{rows_here}; the cache is incomplete, make it again"
                    )
        return batches

    def _record(self, name: str) -> dict[str, Any]:
        width = int(self._file[name]["raw"][self._batches[0][0]].shape[1])
        return {"name": name, "hidden_size": width, "normalize": "l2"}


def is_analysis_cache(path: Path) -> bool:
    """Return whether an HDF5 file is an analysis cache, and not a feature file."""
    with open_hdf5(path) as file:
        return "dataset_indices" in file and "features" not in file


class _FileContent(TypedDict, total=False):
    train_stream_feature_files: dict[str, Any] | None
    dataset: Any


class RunConfig(TypedDict, total=False):
    """A run_config.json of that project."""

    config_file_content: _FileContent | None


def stream_order(config: Mapping[str, Any] | None) -> list[str]:
    """Return the stream names of that project's configuration file, in order."""
    return list((config or {}).get("train_stream_feature_files") or {})


def configured_files(path: Path, split: str) -> dict[str, Path]:
    """Return stream name -> feature file of one split of that project's configuration file.

    Its paths are relative to the folder the project was run from; the working directory, the folder of the
    configuration and the one above it are tried.

    Raises:
        ValueError: for a file that is no such configuration, or feature files that are not there.
    """
    key = f"{split}_stream_feature_files"
    try:
        config = read_json(path, dict[str, Any])
        config = checked(config.get("config_file_content", config), dict[str, Any], "config_file_content")
        files = {name: Path(file) for name, file in checked(config.get(key), dict[str, str], key).items()}
    except ValueError as error:
        raise ValueError(f"`{path}` is no configuration of the earlier SPARC project with `{key}`: {error}") from error
    for folder in (Path(), path.parent, path.parent.parent):
        paths = {name: folder / file for name, file in files.items()}
        if paths and all(file.is_file() for file in paths.values()):
            return paths
    raise ValueError(
        f"`{path}` names the files {sorted(map(str, files.values()))}, which are not all there, seen from here or "
        "from the configuration's folder; give them as `--source name=file name=file`"
    )


def open_hdf5(path: Path) -> Any:
    """Open an HDF5 file for reading.

    Raises:
        ValueError: if it is not there or not HDF5.
        ImportError: without h5py.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError('HDF5 files need h5py: `pip install "sparc-hf[legacy]"`') from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"cannot read `{path}` as HDF5: {error}") from error


def _facts_of(path: Path) -> dict[str, Any]:
    """Return what tells one file from another later on, since these files have no checksum of their own."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _is_group(entry: Any) -> bool:
    import h5py

    return isinstance(entry, h5py.Group)


def _dataset(group: Any, name: str, kinds: str, dimensions: int) -> Any:
    """Return an array of a file that was written in full.

    Raises:
        ValueError: for another kind of thing or of numbers, or an array that claims more than the file holds: without
            a byte of them, HDF5 gives out zeros for all rows that it declares.
    """
    import h5py

    array = group.get(name)
    where = f"`{group.name.rstrip('/')}/{name}` of `{Path(group.file.filename).name}`"
    if not isinstance(array, h5py.Dataset) or array.ndim != dimensions or array.dtype.kind not in kinds:
        kind = f"{array.dtype} {list(array.shape)}" if isinstance(array, h5py.Dataset) else "no array"
        raise ValueError(f"{where} is {kind}")
    if array.is_virtual or array.external:
        raise ValueError(f"{where} only points to other files")
    stored_bytes, file_bytes = array.id.get_storage_size(), Path(group.file.filename).stat().st_size
    is_whole = True
    if array.chunks is not None:
        expected_chunks = math.prod(-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True))
        is_whole = array.id.get_num_chunks() == expected_chunks
    elif array.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS:
        is_whole = stored_bytes == array.nbytes
    if not is_whole or stored_bytes > file_bytes:
        raise ValueError(
            f"{where} declares {list(array.shape)} numbers, but {stored_bytes:,} bytes of them were written"
        )
    check_declared(array.nbytes, stored_bytes, where)
    return array


def _floats(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float16 if values.dtype.itemsize == 2 else np.float32)
