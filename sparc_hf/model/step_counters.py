"""Training steps since each latent last fired, by which dead ones are told."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .outputs import SparseCodes


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
