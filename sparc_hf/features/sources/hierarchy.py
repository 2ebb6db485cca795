"""Label hierarchies as nested `{"LabelName": ..., "Subcategory": [...]}` over class names, Open Images' own form."""

from collections.abc import Mapping, Sequence
from typing import Any

ROOT_NAME = "entity"


def hierarchy_of_codes(node: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Return a hierarchy of label codes as one of class names; classes that it lacks go right under its root.

    Args:
        node: the root, an object with `LabelName` and, where it has parts, `Subcategory`; other keys are left out.
        names: label code -> class name; a code without one keeps its code as the name.

    Raises:
        ValueError: for a node without `LabelName`, or whose `Subcategory` is no list.
    """
    tree = _renamed(node, names)
    seen = _names_in(tree)
    missing = sorted(set(names.values()) - seen)
    if missing:
        tree["Subcategory"] = [*tree.get("Subcategory", []), *({"LabelName": name} for name in missing)]
    return tree


def hierarchy_of_paths(paths: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """Return the hierarchy whose leaves are `paths`, each the names from the outermost group to the class."""
    root: dict[str, Any] = {"LabelName": ROOT_NAME}
    places: dict[tuple[str, ...], dict[str, Any]] = {(): root}
    for path in paths:
        for depth, name in enumerate(path, start=1):
            if path[:depth] not in places:
                places[path[:depth]] = {"LabelName": name}
                places[path[: depth - 1]].setdefault("Subcategory", []).append(places[path[:depth]])
    return root


def _renamed(node: Any, names: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(node, Mapping) or not isinstance(node.get("LabelName"), str):
        raise ValueError("a hierarchy is made of objects with `LabelName` and, where they have parts, `Subcategory`")
    renamed: dict[str, Any] = {"LabelName": names.get(node["LabelName"], node["LabelName"])}
    children = node.get("Subcategory", [])
    if not isinstance(children, list):
        raise ValueError(f"`Subcategory` of {node['LabelName']} must be a list")
    if children:
        renamed["Subcategory"] = [_renamed(child, names) for child in children]
    return renamed


def _names_in(node: Mapping[str, Any]) -> set[str]:
    return {node["LabelName"]}.union(*(_names_in(child) for child in node.get("Subcategory", [])))
