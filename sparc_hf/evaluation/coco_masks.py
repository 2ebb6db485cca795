"""COCO's segmentations, polygons and run lengths, as masks over the image files that there are."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

import numpy as np
from PIL import Image

from sparc_hf.encoders.inputs import ON_ITS_SIDE, open_with_tag, turned
from sparc_hf.files.checked_reading import Count, Limit, checked

MOST_PIXELS = 1 << 28
Size = tuple[int, int]
Coordinate = Annotated[float, Limit("a coordinate of a pixel", lambda value: abs(value) < MOST_PIXELS)]
Side = Annotated[int, Limit("a number of pixels", lambda value: 0 < value <= MOST_PIXELS)]


class RunLengths(TypedDict):
    """Lengths of runs outside and inside, down the columns: numbers, or COCO's text of them."""

    size: list[Side]
    counts: list[Count] | str


def image_and_masks(
    file: str, size: Size | None, segmentations: Sequence[tuple[str, Any]], name: str
) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """Return an upright image, and class name -> bool [height, width], the pixels of all its objects in it.

    Masks are brought to the size of the file, which may be a smaller or larger copy of the image they were drawn on.
    Where the file has an orientation tag, the width and height that COCO lists tell whether masks were drawn on the
    pixels as they are stored or on the turned image; where both fit, they lie on the stored pixels, as everything in
    COCO's own files does.

    Args:
        file: the image.
        size: width and height that COCO lists; None where it does not, and masks lie on the stored pixels.
        segmentations: (class name, COCO's segmentation) of every object.
        name: what errors call the annotations' file.

    Raises:
        ValueError: for an image that cannot be read or has other proportions, or a segmentation that is none.
    """
    image, tag = open_with_tag(file)
    stored = (image.height, image.width) if tag in ON_ITS_SIDE else image.size
    size = size or stored
    check_proportions(file, stored, size, name)
    on_stored = same_proportions(stored, size)
    masks: dict[str, np.ndarray] = {}
    for label, segmentation in segmentations:
        mask = mask_of(segmentation, size, f"a segmentation of {label} in {name}")
        if on_stored and tag != 1:
            mask = np.asarray(turned(Image.fromarray(mask), tag))
        mask = fitted(mask, image.size)
        masks[label] = masks.get(label, np.zeros_like(mask)) | mask
    return image, masks


def same_proportions(size: Size, other: Size) -> bool:
    """Return whether one image (width, height) is a copy of the other in another size, to the rounding of a pixel."""
    small, large = sorted((size, other), key=lambda size: size[0] * size[1])
    longer = int(large[1] > large[0])
    return abs(large[1 - longer] * small[longer] / large[longer] - small[1 - longer]) <= 1


def check_proportions(file: str, stored: Size, size: Size, name: str) -> None:
    """Raise ValueError where masks drawn on `size` are not of an image of this stored size, whichever way it lies."""
    if not same_proportions(stored, size) and not same_proportions(stored, (size[1], size[0])):
        raise ValueError(
            f"`{file}` has {stored[0]} x {stored[1]} pixels, but its masks in `{name}` were drawn on {size[0]} x "
            f"{size[1]}, which are other proportions; give those images, or copies of them in another size"
        )


def fitted(mask: np.ndarray, size: Size) -> np.ndarray:
    """Return a mask, bool [height, width], in another size (width, height)."""
    if mask.shape == size[::-1]:
        return mask
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def mask_of(segmentation: Any, size: Size, name: str) -> np.ndarray:
    """Return a segmentation as a mask, bool [height, width]; run lengths in their own size, polygons in `size`.

    Raises:
        ValueError: for neither polygons nor run lengths, or such as do not fit the size.
    """
    if isinstance(segmentation, Mapping):
        return _mask_of_runs(checked(segmentation, RunLengths, name), size, name)
    return _mask_of_polygons(checked(segmentation, list[list[Coordinate]], name), size, name)


def _mask_of_runs(runs: Mapping[str, Any], size: Size, name: str) -> np.ndarray:
    height, width = runs["size"] if len(runs["size"]) == 2 else (MOST_PIXELS, 1)
    if height * width > MOST_PIXELS or not same_proportions((width, height), size):
        raise ValueError(f"{name} has run lengths of `size` {runs['size']} for {size[0]} x {size[1]} pixels")
    counts = _counts_of(runs["counts"]) if isinstance(runs["counts"], str) else runs["counts"]
    # pycocotools reads beyond its memory where they do not add up.
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"{name} has run lengths that do not add up to {height} x {width} pixels")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T


def _counts_of(text: str) -> list[int]:
    """Return the numbers of COCO's text: five bits a letter, and from the fourth on what the last but one lacks."""
    counts: list[int] = []
    count, bits = 0, 0
    for letter in text:
        code = ord(letter) - 48
        count |= (code & 31) << bits
        bits += 5
        if not code & 32:
            count -= (code >> 4 & 1) << bits
            counts.append(count + (counts[-2] if len(counts) > 2 else 0))
            count, bits = 0, 0
        elif bits > 60:
            return [-1]
    return counts


def _mask_of_polygons(polygons: Sequence[Sequence[float]], size: Size, name: str) -> np.ndarray:
    from pycocotools import mask

    coco_mask: Any = mask  # whose types leave polygons out
    width, height = size
    if any(len(polygon) % 2 for polygon in polygons):
        raise ValueError(f"{name} has a polygon with an odd number of coordinates")
    closed = [polygon for polygon in polygons if len(polygon) >= 6]  # fewer points enclose nothing
    for polygon in closed:
        points = np.array(polygon).reshape(-1, 2)
        # It is drawn point by point, also where it lies far outside.
        if np.abs(np.diff(points, axis=0)).max(initial=0, axis=1).sum() > 10 * (width * height + width + height):
            raise ValueError(f"{name} has a polygon longer than an image of {width} x {height} pixels can hold")
    if not closed:
        return np.zeros((height, width), bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(closed, height, width))).astype(bool)
