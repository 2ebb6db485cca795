"""What becomes of feature rows before they are encoded: unusable ones refused, and standardised streams."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_sparc import SparcConfig


def reject_missing_streams(features: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError where features for training lack a stream."""
    if missing := [name for name in names if name not in features]:
        raise ValueError(f"training needs every stream of the model, but {missing} are missing from `features`")


def reject_shape(raw: Any, name: str, hidden_size: int) -> None:
    """Raise ValueError where features of stream `name` are no tensor [batch, hidden_size] with rows in it."""
    if not isinstance(raw, Tensor) or raw.ndim != 2:
        found = list(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
        raise ValueError(f"stream `{name}` needs a tensor [batch, {hidden_size}], but it got {found}")
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
