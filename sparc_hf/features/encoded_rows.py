"""Batches of samples through the encoders, and the rows of a shard while it grows."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.features.row_schema import RowSchema
from sparc_hf.features.sample_reader import Batch, failure
from sparc_hf.features.shard_folder import ShardFolder

logger = logging.getLogger(__name__)


class ShardRows:
    """The rows of one shard while it grows."""

    def __init__(self, rows: RowSchema, folder: ShardFolder, number: int | None = None):
        self.number = number
        self._rows, self._folder = rows, folder
        self._arrays: dict[str, list[np.ndarray]] = {record["name"]: [] for record in rows.streams}
        self._extras: dict[str, list[pa.Array]] = {name: [] for name in rows.extra_features}
        self._skipped: list[dict[str, Any]] = []

    def append(self, columns: dict[str, Any] | None, failed: list[dict[str, Any]], skip: bool) -> None:
        """Add what `encoded_columns` gave.

        Raises:
            ValueError: naming the first failed row, unless such rows are to be skipped.
        """
        if failed and not skip:
            first = min(failed, key=lambda one: one["row"])
            name = f" ({first['id']})" if first["id"] is not None else ""
            raise ValueError(
                f"row {first['row']}{name}: {first['reason']}; or leave such rows out with `on_error` skip"
            )
        self._skipped += sorted(failed, key=lambda one: one["row"])
        if columns is None:
            return
        arrays, extras, _ = self._rows.checked(columns)
        for name, array in arrays.items():
            self._arrays[name].append(array)
        for name, values in extras.items():
            self._extras[name].append(values)

    def save(self) -> None:
        """Write the shard, with a note of the rows that were left out."""
        if self.number is None:
            return
        batch = None
        if next(iter(self._arrays.values())):
            arrays = {name: np.concatenate(pieces) for name, pieces in self._arrays.items()}
            batch = self._rows.record_batch(arrays, self._extras)
        if self._skipped:
            logger.warning("%d rows of shard %d are left out", len(self._skipped), self.number)
        self._folder.save(self.number, batch, skipped=self._skipped)


def encoded_columns(
    batch: Batch, encoders: Mapping[str, StreamEncoder], dtype: str, tokens: int | None, autocast: bool
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the columns of the rows that came out well, or None, and the rows that did not."""
    failed = list(batch.failed)
    if not batch.numbers:
        return None, failed
    count = len(batch.numbers)
    arrays: dict[str, np.ndarray] = {}
    well = np.ones(count, dtype=bool)
    for name, encoder in encoders.items():
        values = _rows_of(encoder, batch.inputs[name], autocast).unflatten(0, (-1, tokens or 1))
        if encoder.modality == "image" and batch.image_of is not None:
            values = values[batch.image_of]
        with np.errstate(over="ignore"):
            arrays[name] = values.numpy().astype(dtype, copy=False)  # [samples, tokens, hidden]
        finite = np.isfinite(arrays[name]).all(axis=(1, 2))
        for number in np.flatnonzero(well & ~finite):
            known = batch.columns["id"][number] if "id" in batch.columns else None
            reason = (
                f"encoder `{name}` gives a NaN or infinite number in {dtype}; look at that sample, or try another "
                "`dtype` or no `autocast`"
            )
            failed.append(failure(batch.numbers[number], known, reason))
        well &= finite
    kept = np.flatnonzero(well)
    if not len(kept):
        return None, failed
    columns: dict[str, Any] = {name: array[kept].reshape(-1, array.shape[2]) for name, array in arrays.items()}
    for name, values in batch.columns.items():
        if tokens is None or name != "text":
            columns[name] = [values[number] for number in kept for _ in range(tokens or 1)]
    if tokens is not None:
        columns["sample"] = np.repeat([batch.numbers[number] for number in kept], tokens).tolist()
        columns["token"] = list(range(tokens)) * len(kept)
    return columns, failed


def _rows_of(encoder: StreamEncoder, inputs: Mapping[str, Tensor], autocast: bool) -> Tensor:
    on = autocast and encoder.device.type == "cuda"
    with torch.autocast("cuda", dtype=torch.bfloat16) if on else nullcontext():
        return encoder.rows(inputs).cpu()


def tokens_per_sample(encoders: Mapping[str, StreamEncoder]) -> int | None:
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
