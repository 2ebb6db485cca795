"""Row-weighted sums of the loss terms of some steps, kept on the device until they are read."""

import torch
from torch import Tensor


class TermSums:
    """Sums of named terms; a term that not every step has, as with a source drawn per step, counts where it is.

    Args:
        device: where the sums are kept.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.steps: dict[tuple[str, ...], int] = {}
        self._names: tuple[str, ...] = ()

    def add(self, loss: Tensor, losses: dict[str, Tensor], weight: float) -> None:
        """Add the terms of one share of a step's rows, `weight` of them all."""
        # Single terms come before their means, so that the first broken one names a stream.
        self._names = (*sorted(losses, key=lambda name: "/" not in name), "loss")
        values = torch.stack([*(losses[name] for name in self._names[:-1]), loss]).detach().float() * weight
        known = self.sums.get(self._names)
        self.sums[self._names] = values if known is None else known + values

    def count_step(self) -> None:
        """Note that a step is whole."""
        self.steps[self._names] = self.steps.get(self._names, 0) + 1

    def first_broken_term(self) -> str | None:
        """Return the first term that is not finite in the step just added, or None."""
        sums = self.sums.get(self._names)
        if sums is None or sums[-1].isfinite():
            return None
        return self._names[int((~sums.isfinite()).nonzero()[0])]

    def means(self, world_size: int) -> dict[str, float]:
        """Return name -> mean per step, over all processes (each step's weights sum to 1 over them)."""
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for names, sums in self.sums.items():
            shared = sums.clone()
            if world_size > 1:
                torch.distributed.all_reduce(shared)
            for name, value in zip(names, shared.tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + self.steps.get(names, 0)
        return {name: value / max(counts[name], 1) for name, value in totals.items()}
