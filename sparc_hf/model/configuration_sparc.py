"""SparcConfig: everything that rebuilds a SparcModel, and the stream records that say how its features were made."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig

from .stream_record import LARGEST_FLOAT, LARGEST_SIZE, checked_stream_records

FORMAT_VERSION = 2
# Models with statistics for streams that are missing; all others are written as version 1, which older code reads.
IMPUTATION_VERSION = 2
DTYPES = ("float32", "bfloat16", "float16", "float64")
# How a stream that stands alone is encoded, chosen on validation rows: docs/alignment.md has the figures.
IMPUTATION_DEFAULTS = {"ridge": 0.003, "shared": 0.6, "own_weight": 2.0, "fit_steps": 0.75}
# What transformers would let a config.json change of how a model is loaded, and no SparcModel has.
FOREIGN_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "distributed_config",
    "fusion_config",
    "num_labels",
    "quantization_config",
    "sub_configs",
    "transformers_weights",
)


@strict
class SparcConfig(PreTrainedConfig):
    """Configuration of a [`SparcModel`].

    Args:
        streams: the streams in order, as a list of records or as a dict name -> record. A record holds `name`,
            `hidden_size`, `normalize` ("none", "l2", or "standardize" with `mean` and `std`, each one number or
            `hidden_size` numbers) and, where known, what repeats the features: `encoder`, `revision`, `modality`,
            `pooling`, `grid`. Always kept as a list, because JSON saves dict keys in sorted order.
        num_latents: N, latents in the shared code space.
        k: active latents of a code.
        auxk: dead latents the auxiliary term decodes per row.
        auxk_coef: weight of the auxiliary term.
        cross_coef: weight of the cross-reconstruction term; 0 trains every stream for itself.
        dead_after_steps: a latent is dead in a stream after more than this many training steps without firing.
        dead_threshold: a latent fires in a stream when its value exceeds this.
        selection: "global" (one top-k of the summed pre-activations) or "local" (one top-k per stream).
        objective: "sparc", or "usae" for Universal Sparse Autoencoders: batch norm after the encoder, a selection per
            stream, atoms brought to unit norm at use, no pre-biases. The paper has k 32, auxk N // 2, auxk_coef 0.1.
        distance: of the USAE objective, "l1" (mean absolute) or "l2" (mean squared).
        imputation: where the model has statistics of its streams, by which it encodes rows that lack some of them, how
            it does: `ridge` (of the regression, as a share of a stream's mean variance), `shared` (0 to 1: how far the
            selection moves a given row towards what the other streams know of it), `own_weight` and `fit_steps` (the
            weight of a code's own stream, those of all others being 1, where its values are fitted, and the steps of
            that, the last of which may be broken; 0 takes the mean of the streams' pre-activations). None has none.
        format_version: version of the checkpoint format, 2 with `imputation` and 1 without; a newer one than this
            package knows is refused.
        weights_sha256: in a config.json, the SHA-256 of each weight file saved with it, which loading compares; empty
            while they are being saved.

    Raises:
        ValueError: for contradicting sizes, or a stream record that cannot be used.
    """

    model_type = "sparc"

    streams: list | dict | None = None
    num_latents: int = 8192
    k: int = 64
    auxk: int = 64
    auxk_coef: float | int = 1 / 32
    cross_coef: float | int = 1.0
    dead_after_steps: int = 1000
    dead_threshold: float | int = 1e-3
    selection: Literal["global", "local"] = "global"
    objective: Literal["sparc", "usae"] = "sparc"
    distance: Literal["l1", "l2"] = "l1"
    imputation: dict | None = None
    format_version: int = 1
    weights_sha256: dict | None = None

    def __post_init__(self, **kwargs: Any):
        self.streams = checked_stream_records(self.streams) if self.streams else []
        for record in self.streams:
            record.setdefault("normalize", "none")
        if self.imputation is not None:
            self.imputation = {**IMPUTATION_DEFAULTS, **self.imputation}
            self.format_version = max(self.format_version, IMPUTATION_VERSION)
        self.check()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raise ValueError where two settings contradict each other or a size is impossible."""
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has `format_version` {self.format_version}, but this version of sparc_hf reads up "
                f"to {FORMAT_VERSION}; upgrade with `pip install -U sparc-hf`"
            )
        if self.objective == "usae" and self.selection != "local":
            raise ValueError(
                '`objective="usae"` selects latents in every stream alone; set `selection="local"` with it'
            )
        if self.imputation is not None:
            _check_imputation(self.imputation, self.objective)
        for field, least in (
            ("num_latents", 1),
            ("k", 1),
            ("auxk", 0),
            ("dead_after_steps", 0),
            ("format_version", 1),
        ):
            if not least <= getattr(self, field) <= LARGEST_SIZE:
                raise ValueError(f"`{field}` must be from {least} to {LARGEST_SIZE}, but it is {getattr(self, field)}")
        for field in ("auxk_coef", "cross_coef", "dead_threshold"):
            if not 0 <= getattr(self, field) <= LARGEST_FLOAT:
                raise ValueError(f"`{field}` must be a finite number from 0 on, but it is {getattr(self, field)}")
        for field in ("k", "auxk"):
            if getattr(self, field) > self.num_latents:
                raise ValueError(
                    f"`{field}` is {getattr(self, field)} but `num_latents` is {self.num_latents}; "
                    f"choose `{field}` <= `num_latents`"
                )

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json; see `PreTrainedConfig.get_config_dict`. ValueError where it holds no JSON object."""
        try:
            return super().get_config_dict(*args, **kwargs)
        except (TypeError, RecursionError) as error:
            raise ValueError(f"config.json must hold a JSON object with the settings of a model: {error}") from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config of what a config.json holds; see `PreTrainedConfig.from_dict`.

        Raises:
            ValueError: for settings of another type or value than `SparcConfig` takes, a stream record that does not
                say its `normalize`, or settings with which transformers would load the model in another way.
        """
        _check_file(config_dict)
        try:
            return super().from_dict(config_dict, **kwargs)
        except (StrictDataclassError, TypeError, AttributeError, LookupError, OverflowError) as error:
            raise ValueError(f"these settings of a model cannot be used: {error.__cause__ or error}") from error

    @property
    def stream_names(self) -> list[str]:
        """Names of the streams, in order."""
        return [record["name"] for record in self.streams]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]

    @property
    def hidden_sizes(self) -> dict[str, int]:
        """Stream name -> width of its feature rows."""
        return {record["name"]: record["hidden_size"] for record in self.streams}  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]

    def stream(self, name: str) -> dict[str, Any]:
        """Return the record of stream `name`; ValueError where there is none."""
        for record in self.streams or []:
            if record["name"] == name:
                return record
        raise ValueError(f"there is no stream `{name}`; the streams are {self.stream_names}")


def _check_file(content: Any) -> None:
    """Raise ValueError where what a config.json holds is no SparcConfig, or would change how transformers loads."""
    if not isinstance(content, dict):
        raise ValueError(f"config.json must hold a JSON object, but it holds {type(content).__name__}")
    if content.get("model_type", SparcConfig.model_type) != SparcConfig.model_type:
        raise ValueError(f"config.json is of the model type {content['model_type']!r}, not {SparcConfig.model_type!r}")
    if foreign := [key for key in FOREIGN_KEYS if content.get(key) is not None]:
        raise ValueError(f"config.json has `{foreign[0]}`, which is nothing to a SparcModel; take it out")
    for key in ("dtype", "torch_dtype"):
        if content.get(key) is not None and content[key] not in DTYPES:
            raise ValueError(f"`{key}` in config.json must be one of {list(DTYPES)}, but it is {content[key]!r}")
    if content.get("auto_map") is not None and not isinstance(content["auto_map"], dict):
        raise ValueError(f"`auto_map` in config.json must be an object, but it is {content['auto_map']!r}")
    streams = content.get("streams")
    for record in streams if isinstance(streams, list) else []:
        # Only in Python may it be left out, for "none": a file that has lost it would give other codes.
        if isinstance(record, dict) and "normalize" not in record:
            raise ValueError(f"stream `{record.get('name')}` in config.json does not say its `normalize`")


def _check_imputation(settings: dict, objective: str) -> None:
    """Raise ValueError for settings of the imputation that it has not or cannot use."""
    if objective == "usae":
        raise ValueError(
            '`objective="usae"` encodes every stream by itself, so that none is missing; leave `imputation` out'
        )
    if unknown := sorted(set(settings) - set(IMPUTATION_DEFAULTS)):
        raise ValueError(f"`imputation` has {list(IMPUTATION_DEFAULTS)}, but not {unknown}")
    most = {"shared": 1, "fit_steps": 100}
    for field, value in settings.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= most.get(field, LARGEST_FLOAT):
            raise ValueError(
                f"`{field}` of `imputation` must be a number from 0 to "
                f"{most.get(field, LARGEST_FLOAT):g}, but it is {value!r}"
            )


SparcConfig.register_for_auto_class()
