"""One pass of SPARC from rows to errors, on the parameters of a model (arXiv 2507.06265)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .outputs_sparc import SparseCodes
from .sparse_ops import GradientTerm, Selection, decode_errors, gather_preactivations, row_energy, top_k

# Rows that a CPU multiplies at full speed; more at once only take memory.
ROWS_PER_PRODUCT = 512


class StreamRows(NamedTuple):
    """A stream's normalised rows x and, outside the graph, x - b: both [batch, d]."""

    normalized: Tensor
    centered: Tensor


class SelectedStreams(NamedTuple):
    """Streams that share a selection, and their pre-activations there, outside the graph, [streams, batch, k]."""

    names: list[str]
    selection: Selection
    preactivations: Tensor


class EncodedStreams(NamedTuple):
    """Streams that share a selection, and their values [streams, batch, k]."""

    names: list[str]
    selection: Selection
    values: Tensor


class SparcStep:
    """Encoding, errors of all pairs and the auxiliary term, with gradients that touch only what was selected.

    Args:
        model: a SparcModel; its parameters and settings are read, nothing is changed.
    """

    def __init__(self, model: Any):
        self.model = model

    def rows(self, normalized: Mapping[str, Tensor]) -> dict[str, StreamRows]:
        """Return normalised rows with those rows minus the pre-bias."""
        return {name: StreamRows(x, (x - self.model.pre_bias[name]).detach()) for name, x in normalized.items()}

    def select(self, rows: Mapping[str, StreamRows], selection: str | None) -> list[SelectedStreams]:
        """Select the latents of normalised rows.

        The pre-activations, the one dense product of a step, are made outside the graph, for as many rows at a time
        as `max_preactivation_mb` holds. A selection concerns one row, so blocks of rows change nothing.
        """
        selection = selection or self.model.config.selection
        if selection not in ("global", "local"):
            raise ValueError(f'`selection` must be "global" or "local", but it is {selection!r}')
        groups = [list(rows)] if selection == "global" else [[name] for name in rows]
        at_once = rows_at_once(self.model, len(rows) + 1)  # and their sum
        blocks = zip(*(value.centered.split(at_once) for value in rows.values()), strict=True)
        scratch = self._scratch(rows, at_once)
        found = [self._select(dict(zip(rows, block, strict=True)), groups, scratch) for block in blocks]
        selected = []
        for names, parts in zip(groups, zip(*found, strict=True), strict=True):
            shared = self._joined([indices for indices, _ in parts])
            selected.append(SelectedStreams(names, shared, torch.cat([values for _, values in parts], dim=1)))
        return selected

    def encode(self, rows: Mapping[str, StreamRows], selected: Sequence[SelectedStreams]) -> list[EncodedStreams]:
        """Give what was selected of these rows its gradient, and bring it to codes.

        Raises:
            ValueError: where it was selected of other streams or another number of rows.
        """
        encoded = []
        for names, shared, gathered in selected:
            shapes = {name: len(rows[name].normalized) for name in names if name in rows}
            if shapes != dict.fromkeys(names, len(shared.indices)):
                raise ValueError(
                    f"`selected` is of {len(shared.indices)} rows of {names}, but the features are {shapes}; "
                    "give each micro-batch what `begin_step` returned for it"
                )
            values = [self._with_gradient(name, rows[name], shared, gathered[at]) for at, name in enumerate(names)]
            encoded.append(EncodedStreams(names, shared, torch.stack(values).relu()))
        return encoded

    def _joined(self, indices: list[Tensor]) -> Selection:
        return Selection(indices[0] if len(indices) == 1 else torch.cat(indices), self.model.config.num_latents)

    @torch.no_grad()
    def _select(
        self, centered: Mapping[str, Tensor], groups: Sequence[list[str]], scratch: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return, per group, the latents [batch, k] and the streams' pre-activations there [streams, batch, k]."""
        dense = {name: self._preactivations(name, value, scratch.get(name)) for name, value in centered.items()}
        return [top_k([dense[name] for name in names], self.model.config.k) for names in groups]

    def _preactivations(self, name: str, centered: Tensor, scratch: Tensor | None = None) -> Tensor:
        weight, bias = self.model.encoders[name].weight, self.model.encoders[name].bias
        if scratch is None:
            return F.linear(centered, weight, bias)
        return torch.addmm(bias, centered, weight.t(), out=scratch[: len(centered)])

    def _scratch(self, rows: Mapping[str, StreamRows], at_once: int) -> dict[str, Tensor]:
        """Return stream -> [rows, N] to make one block's pre-activations in after the other.

        On a CPU fresh memory of that size costs a quarter of the product. Autocast has no such form of the product.
        """
        if self.model.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return {}
        return {
            name: value.centered.new_empty(min(at_once, len(value.centered)), self.model.config.num_latents)
            for name, value in rows.items()
        }

    def _terms(self, parameter: str) -> list[GradientTerm] | None:
        return None if self.model.gradient_terms is None else self.model.gradient_terms.setdefault(parameter, [])

    def _with_gradient(self, name: str, rows: StreamRows, selection: Selection, gathered: Tensor) -> Tensor:
        encoder = self.model.encoders[name]
        return gather_preactivations(
            rows.normalized,
            encoder.weight,
            encoder.bias,
            self.model.pre_bias[name],
            rows.centered,
            gathered,
            selection,
            self._terms(f"encoders.{name}.weight"),
        )

    def _decode_errors(
        self, name: str, values: Tensor, selection: Selection, rows: Tensor, centered: Tensor
    ) -> tuple[Tensor, Tensor]:
        terms = self._terms(f"atoms.{name}")
        return decode_errors(
            values, self.model.atoms[name], self.model.pre_bias[name], rows, centered, selection, terms
        )

    def errors(
        self, rows: Mapping[str, StreamRows], groups: Sequence[EncodedStreams]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
        """Return target -> source -> squared errors [batch], and reconstruction minus rows [batch, hidden_size]."""
        errors, residuals = {}, {}
        # A run without the cross term has no use for the other pairs while it trains.
        only_own = self.model.training and self.model.config.cross_coef == 0
        for target, value in rows.items():
            errors[target], residuals[target] = {}, {}
            for names, selection, values in groups:
                if only_own and target not in names:
                    continue
                if only_own:
                    at = names.index(target)
                    names, values = [target], values[at : at + 1]
                found = self._decode_errors(target, values, selection, value.normalized, value.centered)
                errors[target].update(zip(names, found[0].unbind(), strict=True))
                residuals[target].update(zip(names, found[1].unbind(), strict=True))
        return errors, residuals

    def auxiliary(
        self, rows: Mapping[str, StreamRows], residuals: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return stream -> squared errors of the largest dead pre-activations, decoded, and their target's energy.

        The target is what the stream's own code leaves over, x - x^ + b.
        """
        found = {}
        for name in rows if self.model.config.auxk > 0 else ():
            selection, gathered, any_dead = self._select_dead(name, rows[name].centered)
            if selection is None:
                continue
            values = self._with_gradient(name, rows[name], selection, gathered).relu().unsqueeze(0)
            left = -residuals[name][name]
            target = left + self.model.pre_bias[name].detach()
            errors = self._decode_errors(name, values, selection, target, left)[0][0]
            # Nothing dead gives a term of 0, with a gradient of 0.
            found[name] = errors, row_energy(target) * any_dead
        return found

    @torch.no_grad()
    def _select_dead(self, name: str, centered: Tensor) -> tuple[Selection | None, Tensor, Tensor | float]:
        """Select the `auxk` largest dead pre-activations (or as many as there are); say whether anything is dead."""
        dead = self.model.dead_latents(name)
        on_host = self.model.finds_dead_on_host
        if self.model.device.type == "cpu" if on_host is None else on_host:
            latents = dead.nonzero().squeeze(-1)
            if not len(latents):
                return None, centered, 0.0
            weight, bias = self.model.encoders[name].weight[latents], self.model.encoders[name].bias[latents]
            count = min(self.model.config.auxk, len(latents))
            blocks = centered.split(rows_at_once(self.model, 2))
            found = [top_k([F.linear(block, weight, bias)], count) for block in blocks]
            selection, any_dead = self._joined([latents[best] for best, _ in found]), 1.0
        else:
            # Where fewer are dead, the rest of the selection is -inf: no value, no gradient.
            found = [
                top_k([self._preactivations(name, block).masked_fill(~dead, -torch.inf)], self.model.config.auxk)
                for block in centered.split(rows_at_once(self.model, 2))
            ]
            selection, any_dead = self._joined([best for best, _ in found]), dead.any()
        return selection, torch.cat([values[0] for _, values in found]), any_dead


def rows_at_once(model: Any, arrays: int) -> int:
    """Return how many rows `arrays` arrays of N numbers a row have in the memory a model may take."""
    bytes_per_row = 4 * model.config.num_latents * arrays
    most = ROWS_PER_PRODUCT if model.device.type == "cpu" else 2**31
    return max(1, min(most, int(model.max_preactivation_mb * 2**20) // bytes_per_row))


def codes_of(groups: Sequence[EncodedStreams], num_latents: int) -> dict[str, SparseCodes]:
    return {
        name: SparseCodes(selection.indices, value, num_latents)
        for names, selection, values in groups
        for name, value in zip(names, values.unbind(), strict=True)
    }
