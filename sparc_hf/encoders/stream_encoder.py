"""Frozen encoders: the only place that knows a backbone, its pooled vector, its patch tokens and its grid."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig

from sparc_hf.encoders.families import FAMILIES, MODALITIES, POOLINGS, Family
from sparc_hf.encoders.pretrained import ImageInputs, LoadedModels, TextInputs, commit_of, frozen_model, load_part
from sparc_hf.encoders.token_grid import resample_tokens


class StreamEncoder:
    """A frozen pretrained model that turns images or texts into the feature rows of one stream.

    Args:
        name: name of the stream.
        encoder: Hub id or folder of a transformers checkpoint, or "demo:clip" or "demo:dino" for those shipped here.
        modality: what it encodes.
        pooling: which vector stands for a sample, one of "cls", "mean", "pooler", "projection"; by default the one
            the papers use for this family of models. "tokens" makes every patch token a row of its own.
        grid: rows and columns that patch tokens are resampled to, with pooling "tokens"; the model's own by default.
        prefix_tokens: tokens before the patch tokens, where the family of the model is not known here.
        revision: branch, tag or commit on the Hub.
        device: where the model runs.
        dtype: of its weights; feature rows are float32 whatever it is.
        normalize: how a SPARC model shall normalise the rows; it is only recorded here.
        image_backend: what resizes images, "pil" or "torchvision"; see `ImageInputs`.
        loaded: models that were already loaded, shared between encoders; see `load_encoders`.
        trust_remote_code: whether to run code from the encoder's repository. No stream record can say so, because
            records come from others.

    Raises:
        ValueError: if the checkpoint cannot be loaded, lacks safetensors weights or its image processor or tokenizer,
            needs code of its own, or does not have this modality or pooling.
    """

    def __init__(
        self,
        name: str,
        encoder: str,
        modality: Literal["image", "text"] | str,
        *,
        pooling: str | None = None,
        grid: Sequence[int] | None = None,
        prefix_tokens: int | None = None,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        normalize: str = "l2",
        image_backend: str = "pil",
        loaded: LoadedModels | None = None,
        trust_remote_code: bool = False,
    ):
        if modality not in MODALITIES:
            raise ValueError(f"`modality` must be one of {list(MODALITIES)}, but it is {modality!r}")
        self.name, self.encoder, self.modality = name, str(encoder), modality
        self.revision = commit_of(self.encoder, revision)
        pinned = self.revision or revision
        trust = {"trust_remote_code": trust_remote_code}
        self.config = load_part(AutoConfig, self.encoder, "config", revision=pinned, **trust)
        self.pooling = self._checked_pooling(pooling)
        self.grid = self._checked_grid(grid)
        self._given_prefix = prefix_tokens
        self.image_backend = image_backend
        if modality == "image":
            self._prepare: Any = ImageInputs(self.encoder, pinned, image_backend, **trust)
        else:
            positions = getattr(self.tower_config, "max_position_embeddings", None)
            self._prepare = TextInputs(self.encoder, pinned, positions, self.family.attention_mask, **trust)
        options = dict(self.family.options) if self.pooling != "pooler" else {}
        shared = {} if loaded is None else loaded
        self.model = frozen_model(self.encoder, pinned, dtype or torch.float32, options, shared, **trust)
        self.to(device or "cpu")
        self._record = {"name": name, "normalize": normalize} | self._facts()

    @classmethod
    def from_record(
        cls,
        record: Mapping[str, Any],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        loaded: LoadedModels | None = None,
        trust_remote_code: bool = False,
    ) -> "StreamEncoder":
        """Build the encoder that a stream record names, and keep all the record says.

        Raises:
            ValueError: if the record does not name its encoder and modality, or this encoder gives other rows than
                the record says.
        """
        _check_named(record)
        made = cls(
            record["name"],
            record["encoder"],
            record["modality"],
            pooling=record.get("pooling"),
            grid=record.get("grid") if record.get("pooling") == "tokens" else None,
            prefix_tokens=record.get("prefix_tokens"),
            revision=record.get("revision"),
            image_backend=record.get("image_backend", "pil"),
            device=device,
            dtype=dtype,
            loaded=loaded,
            trust_remote_code=trust_remote_code,
        )
        for key in ("hidden_size", "grid"):
            if record.get(key) is not None and record[key] != made.record.get(key):
                raise ValueError(
                    f"stream `{made.name}` was made with `{key}` {record[key]}, but `{made.encoder}` gives "
                    f"{made.record.get(key)}; use the checkpoint and revision of the record"
                )
        made._record = {**record, **made._record, "normalize": record.get("normalize", "l2")}
        return made

    @property
    def family(self) -> Family:
        """What is known of this kind of model; of an unknown kind, nothing but what its config shows."""
        both = hasattr(self.config, "vision_config") and hasattr(self.config, "text_config")
        return FAMILIES.get(self.config.model_type, Family("", MODALITIES if both else (self.modality,)))

    @property
    def record(self) -> dict[str, Any]:
        """The stream record: all that repeats these features."""
        return dict(self._record)

    @property
    def hidden_size(self) -> int:
        """Width of a row."""
        return int(self._record["hidden_size"])

    @property
    def rows_per_sample(self) -> int:
        """Rows of one sample: 1, or with pooling "tokens" one per place of the grid."""
        grid: Any = self._record["grid"] if self.pooling == "tokens" else (1, 1)
        return grid[0] * grid[1]

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patch tokens: class token and registers."""
        if self._given_prefix is not None:
            return self._given_prefix
        return int(self.family.class_token) + (getattr(self.tower_config, "num_register_tokens", 0) or 0)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        size = getattr(self.tower_config, "patch_size", None)
        if size is None:
            raise ValueError(f"`{self.encoder}` ({self.config.model_type}) has no patches")
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> "StreamEncoder":
        """Move the model, which encoders of the same checkpoint may share."""
        self.model.to(device)
        return self

    def prepare(self, samples: Sequence[Image.Image] | Sequence[str]) -> dict[str, Tensor]:
        """Turn PIL images of any mode, or texts, into model inputs on the CPU.

        Returns:
            `pixel_values` [batch, 3, height, width], or `input_ids` and mostly `attention_mask` [batch, tokens].

        Raises:
            ValueError: for no samples, or samples of another kind than the stream's.
        """
        kind = Image.Image if self.modality == "image" else str
        if isinstance(samples, str) or not len(samples) or not all(isinstance(sample, kind) for sample in samples):
            given = (
                sorted({type(sample).__name__ for sample in samples}) if not isinstance(samples, str) else "one text"
            )
            raise ValueError(
                f"stream `{self.name}` takes a non-empty list of {'PIL images' if kind is not str else 'texts'}, "
                f"but got {given}"
            )
        return self._prepare(samples)

    @torch.no_grad()
    def rows(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the feature rows, float32 [batch * rows_per_sample, hidden_size], of what `prepare` made.

        The tokens of a sample follow each other, the grid row by row.
        """
        if self.pooling == "tokens":
            return self.patch_tokens(inputs).flatten(0, 1)
        return self.pooled(inputs)

    @torch.no_grad()
    def pooled(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return one vector a sample, float32 [batch, hidden_size], of what `prepare` made.

        Raises:
            ValueError: for a stream of patch tokens.
        """
        inputs = self.placed(inputs)
        return self.vectors(self.output(inputs), inputs)

    @torch.no_grad()
    def patch_tokens(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the patch tokens of the last hidden state, float32 [batch, grid height * grid width, hidden].

        They are resampled to the grid that was asked for, where one was (see `resample_tokens`).

        Raises:
            ValueError: for a text stream, or a model whose tokens are not prefix tokens plus one per patch.
        """
        if self.modality != "image":
            raise ValueError(f"stream `{self.name}` encodes text, which has no patches")
        hidden = self.tower(**self.placed(inputs)).last_hidden_state
        tokens = self.patches(hidden, inputs["pixel_values"])
        return (
            tokens if self.grid is None else resample_tokens(tokens, self.grid_of(inputs["pixel_values"]), self.grid)
        )

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Return rows and columns of the patch grid for `pixel_values` [batch, 3, height, width]."""
        height, width = self.patch_size
        return pixel_values.shape[-2] // height, pixel_values.shape[-1] // width

    def encode(self, samples: Sequence[Image.Image] | Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Return the feature rows of images or texts, float32 [samples * rows_per_sample, hidden_size]."""
        starts = range(0, max(len(samples), 1), batch_size)
        rows = [self.rows(self.prepare(samples[start : start + batch_size])) for start in starts]
        return torch.cat(rows).cpu().numpy()

    @property
    def inputs_of(self) -> Any:
        """The image processor or tokenizer that `prepare` uses, a callable that other processes can be given."""
        return self._prepare

    @property
    def tower_config(self) -> Any:
        return getattr(self.config, "vision_config" if self.modality == "image" else "text_config", self.config)

    @property
    def tower(self) -> nn.Module:
        return getattr(self.model, "vision_model" if self.modality == "image" else "text_model", self.model)

    def output(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        if self.pooling == "tokens":
            raise ValueError(f"stream `{self.name}` has patch tokens as rows, and no one vector a sample; use `rows`")
        if self.pooling == "projection":
            get = self.model.get_image_features if self.modality == "image" else self.model.get_text_features
            return get(**inputs, **options)  # pyright: ignore[reportCallIssue]
        return self.tower(**inputs, **options)

    def vectors(self, output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.pooling in ("projection", "pooler"):
            return output.pooler_output.float()
        hidden = output.last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0].float()
        if self.modality == "image":
            return self.patches(hidden, inputs["pixel_values"]).mean(1)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[:, :, None].float()
        return (hidden.float() * mask).sum(1) / mask.sum(1)

    def placed(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs where the model is, floating ones in its dtype."""
        weight = next(self.model.parameters())
        return {
            key: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }

    def patches(self, hidden: Tensor, pixel_values: Tensor) -> Tensor:
        grid = self.grid_of(pixel_values)
        if hidden.ndim != 3 or hidden.shape[1] != self.prefix_tokens + grid[0] * grid[1]:
            raise ValueError(
                f"`{self.encoder}` gives {list(hidden.shape)} where {self.prefix_tokens} prefix tokens and a grid of "
                f"{grid[0]} x {grid[1]} patches were expected; say in the stream record how many `prefix_tokens` "
                f"its family `{self.config.model_type}` has"
            )
        return hidden[:, self.prefix_tokens :].float()

    def _checked_pooling(self, pooling: str | None) -> str:
        family, kind = self.family, self.config.model_type
        if self.modality not in family.modalities:
            raise ValueError(f"`{self.encoder}` ({kind}) encodes {family.modalities[0]}, not {self.modality}")
        pooling = pooling or family.pooling
        if pooling == "tokens" and self.modality != "image":
            raise ValueError(f"stream `{self.name}` encodes text, which has no patch tokens; leave `pooling` out")
        if not pooling:
            raise ValueError(
                f"`{self.encoder}` is of the unknown family `{kind}`; say which vector to take with "
                f"`pooling`, one of {list(POOLINGS)}"
            )
        if pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {list(POOLINGS)}, but it is {pooling!r}")
        # A causal text tower's first token has seen nothing of the text, and SigLIP has no class token.
        without_cls = not family.class_token or (self.modality == "text" and kind in FAMILIES)
        if (pooling == "cls" and without_cls) or (pooling == "projection" and not hasattr(self.config, "text_config")):
            raise ValueError(f"`{self.encoder}` ({kind}, {self.modality}) has no `pooling` {pooling!r}; leave it out")
        return pooling

    def _checked_grid(self, grid: Sequence[int] | None) -> tuple[int, int] | None:
        if grid is None:
            return None
        if self.pooling != "tokens" or len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
            raise ValueError(
                f"`grid` must be two positive numbers, rows and columns, with `pooling` tokens, but stream "
                f"`{self.name}` has {list(grid)} with `pooling` {self.pooling}"
            )
        return int(grid[0]), int(grid[1])

    def _facts(self) -> dict[str, Any]:
        """Run one sample through the model, so that the record says what it does and not what its config promises."""
        sample = Image.new("RGB", (64, 64)) if self.modality == "image" else "a"
        inputs = self.prepare([sample])  # pyright: ignore[reportArgumentType]
        try:
            row = self.rows(inputs)
        except AttributeError as error:
            raise ValueError(
                f"`{self.encoder}` ({self.config.model_type}) has no `{self.pooling}` vector: {error}"
            ) from error
        if row.ndim != 2:
            raise ValueError(f"`{self.encoder}` has no `{self.pooling}` vector; a sample gives {list(row.shape[1:])}")
        facts: dict[str, Any] = {
            "hidden_size": int(row.shape[-1]),
            "encoder": self.encoder,
            "revision": self.revision,
            "modality": self.modality,
            "pooling": self.pooling,
        }
        if self.modality == "image":
            facts["image_backend"] = self.image_backend
            facts["image_size"] = list(inputs["pixel_values"].shape[-2:])
            if getattr(self.tower_config, "patch_size", None) is not None:
                facts["grid"] = list(self.grid or self.grid_of(inputs["pixel_values"]))
        if self._given_prefix is not None:
            facts["prefix_tokens"] = self._given_prefix
        return facts


def check_encoders(records: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where a stream record does not name an encoder that can be reached; no model is loaded."""
    for record in records:
        _check_named(record)
        commit_of(str(record["encoder"]), record.get("revision"))


def _check_named(record: Mapping[str, Any]) -> None:
    if missing := [key for key in ("name", "encoder", "modality") if not record.get(key)]:
        raise ValueError(
            f"the record of stream `{record.get('name')}` does not say which encoder made it ({missing} missing); "
            "pass its features instead of raw images or text"
        )


def checked_device(name: str | torch.device) -> torch.device:
    """Return a device.

    Raises:
        ValueError: for a device that is unknown or not in this machine.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`device` must be one of this machine, such as cpu or cuda:0, not {name}: {reason}"
        ) from error
    if device.type == "meta":
        raise ValueError("`device` must be one that computes, such as cpu or cuda:0, not meta")
    return device


def load_encoders(
    records: Sequence[Mapping[str, Any]],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> dict[str, StreamEncoder]:
    """Load the encoders of several streams; streams of one checkpoint and revision share its model.

    Args:
        records: stream records with `name`, `encoder`, `modality` and, where wanted, `pooling`, `revision`, `grid` and
            `prefix_tokens`.
        device: where the models run.
        dtype: of their weights.
        trust_remote_code: whether to run code from the encoders' repositories; see `StreamEncoder`.

    Raises:
        ValueError: as `StreamEncoder`.
    """
    check_encoders(records)
    loaded: LoadedModels = {}
    return {
        record["name"]: StreamEncoder.from_record(
            record, device=device, dtype=dtype, loaded=loaded, trust_remote_code=trust_remote_code
        )
        for record in records
    }
