"""Questions as on the demo's pages, "a red circle": which scenes are right, and how many of those retrieved are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparc_hf.demo.captions import with_article
from sparc_hf.demo.scenes import Scene
from sparc_hf.demo.taxonomy import CLASS_NAMES, COLOUR_IDS, SHAPE_IDS, TEXTURE_IDS

DEPTH = 5
"""How many retrieved scenes count."""


class ObjectQuery(NamedTuple):
    """A question for an object of a shape and one more attribute, both as class ids."""

    text: str
    shape: int
    attribute: int


def _queries(attributes: range) -> list[ObjectQuery]:
    return [
        ObjectQuery(with_article(f"{CLASS_NAMES[attribute]} {CLASS_NAMES[shape]}"), shape, attribute)
        for attribute in attributes
        for shape in SHAPE_IDS
    ]


QUERIES: dict[str, list[ObjectQuery]] = {"colour": _queries(COLOUR_IDS), "texture": _queries(TEXTURE_IDS)}
"""All pairs: 168 questions "a COLOUR SHAPE" and 70 "a TEXTURE SHAPE"."""


def right_scenes(queries: Sequence[ObjectQuery], scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Tell which scenes have the shape, the attribute, and both in one object; each bool [queries, scenes]."""
    pairs = [{(o.shape, attribute) for o in scene.objects for attribute in (o.colour, o.texture)} for scene in scenes]
    classes = [set(scene.labels) for scene in scenes]
    return {
        "shape": np.array([[query.shape in ids for ids in classes] for query in queries]),
        "attribute": np.array([[query.attribute in ids for ids in classes] for query in queries]),
        "both": np.array([[(query.shape, query.attribute) in ids for ids in pairs] for query in queries]),
    }


def precision_by_chance(queries: Sequence[ObjectQuery], scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the share of right scenes among all, mean over the queries: what scenes in any order reach."""
    return {name: float(right.mean()) for name, right in right_scenes(queries, scenes).items()}


def precision_at_depth(
    retrieved: Sequence[Sequence[int]], queries: Sequence[ObjectQuery], scenes: Sequence[Scene]
) -> dict[str, float]:
    """Return the share of right scenes among the first five retrieved, mean over the queries; 0 to 1.

    Args:
        retrieved: for each query, rows of the scenes, the best first; places that are missing count as wrong.
        queries: the questions.
        scenes: what was searched.

    Returns:
        Precision at 5 of the "shape", of the "attribute", and of "both" in one object.
    """
    return {
        name: float(
            np.mean([right[row[:DEPTH]].sum() / DEPTH for right, row in zip(rows, map(list, retrieved), strict=True)])
        )
        for name, rows in right_scenes(queries, scenes).items()
    }
