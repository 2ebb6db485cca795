"""The SPARC objective from normalised rows to the loss, on the parameters of a model (arXiv 2507.06265)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .imputation import Imputation, ValueFit
from .outputs import SparcOutput, SparseCodes
from .present_rows import AloneRows, PresentRows
from .sparc_losses import sparc_losses
from .sparse_ops import (
    GradientTerm,
    Selection,
    decode_errors,
    gather_preactivations,
    preactivations_at,
    product_precision,
    row_energy,
    sum_alone_is_faster,
    sum_of,
    sum_of_products,
    top_k,
    top_latents,
    unit_norm_,
)

# Up to so many, the map that makes a stream alone cheap takes few megabytes and well under a second; beyond, it saves
# little.
LATENTS_OF_ONE_MAP = 8192


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


class SparcObjective:
    """What `objective="sparc"` means: see `UsaeObjective` for its sibling.

    From the rows x of every stream to the loss, in this order: x - b; the k latents where the pre-activations summed
    over streams are largest (global) or each stream's own are (local); codes, the pre-activations there, never
    negative; every code decoded to every stream; the auxiliary term of dead latents; `sparc_losses`. Gradients touch
    only what was selected.

    Attributes:
        has_encoder_norm: whether a batch norm follows the encoder, which takes the pre-bias's place.
        rejects_zero_rows: whether a row of zeros has no loss.
        knows_dead_latents: whether the loss depends on which latents are dead, so that a step of several
            micro-batches has to `begin` with all of them.
        selects_together: whether a stream's code depends on the other streams, so that a missing one is imputed.

    Args:
        model: a SparcModel; its parameters and settings are read, and its counters of steps advanced in training.
    """

    has_encoder_norm = False
    rejects_zero_rows = True  # its errors are relative
    knows_dead_latents = True
    selects_together = True

    def __init__(self, model: Any):
        self.model = model

    def encode(self, rows: Mapping[str, Tensor], selection: str | None) -> dict[str, SparseCodes]:
        """Return stream -> codes of normalised rows [batch, d]; nothing is counted."""
        return self.begin(rows, selection)[1]

    def encode_incomplete(
        self, rows: Mapping[str, Tensor], imputation: Imputation, names: Sequence[str], selection: str | None
    ) -> dict[str, SparseCodes]:
        """Return the codes of some streams where not all are given, the others imputed; nothing is counted.

        All streams select together, as in `encode`, given rows moved towards what they share with the others. A code's
        values start at the mean of the streams' pre-activations and are fitted to the rows of all (`ValueFit`).
        """
        complete = imputation.complete(rows)
        if (selection or self.model.config.selection) == "local":
            wanted = self._with_centered({name: complete[name] for name in names})
            return self._codes(self._encoded(wanted, self._selected(wanted, "local")))
        latents, start = self._selected_incomplete(rows, complete, imputation)
        centered = {name: x - self.model.pre_bias[name] for name, x in complete.items()}
        fit = ValueFit(start.relu(), centered, self.model.atoms, latents)
        steps, weight = imputation.settings["fit_steps"], imputation.settings["own_weight"]
        return {
            name: SparseCodes(latents.indices, fit.values_of(name, weight, steps), latents.num_latents)
            for name in names
        }

    def _selected_incomplete(
        self, rows: Mapping[str, Tensor], complete: Mapping[str, Tensor], imputation: Imputation
    ) -> tuple[Selection, Tensor]:
        """Return the latents all streams select together, and their mean pre-activation there, [batch, k]."""
        offsets, config = imputation.offsets_of(rows), self.model.config
        if config.num_latents > LATENTS_OF_ONE_MAP or self.model.training:  # where weights change all the time
            seen = self._with_centered({**complete, **imputation.shared_rows(rows)})
            names, latents, gathered = self._selected(seen, "global", offsets)[0]
        else:
            names, of_blocks = list(complete), []
            model = self.model
            for summed in imputation.summed_preactivations(
                rows, model.encoders, model.pre_bias, at_once=model.rows_at_once(2)
            ):
                chosen = top_latents([summed if offsets is None else summed.add_(offsets)], config.k)
                of_blocks.append((chosen, summed.gather(1, chosen)))
            latents = self._joined([chosen for chosen, _ in of_blocks])
            if not torch.is_grad_enabled():
                total = torch.cat([values for _, values in of_blocks])
                total = total if offsets is None else total - offsets[latents.indices]
                return latents, (total / len(names)).to(next(iter(rows.values())).dtype)
            seen = self._with_centered({**complete, **imputation.shared_rows(rows)})
            gathered = [
                preactivations_at(latents.indices, encoder.weight, encoder.bias, seen[name].centered)
                for name, encoder in self.model.encoders.items()
            ]
        values = [self._with_gradient(name, seen[name], latents, gathered[at]) for at, name in enumerate(names)]
        return latents, torch.stack(values).mean(dim=0)

    def begin(
        self, rows: Mapping[str, Tensor], selection: str | None
    ) -> tuple[list[SelectedStreams], dict[str, SparseCodes]]:
        """Select, and return what `losses` takes as `selected`, with the codes."""
        streams = self._with_centered(rows)
        selected = self._selected(streams, selection)
        return selected, self._codes(self._encoded(streams, selected))

    def losses(
        self,
        rows: Mapping[str, Tensor],
        selection: str | None,
        new_step: bool,
        source: str | None,
        selected: Sequence[SelectedStreams] | None,
        present: PresentRows | None = None,
        alone: AloneRows | None = None,
    ) -> SparcOutput:
        """Return losses and codes, and in evaluation mode reconstructions; `source` has no meaning here.

        Rows that lack streams have imputed ones there, by which they select; `present` says where that is.
        """
        streams = self._with_centered(rows)
        groups = self._encoded(streams, self._selected(streams, selection) if selected is None else selected)
        codes = self._codes(groups)
        if self.model.training and selected is None:
            self.model.count_step([codes if present is None else present.measured(codes)], new_step)
        errors, residuals = self._errors(streams, groups)
        losses = sparc_losses(
            {name: row_energy(x) for name, x in rows.items()},
            errors,
            self._auxiliary(streams, residuals),
            cross_coef=float(self.model.config.cross_coef),
            auxk_coef=float(self.model.config.auxk_coef),
            present=present,
        )
        if alone is not None:
            losses["alone"] = self._alone_error(rows, alone, present)
            losses["loss"] = losses["loss"] + alone.weight * losses["alone"]
        reconstructions = None
        if not self.model.training:
            reconstructions = {
                target: {source: rows[target] + residual for source, residual in sources.items()}
                for target, sources in residuals.items()
            }
        return SparcOutput(loss=losses.pop("loss"), losses=losses, codes=codes, reconstructions=reconstructions)

    def preactivations(self, stream: str, rows: Tensor, latents: Tensor) -> Tensor:
        """Return pre-activations of chosen latents, [batch, len(latents)], differentiable in the rows."""
        encoder = self.model.encoders[stream]
        return F.linear(rows - self.model.pre_bias[stream], encoder.weight[latents], encoder.bias[latents])

    def summed_preactivations(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over streams of the pre-activations of normalised rows, [batch, N]."""
        centered = self._with_centered(rows)
        return sum_of([self._preactivations(name, x.centered) for name, x in centered.items()])

    def unit_atoms(self, stream: str) -> Tensor:
        """Return a stream's atoms of unit norm [N, d], which these stay: `prepare_atoms_for_step` sees to it."""
        return self.model.atoms[stream]

    def prepare_atoms_for_step(self) -> None:
        """Bring atoms to unit norm, then take from their gradients the part along the atom."""
        with torch.no_grad():
            for atoms in self.model.atoms.values():
                unit_norm_(atoms, atoms.grad)

    def _with_centered(self, normalized: Mapping[str, Tensor]) -> dict[str, StreamRows]:
        """Return normalised rows with those rows minus the pre-bias."""
        return {name: StreamRows(x, (x - self.model.pre_bias[name]).detach()) for name, x in normalized.items()}

    def _codes(self, groups: Sequence[EncodedStreams]) -> dict[str, SparseCodes]:
        return {
            name: SparseCodes(selection.indices, value, self.model.config.num_latents)
            for names, selection, values in groups
            for name, value in zip(names, values.unbind(), strict=True)
        }

    def _selected(
        self, rows: Mapping[str, StreamRows], selection: str | None, offsets: Tensor | None = None
    ) -> list[SelectedStreams]:
        """Select the latents of normalised rows, by their summed pre-activations plus `offsets` [N].

        The pre-activations, the one dense product of a step, are made outside the graph, for as many rows at a time
        as `max_preactivation_mb` holds. A selection concerns one row, so blocks of rows change nothing.
        """
        config = self.model.config
        selection = selection or config.selection
        if selection not in ("global", "local"):
            raise ValueError(f'`selection` must be "global" or "local", but it is {selection!r}')
        if selection == "global" and sum_alone_is_faster(
            next(iter(rows.values())).centered, len(rows), config.num_latents, config.k
        ):
            return [self._selected_by_sum(rows, offsets)]
        groups = [list(rows)] if selection == "global" else [[name] for name in rows]
        at_once = self.model.rows_at_once(len(rows) + 1)  # and their sum
        blocks = zip(*(value.centered.split(at_once) for value in rows.values()), strict=True)
        scratch = self._scratch(rows, at_once)
        of_blocks = [self._select(dict(zip(rows, block, strict=True)), groups, scratch, offsets) for block in blocks]
        selected = []
        for names, of_group in zip(groups, zip(*of_blocks, strict=True), strict=True):
            shared = self._joined([indices for indices, _ in of_group])
            selected.append(SelectedStreams(names, shared, torch.cat([values for _, values in of_group], dim=1)))
        return selected

    @torch.no_grad()
    def _selected_by_sum(self, rows: Mapping[str, StreamRows], offsets: Tensor | None) -> SelectedStreams:
        """Select by the sum of all streams' pre-activations, and make each stream's own where selected only."""
        encoders = [self.model.encoders[name] for name in rows]
        centered = [value.centered for value in rows.values()]
        precision = product_precision(centered[0])
        # Under autocast they are rounded once for all blocks.
        weights = [encoder.weight.to(precision) for encoder in encoders]
        biases = [encoder.bias for encoder in encoders] + ([] if offsets is None else [offsets])
        bias = sum_of(biases).to(precision)
        at_once = self.model.rows_at_once(1)
        total = bias.new_empty(min(at_once, len(centered[0])), len(bias))
        blocks = zip(*(value.to(precision).split(at_once) for value in centered), strict=True)
        shared = self._joined(
            [top_latents([sum_of_products(bias, block, weights, total)], self.model.config.k) for block in blocks]
        )
        gathered = [
            preactivations_at(shared.indices, encoder.weight, encoder.bias, value)
            for encoder, value in zip(encoders, centered, strict=True)
        ]
        return SelectedStreams(list(rows), shared, torch.stack(gathered))

    def _encoded(self, rows: Mapping[str, StreamRows], selected: Sequence[SelectedStreams]) -> list[EncodedStreams]:
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
        self,
        centered: Mapping[str, Tensor],
        groups: Sequence[list[str]],
        scratch: Mapping[str, Tensor],
        offsets: Tensor | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return, per group, the latents [batch, k] and the streams' pre-activations there [streams, batch, k]."""
        dense = {name: self._preactivations(name, value, scratch.get(name)) for name, value in centered.items()}
        if offsets is None:
            return [top_k([dense[name] for name in names], self.model.config.k) for names in groups]
        # One more addend would be one more array; the first stream carries it, and gives it back.
        next(iter(dense.values())).add_(offsets)
        indices, gathered = top_k(list(dense.values()), self.model.config.k)
        gathered[0] -= offsets[indices]
        return [(indices, gathered)]

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

    def _errors(
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
                squared, left = self._decode_errors(target, values, selection, value.normalized, value.centered)
                errors[target].update(zip(names, squared.unbind(), strict=True))
                residuals[target].update(zip(names, left.unbind(), strict=True))
        return errors, residuals

    def _alone_error(self, rows: Mapping[str, Tensor], alone: AloneRows, present: PresentRows | None) -> Tensor:
        """Return the mean error of rows of which one stream is given alone and the others are imputed.

        The row's code is that of `encode_incomplete` before its values are fitted: the streams' mean pre-activation at
        the latents they select together. Its error is nmse(x^(s<-s), x_s) + cross_coef * mean_{t != s}
        nmse(x^(t<-s), x_t) over the streams t that the row has.
        """
        imputation: Imputation = self.model.imputation
        seen: dict[str, list[Tensor]] = {name: [] for name in rows}
        for name, row_numbers in alone.rows.items():
            given = {name: rows[name][row_numbers.to(rows[name].device, non_blocking=True)]}
            for stream, x in {**imputation.complete(given), **imputation.shared_rows(given)}.items():
                seen[stream].append(x)
        streams = self._with_centered({name: torch.cat(x) for name, x in seen.items()})
        (names, latents, gathered), *_ = self._selected(streams, "global")
        each = [self._with_gradient(name, streams[name], latents, gathered[at]) for at, name in enumerate(names)]
        values = torch.stack(each).mean(dim=0, keepdim=True).relu()
        row_numbers = torch.cat(list(alone.rows.values()))
        weights = self._alone_weights(alone, present, row_numbers)
        total = values.new_zeros(())
        for name, targets in self._with_centered(
            {name: x[row_numbers.to(x.device, non_blocking=True)] for name, x in rows.items()}
        ).items():
            errors = self._decode_errors(name, values, latents, targets.normalized, targets.centered)[0][0]
            ratios = errors / row_energy(targets.normalized)
            total = total + (ratios * weights[name].to(ratios, non_blocking=True)).sum()
        batch = len(next(iter(rows.values())))
        return total / (batch * alone.share)

    def _alone_weights(self, alone: AloneRows, present: PresentRows | None, row_numbers: Tensor) -> dict[str, Tensor]:
        """Return stream -> [rows], what its error counts in rows of which one stream is given."""
        counts = torch.tensor([len(numbers) for numbers in alone.rows.values()])
        own = {
            name: torch.tensor([name == given for given in alone.rows]).repeat_interleave(counts)
            for name in self.model.config.stream_names
        }
        there = {
            name: torch.ones_like(is_own) if present is None else present.has(name, row_numbers)
            for name, is_own in own.items()
        }
        others = torch.stack([there[name] & ~own[name] for name in own]).sum(dim=0).clamp(min=1)
        cross = float(self.model.config.cross_coef)
        return {name: torch.where(own[name], 1.0, cross * there[name] / others) for name in own}

    def _auxiliary(
        self, rows: Mapping[str, StreamRows], residuals: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return stream -> squared errors of the largest dead pre-activations, decoded, and their target's energy.

        The target is what the stream's own code leaves over, x - x^ + b.
        """
        terms = {}
        for name in rows if self.model.config.auxk > 0 else ():
            selection, gathered, any_dead = self._select_dead(name, rows[name].centered)
            if selection is None:
                continue
            values = self._with_gradient(name, rows[name], selection, gathered).relu().unsqueeze(0)
            left = -residuals[name][name]
            target = left + self.model.pre_bias[name].detach()
            errors = self._decode_errors(name, values, selection, target, left)[0][0]
            # Nothing dead gives a term of 0, with a gradient of 0.
            terms[name] = errors, row_energy(target) * any_dead
        return terms

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
            blocks = centered.split(self.model.rows_at_once(2))
            selected = [top_k([F.linear(block, weight, bias)], count) for block in blocks]
            selection, any_dead = self._joined([latents[best] for best, _ in selected]), 1.0
        else:
            # Where fewer are dead, the rest of the selection is -inf: no value, no gradient.
            selected = [
                top_k([self._preactivations(name, block).masked_fill(~dead, -torch.inf)], self.model.config.auxk)
                for block in centered.split(self.model.rows_at_once(2))
            ]
            selection, any_dead = self._joined([best for best, _ in selected]), dead.any()
        return selection, torch.cat([values[0] for _, values in selected]), any_dead
