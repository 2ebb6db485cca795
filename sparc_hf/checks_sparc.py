"""What a SparcModel refuses, and how it says so."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

_LOADING_FAULTS = {
    "missing_keys": "missing",
    "unexpected_keys": "unexpected",
    "mismatched_keys": "mis-shaped",
    "mistyped_keys": "of another number type",
}


def reject_loading_faults(info: Mapping[str, Any], path: str) -> None:
    """Raise ValueError where loading info, such as transformers', says that weights and config do not fit."""
    faults = [
        f"{len(info[key])} {word}: {_listed(info[key])}" for key, word in _LOADING_FAULTS.items() if info.get(key)
    ]
    if faults:
        raise ValueError(
            f"the weights in `{path}` do not fit its config.json ({'; '.join(faults)}); "
            "the two files must come from one `save_pretrained`"
        )


def reject_missing_streams(features: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError where features for training lack a stream."""
    if missing := [name for name in names if name not in features]:
        raise ValueError(f"training needs every stream of the model, but {missing} are missing from `features`")


def reject_shape(raw: Any, name: str, hidden_size: int) -> None:
    """Raise ValueError where features of stream `name` are no tensor [batch, hidden_size] with rows in it."""
    if not isinstance(raw, Tensor) or raw.ndim != 2:
        found = list(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
        raise ValueError(f"stream `{name}` needs a tensor [batch, {hidden_size}], but it got {found}")
    if raw.shape[1] != hidden_size:
        raise ValueError(f"stream `{name}` has width {hidden_size}, but its features have {raw.shape[1]}")
    if raw.shape[0] == 0:
        raise ValueError(f"stream `{name}` got an empty batch: 0 rows where at least 1 is needed")


def reject_rows(faulty: Tensor, name: str, fault: str) -> None:
    """Raise ValueError where any of bool [batch] is set, with the first row's number."""
    if faulty.any():
        numbers = faulty.nonzero().squeeze(-1).tolist()
        raise ValueError(
            f"row {numbers[0]} of stream `{name}` holds {fault} ({len(numbers)} of {faulty.numel()} rows do); "
            "leave such rows out"
        )


def _listed(keys: Any, limit: int = 3) -> str:
    # Mis-shaped and mistyped keys come as (name, what it is in the file, what it is in the model).
    texts = sorted(
        key if isinstance(key, str) else f"{key[0]} is {_plain(key[1])} instead of {_plain(key[2])}" for key in keys
    )
    return ", ".join(texts[:limit]) + (", ..." if len(texts) > limit else "")


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else list(value)
