"""Encoders over a dataset of images and texts: one pass that makes a feature dataset, resumable after a kill."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sparc_hf.encoders.stream_encoder import StreamEncoder, checked_device
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.sample_reader import Batch, SampleReader, failure
from sparc_hf.features.source_columns import chosen_columns
from sparc_hf.features.sources.source import schema_of
from sparc_hf.features.statistics import standardization_of
from sparc_hf.features.writer import RowSchema, ShardWriter
from sparc_hf.files.folder_lock import launched_rank, locked_folder

if TYPE_CHECKING:
    import datasets
    from accelerate import PartialState

logger = logging.getLogger(__name__)

OnError = Literal["stop", "skip", "keep"]


@dataclass
class Encoded:
    """What the encoders made of a batch.

    Attributes:
        columns: all columns of its rows; None where it has none.
        present: stream -> bool [rows], which rows have it.
        failed: samples that no row was made of, as `failure` makes them.
        incomplete: those whose rows lack `streams`.
    """

    columns: dict[str, Any] | None
    present: dict[str, np.ndarray]
    failed: list[dict[str, Any]]
    incomplete: list[dict[str, Any]]


Encode = Callable[[Batch], Encoded]


def extract_features(
    dataset: "datasets.Dataset | datasets.IterableDataset",
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
    workers: int = 2,
    label_names: Sequence[str] | None = None,
    taxonomy: Any = None,
    source: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    autocast: bool = False,
    on_error: OnError = "stop",
    repair: bool = False,
) -> FeatureDataset:
    """Encode every sample with every encoder, write the rows, and open the result.

    A run that was stopped or killed goes on where it was when it is called again with the same arguments, and its
    result equals that of a run without a stop. Under Accelerate's launcher, the processes share the work; they must
    see one folder. With encoders of patch tokens every token is a row, and `sample` (row number in the source) and
    `token` (place in the grid, row by row) say which; texts and images are then not copied.

    Args:
        dataset: the samples; an IterableDataset is read once, from its first row to its last.
        encoders: stream name -> encoder, in the order of the streams; see `load_encoders`. Where one is to be
            standardised and its record has no statistics, they are estimated from the rows (`standardization_of`).
        path: the folder to make.
        image_column: column of images (or of paths); found by its type if there is one.
        text_column: column of texts, or of lists of captions, which are joined by a space; found by its type.
        id_column: what becomes the `id` of a row; `id` by default, where there is such a column.
        labels_column: class ids or lists of class ids; strings are looked up in `label_names`.
        keep_columns: other columns to copy, the image column among them if wanted.
        batch_size: samples that go through an encoder at once.
        dtype: how the rows are stored.
        rows_per_shard: rows of one file; a stopped run loses at most these. Patch tokens get at least a batch.
        workers: processes that decode images; 0 to decode in this one.
        label_names: names of the classes; taken from a ClassLabel column by default.
        taxonomy: nested label hierarchy.
        source: where the samples come from; rows and column names are added.
        device: where the encoders run; they stay where they are by default.
        autocast: run in bfloat16 on a CUDA device; the stream records say so.
        on_error: "stop" at a row whose image is missing or cannot be read, whose text is empty, whose label is
            unknown, or whose features are not finite; "skip" it and list it in `skipped.jsonl`; or "keep" it without
            the streams that cannot be made and list it in `incomplete.jsonl`, so that only rows of which no stream can
            be made, or whose label is unknown, are skipped.
        repair: make the damaged or missing shards of the finished dataset at `path` again.

    Raises:
        ValueError: for unusable settings, for a `path` that another process writes into, or naming the row at which
            `on_error` stops; finished shards are kept.
        OSError: if a shard cannot be written; finished shards are kept.
    """
    if on_error not in get_args(OnError):
        raise ValueError(f"`on_error` must be stop, skip or keep, but it is {on_error!r}")
    check_sizes(batch_size, rows_per_shard, workers)
    if not encoders or not getattr(dataset, "num_rows", 1):
        raise ValueError(f"nothing to extract: {len(encoders)} streams and {getattr(dataset, 'num_rows', '?')} rows")
    tokens = _tokens_per_sample(encoders)
    columns = chosen_columns(
        dataset,
        {encoder.modality for encoder in encoders.values()},
        image_column=image_column,
        text_column=text_column,
        id_column=id_column,
        labels_column=labels_column,
        keep_columns=keep_columns,
    )
    features = schema_of(dataset)
    if labels_column and label_names is None:
        feature = features[labels_column]
        label_names = getattr(getattr(feature, "feature", feature), "names", None)  # of a ClassLabel
    if device is not None:
        place = checked_device(device)
        for encoder in encoders.values():
            encoder.to(place)
    reader = SampleReader(
        dataset,
        columns,
        encoders,
        label_names=label_names,
        samples_per_shard=rows_per_shard if tokens is None else max(rows_per_shard // tokens, batch_size),
        batch_size=batch_size,
        workers=workers,
        keeps_incomplete=on_error == "keep",
    )
    records = [_record(encoder, name, autocast) for name, encoder in encoders.items()]
    open_writer = partial(
        ShardWriter,
        Path(path),
        RowSchema(records, dtype, _extra_columns(columns, features, tokens), measured=False),
        rows_per_shard=rows_per_shard,
        label_names=label_names,
        taxonomy=taxonomy,
        source={**(source or {}), "rows": reader.total, **columns.record},
        repair=repair,
    )
    encode = partial(
        _encoded, encoders=encoders, dtype=dtype, tokens=tokens, autocast=autocast, keep=on_error == "keep"
    )
    was_written = _write_shards(Path(path), open_writer, reader, encode, on_error=on_error, repair=repair)
    # Files that were just written or checked are not read once more.
    return FeatureDataset.load(path, verify=not was_written)


def _write_shards(
    path: Path,
    open_writer: Callable[[], ShardWriter],
    reader: SampleReader,
    encode: Encode,
    *,
    on_error: OnError,
    repair: bool,
) -> bool:
    """Make the shards of a folder, all processes together, and finish it; return False where it was finished."""
    processes = launched_processes()
    with locked_folder(path, rank=launched_rank()):
        with processes.main_process_first() if processes else nullcontext():
            writer = open_writer()
        if writer.folder.finished and not repair:
            if any(_is_unmade(entry, on_error) for entry in writer.folder.finished_shards):
                raise ValueError(
                    f"`{path}` was finished with another `on_error` than {on_error}; make it again with `repair`, or "
                    "choose another path"
                )
            logger.info("%s is finished already", path)
            return False
        _encode_shards(reader, encode, writer, on_error, processes)
        if processes:
            processes.wait_for_everyone()
        if processes is None or processes.is_main_process:
            writer.finish(reader.shards, writer.folder.streams or _with_statistics(writer, reader.shards))
        if processes:
            processes.wait_for_everyone()
    return True


def check_sizes(batch_size: int, rows_per_shard: int, workers: int) -> None:
    if min(batch_size, rows_per_shard) < 1 or workers < 0:
        raise ValueError("`batch_size` and `rows_per_shard` must be at least 1 and `workers` at least 0")


def launched_processes() -> "PartialState | None":
    """Return the processes of a launcher, or None where this is the only one.

    Raises:
        ValueError: if they do not find each other, so that each would do all the work.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched < 2:
        return None
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without this, processes on CPUs would each be the first of one. One may be done long before another.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    processes = PartialState(cpu=on_cpu, timeout=timedelta(days=1))
    if processes.num_processes != launched:
        raise ValueError(f"{launched} processes were launched, but this one knows of {processes.num_processes}")
    return processes


def _encode_shards(
    reader: SampleReader, encode: Encode, writer: ShardWriter, on_error: OnError, processes: "PartialState | None"
) -> None:
    """Encode and save the shards of this process that are not there yet, with a progress bar.

    Raises:
        ValueError: naming the first row that failed, where `on_error` is to stop.
    """
    rank, size = (processes.process_index, processes.num_processes) if processes else (0, 1)

    @cache
    def wanted(shard: int) -> bool:
        return shard % size == rank and _is_unmade(writer.folder.entry(shard), on_error)

    total = done = None
    if reader.total is not None:
        own_shards = range(rank, reader.shards, size)
        total = sum(map(reader.samples_in, own_shards))
        done = total - sum(reader.samples_in(shard) for shard in own_shards if wanted(shard))
        if done:
            logger.info("going on behind %d samples that are done", done)
    with tqdm(total=total, initial=done or 0, unit=" rows", desc="extract", disable=rank > 0) as bar:
        for batch in reader.batches(wanted):
            if batch.shard != writer.number:
                writer.save()
                writer.begin(batch.shard)
            encoded = encode(batch)
            if encoded.failed and on_error == "stop":
                _refuse(encoded.failed[0])
            writer.skip(encoded.failed)
            if on_error == "keep" and (encoded.failed or encoded.incomplete):
                writer.keep_incomplete(encoded.incomplete)
            if encoded.columns is not None:
                arrays, extras, _ = writer.schema.checked(encoded.columns, present=encoded.present)
                writer.add(arrays, extras)
            bar.update(len(batch.numbers) + len(batch.failed))
        writer.save()


def _is_unmade(entry: Mapping[str, Any] | None, on_error: OnError) -> bool:
    """Return whether a shard has to be made: where it is not, or was made with another way to treat its failures.

    One without failures is the same either way; `incomplete` is there where "keep" made one with failures.
    """
    if entry is None:
        return True
    if on_error == "keep":
        return bool(entry.get("skipped")) and "incomplete" not in entry
    return on_error == "skip" and bool(entry.get("incomplete"))


def _refuse(failure: Mapping[str, Any]) -> NoReturn:
    name = f" ({failure['id']})" if failure["id"] is not None else ""
    raise ValueError(
        f"row {failure['row']}{name}: {failure['reason']}; or leave such rows out with `on_error` skip, or keep their "
        "other streams with `on_error` keep"
    )


def _encoded(
    batch: Batch, encoders: Mapping[str, StreamEncoder], dtype: str, tokens: int | None, autocast: bool, keep: bool
) -> Encoded:
    """Encode the samples of a batch; with `keep` those stay that only some streams can be made of."""
    faults = {place: dict(fault) for place, fault in batch.faults.items()}
    arrays: dict[str, np.ndarray] = {}
    has: dict[str, np.ndarray] = {}
    for name, encoder in encoders.items() if batch.numbers else ():
        arrays[name], has[name] = _stream_arrays(batch, name, encoder, dtype, tokens, autocast)
        is_finite = np.isfinite(arrays[name]).all(axis=(1, 2))
        for place in np.flatnonzero(has[name] & ~is_finite).tolist():
            reason = (
                f"encoder `{name}` gives a NaN or infinite number in {dtype}; look at that sample, or try another "
                "`dtype` or no `autocast`"
            )
            _add_fault(faults, batch, place, reason, keep)
        has[name] &= is_finite
    combine = np.logical_or if keep else np.logical_and
    is_usable: np.ndarray = combine.reduce(list(has.values())) if has else np.zeros(0, dtype=bool)
    failed = [*batch.failed, *(faults[place] for place in np.flatnonzero(~is_usable).tolist())]
    incomplete = [
        faults[place] | {"streams": [name for name in has if not has[name][place]]}
        for place in sorted(faults)
        if is_usable[place]
    ]
    failed.sort(key=lambda fault: fault["row"])
    usable = np.flatnonzero(is_usable)
    present = {name: mask[usable].repeat(tokens or 1) for name, mask in has.items()}
    return Encoded(_columns_of(batch, arrays, usable, tokens) if len(usable) else None, present, failed, incomplete)


def _add_fault(faults: dict[int, dict[str, Any]], batch: Batch, place: int, reason: str, keep: bool) -> None:
    """Note why something of a sample cannot be made; with `keep` beside other such reasons, else only the first."""
    if place not in faults:
        sample_id = batch.columns["id"][place] if "id" in batch.columns else None
        faults[place] = failure(batch.numbers[place], sample_id, reason)
    elif keep:
        faults[place]["reason"] += f"; {reason}"


def _stream_arrays(
    batch: Batch, name: str, encoder: StreamEncoder, dtype: str, tokens: int | None, autocast: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a stream, [samples, tokens, hidden_size], and bool [samples], which samples have an input."""
    if name not in batch.inputs:
        width = encoder.record["hidden_size"]
        return np.zeros((len(batch.numbers), tokens or 1, width), dtype), np.zeros(len(batch.numbers), dtype=bool)
    rows = _rows_of(encoder, batch.inputs[name], autocast).unflatten(0, (-1, tokens or 1))
    places = batch.input_of.get(encoder.modality)
    if places is not None:
        rows = rows[places.clamp(min=0)]
    with np.errstate(over="ignore"):
        array = rows.numpy().astype(dtype, copy=False)
    return array, np.ones(len(array), dtype=bool) if places is None else (places >= 0).numpy()


def _columns_of(
    batch: Batch, arrays: Mapping[str, np.ndarray], usable: np.ndarray, tokens: int | None
) -> dict[str, Any]:
    """Return all columns of the samples that rows are made of."""
    columns: dict[str, Any] = {name: array[usable].reshape(-1, array.shape[2]) for name, array in arrays.items()}
    for name, values in batch.columns.items():
        if tokens is None or name != "text":
            columns[name] = [values[place] for place in usable for _ in range(tokens or 1)]
    if tokens is not None:
        columns["sample"] = np.repeat([batch.numbers[place] for place in usable], tokens).tolist()
        columns["token"] = list(range(tokens)) * len(usable)
    return columns


def _rows_of(encoder: StreamEncoder, inputs: Mapping[str, Tensor], autocast: bool) -> Tensor:
    on = autocast and encoder.device.type == "cuda"
    with torch.autocast("cuda", dtype=torch.bfloat16) if on else nullcontext():
        return encoder.rows(inputs).cpu()


def _tokens_per_sample(encoders: Mapping[str, StreamEncoder]) -> int | None:
    """Return the rows a sample has where streams are patch tokens, None where they are vectors.

    Raises:
        ValueError: if streams of both kinds are mixed, or their grids differ.
    """
    grids = {name: e.record["grid"] if e.pooling == "tokens" else None for name, e in encoders.items()}
    first = next(iter(grids.values()))
    if any(grid != first for grid in grids.values()):
        raise ValueError(
            "all streams must have rows of one kind: vectors, or patch tokens on one grid (`grid`), but they have "
            f"{grids}"
        )
    return None if first is None else first[0] * first[1]


def _record(encoder: StreamEncoder, name: str, autocast: bool) -> dict[str, Any]:
    on = autocast and encoder.device.type == "cuda"
    return encoder.record | {"name": name} | ({"autocast": "bfloat16"} if on else {})


def _extra_columns(columns: Any, features: Any, tokens: int | None) -> dict[str, Any]:
    """Return the types of the columns beside the streams.

    Raises:
        ValueError: if images are to be kept once for every token.
    """
    from datasets import Image, List, Value

    types = {"id": Value("string"), "text": Value("string"), "labels": List(Value("int32"))}
    source_columns = {"id": columns.id, "text": columns.text if tokens is None else None, "labels": columns.labels}
    extras: dict[str, Any] = {name: types[name] for name in source_columns if source_columns[name]}
    extras |= {name: features[name] for name in columns.keep}
    if tokens is None:
        return extras
    if images := [name for name in columns.keep if isinstance(features[name], Image)]:
        raise ValueError(f"images {images} cannot be kept with patch tokens: each would be stored {tokens} times")
    return extras | {"sample": Value("int64"), "token": Value("int32")}


def _with_statistics(writer: ShardWriter, shards: int) -> list[dict[str, Any]]:
    """Return the stream records, with mean and standard deviation where they are to be standardised without any."""
    records = writer.schema.streams
    unmeasured = [record for record in records if record["normalize"] == "standardize" and "mean" not in record]
    if not unmeasured:
        return records
    widths = [{key: record[key] for key in ("name", "hidden_size")} for record in records]
    rows = FeatureDataset(writer.folder.open_table(shards), widths)
    return [
        record | standardization_of(rows, record["name"], per_channel=record.get("per_channel", False))
        if record in unmeasured
        else record
        for record in records
    ]
