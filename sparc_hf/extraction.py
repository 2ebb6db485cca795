"""Encoders over a dataset of images and texts: one pass that makes a feature dataset, resumable after interruption."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sparc_hf.encoders import StreamEncoder, load_encoders
from sparc_hf.feature_writer import FeatureWriter
from sparc_hf.features import FeatureDataset
from sparc_hf.sources import find_column, open_source, parse_streams

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

WORKERS = 2
BATCHES_AHEAD = 4


def extract_features(
    dataset: "datasets.Dataset",
    encoders: Mapping[str, StreamEncoder],
    path: str | os.PathLike,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    labels_column: str | None = None,
    keep_columns: Sequence[str] = (),
    batch_size: int = 64,
    dtype: Literal["float32", "float16"] = "float32",
    rows_per_shard: int = 4096,
    label_names: Sequence[str] | None = None,
    taxonomy: Any = None,
    source: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    autocast: bool = False,
) -> FeatureDataset:
    """Encode every sample with every encoder, write the rows, and open the result.

    A run that was stopped goes on where it was when it is called again with the same arguments.

    Args:
        dataset: the samples.
        encoders: stream name -> encoder, in the order of the streams; see `load_encoders`.
        path: the folder to make.
        image_column: column of images (or of paths); found by its type if there is one.
        text_column: column of texts, or of lists of captions, which are joined by a space; found by its type.
        id_column: what becomes the `id` of a row; `id` by default, where there is such a column.
        labels_column: class ids or lists of class ids; strings are looked up in `label_names`.
        keep_columns: other columns to copy, the image column among them if wanted.
        batch_size: samples that go through an encoder at once.
        dtype: how the rows are stored.
        rows_per_shard: rows of one file; a stopped run loses at most these.
        label_names: names of the classes; taken from a ClassLabel column by default.
        taxonomy: nested label hierarchy.
        source: where the samples come from; rows and column names are added.
        device: where the encoders run; they stay where they are by default.
        autocast: run in bfloat16 on a CUDA device.

    Raises:
        ValueError: for unusable columns, or naming the row whose image cannot be read, whose text is empty, or whose
            features are not finite. The rows before it are kept for the next call.
    """
    samples = _Samples(
        dataset, encoders, image_column, text_column, id_column, labels_column, keep_columns, label_names
    )
    for encoder in encoders.values():
        if device is not None:
            encoder.to(device)
    writer = FeatureWriter(
        path,
        [encoder.record | {"name": name} for name, encoder in encoders.items()],
        dtype=dtype,
        rows_per_shard=rows_per_shard,
        label_names=samples.label_names,
        taxonomy=taxonomy,
        source={**(source or {}), "rows": len(dataset), **samples.columns},
        extra_columns=samples.extra_columns,
    )
    if writer.rows_done:
        logger.info("resuming behind %d rows that are done", writer.rows_done)
    bar = tqdm(total=len(dataset), initial=writer.rows_done, unit=" rows", desc="extract")
    with bar, writer:
        for first, columns, inputs in samples.batches(writer.rows_done, batch_size):
            rows = {name: _encoded(encoders[name], inputs[name], autocast) for name in encoders}
            for name, values in rows.items():
                samples.check_finite(name, values, first, columns)
            writer.append({**rows, **columns})
            bar.update(len(next(iter(rows.values()))))
    return FeatureDataset.load(path)


@dataclass
class ExtractionArguments:
    """What `sparc extract` asks for."""

    source: str = field(
        metadata={
            "help": "Samples: Hub id, imagefolder folder, folder of `save_to_disk`, or parquet, csv or json file."
        }
    )
    output: str = field(metadata={"help": "Folder of the feature dataset to make; a stopped run goes on in it."})
    encoders: list[str] = field(
        metadata={
            "help": "Streams, each as name=encoder:modality[:pooling], where encoder is a Hub id, a folder, or "
            "demo:clip or demo:dino for the small ones inside; modality is image or text; and pooling is cls, mean, "
            "pooler or projection (default: as in the papers)."
        }
    )
    split: str | None = field(default=None, metadata={"help": "Split of the source; needed where it has several."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images (default: found by its type)."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column of texts or lists of captions (default: found by its type)."}
    )
    id_column: str | None = field(
        default=None, metadata={"help": "Column of row ids (default: `id`, if there is one)."}
    )
    labels_column: str | None = field(default=None, metadata={"help": "Column of class ids or lists of them."})
    keep_columns: list[str] | None = field(
        default=None, metadata={"help": "Further columns to copy, images included."}
    )
    batch_size: int = field(default=64, metadata={"help": "Samples that go through an encoder at once."})
    dtype: Literal["float32", "float16"] = field(default="float32", metadata={"help": "How the numbers are stored."})
    rows_per_shard: int = field(default=4096, metadata={"help": "Rows of one file; a killed run loses at most these."})
    device: str | None = field(
        default=None,
        metadata={"help": "Where the encoders run, such as cpu or cuda:0 (default: CUDA if there is one)."},
    )
    image_backend: Literal["pil", "torchvision"] = field(
        default="pil",
        metadata={"help": "What resizes images: pil (the same pixels on every machine) or torchvision (faster)."},
    )
    autocast: bool = field(default=False, metadata={"help": "Run the encoders in bfloat16 on a CUDA device."})
    limit: int | None = field(default=None, metadata={"help": "Rows to encode, from the first (default: all)."})


def run_extraction(args: ExtractionArguments) -> FeatureDataset:
    """Do what the arguments say: open the source, load the encoders, extract, and open the result.

    Raises:
        ValueError: for unusable arguments, and as `extract_features`.
    """
    records = parse_streams(args.encoders)
    for record in records:
        if record["modality"] == "image":
            record["image_backend"] = args.image_backend
    dataset = open_source(args.source, args.split)
    if args.limit is not None:
        if args.limit < 1:
            raise ValueError(f"`limit` must be at least 1 row, but it is {args.limit}")
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return extract_features(
        dataset,
        load_encoders(records, device=device),
        args.output,
        image_column=args.image_column,
        text_column=args.text_column,
        id_column=args.id_column,
        labels_column=args.labels_column,
        keep_columns=args.keep_columns or (),
        batch_size=args.batch_size,
        dtype=args.dtype,
        rows_per_shard=args.rows_per_shard,
        source={"dataset": args.source, "split": args.split},
        autocast=args.autocast,
    )


class _Samples:
    """The columns of a source dataset as encoder inputs, read and decoded ahead by worker threads."""

    def __init__(
        self,
        dataset: "datasets.Dataset",
        encoders: Mapping[str, StreamEncoder],
        image_column: str | None,
        text_column: str | None,
        id_column: str | None,
        labels_column: str | None,
        keep_columns: Sequence[str],
        label_names: Sequence[str] | None,
    ):
        from datasets import Image, List, Value

        if not encoders or not len(dataset):
            raise ValueError(f"nothing to extract: {len(encoders)} streams and {len(dataset)} rows")
        named = [image_column, text_column, id_column, labels_column, *keep_columns]
        if missing := [name for name in named if name is not None and name not in dataset.column_names]:
            raise ValueError(f"the dataset has no columns {missing}; it has {dataset.column_names}")
        modalities = {encoder.modality for encoder in encoders.values()}
        self.image_column = (image_column or find_column(dataset, "image")) if "image" in modalities else None
        self.text_column = text_column or (find_column(dataset, "text") if "text" in modalities else None)
        self.id_column = id_column or ("id" if "id" in dataset.column_names else None)
        self.labels_column = labels_column
        self.encoders = encoders
        made = {"id": self.id_column, "text": self.text_column, "labels": labels_column}
        if taken := [name for name in keep_columns if made.get(name) not in (None, name)]:
            raise ValueError(f"columns {taken} cannot be kept, because {made} take their names; rename them first")
        self.keep_columns = [name for name in keep_columns if made.get(name) is None]
        types = {"id": Value("string"), "text": Value("string"), "labels": List(Value("int32"))}
        self.extra_columns = {name: types[name] for name in made if made[name]}
        self.extra_columns |= {name: dataset.features[name] for name in self.keep_columns}
        self.columns = {f"{name}_column": column for name, column in {"image": self.image_column, **made}.items()}
        if labels_column and label_names is None:
            feature = dataset.features[labels_column]
            label_names = getattr(getattr(feature, "feature", feature), "names", None)  # of a ClassLabel
        self.label_names = None if label_names is None else list(label_names)
        self._class_ids = {name: number for number, name in enumerate(self.label_names or ())}
        needed = dict.fromkeys(name for name in [*self.columns.values(), *self.keep_columns] if name)
        self.dataset = dataset.with_format(None).select_columns(list(needed))
        self._images = [name for name in needed if isinstance(dataset.features[name], Image)]
        if self.image_column and self.image_column not in self._images:  # a column of paths
            self._images.append(self.image_column)
        for name in self._images:
            self.dataset = self.dataset.cast_column(name, Image(decode=False))
        self._image = Image()

    def batches(
        self, first: int, batch_size: int
    ) -> Iterator[tuple[int, dict[str, list[Any]], dict[str, dict[str, Tensor]]]]:
        """Yield, from row `first` on, the first row of each batch, its columns to write, and every stream's inputs."""
        starts = range(first, len(self.dataset), batch_size)
        jobs = ((start, self.dataset[start : start + batch_size]) for start in starts)
        pool = ThreadPoolExecutor(max_workers=WORKERS)
        try:
            yield from _ahead(pool, self._read, jobs)
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(
        self, first: int, rows: dict[str, list[Any]]
    ) -> tuple[int, dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Decode one batch of rows; the one place where a bad sample is met, and stops the run."""
        numbers = range(len(next(iter(rows.values()))))
        columns: dict[str, Any] = {name: rows[name] for name in self.keep_columns}
        for name in set(self._images) & set(columns):
            columns[name] = [self._embedded(rows, name, first, number) for number in numbers]
        if self.id_column:
            columns["id"] = [str(value) for value in rows[self.id_column]]
        if self.labels_column:
            columns["labels"] = [self._labels(rows, first, number) for number in numbers]
        samples: dict[str, list[Any]] = {}
        if self.text_column:
            samples["text"] = columns["text"] = [self._text(rows, first, number) for number in numbers]
        if self.image_column:
            samples["image"] = [self._decoded(rows, first, number) for number in numbers]
        inputs = {name: encoder.prepare(samples[encoder.modality]) for name, encoder in self.encoders.items()}
        return first, columns, inputs

    def _decoded(self, rows: Mapping[str, list[Any]], first: int, number: int) -> Any:
        value = rows[str(self.image_column)][number]
        name = self._row_name(rows, first, number)
        if value is None:
            raise ValueError(f"{name} has no image; remove it from the dataset")
        try:
            return self._image.decode_example(value).convert("RGB")
        except Exception as error:  # a damaged file can raise anything, from OSError to struct.error
            raise ValueError(f"the image of {name} cannot be read ({error}); repair or remove it") from error

    def _embedded(self, rows: Mapping[str, list[Any]], column: str, first: int, number: int) -> dict[str, Any] | None:
        """Return a kept image with its bytes inside, so that it travels with the features."""
        value = rows[column][number]
        if value is None or value["bytes"] is not None:
            return value
        try:
            return {"bytes": Path(value["path"]).read_bytes(), "path": Path(value["path"]).name}
        except OSError as error:
            name = self._row_name(rows, first, number)
            raise ValueError(f"the image of {name} cannot be read ({error}); repair or remove it") from error

    def _text(self, rows: Mapping[str, list[Any]], first: int, number: int) -> str:
        value = rows[str(self.text_column)][number]
        text = " ".join(part for part in value if part) if isinstance(value, list) else (value or "")
        if not text.strip():
            raise ValueError(f"the text of {self._row_name(rows, first, number)} is empty; add one or remove the row")
        return text

    def _labels(self, rows: Mapping[str, list[Any]], first: int, number: int) -> list[int]:
        value = rows[str(self.labels_column)][number]
        values = [] if value is None else value if isinstance(value, list) else [value]
        try:
            return [self._class_ids[label] if isinstance(label, str) else int(label) for label in values]
        except KeyError as error:
            raise ValueError(
                f"label {error} of {self._row_name(rows, first, number)} is not among `label_names`"
            ) from error

    def _row_name(self, rows: Mapping[str, list[Any]], first: int, number: int) -> str:
        """Return the number of a row, and its id or the file of its image."""
        known = rows[self.id_column][number] if self.id_column else None
        if known is None and self.image_column and isinstance(rows[self.image_column][number], dict):
            known = rows[self.image_column][number].get("path")
        return f"row {first + number}" + (f" ({known})" if known is not None else "")

    def check_finite(self, stream: str, values: np.ndarray, first: int, columns: Mapping[str, list[Any]]) -> None:
        """Raise ValueError naming the first row [rows, hidden_size] of a batch with a NaN or infinite number."""
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            number = int(finite.argmin())
            known = f" ({columns['id'][number]})" if "id" in columns else ""
            raise ValueError(
                f"encoder `{stream}` gives a NaN or infinite number for row {first + number}{known}; look at that "
                "sample, or try another `dtype` or no `autocast`"
            )


def _encoded(encoder: StreamEncoder, inputs: Mapping[str, Tensor], autocast: bool) -> np.ndarray:
    on = autocast and encoder.device.type == "cuda"
    with torch.autocast("cuda", dtype=torch.bfloat16) if on else nullcontext():
        return encoder.pooled(inputs).cpu().numpy()


def _ahead(pool: ThreadPoolExecutor, work: Callable[..., Any], jobs: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
    """Yield `work(*job)` in order, while the pool is busy with the jobs that come next."""
    waiting: deque[Future[Any]] = deque(pool.submit(work, *job) for job in islice(jobs, BATCHES_AHEAD))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(work, *job) for job in islice(jobs, 1))
        yield result
