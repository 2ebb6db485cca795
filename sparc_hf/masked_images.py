"""Images with a mask per class: COCO's instances JSON, a Dataset with masks, or scenes of the embedded world."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparc_hf.coco_source import LISTS
from sparc_hf.demo.scenes import make_scenes_dataset
from sparc_hf.sources import read_json

DEMO_PREFIX = "demo:"


@dataclass(frozen=True)
class MaskedImages:
    """Images, read when they are asked for.

    Attributes:
        classes: image -> names of the classes that have a mask there.
        read: image number -> PIL image, and class name -> bool [height, width], the pixels of all its objects.
    """

    classes: Sequence[Sequence[str]]
    read: Callable[[int], tuple[Image.Image, dict[str, np.ndarray]]]

    def __len__(self) -> int:
        return len(self.classes)


def open_masked_images(source: str, images: str | None = None, rows: int | None = None) -> MaskedImages:
    """Open images with masks; images without any are left out.

    Args:
        source: a COCO instances JSON; a folder that `Dataset.save_to_disk` wrote, with columns `image`, `masks` and
            `mask_labels`; or "demo:<split>" for scenes of the embedded world.
        images: the folder of the JSON's image files.
        rows: most images to take; by default all, or 500 scenes.

    Raises:
        ValueError: for a file of another form, or missing images.
        ImportError: where a JSON is given and pycocotools is not installed.
    """
    if source.startswith(DEMO_PREFIX):
        return _of_dataset(make_scenes_dataset(source.removeprefix(DEMO_PREFIX), rows or 500))
    if source.endswith(".json"):
        if images is None:
            raise ValueError(f"give the folder of the images that `{source}` lists as `mask_images`")
        return _of_coco(Path(source), Path(images), rows)
    import datasets

    try:
        table: Any = datasets.load_from_disk(source)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"`{source}` is neither a JSON file nor a folder of a saved Dataset: {error}") from error
    return _of_dataset(table if rows is None else table.select(range(min(rows, len(table)))))


def _of_dataset(table: Any) -> MaskedImages:
    if missing := {"image", "masks", "mask_labels"} - set(table.column_names):
        raise ValueError(f"the dataset lacks the columns {sorted(missing)}; it has {table.column_names}")
    labels = table.features["mask_labels"].feature
    names: list[str] | None = getattr(labels, "names", None)

    def name_of(label: Any) -> str:
        return str(label) if names is None else names[label]

    per_image = [sorted({name_of(one) for one in of_image}) for of_image in table["mask_labels"]]
    kept = [number for number, found in enumerate(per_image) if found]

    def read(number: int) -> tuple[Image.Image, dict[str, np.ndarray]]:
        row = table[kept[number]]
        masks: dict[str, np.ndarray] = {}
        for label, mask in zip(row["mask_labels"], row["masks"], strict=True):
            name = name_of(label)
            pixels = np.asarray(mask).astype(bool)
            masks[name] = masks.get(name, np.zeros_like(pixels)) | pixels
        return row["image"], masks

    return MaskedImages([per_image[number] for number in kept], read)


def _of_coco(file: Path, folder: Path, rows: int | None) -> MaskedImages:
    from pycocotools import mask as coco_mask

    content = read_json(file)
    if not isinstance(content, dict) or any(
        not isinstance(content.get(key), list) or not all(LISTS[key] <= set(one) for one in content[key])
        for key in LISTS
    ):
        raise ValueError(f"`{file}` is not in COCO's format: it must be an object with lists {list(LISTS)}")
    names = {one["id"]: one["name"] for one in content["categories"]}
    of_image: dict[Any, list[dict[str, Any]]] = {one["id"]: [] for one in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in of_image or annotation.get("category_id") not in names:
            raise ValueError(
                f"`{file}` has an annotation of image {annotation['image_id']} and category "
                f"{annotation.get('category_id')}, one of which it does not list"
            )
        if annotation.get("segmentation"):
            of_image[annotation["image_id"]].append(annotation)
    listed = [one for one in content["images"] if of_image[one["id"]]][:rows]
    if absent := [one["file_name"] for one in listed if not (folder / one["file_name"]).is_file()]:
        raise ValueError(f"`{folder}` lacks {len(absent)} images of `{file}`, {absent[0]} among them")

    def pixels(segmentation: Any, height: int, width: int) -> np.ndarray:
        if isinstance(segmentation, list):
            found = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            found = coco_mask.frPyObjects(segmentation, height, width)
        else:
            found = segmentation
        return coco_mask.decode(found).astype(bool)

    def read(number: int) -> tuple[Image.Image, dict[str, np.ndarray]]:
        record = listed[number]
        with Image.open(folder / record["file_name"]) as opened:
            image = opened.convert("RGB")
        masks: dict[str, np.ndarray] = {}
        for annotation in of_image[record["id"]]:
            name = names[annotation["category_id"]]
            one = pixels(annotation["segmentation"], image.height, image.width)
            masks[name] = masks.get(name, np.zeros_like(one)) | one
        return image, masks

    return MaskedImages([sorted({names[a["category_id"]] for a in of_image[one["id"]]}) for one in listed], read)
