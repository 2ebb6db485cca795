"""SparcModel: several streams of frozen features, one sparse code space (SPARC, arXiv 2507.06265)."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from .buffers_sparc import FeatureStatistics, StepCounters
from .checks_sparc import reject_loading_faults, reject_rows, reject_shape
from .configuration_sparc import SparcConfig
from .objectives_sparc import sparc_losses
from .outputs_sparc import SparcOutput, SparseCodes
from .sparse_ops import (
    GradientTerm,
    Selection,
    decode_errors,
    gather_preactivations,
    normalize_rows,
    row_energy,
    sparse_decode,
    top_k,
    unit_norm,
    unit_norm_,
)

__all__ = ["SparcModel", "SparcOutput", "SparseCodes"]

REINITIALIZED_STD = 0.01
# Rows that a CPU multiplies at full speed; more at once only take memory.
ROWS_PER_PRODUCT = 512


class _Rows(NamedTuple):
    """A stream's normalised rows x and, outside the graph, x - b: both [batch, d]."""

    normalized: Tensor
    centered: Tensor


class _Encoded(NamedTuple):
    """Streams that share a selection, and their values [streams, batch, k]."""

    names: list[str]
    selection: Selection
    values: Tensor


class SparcModel(PreTrainedModel):
    """Encoders, atoms and biases of every stream over one space of `config.num_latents` latents.

    Parameters per stream: `encoders.<stream>.weight` [N, d] and `.bias` [N], `atoms.<stream>` [N, d] with one unit
    row per latent, `pre_bias.<stream>` [d]; buffer `steps_since_fired.<stream>` int64 [N].

    Attributes:
        counter_group: process group over which training steps agree on what fired; None keeps counters local.
        max_preactivation_mb: memory for pre-activations, in MiB; larger batches are encoded in blocks of rows.
        gradient_terms: parameter name -> list that a backward pass gives the gradient of `encoders.<stream>.weight`
            and `atoms.<stream>` to, in place of the dense `.grad`; None, the default, makes dense gradients.
        finds_dead_on_host: whether the auxiliary term may ask the device which latents are dead; otherwise it works
            on all latents, masked, so that the host never waits. None means: on a CPU only.
    """

    config_class = SparcConfig
    base_model_prefix = "sparc"
    main_input_name = "features"

    def __init__(self, config: SparcConfig):
        super().__init__(config)
        config.check()
        if not config.streams:
            raise ValueError('a SparcModel needs at least one stream, e.g. `streams={"dino": {"hidden_size": 768}}`')
        latents, sizes = config.num_latents, config.hidden_sizes
        self.encoders = nn.ModuleDict({name: nn.Linear(size, latents) for name, size in sizes.items()})
        self.atoms = nn.ParameterDict([(name, torch.empty(latents, size)) for name, size in sizes.items()])
        self.pre_bias = nn.ParameterDict([(name, torch.empty(size)) for name, size in sizes.items()])
        self.steps_since_fired = StepCounters(config.stream_names, latents)
        self.feature_statistics = FeatureStatistics(config)
        self.counter_group: Any = None
        self.max_preactivation_mb: float = 1024
        self.gradient_terms: dict[str, list[GradientTerm]] | None = None
        self.finds_dead_on_host: bool | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for every module that owns tensors, in the order they were made: encoders first,
        # so that the atoms can start as the encoder rows brought to unit norm.
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif module is self.atoms:
            for name, atoms in self.atoms.items():
                init.copy_(atoms, unit_norm(self._encoder(name).weight))
        elif module is self.pre_bias:
            for bias in self.pre_bias.values():
                init.zeros_(bias)
        elif isinstance(module, StepCounters):
            for counter in module.buffers():
                init.zeros_(counter)
        elif isinstance(module, FeatureStatistics):
            module.fill()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> "SparcModel":
        """Load a model; see `PreTrainedModel.from_pretrained` for the arguments.

        Raises:
            ValueError: where a folder does not exist, the checkpoint lacks a tensor, has one too many or one of
                another shape, or was written in a newer format; loading never fills a gap with fresh values.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        path = str(pretrained_model_name_or_path)
        if path.startswith((".", "~", os.sep)) and not os.path.isdir(path):
            raise ValueError(
                f"there is no folder `{path}`; give the folder of a saved model, or a Hub id `owner/name`"
            )
        model, info = super().from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            pretrained_model_name_or_path,  # pyright: ignore[reportArgumentType]
            *args,
            output_loading_info=True,
            **{**kwargs, "ignore_mismatched_sizes": True},
        )
        reject_loading_faults(info, path)
        return (model, info) if wants_info else model  # pyright: ignore[reportReturnType]

    def forward(
        self, features: Mapping[str, Tensor], selection: str | None = None, new_step: bool = True
    ) -> SparcOutput:
        """Encode all given streams, decode every code to every given stream, and return the losses.

        Args:
            features: stream -> raw feature rows, float [batch, hidden_size]; in training every stream is needed.
            selection: "global" or "local" in place of the config's.
            new_step: in training, whether the dead counters advance; False for all but the first micro-batch of a
                gradient-accumulation step, in which they only note what fired.

        Raises:
            ValueError: for unknown or missing streams, wrong widths, an empty batch, rows that hold NaN or infinity,
                or rows that are all zero after normalisation (their relative error is undefined).
        """
        if self.training and (missing := [name for name in self.config.stream_names if name not in features]):
            raise ValueError(f"training needs every stream of the model, but {missing} are missing from `features`")
        rows = self._rows(features, reject_zero_rows=True)
        groups = self._encode(rows, selection)
        codes = _codes_of(groups, self.config.num_latents)
        if self.training:
            self._update_counters(codes, new_step)
        errors, residuals = self._errors(rows, groups)
        losses = sparc_losses(
            {name: row_energy(value.normalized) for name, value in rows.items()},
            errors,
            self._auxiliary(rows, residuals),
            cross_coef=self.config.cross_coef,
            auxk_coef=self.config.auxk_coef,
        )
        reconstructions = None
        if not self.training:
            reconstructions = {
                target: {source: rows[target].normalized + residual for source, residual in sources.items()}
                for target, sources in residuals.items()
            }
        return SparcOutput(loss=losses.pop("loss"), losses=losses, codes=codes, reconstructions=reconstructions)

    def encode(self, features: Mapping[str, Tensor], selection: str | None = None) -> dict[str, SparseCodes]:
        """Encode any subset of the streams.

        With global selection the given streams choose their latents together, so a stream's code depends on which
        others are given; encode it alone for the code it has when it stands alone.

        Args:
            features: stream -> raw feature rows, float [batch, hidden_size].
            selection: "global" or "local" in place of the config's.

        Returns:
            stream -> SparseCodes with indices and values [batch, k].

        Raises:
            ValueError: for unknown streams, wrong widths, an empty batch, or rows that hold NaN or infinity.
        """
        return _codes_of(self._encode(self._rows(features), selection), self.config.num_latents)

    def decode(self, codes: SparseCodes, to: str) -> Tensor:
        """Decode codes of any stream to normalised rows [batch, hidden_size] of stream `to`.

        Raises:
            ValueError: for an unknown stream, or codes of another number of latents.
        """
        self.config.stream(to)
        if codes.num_latents != self.config.num_latents:
            raise ValueError(f"the codes have {codes.num_latents} latents but the model has {self.config.num_latents}")
        selection = Selection(codes.indices.to(self.device), codes.num_latents)
        return sparse_decode(codes.values.to(self.device), self.atoms[to], selection) + self.pre_bias[to]

    def normalize(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows the losses are measured on: raw features normalised as the stream records say."""
        return self._normalized_rows(features)

    def dead_latents(self, stream: str) -> Tensor:
        """Return bool [N]: which latents have not fired in `stream` for more than `dead_after_steps` steps."""
        self.config.stream(stream)
        return getattr(self.steps_since_fired, stream) > self.config.dead_after_steps

    def prepare_atoms_for_step(self) -> None:
        """Bring atoms to unit norm, then take from their gradients the part along the atom.

        The earlier code does both between backward and the optimizer's step, so that is where the training loop
        calls this; the gradient was taken at the atoms before the division.
        """
        with torch.no_grad():
            for atoms in self.atoms.values():
                unit_norm_(atoms, atoms.grad)

    @torch.no_grad()
    def reinitialize_dead_latents(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw the encoder rows of dead latents from N(0, 0.01^2), and set their bias and counter to zero.

        Atoms and the optimizer's moments stay, as in the earlier code.

        Args:
            generator: CPU generator to draw from; the same draws are made on every device and process.

        Returns:
            stream -> int64 scalar, the number of latents drawn again.
        """
        counts = {}
        for name in self.config.stream_names:
            dead = self.dead_latents(name)
            counts[name] = dead.sum()
            encoder, counter = self._encoder(name), getattr(self.steps_since_fired, name)
            latents = dead.nonzero().squeeze(-1)
            fresh = torch.randn(latents.numel(), encoder.weight.shape[1], generator=generator) * REINITIALIZED_STD
            encoder.weight[latents] = fresh.to(encoder.weight)
            encoder.bias[latents] = 0
            counter[latents] = 0
        return counts

    def _rows(self, features: Mapping[str, Tensor], reject_zero_rows: bool = False) -> dict[str, _Rows]:
        rows = self._normalized_rows(features, reject_zero_rows)
        return {name: _Rows(value, (value - self.pre_bias[name]).detach()) for name, value in rows.items()}

    def _normalized_rows(self, features: Mapping[str, Tensor], reject_zero_rows: bool = False) -> dict[str, Tensor]:
        names = self.config.stream_names
        if not isinstance(features, Mapping) or not features:
            raise ValueError(f"`features` must map stream names to tensors, for at least one of the streams {names}")
        if unknown := [name for name in features if name not in names]:
            raise ValueError(f"unknown streams {unknown}; this model has the streams {names}")
        rows = {}
        for name in names:
            if name in features:
                rows[name] = self._normalized_stream(name, features[name], reject_zero_rows)
        sizes = {name: value.shape[0] for name, value in rows.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"all streams must have the same rows, but their batch sizes are {sizes}")
        return rows

    def _normalized_stream(self, name: str, raw: Tensor, reject_zero_rows: bool) -> Tensor:
        record = self.config.stream(name)
        reject_shape(raw, name, record["hidden_size"])
        raw = raw.to(device=self.device, dtype=self.pre_bias[name].dtype)
        # Reading a verdict back stalls a GPU, so training there leaves it to the loop, which watches the losses.
        checked = raw.device.type == "cpu" or not self.training
        # A sum is finite only where every value is, and takes one pass.
        if checked and not raw.sum().isfinite():
            reject_rows(~raw.isfinite().all(dim=-1), name, "NaN or infinite values")
        rows = normalize_rows(raw, record["normalize"], self.feature_statistics.of(name))
        if checked and reject_zero_rows:
            reject_rows(~rows.any(dim=-1), name, "only zeros, so that its relative error is undefined")
        return rows

    def _encoder(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.encoders[name])

    def _encode(self, rows: Mapping[str, _Rows], selection: str | None) -> list[_Encoded]:
        """Encode normalised rows.

        The pre-activations, the one dense product of a step, are made outside the graph, for as many rows at a time
        as `max_preactivation_mb` holds. A selection concerns one row, so blocks of rows change nothing.
        """
        selection = selection or self.config.selection
        if selection not in ("global", "local"):
            raise ValueError(f'`selection` must be "global" or "local", but it is {selection!r}')
        groups = [list(rows)] if selection == "global" else [[name] for name in rows]
        at_once = self._rows_at_once(len(rows))
        blocks = zip(*(value.centered.split(at_once) for value in rows.values()), strict=True)
        scratch = self._scratch(rows, at_once)
        found = [self._select(dict(zip(rows, block, strict=True)), groups, scratch) for block in blocks]
        encoded = []
        for names, parts in zip(groups, zip(*found, strict=True), strict=True):
            shared = self._joined([indices for indices, _ in parts])
            gathered = torch.cat([values for _, values in parts], dim=1)
            values = [self._with_gradient(name, rows[name], shared, gathered[at]) for at, name in enumerate(names)]
            encoded.append(_Encoded(names, shared, torch.stack(values).relu()))
        return encoded

    def _rows_at_once(self, arrays: int) -> int:
        """Rows whose pre-activations of `arrays` streams, and their sum, fit into the budget."""
        bytes_per_row = 4 * self.config.num_latents * (arrays + 1)
        most = ROWS_PER_PRODUCT if self.device.type == "cpu" else 2**31
        return max(1, min(most, int(self.max_preactivation_mb * 2**20) // bytes_per_row))

    def _joined(self, indices: list[Tensor]) -> Selection:
        return Selection(indices[0] if len(indices) == 1 else torch.cat(indices), self.config.num_latents)

    @torch.no_grad()
    def _select(
        self, centered: Mapping[str, Tensor], groups: Sequence[list[str]], scratch: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return, per group, the latents [batch, k] and the streams' pre-activations there [streams, batch, k]."""
        dense = {name: self._preactivations(name, value, scratch.get(name)) for name, value in centered.items()}
        return [top_k([dense[name] for name in names], self.config.k) for names in groups]

    def _preactivations(self, name: str, centered: Tensor, scratch: Tensor | None = None) -> Tensor:
        weight, bias = self._encoder(name).weight, self._encoder(name).bias
        if scratch is None:
            return F.linear(centered, weight, bias)
        return torch.addmm(bias, centered, weight.t(), out=scratch[: len(centered)])

    def _scratch(self, rows: Mapping[str, _Rows], at_once: int) -> dict[str, Tensor]:
        """Return stream -> [rows, N] to make one block's pre-activations in after the other.

        On a CPU fresh memory of that size costs a quarter of the product. Autocast has no such form of the product.
        """
        if self.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return {}
        return {
            name: value.centered.new_empty(min(at_once, len(value.centered)), self.config.num_latents)
            for name, value in rows.items()
        }

    def _terms(self, parameter: str) -> list[GradientTerm] | None:
        return None if self.gradient_terms is None else self.gradient_terms.setdefault(parameter, [])

    def _with_gradient(self, name: str, rows: _Rows, selection: Selection, gathered: Tensor) -> Tensor:
        encoder = self._encoder(name)
        return gather_preactivations(
            rows.normalized,
            encoder.weight,
            encoder.bias,
            self.pre_bias[name],
            rows.centered,
            gathered,
            selection,
            self._terms(f"encoders.{name}.weight"),
        )

    def _decode_errors(
        self, name: str, values: Tensor, selection: Selection, rows: Tensor, centered: Tensor
    ) -> tuple[Tensor, Tensor]:
        terms = self._terms(f"atoms.{name}")
        return decode_errors(values, self.atoms[name], self.pre_bias[name], rows, centered, selection, terms)

    def _errors(
        self, rows: Mapping[str, _Rows], groups: Sequence[_Encoded]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
        """Return target -> source -> squared errors [batch], and reconstruction minus rows [batch, hidden_size]."""
        errors, residuals = {}, {}
        # A run without the cross term has no use for the other pairs while it trains.
        only_own = self.training and self.config.cross_coef == 0
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

    def _auxiliary(
        self, rows: Mapping[str, _Rows], residuals: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return stream -> squared errors of the largest dead pre-activations, decoded, and their target's energy.

        The target is what the stream's own code leaves over, x - x^ + b.
        """
        found = {}
        for name in rows if self.config.auxk > 0 else ():
            selection, gathered, any_dead = self._select_dead(name, rows[name].centered)
            if selection is None:
                continue
            values = self._with_gradient(name, rows[name], selection, gathered).relu().unsqueeze(0)
            left = -residuals[name][name]
            target = left + self.pre_bias[name].detach()
            errors = self._decode_errors(name, values, selection, target, left)[0][0]
            # Nothing dead gives a term of 0, with a gradient of 0.
            found[name] = errors, row_energy(target) * any_dead
        return found

    @torch.no_grad()
    def _select_dead(self, name: str, centered: Tensor) -> tuple[Selection | None, Tensor, Tensor | float]:
        """Select the `auxk` largest dead pre-activations (or as many as there are); say whether anything is dead."""
        dead = self.dead_latents(name)
        on_host = self.finds_dead_on_host
        if self.device.type == "cpu" if on_host is None else on_host:
            latents = dead.nonzero().squeeze(-1)
            if not len(latents):
                return None, centered, 0.0
            weight, bias = self._encoder(name).weight[latents], self._encoder(name).bias[latents]
            count = min(self.config.auxk, len(latents))
            blocks = centered.split(self._rows_at_once(1))
            found = [top_k([F.linear(block, weight, bias)], count) for block in blocks]
            selection, any_dead = self._joined([latents[best] for best, _ in found]), 1.0
        else:
            # Where fewer are dead, the rest of the selection is -inf: no value, no gradient.
            found = [
                top_k([self._preactivations(name, block).masked_fill(~dead, -torch.inf)], self.config.auxk)
                for block in centered.split(self._rows_at_once(1))
            ]
            selection, any_dead = self._joined([best for best, _ in found]), dead.any()
        return selection, torch.cat([values[0] for _, values in found]), any_dead

    @torch.no_grad()
    def _update_counters(self, codes: Mapping[str, SparseCodes], new_step: bool) -> None:
        """Advance the counters; a latent that fired restarts at 1, as in the earlier code."""
        fired = torch.zeros(len(codes), self.config.num_latents, dtype=torch.uint8, device=self.device)
        for row, code in zip(fired, codes.values(), strict=True):
            active = (code.values > self.config.dead_threshold).to(torch.uint8).reshape(-1)
            row.scatter_reduce_(0, code.indices.reshape(-1), active, reduce="amax")
        if self.counter_group is not None:
            torch.distributed.all_reduce(fired, op=torch.distributed.ReduceOp.MAX, group=self.counter_group)
        for row, name in zip(fired, codes, strict=True):
            counter = getattr(self.steps_since_fired, name)
            counter.copy_(torch.where(row > 0, 1, counter + int(new_step)))


def _codes_of(groups: Sequence[_Encoded], num_latents: int) -> dict[str, SparseCodes]:
    return {
        name: SparseCodes(selection.indices, value, num_latents)
        for names, selection, values in groups
        for name, value in zip(names, values.unbind(), strict=True)
    }


SparcModel.register_for_auto_class("AutoModel")
