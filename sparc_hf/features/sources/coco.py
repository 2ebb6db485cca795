"""COCO: a captions JSON and an image folder, with the categories of an instances JSON as labels."""

from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, TypedDict

from sparc_hf.features.sources.hierarchy import hierarchy_of_paths
from sparc_hf.features.sources.source import Source, rows_with_images
from sparc_hf.files.checked_reading import checked, read_json

Id = int | str


class CocoImage(TypedDict):
    """An image of the list `images`."""

    id: Id
    file_name: str


class Caption(TypedDict):
    """An annotation of a captions JSON."""

    id: Id
    image_id: Id
    caption: str


class _Instance(TypedDict):
    image_id: Id


class Instance(_Instance, total=False):
    """An annotation of an instances JSON."""

    category_id: Id


class _Category(TypedDict):
    id: Id
    name: str


class Category(_Category, total=False):
    """A category of an instances JSON."""

    supercategory: str | None


class Captions(TypedDict):
    """A captions JSON."""

    images: list[CocoImage]
    annotations: list[Caption]


class Instances(TypedDict):
    """The part of an instances JSON that tells labels."""

    annotations: list[Instance]
    categories: list[Category]


def open_coco(
    captions: str | Path,
    images: str | Path,
    *,
    instances: str | Path | None = None,
    rows: Literal["image", "caption"] = "image",
) -> Source:
    """Open photographs and captions in COCO's format.

    Args:
        captions: the captions JSON (`images` and `annotations`).
        images: the folder with the image files.
        instances: the instances JSON; its categories become the labels, in the order of their names in the file, and
            its supercategories the taxonomy.
        rows: "image" for one row an image, whose captions are a list that extraction joins; "caption" for one row a
            caption, with id `<image id>-<caption id>`.

    Raises:
        ValueError: if a file is not in COCO's format, or an annotation is for an image that is not listed.
    """
    import datasets

    listed = read_coco(Path(captions), Captions)
    files = {image["id"]: str(Path(images) / image["file_name"]) for image in listed["images"]}
    texts: dict[Any, list[tuple[Any, str]]] = defaultdict(list)
    for annotation in listed["annotations"]:
        if annotation["image_id"] not in files:
            raise ValueError(f"`{captions}` has a caption for image {annotation['image_id']}, which it does not list")
        texts[annotation["image_id"]].append((annotation["id"], annotation["caption"].strip()))
    types: dict[str, Any] = {"labels": datasets.List(datasets.Value("int32"))}
    columns: dict[str, list[Any]] = {"id": [], "image": []}
    if rows == "image":
        types["captions"] = datasets.List(datasets.Value("string"))
        order = list(files)
        columns |= {"id": [str(image) for image in order], "captions": [[t for _, t in texts[i]] for i in order]}
    elif rows == "caption":
        pairs = [(image, number, text) for image in files for number, text in texts[image]]
        order = [image for image, _, _ in pairs]
        columns |= {"id": [f"{image}-{number}" for image, number, _ in pairs], "caption": [text for *_, text in pairs]}
    else:
        raise ValueError(f"`rows` must be image or caption, but it is {rows!r}")
    columns["image"] = [files[image] for image in order]
    names, taxonomy = None, None
    if instances is not None:
        per_image, names, taxonomy = _labels(Path(instances))
        columns["labels"] = [per_image.get(image, []) for image in order]
    return Source(
        rows_with_images(columns, types),
        text_column="captions" if rows == "image" else "caption",
        labels_column="labels" if instances is not None else None,
        label_names=names,
        taxonomy=taxonomy,
        facts={"format": "coco", "rows_are": rows},
    )


def _labels(file: Path) -> tuple[dict[Any, list[int]], list[str], dict[str, Any]]:
    """Return class ids per image, the class names, and the supercategories as a taxonomy."""
    content = read_coco(file, Instances)
    position = {category["id"]: number for number, category in enumerate(content["categories"])}
    class_ids: dict[Any, set[int]] = defaultdict(set)
    for annotation in content["annotations"]:
        if annotation.get("category_id") not in position:
            raise ValueError(
                f"`{file}` has an annotation of category {annotation.get('category_id')}, not listed there"
            )
        class_ids[annotation["image_id"]].add(position[annotation["category_id"]])
    names = [category["name"] for category in content["categories"]]
    paths = [(*filter(None, [category.get("supercategory")]), category["name"]) for category in content["categories"]]
    return {image: sorted(ids) for image, ids in class_ids.items()}, names, hierarchy_of_paths(paths)


def read_coco(file: Path, shape: Any) -> dict[str, Any]:
    """Read a JSON file in COCO's format.

    Args:
        file: the file.
        shape: what it has to hold, see `checked`.

    Raises:
        ValueError: if it cannot be read, or holds something else.
    """
    content = read_json(file)
    try:
        return checked(content, shape, file.name)
    except ValueError as error:
        raise ValueError(f"`{file}` is not in COCO's format: {error}") from error
