"""What a SparcModel keeps beside its parameters: dead counters, and the statistics of standardised streams."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_sparc import SparcConfig
from .outputs_sparc import SparseCodes


class StepCounters(nn.Module):
    """One int64 buffer [N] per stream: training steps since each latent last fired there."""

    def __init__(self, names: list[str], num_latents: int):
        super().__init__()
        for name in names:
            self.register_buffer(name, torch.zeros(num_latents, dtype=torch.int64))

    @torch.no_grad()
    def advance(
        self, micro_batches: Sequence[Mapping[str, SparseCodes]], threshold: float, new_step: bool, group: Any
    ) -> None:
        """Count a step, or with `new_step=False` only note what fired; what did restarts at 1, as in the earlier code.

        Args:
            micro_batches: stream -> codes of a part of the step's rows, each.
            threshold: a latent fires where its value exceeds this.
            new_step: whether a step begins.
            group: process group of those that share the step's rows, or None.
        """
        names = list(micro_batches[0])
        fired = torch.stack([torch.zeros_like(getattr(self, name), dtype=torch.uint8) for name in names])
        for row, name in zip(fired, names, strict=True):
            for codes in micro_batches:
                active = (codes[name].values > threshold).to(torch.uint8).reshape(-1)
                row.scatter_reduce_(0, codes[name].indices.reshape(-1), active, reduce="amax")
        if group is not None:
            torch.distributed.all_reduce(fired, op=torch.distributed.ReduceOp.MAX, group=group)
        for row, name in zip(fired, names, strict=True):
            counter = getattr(self, name)
            counter.copy_(torch.where(row > 0, 1, counter + int(new_step)))


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
