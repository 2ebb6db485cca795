"""SparcConfig: everything that rebuilds a SparcModel, and the stream records that say how its features were made."""

from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

FORMAT_VERSION = 1
NORMALIZATIONS = ("none", "l2", "standardize")


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
        format_version: version of the checkpoint format; a newer one than this package knows is refused.

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
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any):
        self.streams = _stream_records(self.streams)
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
        for field in ("num_latents", "k"):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, but it is {getattr(self, field)}")
        for field in ("auxk", "auxk_coef", "cross_coef", "dead_after_steps"):
            if getattr(self, field) < 0:
                raise ValueError(f"`{field}` must not be negative, but it is {getattr(self, field)}")
        for field in ("k", "auxk"):
            if getattr(self, field) > self.num_latents:
                raise ValueError(
                    f"`{field}` is {getattr(self, field)} but `num_latents` is {self.num_latents}; "
                    f"choose `{field}` <= `num_latents`"
                )

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


def _stream_records(streams: list | dict | None) -> list[dict[str, Any]]:
    """Bring both accepted forms to a list of checked records, leaving the caller's objects untouched."""
    if isinstance(streams, dict):
        streams = [{**record, "name": name} for name, record in streams.items()]
    records = [_checked_record(dict(record)) for record in streams or []]
    names = [record["name"] for record in records]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"every stream needs its own name, but {doubled} occur more than once")
    return records


def _checked_record(record: dict[str, Any]) -> dict[str, Any]:
    name = record.get("name")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a stream name must be a Python identifier such as `clip_img`, but it is {name!r}")
    # The name becomes a key of parameter containers, which refuse the names of their own attributes.
    if hasattr(torch.nn.ModuleDict(), name) or hasattr(torch.nn.ParameterDict(), name):
        raise ValueError(f"`{name}` cannot name a stream because torch's containers use it; add a suffix to it")
    size = record.get("hidden_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"stream `{name}` needs `hidden_size` as a positive integer, but it is {size!r}")
    kind = record.setdefault("normalize", "none")
    if kind not in NORMALIZATIONS:
        raise ValueError(f"stream `{name}` has `normalize` {kind!r}; it must be one of {list(NORMALIZATIONS)}")
    if kind == "standardize":
        for field in ("mean", "std"):
            _check_statistic(name, field, record.get(field), size)
    return record


def _check_statistic(name: str, field: str, value: Any, size: int) -> None:
    numbers = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(number, int | float) for number in numbers) or len(numbers) not in (1, size):
        raise ValueError(
            f"stream `{name}` is standardised, so its record needs `{field}` as one number or {size} numbers, "
            f"but it has {len(numbers)} values" + (" of another type" if len(numbers) in (1, size) else "")
        )


SparcConfig.register_for_auto_class()
