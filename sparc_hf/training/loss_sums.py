"""Row-weighted sums of the loss terms of some steps, kept on the device until they are read."""

from collections.abc import Sequence

import torch
from torch import Tensor


class LossSums:
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

    def state_dict(self) -> dict[str, list]:
        """Return names, sums and steps, to go on from in another process."""
        return {
            "names": [list(names) for names in self.sums],
            "sums": [sums.cpu() for sums in self.sums.values()],
            "steps": [self.steps.get(names, 0) for names in self.sums],
        }

    def load_state_dicts(self, states: Sequence[dict[str, list]], rank: int, world_size: int) -> None:
        """Go on from the sums of all processes of a run, which may have had more of them or fewer than now."""
        for number, state in enumerate(states):
            for names, sums, steps in zip(map(tuple, state["names"]), state["sums"], state["steps"], strict=True):
                # Every process knows all names, since they share their sums name by name.
                share = sums.to(self.device) if number % world_size == rank else torch.zeros_like(sums).to(self.device)
                known = self.sums.get(names)
                self.sums[names] = share if known is None else known + share
                self.steps[names] = steps

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
