"""FeatureWriter: a feature dataset written batch by batch, resumable after an interruption."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sparc_hf.features.row_schema import RowSchema
from sparc_hf.features.shard_folder import ShardFolder
from sparc_hf.features.shards import check_target
from sparc_hf.files.folder_lock import locked_folder
from sparc_hf.model.stream_record import StreamRecords

logger = logging.getLogger(__name__)


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
        self.rows = RowSchema(streams, dtype, extra_columns)
        self.streams = self.rows.streams
        self.rows_per_shard = rows_per_shard
        self._facts = {
            "streams": self.streams,
            "label_names": None if label_names is None else list(label_names),
            "taxonomy": taxonomy,
            "source": source,
        }
        settings = {**self._facts, "columns": self.rows.column_types, "rows_per_shard": rows_per_shard}
        with ExitStack() as opened:
            opened.enter_context(locked_folder(self.path))
            check_target(self.path)
            self._folder = ShardFolder(self.path, settings)
            self._lock = opened.pop_all()
        self._shards: list[dict[str, Any]] = []
        for number in count():
            entry = self._folder.entry(number)
            if entry is None:
                break
            self._shards.append(entry)
        self._arrays = {
            record["name"]: np.empty((rows_per_shard, record["hidden_size"]), dtype) for record in self.streams
        }
        self._extras: dict[str, list[pa.Array]] = {name: [] for name in self.rows.extra_features}
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
            ValueError: as `RowSchema.checked`. Nothing of the batch is then kept.
        """
        arrays, extras, rows = self.rows.checked(batch, first_row=len(self))
        start = 0
        while start < rows:
            taken = min(rows - start, self.rows_per_shard - self._pending)
            for name, array in arrays.items():
                self._arrays[name][self._pending : self._pending + taken] = array[start : start + taken]
            for name, values in extras.items():
                self._extras[name].append(values.slice(start, taken))
            self._pending += taken
            start += taken
            if self._pending == self.rows_per_shard:
                self._flush()

    def close(self) -> None:
        """Write the last shard and the manifest, and give the folder its final name.

        Raises:
            ValueError: if there are no rows at all.
        """
        with self._lock:
            self._flush()
            self._folder.finish(self.rows.schema, self._facts, len(self._shards))

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
            logger.warning("the last %d rows could not be saved: %s", self._pending, flush_error)
        logger.warning("stopped after %d rows, which are kept in %s", self.rows_done, self._folder.partial)

    def _flush(self) -> None:
        if not self._pending:
            return
        arrays = {name: array[: self._pending] for name, array in self._arrays.items()}
        batch = self.rows.record_batch(arrays, self._extras)
        self._shards.append(self._folder.save(len(self._shards), batch))
        self._extras = {name: [] for name in self._extras}
        self._pending = 0
