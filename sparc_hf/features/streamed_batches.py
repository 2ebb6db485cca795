"""StreamedBatches: training batches of a feature dataset that is read from the Hub as training goes on."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sparc_hf.features.columns import ColumnRows
from sparc_hf.features.parquet import open_parquet


class StreamedBatches:
    """Batches of a pushed feature dataset, read file by file without keeping it.

    Shuffling is that of a stream: the files in random order, and rows drawn from a buffer; `FeatureBatches` shuffles
    fully. Every process reads its own files where their number allows, its own rows otherwise. An epoch iterated to
    its end is followed by the next one.

    Args:
        address: `hf://datasets/<owner>/<name>[@<revision>][/<split>]`, or the folder that was pushed.
        batch_size: rows of a batch of this process; the last one of an epoch may have fewer.
        streams: the streams to read; all by default.
        shuffle_rows: rows of the buffer to draw from; 0 keeps the stored order.
        seed: seed of the order.
        rank: number of this process.
        world_size: number of processes.

    Attributes:
        records: stream records, for SparcConfig.
        rows: rows of the dataset, over all processes.
        epoch: the current epoch.

    Raises:
        ValueError: as `open_parquet`, and for unknown streams or a rank outside the world.
    """

    def __init__(
        self,
        address: str | os.PathLike,
        *,
        batch_size: int,
        streams: Sequence[str] | None = None,
        shuffle_rows: int = 16384,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        from datasets.distributed import split_dataset_by_node

        split = open_parquet(address, streaming=True)
        known = [record["name"] for record in split.facts["streams"]]
        if streams is not None and (not streams or set(streams) - set(known)):
            raise ValueError(f"`streams` must be among {known}, but it is {list(streams)}")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be from 0 to `world_size` - 1 = {world_size - 1}, but it is {rank}")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but it is {batch_size}")
        self.records = [record for record in split.facts["streams"] if streams is None or record["name"] in streams]
        self.streams = [record["name"] for record in self.records]
        self.rows: int = split.facts["rows"]
        self.batch_size = batch_size
        self.epoch = 0
        rows = split.stream_rows().select_columns(self.streams)
        if shuffle_rows:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_rows)
        self._rows = split_dataset_by_node(rows, rank, world_size).with_format("arrow")
        self._rows.set_epoch(0)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield stream -> float32 [rows, hidden_size] to the end of the epoch, in the form `SparcModel` takes."""
        self._rows.set_epoch(self.epoch)
        for table in self._rows.iter(self.batch_size):
            yield {name: torch.from_numpy(_floats(table, name)) for name in self.streams}
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position; rows in the shuffle buffer are read anew on resuming, in another order."""
        return {"epoch": self.epoch, "rows": self._rows.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where `state_dict` was taken."""
        self.epoch = state["epoch"]
        self._rows.set_epoch(self.epoch)
        self._rows.load_state_dict(state["rows"])


def _floats(table: pa.Table, stream: str) -> np.ndarray:
    return ColumnRows(table.column(stream)).all()
