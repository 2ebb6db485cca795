"""Samples as encoder inputs: rows read in numbered blocks, images decoded in worker processes."""

import json
import os
import reprlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparc_hf.encoders.inputs import open_image, upright_rgb
from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.features.source_columns import Columns
from sparc_hf.features.sources.source import schema_of

if TYPE_CHECKING:
    import datasets

PREFETCHED_BATCHES = 2
WATCH_SECONDS = 1.0
# `labels` is a column of int32.
LARGEST_ID = 2**31 - 1


@dataclass
class Batch:
    """Samples of one shard, ready for the encoders.

    Attributes:
        shard: number of the shard they belong to.
        numbers: their row numbers in the source.
        columns: column name -> values to write, one a sample.
        inputs: stream name -> model inputs; images that follow each other in several rows are there once. Streams of
            which no sample has an input are not there.
        input_of: "image" or "text" -> for each sample the number of its input, int64 [samples], -1 where it has none;
            what is not there has one input a sample.
        faults: place of a sample that lacks something -> what could not be read, as `failure` makes it.
        failed: rows that could not be read, as dicts of `row`, `id` and `reason`.
    """

    shard: int
    numbers: list[int]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    inputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    input_of: dict[str, Tensor] = field(default_factory=dict)
    faults: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)


class SampleReader:
    """The samples of a source as batches of encoder inputs, shard by shard.

    Args:
        dataset: the samples.
        columns: which columns to read.
        encoders: stream name -> encoder.
        label_names: to look up labels that are names.
        samples_per_shard: samples of the source that make one shard.
        batch_size: samples of a batch; a batch never reaches over the end of a shard.
        workers: processes that decode; 0 to decode in this one.
        keeps_incomplete: whether a sample stays of which an image or a text is missing, as long as it has the other.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset | datasets.IterableDataset",
        columns: Columns,
        encoders: Mapping[str, StreamEncoder],
        *,
        label_names: Sequence[str] | None,
        samples_per_shard: int,
        batch_size: int,
        workers: int,
        keeps_incomplete: bool = False,
    ):
        from datasets import Dataset as StoredDataset
        from datasets import Image

        features = schema_of(dataset)
        images = [name for name in columns.needed if isinstance(features[name], Image)]
        if columns.image and columns.image not in images:  # a column of paths
            images.append(columns.image)
        if isinstance(dataset, StoredDataset):
            dataset = dataset.with_format(None)
        dataset = dataset.select_columns(columns.needed)
        for name in images:
            dataset = dataset.cast_column(name, Image(decode=False))
        self.dataset = dataset
        self.total: int | None = len(dataset) if isinstance(dataset, StoredDataset) else None
        self.samples_per_shard, self.batch_size, self.workers = samples_per_shard, batch_size, workers
        self.pin_memory = any(encoder.device.type == "cuda" for encoder in encoders.values())
        self._prepare = _Preparation(columns, tuple(images), encoders, label_names, keeps_incomplete)
        self._streamed = 0

    @property
    def shards(self) -> int:
        """How many shards there are; of a stream, after it was read to its end."""
        rows = self._streamed if self.total is None else self.total
        return -(-rows // self.samples_per_shard)

    def samples_in(self, shard: int) -> int:
        """How many samples of the source a shard of a stored dataset covers."""
        return min(self.samples_per_shard, (self.total or 0) - shard * self.samples_per_shard)

    def batches(self, wanted: Callable[[int], bool]) -> Iterator[Batch]:
        """Yield the batches of the wanted shards in order, while the workers are busy with those that come next."""
        blocks = self._stored_blocks(wanted) if self.total is not None else self._streamed_blocks(wanted)
        several = self.total is None or self.total > self.batch_size
        workers = self.workers if several else 0
        # The "indices" that the workers are sent are the rows themselves, still encoded.
        yield from DataLoader(
            self._prepare,
            sampler=blocks,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]
            num_workers=workers,
            prefetch_factor=PREFETCHED_BATCHES if workers else None,
            worker_init_fn=partial(_end_with, os.getpid()),
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # so that reading draws nothing from the caller's random numbers
        )

    def _stored_blocks(self, wanted: Callable[[int], bool]) -> Iterator["_Block"]:
        for shard in filter(wanted, range(self.shards)):
            first = shard * self.samples_per_shard
            end = first + self.samples_in(shard)
            for start in range(first, end, self.batch_size):
                rows: Any = self.dataset[start : min(start + self.batch_size, end)]  # pyright: ignore[reportArgumentType, reportIndexIssue]
                yield _Block(shard, start, rows)

    def _streamed_blocks(self, wanted: Callable[[int], bool]) -> Iterator["_Block"]:
        from datasets.exceptions import DatasetsError

        rows = iter(self.dataset)
        shard = self._streamed = 0
        while True:
            end = (shard + 1) * self.samples_per_shard
            keep = wanted(shard)
            while self._streamed < end:
                try:
                    block = list(islice(rows, min(self.batch_size, end - self._streamed)))
                except (ValueError, TypeError, DatasetsError) as error:  # of files that are read as they come
                    raise ValueError(
                        f"the source cannot be read behind row {self._streamed - 1}: {error.__cause__ or error}"
                    ) from error
                if not block:
                    return
                if keep:
                    yield _Block(shard, self._streamed, {name: [row[name] for row in block] for name in block[0]})
                self._streamed += len(block)
            shard += 1


@dataclass(frozen=True)
class _Block:
    """Rows of a source as read, and where they come from."""

    shard: int
    first: int
    rows: dict[str, list[Any]]


@dataclass
class _Sample:
    """What a row of a source gives.

    Attributes:
        columns: column name -> value to write.
        image: decoded; None where it has none, or has that of the row before.
        faults: why something of it is missing.
        lacks: "image" and "text", where it has none.
    """

    columns: dict[str, Any] = field(default_factory=dict)
    image: Any = None
    faults: list[str] = field(default_factory=list)
    lacks: set[str] = field(default_factory=set)


class _Preparation(Dataset):
    """Turns a block of rows into a batch; the worker processes run it, so it knows no model."""

    def __init__(
        self,
        columns: Columns,
        images: tuple[str, ...],
        encoders: Mapping[str, StreamEncoder],
        label_names: Sequence[str] | None,
        keeps_incomplete: bool,
    ):
        from datasets import Image

        self.columns, self.images, self.label_names = columns, images, label_names
        self.keeps_incomplete = keeps_incomplete
        self._class_ids = {name: number for number, name in enumerate(label_names or ())}
        self._image = Image()
        self._modalities = {encoder.modality for encoder in encoders.values()}
        # Streams that prepare images in the same way share the result.
        groups: dict[Any, tuple[str, Any, list[str]]] = {}
        for name, encoder in encoders.items():
            key = _same_inputs(encoder)
            groups.setdefault(key, (encoder.modality, encoder.inputs_of, []))[2].append(name)
        self._groups = list(groups.values())

    def __getitem__(self, block: _Block) -> Batch:
        count = len(next(iter(block.rows.values())))
        batch = Batch(block.shard, [], columns={name: [] for name in self._written()})
        inputs: dict[str, list[Any]] = {"image": [], "text": []}
        input_of: dict[str, list[int]] = {"image": [], "text": []}
        previous: str | None = None
        for place in range(count):
            row = {name: column[place] for name, column in block.rows.items()}
            path = _file_of(row[self.columns.image]) if self.columns.image else None
            try:
                sample = self._sample(row, is_new_image=path is None or path != previous)
            except _BadRow as error:
                batch.failed.append(failure(block.first + place, self._name_of(row), str(error)))
                continue
            if sample.faults:
                reason = "; ".join(dict.fromkeys(sample.faults))
                batch.faults[len(batch.numbers)] = failure(block.first + place, self._name_of(row), reason)
            batch.numbers.append(block.first + place)
            if sample.image is not None:
                inputs["image"].append(sample.image)
                previous = path
            if "text" not in sample.lacks:
                inputs["text"].append(sample.columns.get("text", ""))
            for modality, places in input_of.items():
                places.append(-1 if modality in sample.lacks else len(inputs[modality]) - 1)
            for name, value in sample.columns.items():
                batch.columns[name].append(value)
        self._prepare_inputs(batch, inputs, input_of)
        return batch

    def _prepare_inputs(
        self, batch: Batch, inputs: Mapping[str, list[Any]], input_of: Mapping[str, list[int]]
    ) -> None:
        for modality, prepare, streams in self._groups:
            if inputs[modality]:
                prepared = prepare(inputs[modality])
                batch.inputs.update((name, prepared) for name in streams)
        batch.input_of = {
            modality: torch.tensor(places)
            for modality, places in input_of.items()
            if modality in self._modalities and places != list(range(len(batch.numbers)))
        }

    def _written(self) -> list[str]:
        source_columns = {"id": self.columns.id, "text": self.columns.text, "labels": self.columns.labels}
        return [*(name for name in source_columns if source_columns[name]), *self.columns.keep]

    def _sample(self, row: Mapping[str, Any], is_new_image: bool) -> _Sample:
        """Return what a row gives; `_BadRow` where no row can be made of it."""
        sample, columns = _Sample(), self.columns
        for name in columns.keep:
            sample.columns[name] = self._read(sample, "", self._embedded, name, row[name])
        if columns.id:
            sample.columns["id"] = str(row[columns.id])
        if columns.labels:
            sample.columns["labels"] = self._labels(row[columns.labels])
        if columns.text:
            sample.columns["text"] = self._read(sample, "text", self._text, row[columns.text])
        if columns.image and is_new_image:
            sample.image = self._read(sample, "image", self._decoded, row[columns.image])
            if sample.image is None and columns.image in columns.keep:
                sample.columns[columns.image] = None
        if sample.lacks >= self._modalities:
            raise _BadRow("; ".join(dict.fromkeys(sample.faults)))
        return sample

    def _read(self, sample: _Sample, modality: str, read: Callable[..., Any], *value: Any) -> Any:
        """Return what `read` makes of a value; where it cannot and that is allowed, None, and note it."""
        try:
            return read(*value)
        except _BadRow as error:
            if not self.keeps_incomplete:
                raise
            sample.faults.append(str(error))
            sample.lacks.add(modality)
            return None

    def _text(self, value: Any) -> str:
        captions = value if isinstance(value, list) else [value]
        if odd := [caption for caption in captions if not (caption is None or isinstance(caption, str))]:
            raise _BadRow(f"its text holds {reprlib.repr(odd[0])}, which is no text")
        text = " ".join(filter(None, captions))
        if not text.strip():
            raise _BadRow("its text is empty; add one or remove the row")
        return text

    def _decoded(self, value: Any) -> Any:
        if not _has_image(value):
            raise _BadRow("it has no image; remove it from the dataset")
        try:
            if value["bytes"] is None and "://" in (value["path"] or ""):  # which datasets knows how to fetch
                return upright_rgb(self._image.decode_example(value))
            return open_image(value["bytes"] or value["path"])
        except Exception as error:  # a damaged file can raise anything, from OSError to struct.error
            raise _BadRow(f"its image cannot be read ({error.__cause__ or error}); repair or remove it") from error

    def _embedded(self, column: str, value: Any) -> Any:
        """Return a kept image with its bytes, so that it travels with the features; other values as they are."""
        if column not in self.images or not _has_image(value) or value["bytes"] is not None:
            return value
        try:
            if not Path(value["path"]).is_file():
                raise FileNotFoundError(f"{value['path']} is no file")  # a pipe would be waited for
            return {"bytes": Path(value["path"]).read_bytes(), "path": Path(value["path"]).name}
        except OSError as error:
            raise _BadRow(f"its image cannot be read ({error}); repair or remove it") from error

    def _labels(self, value: Any) -> list[int]:
        values = [] if value is None else value if isinstance(value, list) else [value]
        try:
            ids = [self._class_ids[label] if isinstance(label, str) else label for label in values]
        except KeyError as error:
            raise _BadRow(f"its label {error} is not among `label_names`") from error
        if odd := [label for label in ids if not isinstance(label, int) or not 0 <= label <= LARGEST_ID]:
            raise _BadRow(f"its label {reprlib.repr(odd[0])} is no class id, a whole number from 0 to {LARGEST_ID}")
        return ids

    def _name_of(self, row: Mapping[str, Any]) -> str | None:
        """Return the id of a row, or the file of its image."""
        name = row[self.columns.id] if self.columns.id else None
        if name is None and self.columns.image:
            name = _file_of(row[self.columns.image])
        return None if name is None else str(name)


class _BadRow(ValueError):
    """A row that cannot be used, and why."""


def failure(row: int, name: str | None, reason: str) -> dict[str, Any]:
    """Return what `skipped.jsonl` says of a row that was left out."""
    return {"row": row, "id": name, "reason": reason}


def _has_image(value: Any) -> bool:
    return value is not None and (value["bytes"] is not None or value["path"] is not None)


def _file_of(image: Any) -> str | None:
    return image.get("path") if isinstance(image, dict) and image.get("bytes") is None else None


def _same_inputs(encoder: StreamEncoder) -> Any:
    processor = getattr(encoder.inputs_of, "processor", None)
    if processor is None:
        return encoder.name
    return type(processor).__name__, json.dumps(processor.to_dict(), sort_keys=True, default=str)


def _end_with(parent: int, worker: int = 0) -> None:
    """Let a worker end when its parent is gone.

    torch's own watch starts later, and waits for ever on a parent that was killed before.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(batch: Batch) -> Batch:
    return batch
