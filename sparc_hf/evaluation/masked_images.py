"""Images with a mask per class: COCO's instances JSON, or a Dataset with masks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from PIL import Image

from sparc_hf.encoders.inputs import size_of_file, stored_image
from sparc_hf.evaluation.coco_masks import (
    MOST_PIXELS,
    Side,
    check_proportions,
    fitted,
    image_and_masks,
    same_proportions,
)
from sparc_hf.features.sources.coco import Category, CocoImage, Instance, read_coco

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class MaskedImages:
    """Images, read when they are asked for.

    Attributes:
        classes: image -> names of the classes that have a mask there.
        read: image number -> upright RGB image, and class name -> bool [height, width], the pixels of all its objects.
    """

    classes: Sequence[Sequence[str]]
    read: Callable[[int], tuple[Image.Image, dict[str, np.ndarray]]]

    def __len__(self) -> int:
        return len(self.classes)


def open_masked_images(source: "str | Dataset", images: str | None = None, rows: int | None = None) -> MaskedImages:
    """Open images with masks; images without any are left out.

    Args:
        source: a COCO instances JSON; or a Dataset with columns `image`, `masks` and `mask_labels`, or the folder
            where its `save_to_disk` wrote it.
        images: the folder of the JSON's image files.
        rows: most images to take (default: all).

    Raises:
        ValueError: for a file of another form, or missing images.
        ImportError: where a JSON is given and pycocotools is not installed.
    """
    if isinstance(source, str) and source.endswith(".json"):
        if images is None:
            raise ValueError(f"give the folder of the images that `{source}` lists as `mask_images`")
        return _images_of_coco(Path(source), Path(images), rows)
    import datasets

    try:
        table: Any = datasets.load_from_disk(source) if isinstance(source, str) else source
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"`{source}` is neither a JSON file nor a folder of a saved Dataset: {error}") from error
    return _images_of_dataset(table if rows is None else table.select(range(min(rows, len(table)))))


def _images_of_dataset(table: Any) -> MaskedImages:
    """Open a Dataset, whose masks lie on its images as datasets shows them, which are turned by their tags."""
    import datasets

    if missing := {"image", "masks", "mask_labels"} - set(table.column_names):
        raise ValueError(f"the dataset lacks the columns {sorted(missing)}; it has {table.column_names}")
    kinds = {name: getattr(table.features[name], "feature", None) for name in ("masks", "mask_labels")}
    if None in kinds.values():
        raise ValueError(f"the columns `masks` and `mask_labels` must hold lists, but they are {table.features}")
    names: list[str] | None = getattr(kinds["mask_labels"], "names", None)

    def name_of(label: Any) -> str:
        if names is not None and label not in range(len(names)):
            raise ValueError(f"`mask_labels` has the class {label}, but there are {len(names)} names")
        return str(label) if names is None else names[label]

    per_image = [sorted({name_of(label) for label in labels or ()}) for labels in table["mask_labels"]]
    masked_rows = [row for row, labels in enumerate(per_image) if labels]
    stored_images = table.cast_column("image", datasets.Image(decode=False))

    def read(index: int) -> tuple[Image.Image, dict[str, np.ndarray]]:
        row, name = stored_images[masked_rows[index]], f"row {masked_rows[index]} of the dataset"
        image = stored_image(row["image"])
        if image is None or len(row["masks"] or ()) != len(row["mask_labels"]):
            raise ValueError(f"{name} needs an image, and a mask for each of its {len(row['mask_labels'])} labels")
        masks: dict[str, np.ndarray] = {}
        for label, stored in zip(row["mask_labels"], row["masks"], strict=True):
            mask = np.asarray(stored).astype(bool)
            if mask.ndim != 2 or not same_proportions(mask.shape[::-1], image.size):
                raise ValueError(f"{name} has a mask {list(mask.shape)} for an image of {image.size} pixels")
            mask, label = fitted(mask, image.size), name_of(label)
            masks[label] = masks.get(label, np.zeros_like(mask)) | mask
        return image, masks

    return MaskedImages([per_image[row] for row in masked_rows], read)


class _Sized(CocoImage, total=False):
    width: Side | None
    height: Side | None


class _Segmented(Instance, total=False):
    segmentation: list[Any] | dict[str, Any] | None


class _Masks(TypedDict):
    images: list[_Sized]
    annotations: list[_Segmented]
    categories: list[Category]


def _images_of_coco(file: Path, folder: Path, rows: int | None) -> MaskedImages:
    import pycocotools.mask  # noqa: F401 before anything is read

    content = read_coco(file, _Masks)
    names = {category["id"]: category["name"] for category in content["categories"]}
    objects: dict[Any, list[tuple[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in objects or annotation.get("category_id") not in names:
            raise ValueError(
                f"`{file}` has an annotation of image {annotation['image_id']} and category "
                f"{annotation.get('category_id')}, one of which it does not list"
            )
        if annotation.get("segmentation"):
            objects[annotation["image_id"]].append((names[annotation["category_id"]], annotation["segmentation"]))
    listed = [image for image in content["images"] if objects[image["id"]]][:rows]
    if absent := [image["file_name"] for image in listed if not (folder / image["file_name"]).is_file()]:
        raise ValueError(f"`{folder}` lacks {len(absent)} images of `{file}`, {absent[0]} among them")
    sizes = [_listed_size(image, folder / image["file_name"], file) for image in listed]

    def read(index: int) -> tuple[Image.Image, dict[str, np.ndarray]]:
        image = listed[index]
        return image_and_masks(str(folder / image["file_name"]), sizes[index], objects[image["id"]], file.name)

    return MaskedImages([sorted({label for label, _ in objects[image["id"]]}) for image in listed], read)


def _listed_size(image: Mapping[str, Any], path: Path, file: Path) -> tuple[int, int] | None:
    """Return the width and height a JSON lists, after comparison with the file's header, before any work is done."""
    width, height = image.get("width"), image.get("height")
    if not width or not height:
        return None
    if width * height > MOST_PIXELS:
        raise ValueError(f"`{file}` lists {image['file_name']} with {width} x {height} pixels, which no image has")
    check_proportions(str(path), size_of_file(path), (width, height), file.name)
    return width, height
