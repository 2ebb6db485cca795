"""SparcModel: several streams of frozen features, one sparse code space (SPARC, arXiv 2507.06265)."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME

from .configuration_sparc import SparcConfig
from .imputation import Imputation
from .normalization import FeatureStatistics, normalized_rows, normalized_stream, reject_missing_streams
from .outputs import SparcOutput, SparseCodes
from .present_rows import AloneRows, PresentRows
from .sparc_objective import SelectedStreams, SparcObjective
from .sparse_ops import GradientTerm, Selection, sparse_decode, unit_norm
from .step_counters import StepCounters
from .usae_objective import UsaeObjective
from .weights import (
    DOWNLOAD_ARGUMENTS,
    WeightFiles,
    finish_saving,
    reject_loading_faults,
    reject_unusable_numbers,
    stamps_of,
    stays_float,
)

__all__ = ["SparcModel", "SparcOutput", "SparseCodes"]

OBJECTIVES = {"sparc": SparcObjective, "usae": UsaeObjective}
REINITIALIZED_STD = 0.01
# Rows that a CPU multiplies at full speed; more at once only take memory.
ROWS_PER_PRODUCT = 512
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
    # A rounded covariance is none.
    _keep_in_fp32_modules_strict = ("imputation",)  # pyright: ignore[reportAssignmentType]

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
        has_norm = OBJECTIVES[config.objective].has_encoder_norm
        self.encoders = nn.ModuleDict({name: nn.Linear(size, latents) for name, size in sizes.items()})
        self.atoms = nn.ParameterDict([(name, torch.empty(latents, size)) for name, size in sizes.items()])
        self.pre_bias = nn.ParameterDict([(name, torch.empty(size)) for name, size in sizes.items()])
        # Universal Sparse Autoencoders have a batch norm after the encoder, and no pre-bias: theirs stays zero.
        self.encoder_norm = nn.ModuleDict({name: nn.BatchNorm1d(latents) for name in sizes if has_norm})
        for bias in self.pre_bias.values() if has_norm else ():
            bias.requires_grad_(False)
        self.steps_since_fired = StepCounters(config.stream_names, latents)
        self.feature_statistics = FeatureStatistics(config)
        self.imputation = None if config.imputation is None else Imputation(config)

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
        elif isinstance(module, FeatureStatistics | Imputation):
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
        tensors = kwargs.get("state_dict") or self.state_dict()
        floats = [
            value.dtype for name, value in tensors.items() if value.is_floating_point() and not stays_float(name)
        ]
        if len(types := {str(dtype) for dtype in floats}) > 1:
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
        present: PresentRows | None = None,
        alone: AloneRows | None = None,
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
            present: which rows have which streams, where not all have all. What stands in a row in place of a stream
                it lacks is ignored; the row selects by its imputed streams, and no loss is measured on them.
            alone: rows of which, beside, one stream alone is given, the others imputed, and its code is to reconstruct
                all streams the row has (the term "alone").

        Raises:
            ValueError: for unknown or missing streams, wrong widths, an empty batch, rows that hold NaN or infinity,
                rows that are all zero after normalisation (their relative error is undefined), or `selected` of
                other features; for `present` or `alone` where the model has no statistics of its streams.
        """
        if self.training or present is not None or alone is not None:
            reject_missing_streams(features, self.config.stream_names)
        if alone is not None:
            self._imputation_of("impute")
        rows = self._rows_of_loss(features, present)
        return self.objective.losses(rows, selection, new_step, source, selected, present, alone)

    def _rows_of_loss(self, features: Mapping[str, Tensor], present: PresentRows | None) -> dict[str, Tensor]:
        """Return normalised rows, of all streams where some rows lack some, which are imputed there."""
        if present is None:
            return normalized_rows(self, features, self.objective.rejects_zero_rows)
        imputation = cast(Imputation, self._imputation_of("impute"))
        return imputation.fill_in(normalized_rows(self, features, True, present.masks), present.masks)

    @torch.no_grad()
    def begin_step(
        self,
        micro_batches: Iterable[Mapping[str, Tensor]],
        selection: str | None = None,
        present: Iterable[PresentRows | None] | None = None,
    ) -> list[list[SelectedStreams]]:
        """Select the latents of all micro-batches of a training step, and count the step.

        The auxiliary term needs to know which latents are dead once the whole step is counted, so that accumulated
        gradients are those of the whole batch. Selecting is the one dense product of a forward pass, which is then
        not made again. In evaluation mode nothing is counted.

        Args:
            micro_batches: as `forward` takes one, each with every stream; taken one at a time.
            selection: "global" or "local" in place of the config's.
            present: for each, as `forward` takes it.

        Returns:
            For each, what `forward` takes as `selected`: latents and pre-activations, no rows.

        Raises:
            ValueError: with `objective="usae"`, whose codes depend on the batch; without micro-batches; as `forward`.
        """
        if not self.objective.knows_dead_latents:
            name = self.config.objective
            raise ValueError(f"`objective={name!r}` has no auxiliary term of dead latents; call it with `new_step`")
        objective, pairs = cast(SparcObjective, self.objective), []
        for features, mask in zip(micro_batches, present or itertools.repeat(None), strict=present is not None):
            reject_missing_streams(features, self.config.stream_names)
            selected, codes = objective.begin(self._rows_of_loss(features, mask), selection)
            pairs.append((selected, codes if mask is None else mask.measured(codes)))
        if not pairs:
            raise ValueError("a training step needs at least one micro-batch, but there is none")
        if self.training:
            self.count_step([codes for _, codes in pairs], new_step=True)
        return [selected for selected, _ in pairs]

    def encode(
        self,
        features: Mapping[str, Tensor],
        selection: str | None = None,
        *,
        missing: str | None = None,
        streams: Iterable[str] | None = None,
    ) -> dict[str, SparseCodes]:
        """Encode any subset of the streams.

        With global selection all streams choose their latents together. Those that are not given are imputed where
        the model has statistics of its streams (`config.imputation`): guessed by the conditional mean of what is
        given, so that a stream alone selects nearly what it would with the others. Without, the given streams choose
        by themselves. With local selection every stream chooses for itself, and nothing depends on the others.

        The model stays as it is, in training mode too: batch norms use the statistics they have kept, so that a code
        never depends on its batch.

        Args:
            features: stream -> raw feature rows, float [batch, hidden_size].
            selection: "global" or "local" in place of the config's.
            missing: "impute" or "ignore" streams that are not given; by default "impute" where the model can.
            streams: whose codes to return, by default those given. The code of a missing stream is that of its imputed
                rows: decoded to that stream, it is the best guess of what is missing.

        Returns:
            stream -> SparseCodes with indices and values [batch, k].

        Raises:
            ValueError: for unknown streams, wrong widths, an empty batch, or rows that hold NaN or infinity; for
                "impute", or `streams` that are not given, where the model has no statistics.
        """
        rows = normalized_rows(self, features)
        names = list(rows) if streams is None else [self.config.stream(name)["name"] for name in streams]
        imputation = self._imputation_of(missing)
        if absent := [name for name in names if name not in rows]:
            if imputation is None:
                raise ValueError(f"the features lack {absent}, and missing streams are not imputed")
        elif imputation is None or len(rows) == len(self.config.stream_names):
            codes = self.objective.encode(rows, selection)
            return {name: codes[name] for name in names}
        return cast(SparcObjective, self.objective).encode_incomplete(
            rows, cast(Imputation, imputation), names, selection
        )

    def impute(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return normalised rows [batch, hidden_size] of all streams: those given, and the best linear guess of more.

        Raises:
            ValueError: as `encode`, and where the model has no statistics of its streams.
        """
        return cast(Imputation, self._imputation_of("impute")).complete(normalized_rows(self, features))

    def set_imputation(self, mean: Tensor, covariance: Tensor, **settings: float) -> Imputation:
        """Give the model statistics of its streams, by which it encodes rows that lack some of them.

        Joint codes stay as they are.

        Args:
            mean: [D], of the normalised rows of all streams side by side, in order.
            covariance: [D, D], of the same.
            **settings: as `config.imputation`.

        Returns:
            The module that holds them, `imputation`; its `offsets` are 0.

        Raises:
            ValueError: for `objective="usae"`, settings that cannot be used, or other shapes.
        """
        changed = SparcConfig.from_dict({**self.config.to_dict(), "imputation": settings})
        imputation = Imputation.of(changed, mean, covariance).to(self.device)
        self.config.imputation, self.config.format_version = changed.imputation, changed.format_version
        self.imputation = imputation
        return imputation

    def _imputation_of(self, missing: str | None) -> Imputation | None:
        if missing not in (None, "impute", "ignore"):
            raise ValueError(f'`missing` must be "impute" or "ignore", but it is {missing!r}')
        if missing == "impute" and self.imputation is None:
            raise ValueError(
                "this model has no statistics of its streams to impute one by; make them with `sparc impute`"
            )
        return None if missing == "ignore" else self.imputation

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
        rows = normalized_stream(self, stream, features, reject_zero_rows=False)
        return self.objective.preactivations(stream, rows, latents.to(self.device))

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
        return self.objective.unit_atoms(stream)

    def normalize(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows the losses are measured on: raw features normalised as the stream records say."""
        return normalized_rows(self, features)

    def dead_latents(self, stream: str) -> Tensor:
        """Return bool [N]: which latents have not fired in `stream` for more than `dead_after_steps` steps."""
        self.config.stream(stream)
        return getattr(self.steps_since_fired, stream) > self.config.dead_after_steps

    def prepare_atoms_for_step(self) -> None:
        """Bring atoms to unit norm, then take from their gradients the part along the atom.

        The earlier code does both between backward and the optimizer's step, so that is where the training loop
        calls this; the gradient was taken at the atoms before the division.
        """
        self.objective.prepare_atoms_for_step()

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
            encoder, latents = self._encoder(name), self.dead_latents(name).nonzero().squeeze(-1)
            fresh = torch.randn(len(latents), encoder.weight.shape[1], generator=generator) * REINITIALIZED_STD
            encoder.weight[latents] = fresh.to(encoder.weight)
            encoder.bias[latents] = getattr(self.steps_since_fired, name)[latents] = 0
            counts[name] = torch.tensor(len(latents))
        return counts

    @property
    def objective(self) -> SparcObjective | UsaeObjective:
        """What the config's `objective` means, on this model's parameters."""
        return OBJECTIVES[self.config.objective](self)

    def count_step(self, micro_batches: Sequence[Mapping[str, SparseCodes]], new_step: bool) -> None:
        """Advance the dead counters by the codes of a training step's rows, in one or several parts.

        With `new_step=False` the parts belong to a step that was counted, and only what fired is noted.
        """
        threshold = float(self.config.dead_threshold)
        self.steps_since_fired.advance(micro_batches, threshold, new_step, self.counter_group)

    def rows_at_once(self, arrays: int, per_product: int = ROWS_PER_PRODUCT) -> int:
        """Return how many rows `arrays` arrays of N numbers a row have in the memory a model may take."""
        bytes_per_row = 4 * self.config.num_latents * arrays
        most = per_product if self.device.type == "cpu" else 2**31
        return max(1, min(most, int(self.max_preactivation_mb * 2**20) // bytes_per_row))

    def _encoder(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.encoders[name])


SparcModel.register_for_auto_class("AutoModel")
