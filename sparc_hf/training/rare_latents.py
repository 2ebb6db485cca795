"""A push for latents that are hardly ever selected, so that none of them dies."""

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
    of all rows of a step, whichever micro-batches and processes had them.

    Args:
        adam: the optimizer of the model's parameters.
        model: the model.
        push: strength; 0.003 lets a latent that is never selected gain t_s in some 110 steps, 0 leaves all as it is.
        share: f.
    """

    def __init__(self, adam: torch.optim.Adam, model: SparcModel, push: float, share: float):
        self.adam, self.push = adam, push
        self.biases = [model.get_parameter(f"encoders.{name}.bias") for name in model.config.stream_names]
        # With global selection all streams have the same latents, and the first stream's rates are everyone's.
        self.rated = self.biases[: 1 if model.config.selection == "global" else None]
        self.mean_rate = model.config.k / model.config.num_latents
        self.rare_rate = share * self.mean_rate
        self._selected = self._last_values = None

    @torch.no_grad()
    def add(self, codes: Mapping[str, SparseCodes]) -> None:
        """Count what a micro-batch selected: stream -> codes [batch, k]."""
        if not self.push:
            return
        selected = torch.stack([_counts(code) for _, code in zip(self.rated, codes.values(), strict=False)])
        last_values = torch.stack([code.values.select(1, -1) for code in codes.values()]).sum(
            dim=1, dtype=torch.float32
        )
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
        if not all(map(self.adam.state.get, self.rated)):
            return  # after a first step that was left out, as half precision may: Adam has yet to make its state
        deficits = [self._deficit(*pair, rows) for pair in zip(self.rated, selected, strict=True)]
        for at, bias in enumerate(self.biases):
            bias.addcmul_(deficits[at % len(deficits)], last_values[at], value=self.push / rows)

    def _deficit(self, bias: Tensor, selected: Tensor, rows: int) -> Tensor:
        """Bring the rates of latents up to date; return [N], by how much they are too low."""
        state = self.adam.state[bias]
        if "selection_rate" not in state:
            state["selection_rate"] = torch.full_like(bias, self.mean_rate)
        weight = min(1.0, rows / RATE_ROWS)
        rates = state["selection_rate"].mul_(1 - weight).add_(selected, alpha=weight / rows)
        return (self.rare_rate / rates).log_().clamp_(0, LARGEST_DEFICIT)


def _counts(codes: SparseCodes) -> Tensor:
    """Return [N]: how many rows selected each latent."""
    latents = codes.indices.reshape(-1)
    if latents.device.type == "cpu":
        return torch.bincount(latents, minlength=codes.num_latents)
    # The host would wait for the other's largest number.
    ones = torch.ones(len(latents), device=latents.device)
    return torch.zeros(codes.num_latents, device=latents.device).index_add_(0, latents, ones)
