"""JSON, YAML and text files from elsewhere: read in one way, and compared with the shape they have to have."""

import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from sparc_hf.files.atomic_files import CHECKSUM_FIELD, check_own_checksum

# Deeper values are refused, because functions that walk them would run out of stack.
DEEPEST = 200
LONGEST_PLACE = 60
# What the aliases of a YAML file stand for is written out by whoever reads it.
MOST_YAML_NODES = 1_000_000
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    NoneType: "nothing",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Limit:
    """What a value must be beyond its type, for `Annotated[type, Limit(...)]`.

    Attributes:
        words: what a message calls such a value.
        holds: whether one is.
    """

    words: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Limit("a whole number of 0 or more", lambda value: 0 <= value < 1 << 63)]
FileName = Annotated[str, Limit("the name of a file", lambda value: Path(value).name == value and "\0" not in value)]


class _NamedLabel(TypedDict):
    LabelName: str


class Taxonomy(_NamedLabel, total=False):
    """A label hierarchy: a name and, where it has parts, these."""

    Subcategory: "list[Taxonomy]"


def read_text(file: str | PathLike) -> str:
    """Read a text file.

    Raises:
        ValueError: if it cannot be read, or is not UTF-8.
    """
    return _decoded(_read_bytes(file), file)


def _read_bytes(file: str | PathLike) -> bytes:
    try:
        return Path(file).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read `{file}`: {getattr(error, 'strerror', None) or error}") from error


def _decoded(data: bytes, file: str | PathLike) -> str:
    try:
        return data.decode("utf-8")
    except ValueError as error:
        raise ValueError(f"cannot read `{file}`: it is not UTF-8") from error


def read_json(file: str | PathLike, shape: Any = Any, verify: bool = True) -> Any:
    """Read a JSON file whose content has a shape, see `checked`, and compare it with its own checksum if it has one.

    Args:
        file: its path.
        shape: what it must hold.
        verify: compare the checksum that `write_json` put into it, which is not in what is returned.

    Raises:
        ValueError: if it is missing, damaged, no JSON, nested too deeply, or of another shape.
    """
    data = _read_bytes(file)
    if verify:
        check_own_checksum(data, file)
    text = _decoded(data, file)
    try:
        content = json.loads(text)
        if "\\ud" in text.lower():  # half a character, which nothing can write
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read `{file}` as JSON: {error}") from error
    if isinstance(content, dict):
        content.pop(CHECKSUM_FIELD, None)
    return checked(content, shape, f"{file}")


def read_yaml(file: str | PathLike) -> Any:
    """Read a YAML or JSON file.

    Raises:
        ValueError: if it is missing, neither, nested too deeply, or its aliases stand for very much.
    """
    import yaml

    text = read_text(file)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _nodes_written_out(node, {}, 0) > MOST_YAML_NODES:
            raise ValueError(f"its aliases stand for more than {MOST_YAML_NODES:,} values")
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"`{file}` is not usable YAML or JSON: {' '.join(str(error).split())}") from error


def checked(value: Any, shape: Any, name: str) -> Any:
    """Return a value that has a shape.

    Args:
        value: made of what JSON has.
        shape: `Any`, bool, int, float, str, None, `Literal[...]`, `list[...]`, `dict[str, ...]`, a union of these, a
            TypedDict (other keys than its own are allowed), or one of them `Annotated` with a `Limit`.
        name: what the error calls it.

    Raises:
        ValueError: naming the part that differs, what it must be, and what it is.
    """
    if (fault := _fault(value, shape, 0)) is not None:
        place, expected, actual = fault
        where = f"`{name}`" if not place else f"`{place.lstrip('.')}` of `{name}`"
        raise ValueError(f"{where} must be {expected}, but it is {reprlib.repr(actual)}")
    return value


def _fault(value: Any, shape: Any, depth: int) -> tuple[str, str, Any] | None:
    """Return the place that differs, what it must be and what it is; None where nothing differs."""
    if type(value) is shape and shape is not float:  # most of what long files hold
        return None
    kind, parts = _form(shape)
    if kind is Any:
        return None
    if depth > DEEPEST:
        return "", f"nested at most {DEEPEST} deep", value
    if kind is Annotated:
        fault = _fault(value, parts[0], depth)
        return fault or (None if parts[1].holds(value) else ("", parts[1].words, value))
    if kind is Union:
        closest = ("", _words(shape), value)
        for member in parts:
            if (fault := _fault(value, member, depth)) is None:
                return None
            if fault[0]:  # it fits but for something inside it
                closest = fault
        return closest
    if kind is TypedDict:
        return _fault_of_record(value, parts[0], parts[1], depth)
    if kind is Literal:
        return (
            None
            if any(value == choice and type(value) is type(choice) for choice in parts)
            else ("", _words(shape), value)
        )
    if kind is list or kind is dict:
        if not isinstance(value, kind):
            return "", _words(shape), value
        items = enumerate(value) if isinstance(value, list) else value.items()
        if kind is dict and (odd := [key for key in value if not isinstance(key, str)]):  # which YAML can have
            return "", "an object whose names are texts", odd[0]
        return next((_inside(f"[{key!r}]", f) for key, v in items if (f := _fault(v, parts[-1], depth + 1))), None)
    return None if _is(value, shape) else ("", _words(shape), value)


def _fault_of_record(
    value: Any, fields: dict[str, Any], required: frozenset[str], depth: int
) -> tuple[str, str, Any] | None:
    if not isinstance(value, dict):
        return "", WORDS[dict], value
    for key, shape in fields.items():
        if key in value:
            if (fault := _fault(value[key], shape, depth + 1)) is not None:
                return _inside(f".{key}", fault)
        elif key in required:
            return "", f"an object with `{key}`", value
    return None


@cache
def _form(shape: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the kind of a shape and its parts; of a record, its fields and the names of those it must have."""
    if is_typeddict(shape):
        return TypedDict, (get_type_hints(shape, include_extras=True), shape.__required_keys__)
    origin = get_origin(shape)
    return Union if origin is UnionType else origin or shape, get_args(shape)


def _inside(place: str, fault: tuple[str, str, Any]) -> tuple[str, str, Any]:
    inner = fault[0] if len(fault[0]) < LONGEST_PLACE else ""
    return place + inner, fault[1], fault[2]


def _is(value: Any, shape: Any) -> bool:
    if shape is None:
        return value is None
    if shape is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, shape) and (shape is bool or not isinstance(value, bool))


@cache
def _words(shape: Any) -> str:
    kind, parts = _form(shape)
    if kind is Literal:
        return " or ".join(map(repr, parts))
    if kind is Union:
        return " or ".join(dict.fromkeys(_words(part) for part in parts))
    return parts[1].words if kind is Annotated else WORDS.get(NoneType if kind is None else kind, WORDS[dict])


def _nodes_written_out(node: Any, counts: dict[int, int], depth: int) -> int:
    """Return how many values a YAML node stands for, with every alias written out."""
    if depth > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep, or in itself")
    if id(node) not in counts:
        children = node.value if isinstance(node.value, list) else []
        inner = [child for entry in children for child in (entry if isinstance(entry, tuple) else (entry,))]
        counts[id(node)] = 1 + sum(_nodes_written_out(child, counts, depth + 1) for child in inner)
    return counts[id(node)]
