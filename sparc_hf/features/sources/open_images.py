"""Open Images: localized narratives in simplified form, an image folder, label CSVs, class names and the hierarchy."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from sparc_hf.features.sources.hierarchy import hierarchy_of_codes
from sparc_hf.features.sources.source import Source, rows_with_images
from sparc_hf.files.checked_reading import read_json

SPLITS = ("train", "validation", "test")


def open_open_images(
    root: str | Path,
    split: str,
    *,
    rows: Literal["image", "caption"] = "caption",
    captions: str | Path | None = None,
    images: str | Path | None = None,
    label_files: Sequence[str | Path] | None = None,
    class_descriptions: str | Path | None = None,
    hierarchy: str | Path | None = None,
) -> Source:
    """Open images and narratives of Open Images.

    Files that are not named are looked for where the earlier SPARC project keeps them:
    `captions/<split>/simplified_open_images_<split>_localized_narratives.json`, `images/<split>/<image id>.jpg`, and
    in `labels/` the CSVs `<split>-annotations-*.csv` and `*class-descriptions*.csv` and the JSON `*hierarchy*.json`.

    Args:
        root: folder of the data set.
        split: "train", "validation" (or "val") or "test".
        rows: "caption" for one row a narrative, with id `<image id>-<number>`; "image" for one row an image.
        captions: JSON image id -> list of narratives (strings, or objects with `caption`).
        images: folder of the images of this split.
        label_files: CSVs with `ImageID`, `LabelName` and `Confidence`; only confidence 1 counts.
        class_descriptions: CSV of label code and display name; the classes are the names in code-point order.
        hierarchy: JSON of nested `LabelName` and `Subcategory`.

    Raises:
        ValueError: for a split, file or column that is not there.
    """
    import datasets

    split = "validation" if split == "val" else split
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, but it is {split!r}")
    root = Path(root)
    narratives = f"simplified_open_images_{split}_localized_narratives.json"
    texts = _narratives(Path(captions or root / "captions" / split / narratives))
    folder = Path(images or root / "images" / split)
    if not folder.is_dir():
        raise ValueError(f"there is no folder of images `{folder}`")
    types: dict[str, Any] = {"labels": datasets.List(datasets.Value("int32"))}
    if rows == "caption":
        pairs = [
            (image, number, text) for image, image_texts in texts.items() for number, text in enumerate(image_texts)
        ]
        order = [image for image, _, _ in pairs]
        columns: dict[str, list[Any]] = {"id": [f"{image}-{number}" for image, number, _ in pairs]}
        columns["caption"] = [text for _, _, text in pairs]
    elif rows == "image":
        types["captions"] = datasets.List(datasets.Value("string"))
        order = list(texts)
        columns = {"id": order, "captions": list(texts.values())}
    else:
        raise ValueError(f"`rows` must be image or caption, but it is {rows!r}")
    columns["image"] = [str(folder / f"{image}.jpg") for image in order]
    label_files = [Path(file) for file in label_files or sorted((root / "labels").glob(f"{split}-annotations-*.csv"))]
    classes = Path(class_descriptions) if class_descriptions else _only(root / "labels", "*class-descriptions*.csv")
    tree = Path(hierarchy) if hierarchy else _only(root / "labels", "*hierarchy*.json")
    names, taxonomy = None, None
    if label_files:
        if classes is None:
            raise ValueError("labels need the names of their classes; give `class_descriptions`")
        code_names = class_names(classes)
        names = sorted(set(code_names.values()))
        per_image = _labels(label_files, set(order), code_names, names)
        columns["labels"] = [per_image.get(image, []) for image in order]
        taxonomy = hierarchy_of_codes(read_json(tree), code_names) if tree is not None else None
    return Source(
        rows_with_images(columns, types),
        text_column="caption" if rows == "caption" else "captions",
        labels_column="labels" if label_files else None,
        label_names=names,
        taxonomy=taxonomy,
        facts={"format": "open-images", "rows_are": rows},
    )


def class_names(file: Path) -> dict[str, str]:
    """Return label code -> display name from a class-descriptions CSV, with or without its header line.

    Raises:
        ValueError: if the file cannot be read, or does not have two columns.
    """
    import csv

    try:
        with open(file, encoding="utf-8", newline="") as lines:
            table = [line for line in csv.reader(lines) if line]
    except OSError as error:
        raise ValueError(f"cannot read the class names `{file}`: {error}") from error
    if not table or any(len(line) != 2 for line in table):
        raise ValueError(f"`{file}` must have two columns, label code and display name")
    return {code: name for code, name in table if code != "LabelName"}


def _narratives(file: Path) -> dict[str, list[str]]:
    content = read_json(file)
    try:
        return {
            image: [(text if isinstance(text, str) else text["caption"]).strip() for text in texts]
            for image, texts in content.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{file}` is not in the simplified form: it must map each image id to a list of narratives, strings or "
            "objects with `caption`"
        ) from error


def _labels(
    files: Sequence[Path], images: set[str], code_names: dict[str, str], names: Sequence[str]
) -> dict[str, list[int]]:
    """Return class ids per image, reading the CSVs (gigabytes for the training split) block by block."""
    import pyarrow as pa
    from pyarrow import csv
    from pyarrow.compute import SetLookupOptions, call_function

    position = {name: number for number, name in enumerate(names)}
    wanted = pa.array(sorted(images))
    class_ids: dict[str, set[int]] = defaultdict(set)
    columns = {"ImageID": pa.string(), "LabelName": pa.string(), "Confidence": pa.float32()}
    options = csv.ConvertOptions(include_columns=list(columns), column_types=columns)
    for file in files:
        try:
            with csv.open_csv(file, convert_options=options) as reader:
                for block in reader:
                    block = block.filter(call_function("equal", [block["Confidence"], pa.scalar(1.0, pa.float32())]))
                    keep = call_function("is_in", [block["ImageID"]], SetLookupOptions(wanted))
                    block = block.filter(keep)
                    for image, code in zip(block["ImageID"].to_pylist(), block["LabelName"].to_pylist(), strict=True):
                        if code in code_names:
                            class_ids[image].add(position[code_names[code]])
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"cannot read the labels `{file}` ({list(columns)} are needed): {error}") from error
    return {image: sorted(ids) for image, ids in class_ids.items()}


def _only(folder: Path, pattern: str) -> Path | None:
    files = sorted(folder.glob(pattern))
    if len(files) > 1:
        raise ValueError(f"`{folder}` has several files {pattern}: {[file.name for file in files]}; name one")
    return files[0] if files else None
