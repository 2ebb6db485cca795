"""FeatureWriter: a feature dataset written batch by batch, resumable after an interruption."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sparc_hf.feature_columns import fixed_size_lists
from sparc_hf.feature_files import (
    FORMAT_VERSION,
    StreamRecords,
    check_target,
    checked_streams,
    finish_folder,
    publish,
    write_json,
    write_shard,
)

logger = logging.getLogger(__name__)

PROGRESS_NAME = "sparc_partial.json"
FLOAT_TYPES = ("float32", "float16")


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
        extra_columns: the other columns of every batch, among `id`, `image`, `text`, `captions` and `labels`, or a
            dict column name -> datasets feature.

    Raises:
        ValueError: for unusable settings, a `path` that already holds something, or a `.partial` folder that was
            begun with other settings.
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
        if dtype not in FLOAT_TYPES:
            raise ValueError(f"`dtype` must be one of {list(FLOAT_TYPES)}, but it is {dtype!r}")
        if rows_per_shard < 1:
            raise ValueError(f"`rows_per_shard` must be at least 1, but it is {rows_per_shard}")
        self.path = Path(path)
        check_target(self.path)
        self.streams = checked_streams(streams)
        self.dtype = dtype
        self.rows_per_shard = rows_per_shard
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._extra_features = _extra_features(extra_columns, self.streams)
        self._schema = _schema(self.streams, dtype, self._extra_features)
        self._facts = {
            "streams": self.streams,
            "label_names": None if label_names is None else list(label_names),
            "taxonomy": taxonomy,
            "source": source,
        }
        self._shards = self._resume()
        self._arrays = {
            record["name"]: np.empty((rows_per_shard, record["hidden_size"]), dtype) for record in self.streams
        }
        self._extras: dict[str, list[pa.Array]] = {name: [] for name in self._extra_features}
        self._pending = 0

    @property
    def rows_done(self) -> int:
        """Rows that are safe on disk, so that a resuming run can skip them."""
        return sum(shard["rows"] for shard in self._shards)

    def __len__(self) -> int:
        """Rows appended so far, safe or still in memory."""
        return self.rows_done + self._pending

    def append(self, batch: Mapping[str, Any]) -> None:
        """Append rows.

        Args:
            batch: every stream as an array [rows, hidden_size], every extra column as a list of `rows` values.

        Raises:
            ValueError: for missing or unknown columns, another width or row count, a number that is not finite (also
                after conversion to `dtype`), or a value its column cannot hold. Nothing of the batch is then kept.
        """
        arrays, extras, rows = self._checked(batch)
        start = 0
        while start < rows:
            count = min(rows - start, self.rows_per_shard - self._pending)
            for name, array in arrays.items():
                self._arrays[name][self._pending : self._pending + count] = array[start : start + count]
            for name, values in extras.items():
                self._extras[name].append(values.slice(start, count))
            self._pending += count
            start += count
            if self._pending == self.rows_per_shard:
                self._flush()

    def close(self) -> None:
        """Write the last shard and the manifest, and give the folder its final name.

        Raises:
            ValueError: if there are no rows at all.
        """
        self._flush()
        if not self._shards:
            raise ValueError(f"no rows were appended to `{self.path}`; a feature dataset needs at least one row")
        finish_folder(self.partial, self._schema, self._shards, self._facts)
        publish(self.partial, self.path)
        (self.path / PROGRESS_NAME).unlink()

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            self._flush()
        except OSError as flush_error:  # a full disk must not hide the first exception
            logger.warning("the last %d rows could not be saved: %s", self._pending, flush_error)
        logger.warning("stopped after %d rows, which are kept in %s", self.rows_done, self.partial)

    def _resume(self) -> list[dict[str, Any]]:
        """Return the shards that are safe, after checking that they were begun with the same settings."""
        columns = {field.name: str(field.type) for field in self._schema}
        settings = {**self._facts, "columns": columns, "rows_per_shard": self.rows_per_shard}
        settings = {"format_version": FORMAT_VERSION, **json.loads(json.dumps(settings))}
        progress = self.partial / PROGRESS_NAME
        if not self.partial.exists() or not any(self.partial.iterdir()):
            self.partial.mkdir(parents=True, exist_ok=True)
            write_json(progress, {"settings": settings, "shards": []})
        try:
            begun = json.loads(progress.read_text())
            differing = sorted(key for key in settings if begun["settings"].get(key) != settings[key])
            shards = begun["shards"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`{self.partial}` is in the way: it is not an unfinished feature dataset (no readable "
                f"{PROGRESS_NAME}); delete or rename that folder"
            ) from error
        if differing:
            names = ", ".join(f"`{key}`" for key in differing)
            raise ValueError(
                f"`{self.partial}` was begun with other settings ({names} differ); "
                "repeat the earlier settings to resume, or delete that folder to start again"
            )
        self._settings = settings
        return _intact(self.partial, shards)

    def _checked(self, batch: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, pa.Array], int]:
        expected = set(self._schema.names)
        if set(batch) != expected:
            raise ValueError(
                f"a batch must have the columns {self._schema.names}; missing are {sorted(expected - set(batch))}, "
                f"not expected are {sorted(set(batch) - expected)}"
            )
        lengths = {name: len(values) for name, values in batch.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"all columns of a batch must have the same number of rows, but they have {lengths}")
        arrays = {record["name"]: self._checked_array(record, batch[record["name"]]) for record in self.streams}
        extras = {name: self._checked_extra(name, batch[name]) for name in self._extra_features}
        return arrays, extras, next(iter(lengths.values()))

    def _checked_array(self, record: dict[str, Any], values: Any) -> np.ndarray:
        array = np.asarray(values)
        if array.ndim != 2 or array.shape[1] != record["hidden_size"]:
            raise ValueError(
                f"stream `{record['name']}` needs an array [rows, {record['hidden_size']}], "
                f"but got one of shape {list(array.shape)}"
            )
        with np.errstate(over="ignore"):
            array = array.astype(self.dtype, copy=False)
        finite = np.isfinite(array).all(axis=1)
        if not finite.all():
            row = len(self) + int(np.argmin(finite))
            hint = "" if self.dtype == "float32" else " (float16 ends at 65504; float32 holds larger numbers)"
            raise ValueError(f"stream `{record['name']}` has a NaN or infinite number in row {row}{hint}")
        return array

    def _checked_extra(self, name: str, values: Any) -> pa.Array:
        from datasets import Features

        try:
            feature = Features({name: self._extra_features[name]})
            encoded = feature.encode_batch({name: list(values)})[name]
            return pa.array(encoded, type=self._schema.field(name).type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            kind = self._schema.field(name).type
            raise ValueError(f"column `{name}` holds {kind}, which a value of this batch is not: {error}") from error

    def _flush(self) -> None:
        if not self._pending:
            return
        columns = [fixed_size_lists(self._arrays[record["name"]][: self._pending]) for record in self.streams] + [
            pa.concat_arrays(pieces) for pieces in self._extras.values()
        ]
        batch = pa.record_batch(columns, schema=self._schema)
        shard = write_shard(self.partial, f"data-{len(self._shards):05d}.arrow", batch)
        write_json(self.partial / PROGRESS_NAME, {"settings": self._settings, "shards": [*self._shards, shard]})
        self._shards.append(shard)
        self._extras = {name: [] for name in self._extras}
        self._pending = 0


def _intact(folder: Path, shards: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the leading shards whose files are whole; what comes after the first damaged one is made again."""
    whole = []
    for shard in shards:
        file = folder / shard["file"]
        if not file.is_file() or file.stat().st_size != shard["bytes"]:
            logger.warning("shard %s is damaged; it and what follows it are made again", file)
            break
        whole.append(dict(shard))
    return whole


def _schema(streams: Sequence[Mapping[str, Any]], dtype: str, extra_features: Mapping[str, Any]) -> pa.Schema:
    from datasets import Features, List, Value

    columns = {record["name"]: List(Value(dtype), length=record["hidden_size"]) for record in streams}
    return Features({**columns, **extra_features}).arrow_schema


def _extra_features(
    columns: Sequence[str] | Mapping[str, Any], streams: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return column name -> datasets feature for the columns beside the streams."""
    from datasets import Image, List, Value

    known = {
        "id": Value("string"),
        "image": Image(),
        "text": Value("string"),
        "captions": List(Value("string")),
        "labels": List(Value("int32")),
    }
    if not isinstance(columns, Mapping):
        unknown = sorted(set(columns) - set(known))
        if unknown:
            raise ValueError(f"columns {unknown} need a type; pass `extra_columns` as a dict name -> datasets feature")
        columns = {name: known[name] for name in columns}
    taken = sorted({record["name"] for record in streams} & set(columns))
    if taken:
        raise ValueError(f"columns {taken} carry the name of a stream; rename the stream or the column")
    return dict(columns)
