"""SparcModel: several streams of frozen features, one sparse code space (SPARC, arXiv 2507.06265)."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME

from .buffers_sparc import FeatureStatistics, StepCounters
from .checks_sparc import reject_loading_faults, reject_missing_streams, reject_rows, reject_shape
from .configuration_sparc import SparcConfig
from .encoder_usae import usae_encoder, usae_preactivations
from .objectives_sparc import sparc_losses
from .objectives_usae import UsaeSettings, usae_losses, usae_source_loss
from .outputs_sparc import SparcOutput, SparseCodes
from .sparse_ops import (
    GradientTerm,
    Selection,
    normalize_rows,
    row_energy,
    sparse_decode,
    unit_norm,
    unit_norm_,
)
from .step_sparc import SelectedStreams, SparcStep, codes_of, rows_at_once
from .weights_sparc import DOWNLOAD_ARGUMENTS, WeightFiles, finish_saving, reject_unusable_numbers, stamps_of

__all__ = ["SparcModel", "SparcOutput", "SparseCodes"]

REINITIALIZED_STD = 0.01
# Arguments of `save_pretrained` that are for the Hub.
PUSH_ARGUMENTS = ("commit_message", "create_pr", "max_shard_size", "private", "revision", "tags", "token")


class SparcModel(PreTrainedModel):
    """Encoders, atoms and biases of every stream over one space of `config.num_latents` latents.

    Parameters per stream: `encoders.<stream>.weight` [N, d] and `.bias` [N], `atoms.<stream>` [N, d] with one unit
    row per latent, `pre_bias.<stream>` [d]; buffer `steps_since_fired.<stream>` int64 [N]. With `objective="usae"`
    also the batch norm `encoder_norm.<stream>` over N, and atoms of any norm.

    Attributes:
        counter_group: process group over which training steps agree on what fired, and on the statistics of batch
            norms; None keeps both local.
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
        try:
            self._make_parameters(config)
        except RuntimeError as error:  # torch's, for more than the machine has
            gigabytes = 8 * config.num_latents * sum(config.hidden_sizes.values()) / 1e9
            raise ValueError(
                f"a model of {config.num_latents:,} latents over streams {config.hidden_sizes} takes "
                f"{gigabytes:,.1f} GB for its weights, which cannot be had here; choose fewer `num_latents`"
            ) from error
        self.counter_group: Any = None
        self.max_preactivation_mb: float = 1024
        self.gradient_terms: dict[str, list[GradientTerm]] | None = None
        self.finds_dead_on_host: bool | None = None
        self.post_init()

    def _make_parameters(self, config: SparcConfig) -> None:
        latents, sizes = config.num_latents, config.hidden_sizes
        self.encoders = nn.ModuleDict({name: nn.Linear(size, latents) for name, size in sizes.items()})
        self.atoms = nn.ParameterDict([(name, torch.empty(latents, size)) for name, size in sizes.items()])
        self.pre_bias = nn.ParameterDict([(name, torch.empty(size)) for name, size in sizes.items()])
        # Universal Sparse Autoencoders have a batch norm after the encoder, and no pre-bias: theirs stays zero.
        self.encoder_norm = nn.ModuleDict({name: nn.BatchNorm1d(latents) for name in sizes if self._is_usae})
        for bias in self.pre_bias.values() if self._is_usae else ():
            bias.requires_grad_(False)
        self.steps_since_fired = StepCounters(config.stream_names, latents)
        self.feature_statistics = FeatureStatistics(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for every module that owns tensors, in the order they were made: encoders first,
        # so that the atoms can start as the encoder rows brought to unit norm.
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            # Mean 0, variance 1, no batches seen.
            module.reset_running_stats()
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

        Weights come from safetensors files only. `verify=False` skips comparing the files' SHA-256 with those in
        config.json, which models saved by older versions have not, and looking for NaN and infinite numbers.

        Raises:
            ValueError: where a folder does not exist, a weight file is not the one that was saved, the checkpoint
                lacks a tensor, has one too many or one of another shape or number type, or was written in a newer
                format; loading never fills a gap with fresh values.
        """
        wants_info, verify = kwargs.pop("output_loading_info", False), kwargs.pop("verify", True)
        path = str(pretrained_model_name_or_path)
        if path.startswith((".", "~", os.sep)) and not os.path.isdir(path):
            raise ValueError(
                f"there is no folder `{path}`; give the folder of a saved model, or a Hub id `owner/name`"
            )
        if pretrained_model_name_or_path is not None:
            download = {name: kwargs[name] for name in DOWNLOAD_ARGUMENTS if name in kwargs}
            try:
                saved: Any = SparcConfig.from_pretrained(path, **download)
            except OSError as error:  # of a Hub that cannot be reached, the library does not say for what
                raise OSError(f"the config of the model `{path}` cannot be read: {error}") from error
            with torch.device("meta"):
                expected = cls(saved)
            WeightFiles(path, kwargs.get("variant"), **download).check(saved, expected, verify)
            kwargs.pop("force_download", None)
        model, info = super().from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            pretrained_model_name_or_path,  # pyright: ignore[reportArgumentType]
            *args,
            output_loading_info=True,
            **{**kwargs, "ignore_mismatched_sizes": True, "use_safetensors": True},
        )
        reject_loading_faults(info, path)
        if verify:
            reject_unusable_numbers(model)
        # They are of the saved weights, which this model may leave behind.
        model.config.weights_sha256 = None
        return (model, info) if wants_info else model  # pyright: ignore[reportReturnType]

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save a model; see `PreTrainedModel.save_pretrained` for the arguments.

        Raises:
            ValueError: where the weights are of several number types, which one config.json cannot say.
        """
        folder = Path(save_directory)
        tensors = (kwargs.get("state_dict") or self.state_dict()).values()
        if len(types := {str(value.dtype) for value in tensors if value.is_floating_point()}) > 1:
            raise ValueError(f"a model is saved in one number type, but it has {sorted(types)}; call e.g. `float()`")
        before = stamps_of(folder)
        # Until its weights lie beside it, config.json says that they do not.
        self.config.weights_sha256 = {}
        try:
            super().save_pretrained(folder, *args, **kwargs)
            if checksums := finish_saving(folder, before):
                self.config.weights_sha256 = checksums
                self.config.to_json_file(folder / CONFIG_NAME)
        finally:
            self.config.weights_sha256 = None
        if push_to_hub:
            options = {name: kwargs[name] for name in PUSH_ARGUMENTS if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id", folder.name), **options)

    def forward(
        self,
        features: Mapping[str, Tensor],
        selection: str | None = None,
        new_step: bool = True,
        source: str | None = None,
        selected: Sequence[SelectedStreams] | None = None,
    ) -> SparcOutput:
        """Encode all given streams, decode every code to every given stream, and return the losses.

        Args:
            features: stream -> raw feature rows, float [batch, hidden_size]; in training every stream is needed.
            selection: "global" or "local" in place of the config's.
            new_step: in training, whether the dead counters advance; False for all but the first micro-batch of a
                gradient-accumulation step, in which they only note what fired. The auxiliary term of a micro-batch
                then knows of those before it alone; `begin_step` makes it that of the whole batch.
            source: with `objective="usae"`, the one stream whose code is decoded, as in a training step of its paper;
                every stream in turn by default. That objective makes the gradients of whatever asks for one in this
                very pass, for `loss` alone, and they serve one `backward`.
            selected: what `begin_step` gave for these features, with the selection chosen there; nothing is selected
                or counted again.

        Raises:
            ValueError: for unknown or missing streams, wrong widths, an empty batch, rows that hold NaN or infinity,
                rows that are all zero after normalisation (their relative error is undefined), or `selected` of
                other features.
        """
        if self.training:
            reject_missing_streams(features, self.config.stream_names)
        if self._is_usae:
            return self._usae_forward(features, new_step, source)
        step = SparcStep(self)
        rows = step.rows(self._normalized_rows(features, reject_zero_rows=True))
        groups = step.encode(rows, step.select(rows, selection) if selected is None else selected)
        codes = codes_of(groups, self.config.num_latents)
        if self.training and selected is None:
            self._update_counters([codes], new_step)
        errors, residuals = step.errors(rows, groups)
        losses = sparc_losses(
            {name: row_energy(value.normalized) for name, value in rows.items()},
            errors,
            step.auxiliary(rows, residuals),
            cross_coef=float(self.config.cross_coef),
            auxk_coef=float(self.config.auxk_coef),
        )
        reconstructions = None
        if not self.training:
            reconstructions = {
                target: {source: rows[target].normalized + residual for source, residual in sources.items()}
                for target, sources in residuals.items()
            }
        return SparcOutput(loss=losses.pop("loss"), losses=losses, codes=codes, reconstructions=reconstructions)

    @torch.no_grad()
    def begin_step(
        self, micro_batches: Iterable[Mapping[str, Tensor]], selection: str | None = None
    ) -> list[list[SelectedStreams]]:
        """Select the latents of all micro-batches of a training step, and count the step.

        The auxiliary term needs to know which latents are dead once the whole step is counted, so that accumulated
        gradients are those of the whole batch. Selecting is the one dense product of a forward pass, which is then
        not made again. In evaluation mode nothing is counted.

        Args:
            micro_batches: as `forward` takes one, each with every stream; taken one at a time.
            selection: "global" or "local" in place of the config's.

        Returns:
            For each, what `forward` takes as `selected`: latents and pre-activations, no rows.

        Raises:
            ValueError: with `objective="usae"`, whose codes depend on the micro-batch; for no micro-batches; or as
                `forward`.
        """
        if self._is_usae:
            raise ValueError(
                '`objective="usae"` has no auxiliary term of dead latents; call the model with `new_step`'
            )
        pairs = [self._select_rows(features, selection) for features in micro_batches]
        if not pairs:
            raise ValueError("a training step needs at least one micro-batch, but there is none")
        if self.training:
            self._update_counters([codes for _, codes in pairs], new_step=True)
        return [selected for selected, _ in pairs]

    def _select_rows(
        self, features: Mapping[str, Tensor], selection: str | None
    ) -> tuple[list[SelectedStreams], dict[str, SparseCodes]]:
        reject_missing_streams(features, self.config.stream_names)
        step = SparcStep(self)
        rows = step.rows(self._normalized_rows(features, reject_zero_rows=True))
        selected = step.select(rows, selection)
        return selected, codes_of(step.encode(rows, selected), self.config.num_latents)

    def encode(self, features: Mapping[str, Tensor], selection: str | None = None) -> dict[str, SparseCodes]:
        """Encode any subset of the streams.

        With global selection the given streams choose their latents together, so a stream's code depends on which
        others are given; encode it alone for the code it has when it stands alone. The model stays as it is, in
        training mode too: batch norms use the statistics they have kept, so that a code never depends on its batch.

        Args:
            features: stream -> raw feature rows, float [batch, hidden_size].
            selection: "global" or "local" in place of the config's.

        Returns:
            stream -> SparseCodes with indices and values [batch, k].

        Raises:
            ValueError: for unknown streams, wrong widths, an empty batch, or rows that hold NaN or infinity.
        """
        if self._is_usae:
            rows = self._normalized_rows(features)
            return {name: self._usae_encode(name, value) for name, value in rows.items()}
        step = SparcStep(self)
        rows = step.rows(self._normalized_rows(features))
        return codes_of(step.encode(rows, step.select(rows, selection)), self.config.num_latents)

    def preactivations(self, stream: str, features: Tensor, latents: Tensor) -> Tensor:
        """Return pre-activations of chosen latents, [batch, len(latents)], differentiable in the features.

        With `objective="usae"` they are taken behind the batch norm.

        Args:
            stream: the stream.
            features: its raw rows, float [batch, hidden_size].
            latents: int64 [latents].

        Raises:
            ValueError: as `encode`.
        """
        self.config.stream(stream)
        rows, latents = self._normalized_stream(stream, features, reject_zero_rows=False), latents.to(self.device)
        encoder = self._encoder(stream)
        if self._is_usae:
            return usae_preactivations(rows, encoder, self._norm(stream), latents)
        return nn.functional.linear(rows - self.pre_bias[stream], encoder.weight[latents], encoder.bias[latents])

    def decode(self, codes: SparseCodes, to: str) -> Tensor:
        """Decode codes of any stream to normalised rows [batch, hidden_size] of stream `to`.

        Raises:
            ValueError: for an unknown stream, or codes of another number of latents.
        """
        self.config.stream(to)
        if codes.num_latents != self.config.num_latents:
            raise ValueError(f"the codes have {codes.num_latents} latents but the model has {self.config.num_latents}")
        selection = Selection(codes.indices.to(self.device), codes.num_latents)
        return sparse_decode(codes.values.to(self.device), self.decoding_atoms(to), selection) + self.pre_bias[to]

    def decoding_atoms(self, stream: str) -> Tensor:
        """Return a stream's atoms as `decode` uses them, [N, hidden_size]: of unit norm with `objective="usae"`."""
        return unit_norm(self.atoms[stream]) if self._is_usae else self.atoms[stream]

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
        if self._is_usae:  # which brings its atoms to unit norm at every use
            return
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

    @property
    def _is_usae(self) -> bool:
        return self.config.objective == "usae"

    def _usae_encode(self, name: str, rows: Tensor) -> SparseCodes:
        positive = usae_preactivations(rows, self._encoder(name), self._norm(name)).relu()
        top = positive.topk(self.config.k, dim=-1)
        return SparseCodes(top.indices, top.values, self.config.num_latents)

    def _usae_forward(self, features: Mapping[str, Tensor], new_step: bool, source: str | None) -> SparcOutput:
        rows = self._normalized_rows(features)
        sources = list(rows) if source is None else [source]
        if unknown := [name for name in sources if name not in rows]:
            raise ValueError(f"`source` must be one of the given streams {list(rows)}, but it is {unknown[0]!r}")
        config = self.config
        # Pre-activations, their gradient, and what either takes in half precision.
        at_once = rows_at_once(self, arrays=3)
        settings = UsaeSettings(config.k, config.auxk, float(config.auxk_coef), config.distance, at_once)
        atoms = {name: self.atoms[name] for name in rows}
        found = {}
        for name in sources:
            weight, bias = usae_encoder(rows[name], self._encoder(name), self._norm(name), self.counter_group)
            found[name] = usae_source_loss(rows[name], weight, bias, rows, atoms, settings)
        codes = {name: SparseCodes(part.indices, part.values, config.num_latents) for name, part in found.items()}
        if self.training:
            self._update_counters([codes], new_step)
        losses = usae_losses(found)
        reconstructions = None
        if not self.training:
            reconstructions = {
                target: {name: self.decode(code, to=target) for name, code in codes.items()} for target in rows
            }
        return SparcOutput(loss=losses.pop("loss"), losses=losses, codes=codes, reconstructions=reconstructions)

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
        # Statistics are float32, whatever the weights are.
        rows = normalize_rows(raw, record["normalize"], self.feature_statistics.of(name)).to(raw.dtype)
        if checked and reject_zero_rows:
            reject_rows(~rows.any(dim=-1), name, "only zeros, so that its relative error is undefined")
        return rows

    def _encoder(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.encoders[name])

    def _norm(self, name: str) -> nn.BatchNorm1d:
        return cast(nn.BatchNorm1d, self.encoder_norm[name])

    def _update_counters(self, micro_batches: Sequence[Mapping[str, SparseCodes]], new_step: bool) -> None:
        threshold = float(self.config.dead_threshold)
        self.steps_since_fired.advance(micro_batches, threshold, new_step, self.counter_group)


SparcModel.register_for_auto_class("AutoModel")
