"""Samples as encoder inputs: columns chosen, rows read in numbered blocks, images decoded in worker processes."""

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
from sparc_hf.features.sources.source import find_column, is_image, schema_of

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
        inputs: stream name -> model inputs; images that follow each other in several rows are there once.
        image_of: for each sample the number of its image among the inputs, int64 [samples]; None without images.
        failed: rows that could not be read, as dicts of `row`, `id` and `reason`.
    """

    shard: int
    numbers: list[int]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    inputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    image_of: Tensor | None = None
    failed: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Columns:
    """Which source columns become what; None for what there is not.

    Attributes:
        image: images, or paths of images.
        text: texts, or lists of captions, which are joined by a space.
        id: what becomes the `id` of a row.
        labels: class ids or names, or lists of them.
        keep: further columns to copy.
    """

    image: str | None
    text: str | None
    id: str | None
    labels: str | None
    keep: tuple[str, ...]

    @property
    def needed(self) -> list[str]:
        """All source columns, each once."""
        named = [self.image, self.text, self.id, self.labels, *self.keep]
        return list(dict.fromkeys(name for name in named if name is not None))

    @property
    def record(self) -> dict[str, str | None]:
        """What the dataset remembers of its source."""
        return {
            "image_column": self.image,
            "id_column": self.id,
            "text_column": self.text,
            "labels_column": self.labels,
        }


def chosen_columns(
    dataset: "datasets.Dataset | datasets.IterableDataset",
    modalities: set[str],
    *,
    image_column: str | None,
    text_column: str | None,
    id_column: str | None,
    labels_column: str | None,
    keep_columns: Sequence[str],
) -> Columns:
    """Check the named columns, and find those that are needed and not named.

    Raises:
        ValueError: for a column that is not there or cannot be found, or a kept one whose name is taken.
    """
    column_names = list(schema_of(dataset))
    named = [image_column, text_column, id_column, labels_column, *keep_columns]
    if missing := [name for name in named if name is not None and name not in column_names]:
        raise ValueError(f"the dataset has no columns {missing}; it has {column_names}")
    image = (image_column or find_column(dataset, "image")) if "image" in modalities else None
    text = text_column or (find_column(dataset, "text") if "text" in modalities else None)
    _check_kinds(schema_of(dataset), image, text, labels_column)
    source_columns = {
        "id": id_column or ("id" if "id" in column_names else None),
        "text": text,
        "labels": labels_column,
    }
    if taken := [name for name in keep_columns if source_columns.get(name) not in (None, name)]:
        raise ValueError(
            f"columns {taken} cannot be kept, because {source_columns} take their names; rename them first"
        )
    return Columns(
        image=image, keep=tuple(name for name in keep_columns if source_columns.get(name) is None), **source_columns
    )


def _check_kinds(features: Any, image: str | None, text: str | None, labels: str | None) -> None:
    """Raise ValueError where a column cannot be what it is to be, by its type."""
    from datasets import List, Value

    def scalar(name: str) -> str:
        feature = features[name]
        inner = feature.feature if isinstance(feature, List) else feature
        # A ClassLabel is a number; an image stored as a plain record has the parts of one.
        kind = getattr(inner, "dtype", "") if isinstance(inner, Value) or hasattr(inner, "names") else ""
        return "record" if isinstance(inner, dict) and {"bytes", "path"} <= set(inner) else kind.removeprefix("large_")

    wanted = (
        (image, "images, or paths of images", lambda kind: kind in ("string", "binary", "record")),
        (text, "texts, or lists of texts", lambda kind: kind == "string"),
        (labels, "class ids or names, or lists of them", lambda kind: kind == "string" or "int" in kind),
    )
    for name, words, fits in wanted:
        if name is not None and not is_image(features[name]) and not fits(scalar(name)):
            raise ValueError(f"the column `{name}` must hold {words}, but it holds {features[name]}")


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
        self._prepare = _Preparation(columns, tuple(images), encoders, label_names)
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


class _Preparation(Dataset):
    """Turns a block of rows into a batch; the worker processes run it, so it knows no model."""

    def __init__(
        self,
        columns: Columns,
        images: tuple[str, ...],
        encoders: Mapping[str, StreamEncoder],
        label_names: Sequence[str] | None,
    ):
        from datasets import Image

        self.columns, self.images, self.label_names = columns, images, label_names
        self._class_ids = {name: number for number, name in enumerate(label_names or ())}
        self._image = Image()
        # Streams that prepare images in the same way share the result.
        groups: dict[Any, tuple[str, Any, list[str]]] = {}
        for name, encoder in encoders.items():
            key = _same_inputs(encoder)
            groups.setdefault(key, (encoder.modality, encoder.inputs_of, []))[2].append(name)
        self._groups = list(groups.values())

    def __getitem__(self, block: _Block) -> Batch:
        count = len(next(iter(block.rows.values())))
        batch = Batch(block.shard, [])
        values: dict[str, list[Any]] = {name: [] for name in self._written()}
        texts: list[str] = []
        image_of: list[int] = []
        decoded: list[Any] = []
        previous: str | None = None
        for place in range(count):
            row = {name: column[place] for name, column in block.rows.items()}
            try:
                written = self._row_values(row)
                path = _file_of(row[self.columns.image]) if self.columns.image else None
                if self.columns.image and (path is None or path != previous):
                    decoded.append(self._decoded(row[self.columns.image]))
            except _BadRow as error:
                batch.failed.append(failure(block.first + place, self._name_of(row), str(error)))
                continue
            previous = path
            batch.numbers.append(block.first + place)
            image_of.append(len(decoded) - 1)
            texts.append(written.get("text", ""))
            for name, value in written.items():
                values[name].append(value)
        batch.columns = values
        if batch.numbers:
            for modality, prepare, streams in self._groups:
                inputs = prepare(decoded if modality == "image" else texts)
                batch.inputs.update((name, inputs) for name in streams)
            if self.columns.image:
                batch.image_of = torch.tensor(image_of)
        return batch

    def _written(self) -> list[str]:
        source_columns = {"id": self.columns.id, "text": self.columns.text, "labels": self.columns.labels}
        return [*(name for name in source_columns if source_columns[name]), *self.columns.keep]

    def _row_values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        values = {name: self._embedded(name, row[name]) for name in self.columns.keep}
        if self.columns.id:
            values["id"] = str(row[self.columns.id])
        if self.columns.labels:
            values["labels"] = self._labels(row[self.columns.labels])
        if self.columns.text:
            value = row[self.columns.text]
            captions = value if isinstance(value, list) else [value]
            if odd := [caption for caption in captions if not (caption is None or isinstance(caption, str))]:
                raise _BadRow(f"its text holds {reprlib.repr(odd[0])}, which is no text")
            text = " ".join(filter(None, captions))
            if not text.strip():
                raise _BadRow("its text is empty; add one or remove the row")
            values["text"] = text
        return values

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
