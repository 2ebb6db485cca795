"""What becomes of feature rows before they are encoded: unusable ones refused, and standardised streams."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_sparc import SparcConfig
from .sparse_ops import normalize_rows


def reject_missing_streams(features: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError where features for training lack a stream."""
    if missing := [name for name in names if name not in features]:
        raise ValueError(f"training needs every stream of the model, but {missing} are missing from `features`")


def reject_shape(raw: Any, name: str, hidden_size: int) -> None:
    """Raise ValueError where features of stream `name` are no tensor [batch, hidden_size] with rows in it."""
    if not isinstance(raw, Tensor) or raw.ndim != 2:
        given = list(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
        raise ValueError(f"stream `{name}` needs a tensor [batch, {hidden_size}], but it got {given}")
    if raw.shape[1] != hidden_size:
        raise ValueError(f"stream `{name}` has width {hidden_size}, but its features have {raw.shape[1]}")
    if raw.shape[0] == 0:
        raise ValueError(f"stream `{name}` got an empty batch: 0 rows where at least 1 is needed")


def reject_rows(faulty: Tensor, name: str, fault: str) -> None:
    """Raise ValueError where any of bool [batch] is set, with the first row's number."""
    if faulty.any():
        numbers = faulty.nonzero().squeeze(-1).tolist()
        raise ValueError(
            f"row {numbers[0]} of stream `{name}` holds {fault} ({len(numbers)} of {faulty.numel()} rows do); "
            "leave such rows out"
        )


def normalized_rows(
    model: Any,
    features: Mapping[str, Tensor],
    reject_zero_rows: bool = False,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return stream -> rows [batch, hidden_size] of a SparcModel, normalised as its records say, in their order.

    With `masks`, stream -> bool [batch], rows that lack a stream may hold anything there; what they become has no
    meaning.

    Raises:
        ValueError: for unknown streams, wrong widths, other numbers of rows, or rows that cannot be used.
    """
    names = model.config.stream_names
    if not isinstance(features, Mapping) or not features:
        raise ValueError(f"`features` must map stream names to tensors, for at least one of the streams {names}")
    if unknown := [name for name in features if name not in names]:
        raise ValueError(f"unknown streams {unknown}; this model has the streams {names}")
    masks = masks or {}
    if unknown := [name for name in masks if name not in names]:
        raise ValueError(f"`present` names {unknown}; this model has the streams {names}")
    rows = {}
    for name in names:
        if name in features:
            rows[name] = normalized_stream(model, name, features[name], reject_zero_rows, masks.get(name))
    sizes = {name: value.shape[0] for name, value in rows.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"all streams must have the same rows, but their batch sizes are {sizes}")
    return rows


def normalized_stream(
    model: Any, name: str, raw: Tensor, reject_zero_rows: bool, mask: Tensor | None = None
) -> Tensor:
    """Return the normalised rows of one stream; see `normalized_rows`."""
    record = model.config.stream(name)
    reject_shape(raw, name, record["hidden_size"])
    raw = raw.to(device=model.device, dtype=model.pre_bias[name].dtype)
    if mask is not None:
        if mask.shape != raw.shape[:1] or mask.dtype != torch.bool:
            raise ValueError(
                f"the mask of stream `{name}` must be bool [{len(raw)}], but it is {mask.dtype} {list(mask.shape)}"
            )
        mask = mask.to(raw.device, non_blocking=True)
        raw = raw.where(mask.unsqueeze(1), 0.0)
    # Reading a verdict back stalls a GPU, so training there leaves it to the loop, which watches the losses.
    checked = raw.device.type == "cpu" or not model.training
    # A sum is finite only where every value is, and takes one pass.
    if checked and not raw.sum().isfinite():
        reject_rows(~raw.isfinite().all(dim=-1), name, "NaN or infinite values")
    # Statistics are float32, whatever the weights are.
    rows = normalize_rows(raw, record["normalize"], model.feature_statistics.of(name)).to(raw.dtype)
    if checked and reject_zero_rows:
        only_zeros = ~rows.any(dim=-1)
        faulty = only_zeros if mask is None else only_zeros & mask
        reject_rows(faulty, name, "only zeros, so that its relative error is undefined")
    return rows


class FeatureStatistics(nn.Module):
    """Means and standard deviations of the standardised streams, rebuilt from the config and so never saved.

    A channel that did not vary has the deviation 0 in the config and infinity here, so that it becomes 0 in every row.
    """

    def __init__(self, config: SparcConfig):
        super().__init__()
        self.records = [record for record in config.streams or [] if record["normalize"] == "standardize"]
        for record in self.records:
            for field in ("mean", "std"):
                buffer = torch.empty_like(self._from_config(record[field]))
                self.register_buffer(f"{record['name']}_{field}", buffer, persistent=False)

    @staticmethod
    def _from_config(value: Any) -> Tensor:
        return torch.tensor(value if isinstance(value, list | tuple) else [value], dtype=torch.float32)

    def fill(self) -> None:
        for record in self.records:
            mean, std = self._from_config(record["mean"]), self._from_config(record["std"])
            init.copy_(getattr(self, f"{record['name']}_mean"), mean)
            init.copy_(getattr(self, f"{record['name']}_std"), std.masked_fill(std == 0, torch.inf))

    def _apply(self, fn: Any, recurse: bool = True) -> "FeatureStatistics":
        # They stay float32 with weights of any number type: rounded, they would give other codes than those of the
        # same model loaded from its files.
        for name, buffer in self.named_buffers():
            moved = fn(buffer)
            setattr(self, name, moved if buffer.is_meta else buffer.to(moved.device))
        return self

    def of(self, name: str) -> tuple[Tensor, Tensor] | None:
        if not hasattr(self, f"{name}_mean"):
            return None
        return getattr(self, f"{name}_mean"), getattr(self, f"{name}_std")
