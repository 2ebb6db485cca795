"""StreamRecord: what is known of a stream, and the one check of it, for configs and feature files alike."""

import json
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints

import torch

# Arrow's lists and the numbers of latents are int32.
LARGEST_SIZE = 2**31 - 1
LARGEST_FLOAT = torch.finfo(torch.float32).max

StreamRecords = Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]]


class _NamedWidth(TypedDict):
    name: str
    hidden_size: int


class StreamRecord(_NamedWidth, total=False):
    """Width of a stream's rows, how a model normalises them, and what repeats them; other keys are kept unread.

    In JSON, and for users, it is a plain dict. What may be None may be left out as well.
    """

    normalize: Literal["none", "l2", "standardize"]
    mean: float | list[float]
    std: float | list[float]
    encoder: str | None
    revision: str | None
    modality: str | None
    pooling: str | None
    image_backend: str | None
    grid: list | None
    image_size: list | None
    prefix_tokens: int | None


_HINTS = get_type_hints(StreamRecord)
NORMALIZATIONS = get_args(_HINTS["normalize"])
# Field -> the type it has where it is known.
_KINDS = {
    field: get_args(hint)[0]
    for field, hint in _HINTS.items()
    if get_origin(hint) is UnionType and type(None) in get_args(hint)
}
_KIND_NAMES = {str: "text", int: "integer", list: "list"}


def checked_stream_records(streams: StreamRecords, *, measured: bool = True) -> list[dict[str, Any]]:
    """Return stream records as new dicts of JSON values, in order.

    Args:
        streams: records, or a dict name -> record.
        measured: whether a standardised stream needs its `mean` and `std`, which extraction finds only at its end.

    Raises:
        ValueError: for no stream, two of one name, or a record that no model could be trained with.
    """
    given = listed_records(streams)
    try:
        records = json.loads(json.dumps(given))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"stream records must be made of JSON values: {error}") from error
    if not records:
        raise ValueError("at least one stream is needed, but there is no stream record")
    for record in records:
        _check_record(record, measured)
    check_names_differ([record["name"] for record in records])
    return records


def listed_records(streams: StreamRecords) -> list[dict[str, Any]]:
    """Return stream records of either form as a list of new dicts; ValueError where one is no dict."""
    given = list(streams.values() if isinstance(streams, Mapping) else streams)
    if wrong := [record for record in given if not isinstance(record, Mapping)]:
        raise ValueError(f"a stream record must be a dict such as {{'hidden_size': 768}}, but there is {wrong[0]!r}")
    if isinstance(streams, Mapping):
        given = [{**record, "name": name} for name, record in streams.items()]
    return [dict(record) for record in given]


def check_stream_name(name: Any) -> None:
    """Raise ValueError for what cannot name a stream."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a stream name must be a Python identifier such as `clip_img`, but it is {name!r}")
    # The name becomes a key of parameter containers, which refuse the names of their own attributes.
    if hasattr(torch.nn.ModuleDict(), name) or hasattr(torch.nn.ParameterDict(), name):
        raise ValueError(f"`{name}` cannot name a stream because torch's containers use it; add a suffix to it")


def check_names_differ(names: Sequence[str]) -> None:
    """Raise ValueError where two streams have one name."""
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"every stream needs its own name, but {doubled} occur more than once")


def _check_record(record: Mapping[str, Any], measured: bool) -> None:
    name, size = record.get("name"), record.get("hidden_size")
    check_stream_name(name)
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST_SIZE:
        raise ValueError(
            f"stream `{name}` needs `hidden_size` as an integer from 1 to {LARGEST_SIZE}, but it is {size!r}"
        )
    if misspelt := [key for key in record if key.lower().startswith("normal") and key != "normalize"]:
        raise ValueError(f"stream `{name}` has `{misspelt[0]}`; the field is called `normalize`")
    normalize = record.get("normalize", "none")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"stream `{name}` has `normalize` {normalize!r}; it must be one of {list(NORMALIZATIONS)}")
    if normalize == "standardize" and (measured or "mean" in record):
        for field in ("mean", "std"):
            _check_statistic(name, field, record.get(field), size)
    for field, kind in _KINDS.items():
        if record.get(field) is not None and not _is(record[field], kind):
            raise ValueError(f"stream `{name}` has `{field}` {record[field]!r}, which is no {_KIND_NAMES[kind]}")


def _check_statistic(name: Any, field: str, value: Any, size: int) -> None:
    """Raise ValueError for a mean or standard deviation that rows cannot be standardised by.

    A standard deviation is 0 where a channel did not vary; of all channels together it is not.
    """
    numbers = value if isinstance(value, list) else [value]
    typed = all(_is(number, int | float) for number in numbers)
    if not typed or len(numbers) not in (1, size):
        raise ValueError(
            f"stream `{name}` is standardised, so its record needs `{field}` as one number or {size} numbers, "
            f"but it has {len(numbers)} values" + (" of another type" if len(numbers) in (1, size) else "")
        )
    least = 0 if field == "std" else -LARGEST_FLOAT
    if faulty := [number for number in numbers if not least <= number <= LARGEST_FLOAT]:
        raise ValueError(
            f"`{field}` of stream `{name}` must be finite"
            + (f" and not negative, but it holds {faulty[0]}" if field == "std" else f", but it holds {faulty[0]}")
        )
    if field == "std" and not any(numbers):
        raise ValueError(f"`std` of stream `{name}` is 0, so that its rows cannot be divided by it")


def _is(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type; Python counts True as an integer, JSON does not."""
    return isinstance(value, kind) and not isinstance(value, bool)
