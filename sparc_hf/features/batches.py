"""Shuffled, sharded, resumable batches: of a feature dataset in Arrow memory, or read from the Hub as they come."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from sparc_hf.features.columns import ColumnRows
from sparc_hf.features.parquet import open_parquet


class RowSource(Protocol):
    """What `FeatureBatches` needs to know of a feature dataset."""

    @property
    def stream_names(self) -> list[str]:
        """Names of the streams, in order."""
        ...

    def __len__(self) -> int: ...

    def array(self, stream: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Return rows of one stream as a new float32 array [rows, hidden_size], of NaN in rows that lack it.

        NaN, so that a sum over rows that forgets `present` is not a number, rather than a wrong one.
        """
        ...

    def present(self, stream: str) -> np.ndarray:
        """Return bool [all rows], which rows have a stream."""
        ...


class FeatureBatches:
    """Batches of a feature dataset: every row once per epoch, split over processes, resumable at any batch.

    The order of an epoch depends on `seed` and the epoch number alone, so global batch t holds the same rows for any
    number of processes; each process iterates over its share. A last batch with fewer rows than processes joins the
    batch before it. An epoch iterated to its end is followed by the next one; leaving it early starts it again.

    Args:
        features: the dataset.
        batch_size: rows of one global batch, over all processes.
        streams: the streams to read; all by default.
        shuffle: a new full permutation per epoch; in stored order otherwise.
        seed: non-negative seed of the permutations.
        rank: number of this process.
        world_size: number of processes.
        pin_memory: put the batches into page-locked memory, where there is a CUDA device.

    Raises:
        ValueError: for unknown streams, a rank outside the world, or fewer rows than processes.
    """

    def __init__(
        self,
        features: RowSource,
        *,
        batch_size: int,
        streams: Sequence[str] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ):
        rows = len(features)
        self.streams = _streams_to_read(features.stream_names, streams)
        _check_rank(rank, world_size)
        if batch_size < world_size:
            raise ValueError(f"`batch_size` is {batch_size} rows for {world_size} processes; each needs at least one")
        if rows < world_size:
            raise ValueError(f"the dataset has {rows} rows for {world_size} processes; each needs at least one")
        if seed < 0:
            raise ValueError(f"`seed` must not be negative, but it is {seed}")
        self.features = features
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.epoch = 0
        self._next_batch = 0
        self._resume_at = 0
        self._order: tuple[int, np.ndarray] | None = None
        whole, tail = divmod(rows, batch_size)
        self._length = whole + (tail >= world_size or (tail > 0 and whole == 0))

    def __len__(self) -> int:
        """Global batches of an epoch."""
        return self._length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield stream -> float32 [rows of this process, hidden_size] to the end of the epoch, NaN in missing rows."""
        self._next_batch, self._resume_at = self._resume_at, 0
        while self._next_batch < len(self):
            batch = self._read(self.batch_rows(self._next_batch))
            self._next_batch += 1
            yield batch
        self.epoch, self._next_batch = self.epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; where that is the current epoch, a resumed position stays."""
        if epoch != self.epoch:
            self.epoch, self._next_batch, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of the batch that comes next, the same on every process."""
        if self._next_batch >= len(self):
            return {"epoch": self.epoch + 1, "batch": 0}
        return {"epoch": self.epoch, "batch": self._next_batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration start where `state_dict` was taken.

        Raises:
            ValueError: if an epoch has no such batch, as with another dataset or batch size.
        """
        epoch, batch = int(state["epoch"]), int(state["batch"])
        if epoch < 0 or not 0 <= batch < len(self):
            raise ValueError(
                f"cannot resume at batch {batch} of epoch {epoch}: an epoch has {len(self)} batches of "
                f"{self.batch_size} rows here; resume with the dataset and batch size of the earlier run"
            )
        self.epoch, self._next_batch, self._resume_at = epoch, batch, batch

    def batch_rows(self, batch: int) -> np.ndarray:
        """Return the dataset row numbers, int64 [rows], of this process in global batch `batch` of this epoch."""
        start, stop = self._bounds(batch)
        share, longer = divmod(stop - start, self.world_size)
        first = start + self.rank * share + min(self.rank, longer)
        return self._permutation()[first : first + share + (self.rank < longer)]

    def global_batch_rows(self, batch: int) -> int:
        """Return the number of rows of global batch `batch`, over all processes."""
        start, stop = self._bounds(batch)
        return stop - start

    def _bounds(self, batch: int) -> tuple[int, int]:
        if not 0 <= batch < len(self):
            raise ValueError(f"there is no batch {batch}; an epoch has {len(self)} batches")
        last = batch == len(self) - 1
        return batch * self.batch_size, len(self.features) if last else (batch + 1) * self.batch_size

    def _permutation(self) -> np.ndarray:
        """Return the row numbers of the current epoch in order, int64 [all rows]."""
        if self._order is None or self._order[0] != self.epoch:
            rows = len(self.features)
            shuffled = self.shuffle and np.random.default_rng([self.seed, self.epoch]).permutation(rows)
            self._order = (self.epoch, np.arange(rows) if shuffled is False else shuffled)
        return self._order[1]

    def _read(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        batch = {name: torch.from_numpy(self.features.array(name, rows)) for name in self.streams}
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin_memory else batch


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
        self.streams = _streams_to_read([record["name"] for record in split.facts["streams"]], streams)
        _check_rank(rank, world_size)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but it is {batch_size}")
        self.records = [record for record in split.facts["streams"] if record["name"] in self.streams]
        self.rows: int = split.facts["rows"]
        self.batch_size = batch_size
        self.epoch = 0
        rows = split.stream_rows().select_columns(self.streams)
        if shuffle_rows:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_rows)
        self._rows = split_dataset_by_node(rows, rank, world_size).with_format("arrow")
        self._rows.set_epoch(0)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield stream -> float32 [rows, hidden_size] to the end of the epoch, in the form `SparcModel` takes.

        Rows that lack a stream are NaN there, as `FeatureDataset.array` gives them.
        """
        self._rows.set_epoch(self.epoch)
        table: Any
        for table in self._rows.iter(self.batch_size):
            yield {name: torch.from_numpy(ColumnRows(table.column(name)).all()) for name in self.streams}
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position; rows in the shuffle buffer are read anew on resuming, in another order."""
        return {"epoch": self.epoch, "rows": self._rows.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where `state_dict` was taken."""
        self.epoch = state["epoch"]
        self._rows.set_epoch(self.epoch)
        self._rows.load_state_dict(state["rows"])


def _streams_to_read(known: Sequence[str], streams: Sequence[str] | None) -> list[str]:
    """Return the names of the streams to read, in their own order; all of them for None."""
    if streams is not None and (not streams or set(streams) - set(known)):
        raise ValueError(f"`streams` must be among {known}, but it is {list(streams)}")
    return [name for name in known if streams is None or name in streams]


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must be from 0 to `world_size` - 1 = {world_size - 1}, but it is {rank}")
