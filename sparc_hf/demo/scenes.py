"""Scenes of the demo world: `make_scene(index, seed)` gives the same image, captions, labels and masks everywhere."""

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sparc_hf.demo.captions import ObjectFacts, write_caption
from sparc_hf.demo.raster import COLOUR_VALUES, IMAGE_SIZE, MAX_TURN, paint_background, paint_object
from sparc_hf.demo.taxonomy import (
    BACKGROUND_OFFSET,
    BACKGROUNDS,
    CLASS_NAMES,
    COLOUR_OFFSET,
    SHAPES,
    TAXONOMY,
    TEXTURE_OFFSET,
    TEXTURES,
    TONE_OFFSET,
)

if TYPE_CHECKING:
    from datasets import Dataset, Features

__all__ = [
    "CAPTIONS_PER_SCENE",
    "CLASS_NAMES",
    "SPLITS",
    "TAXONOMY",
    "Scene",
    "SceneObject",
    "make_scene",
    "make_scenes_dataset",
]

SPLITS: dict[str, range] = {
    "encoders": range(0, 1_000_000),
    "train": range(1_000_000, 2_000_000),
    "test": range(2_000_000, 3_000_000),
}
"""Disjoint scene indices: for training the demo encoders, for training SPARC on them, and held out from both."""

CAPTIONS_PER_SCENE = 5
SIZE_RANGES = ((7.5, 9.5), (11.0, 13.5), (16.0, 20.0))
"""Radius in pixels of a small, a medium and a large object."""

_LAYOUTS = 48
_OBJECT_COUNT_THRESHOLDS = (0.45, 0.80)
_SOLID_SHARE = 0.35
# Least distance of an object's colour from the background's, in RGB units of 0..1.
_MIN_CONTRAST = 0.38


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        shape: class id, indexes `CLASS_NAMES` (as do `colour` and `texture`).
        colour: class id.
        texture: class id.
        mask: bool [64, 64], the pixels on which the object is seen.
        size: 0 small, 1 medium, 2 large.
        centre: x and y in pixels.
    """

    shape: int
    colour: int
    texture: int
    mask: np.ndarray
    size: int
    centre: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """An image with everything known about it; `labels` are sorted class ids."""

    index: int
    image: Image.Image
    captions: tuple[str, ...]
    labels: tuple[int, ...]
    objects: tuple[SceneObject, ...]


def _draw_sizes(count: int, rng: np.random.Generator) -> list[int]:
    sizes = rng.integers(0, 3, size=count).tolist()
    if count == 1:
        return sizes
    if count == 3:
        return [min(size, 1) for size in sizes]
    # Two large objects do not fit beside each other.
    return sizes if sum(sizes) < 4 else [2, int(rng.integers(0, 2))]


def _draw_centres(radii: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Centres [n, 2] in pixels: the first of several random layouts whose objects keep apart, else the best."""
    count = len(radii)
    margin = radii[None, :, None] + 0.5
    centres = margin + rng.random((_LAYOUTS, count, 2)) * (IMAGE_SIZE - 2 * margin)
    if count == 1:
        return centres[0]
    first, second = np.triu_indices(count, 1)
    distance = np.sqrt(((centres[:, first] - centres[:, second]) ** 2).sum(-1))
    slack = (distance / (radii[first] + radii[second])).min(axis=1)
    return centres[np.argmax(np.minimum(slack, 0.95))]


def _draw_colour(base: np.ndarray, rng: np.random.Generator) -> int:
    """A colour index that stands out from the background colour [3]."""
    visible = np.flatnonzero(np.abs(COLOUR_VALUES - base).max(axis=1) > _MIN_CONTRAST)
    return int(visible[rng.integers(0, len(visible))])


def _second_colour(colour: np.ndarray, dark: bool) -> np.ndarray:
    """The texture's other colour [3], mixed away from the background so that the outline stays whole."""
    target = 1.0 if dark else 0.0
    mixed = colour + 0.55 * (target - colour)
    if np.abs(mixed - colour).max() < 0.3:
        mixed = colour + 0.42 * ((1 - target) - colour)
    return mixed


def _draw_facts(base: np.ndarray, rng: np.random.Generator) -> tuple[list[ObjectFacts], list[float]]:
    """What stands where, and the radius of each object in pixels."""
    draw = rng.random()
    count = 1 + sum(draw > threshold for threshold in _OBJECT_COUNT_THRESHOLDS)
    sizes = _draw_sizes(count, rng)
    shares = rng.random(count)
    ranges = np.array([SIZE_RANGES[size] for size in sizes])
    radii = ranges[:, 0] + (ranges[:, 1] - ranges[:, 0]) * shares
    facts = []
    for size, (x, y) in zip(sizes, _draw_centres(radii, rng).tolist(), strict=True):
        shape = int(rng.integers(0, len(SHAPES)))
        if facts and rng.random() < 0.12:
            shape = facts[0].shape
        texture = 0 if rng.random() < _SOLID_SHARE else int(rng.integers(1, len(TEXTURES)))
        facts.append(ObjectFacts(shape, _draw_colour(base, rng), texture, size, x, y))
    return facts, radii.tolist()


def _paint(
    canvas: np.ndarray, facts: ObjectFacts, radius: float, dark: bool, rng: np.random.Generator
) -> tuple[tuple[slice, slice], np.ndarray]:
    """Draw one object over the canvas [64, 64, 3] in place; gives its window and its coverage there."""
    turn, angle, spread, shade = rng.random(4).tolist()
    pattern = (math.pi * angle, (4.6 + 1.2 * spread) * (1.0, 1.15, 1.4)[facts.size])
    window, coverage, share = paint_object(
        facts.shape, facts.texture, (facts.x, facts.y), radius, (2 * turn - 1) * MAX_TURN[facts.shape], pattern
    )
    colour = np.clip(COLOUR_VALUES[facts.colour] * (0.94 + 0.12 * shade), 0, 1)
    other = _second_colour(colour, dark)
    paint = colour + share[:, :, None] * (other - colour)
    canvas[window] += coverage[:, :, None] * (paint - canvas[window])
    return window, coverage


def make_scene(index: int, seed: int = 0) -> Scene:
    """Draw scene `index` of the world `seed`; no state, the same in any process and order.

    Args:
        index: number of the scene; see `SPLITS` for which numbers serve what.
        seed: number of the world.
    """
    if index < 0 or seed < 0:
        raise ValueError(f"`index` and `seed` must be 0 or more, found index={index} and seed={seed}; see SPLITS.")
    rng = np.random.default_rng((seed, index))
    background, tone = int(rng.integers(0, len(BACKGROUNDS))), int(rng.integers(0, 2))
    canvas, base = paint_background(background, tone == 1, rng)
    facts, radii = _draw_facts(base, rng)
    masks = []
    for fact, radius in zip(facts, radii, strict=True):
        window, coverage = _paint(canvas, fact, radius, tone == 1, rng)
        mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        mask[window] = coverage > 0.5
        for earlier in masks:
            earlier &= ~mask
        masks.append(mask)
    pixels = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    objects = tuple(
        SceneObject(
            fact.shape, COLOUR_OFFSET + fact.colour, TEXTURE_OFFSET + fact.texture, mask, fact.size, (fact.x, fact.y)
        )
        for fact, mask in zip(facts, masks, strict=True)
    )
    labels = {BACKGROUND_OFFSET + background, TONE_OFFSET + tone}
    labels.update(label for o in objects for label in (o.shape, o.colour, o.texture))
    captions = tuple(write_caption(facts, background, tone, rng) for _ in range(CAPTIONS_PER_SCENE))
    return Scene(index, Image.fromarray(pixels), captions, tuple(sorted(labels)), objects)


def _png(image: Image.Image) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def _row(scene: Scene, seed: int) -> dict[str, object]:
    return {
        "id": f"{seed}-{scene.index:07d}",
        "image": _png(scene.image),
        "text": scene.captions[0],
        "captions": list(scene.captions),
        "labels": list(scene.labels),
        "masks": [_png(Image.fromarray(o.mask)) for o in scene.objects],
        "mask_labels": [o.shape for o in scene.objects],
    }


def _features() -> "Features":
    from datasets import ClassLabel, Features, List, Value
    from datasets import Image as ImageFeature

    label = ClassLabel(names=list(CLASS_NAMES))
    return Features(
        {
            "id": Value("string"),
            "image": ImageFeature(),
            "text": Value("string"),
            "captions": List(Value("string")),
            "labels": List(label),
            "masks": List(ImageFeature()),
            "mask_labels": List(label),
        }
    )


def make_scenes_dataset(split: str, rows: int, seed: int = 0) -> "Dataset":
    """The first `rows` scenes of a split as a Dataset.

    Args:
        split: a key of `SPLITS`.
        rows: number of scenes.
        seed: number of the world.

    Returns:
        Columns `id`, `image` (PNG), `text` (first caption), `captions`, `labels` (class ids of the scene), `masks`
        (one 1-bit PNG per object) and `mask_labels` (the shape class id of each mask).
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, found {split!r}; pick one of these.")
    if not 0 < rows <= len(SPLITS[split]):
        raise ValueError(f"`rows` must be in 1..{len(SPLITS[split])}, found {rows}; ask for fewer scenes.")
    from datasets import Dataset

    indices = tqdm(SPLITS[split][:rows], desc=f"drawing {split} scenes", unit="scene")
    table = [_row(make_scene(index, seed), seed) for index in indices]
    return Dataset.from_list(table, features=_features())
