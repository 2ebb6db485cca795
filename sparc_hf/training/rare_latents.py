"""A push for latents that are hardly ever selected, so that none of them dies."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.model.outputs import SparseCodes

# Rows over which the running rates forget.
RATE_ROWS = 2000
# Logarithm of how much too rare a latent is at most taken to be; a rate of 0 has no logarithm.
LARGEST_DEFICIT = 3.0


class RareLatentPush:
    """Raises, after every step, the encoder biases of latents that are selected too rarely.

    With r_i the running share of rows that selected latent i, latent i is rare where r_i is below a share f of k / N,
    the rate of all latents if each were selected as often as any other. Its bias in stream s then gets

        push * t_s * min(log(f * k / (N * r_i)), 3)

    where t_s is the mean value in s of the selected latent that came last in its row: about what a pre-activation has
    to reach. A gradient reaches a latent only in rows that select it, so that nothing else brings back one that no row
    selects. The push ends when the latent is selected again; what it is used for is then left to the loss.

    The rates lie in the optimizer's state of the biases as `selection_rate`, so that a checkpoint has them. They are
    of all rows of a step, whichever micro-batch and process had them.

    Args:
        adam: the optimizer of the model's parameters.
        model: the model.
        push: strength; 0.003 lets a latent that is never selected gain t_s in some 110 steps, 0 leaves all as it is.
        share: f.
    """

    def __init__(self, adam: torch.optim.Adam, model: SparcModel, push: float, share: float):
        self.adam, self.model, self.push, self.share = adam, model, push, share
        self.config = model.config
        self._selected = self._last_values = None

    @torch.no_grad()
    def add(self, codes: Mapping[str, SparseCodes]) -> None:
        """Count what a micro-batch selected: stream -> codes [batch, k]."""
        if not self.push:
            return
        # With global selection all streams have the same latents.
        counted = list(codes.values())[: 1 if self.config.selection == "global" else None]
        selected = torch.stack([_counts(code) for code in counted])
        last_values = torch.stack([code.values[:, -1].float().sum() for code in codes.values()])
        self._selected = selected if self._selected is None else self._selected + selected
        self._last_values = last_values if self._last_values is None else self._last_values + last_values

    @torch.no_grad()
    def apply(self, rows: int, world_size: int = 1) -> None:
        """Push after the optimizer's step, whose `rows` of all processes have been added since the last time."""
        if not self.push:
            return
        selected, last_values = self._selected, self._last_values
        if selected is None or last_values is None:
            raise ValueError("nothing was selected since the last push; `add` the codes of the step first")
        self._selected = self._last_values = None
        if world_size > 1:
            packed = torch.cat([selected.flatten(), last_values])
            torch.distributed.all_reduce(packed)
            selected, last_values = packed[: selected.numel()].view_as(selected), packed[selected.numel() :]
        mean_rate = self.config.k / self.config.num_latents
        for at, name in enumerate(self.config.stream_names):
            bias = self.model.get_parameter(f"encoders.{name}.bias")
            state = self.adam.state[bias]
            if not state:  # of a first step that was left out, as half precision may; Adam has yet to fill it
                return
            if "selection_rate" not in state:
                state["selection_rate"] = torch.full_like(bias, mean_rate)
            rates = state["selection_rate"]
            rates.lerp_(selected[at % len(selected)] / rows, min(1.0, rows / RATE_ROWS))
            deficit = (math.log(self.share * mean_rate) - rates.log()).clamp_(0, LARGEST_DEFICIT)
            bias.add_(deficit * (last_values[at] * (self.push / rows)))


def _counts(codes: SparseCodes) -> Tensor:
    """Return float32 [N]: how many rows selected each latent."""
    latents = codes.indices.reshape(-1)
    ones = torch.ones(len(latents), device=latents.device)
    return torch.zeros(codes.num_latents, device=latents.device).index_add_(0, latents, ones)
