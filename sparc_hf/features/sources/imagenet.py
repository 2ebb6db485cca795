"""ImageNet: a tree of folders, one a class, with class names and a hierarchy where there are files of them."""

import os
from pathlib import Path
from typing import Any

from sparc_hf.features.sources.hierarchy import hierarchy_of_codes, hierarchy_of_paths
from sparc_hf.features.sources.source import Source, rows_with_images
from sparc_hf.files.checked_reading import read_json, read_text

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


def open_imagenet(
    root: str | Path,
    split: str | None = None,
    *,
    class_names: str | Path | None = None,
    hierarchy: str | Path | None = None,
) -> Source:
    """Open a folder tree `<root>/[<split>/]<class>/<image>`, in sorted order of classes and file names.

    Class folders may lie in folders of their own (`animal/dog/poodle/x.jpg`): the innermost folder is the class, and
    the folders around it its taxonomy.

    Args:
        root: the folder, which holds the split's folder, or the classes.
        split: name of the split's folder, such as "train" or "val".
        class_names: text file with a line `<folder> <names>` a class, as ImageNet's `LOC_synset_mapping.txt`; the
            first of comma-separated names is taken. Folder names are the class names by default.
        hierarchy: JSON of nested `LabelName` and `Subcategory`, in folder names.

    Raises:
        ValueError: if there are no images in class folders, or two classes have the same name.
    """
    import datasets

    folder = Path(root) / split if split is not None else Path(root)
    if not folder.is_dir():
        raise ValueError(f"there is no folder `{folder}`")
    code_names = _names(Path(class_names)) if class_names is not None else {}
    files: list[str] = []
    classes: list[tuple[str, ...]] = []
    labels: list[int] = []
    for place, inner, names in os.walk(folder):
        inner.sort()
        images = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
        class_path = Path(place).relative_to(folder).parts
        if not images:
            continue
        if not class_path:
            raise ValueError(f"`{folder}` holds images outside of class folders, such as {images[0]}")
        files += [os.path.join(place, name) for name in images]
        labels += [len(classes)] * len(images)
        classes.append(class_path)
    if not files:
        raise ValueError(f"`{folder}` has no images in class folders")
    folders = [class_path[-1] for class_path in classes]
    label_names = [code_names.get(name, name) for name in folders]
    if code_names:  # ImageNet's crane and maillot are two classes each
        doubled = {name for name in label_names if label_names.count(name) > 1}
        label_names = [f"{n} ({f})" if n in doubled else n for n, f in zip(label_names, folders, strict=True)]
    if len(set(label_names)) != len(label_names):
        raise ValueError(f"two class folders in `{folder}` have the same name; each class needs its own")
    folder_names = dict(zip(folders, label_names, strict=True))
    taxonomy: Any = None
    if hierarchy is not None:
        taxonomy = hierarchy_of_codes(read_json(Path(hierarchy)), folder_names)
    elif any(len(class_path) > 1 for class_path in classes):
        taxonomy = hierarchy_of_paths([(*class_path[:-1], folder_names[class_path[-1]]) for class_path in classes])
    ids = [Path(file).relative_to(folder).with_suffix("").as_posix() for file in files]
    if len(set(ids)) != len(ids):  # the same name as .jpg and .png
        ids = [Path(file).relative_to(folder).as_posix() for file in files]
    types = {"label": datasets.Value("int32")}
    return Source(
        rows_with_images({"id": ids, "image": files, "label": labels}, types),
        labels_column="label",
        label_names=label_names,
        taxonomy=taxonomy,
        facts={"format": "imagenet"},
    )


def _names(file: Path) -> dict[str, str]:
    lines = read_text(file).splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"every line of `{file}` must hold a folder name and the names of its class")
    return {folder: names.split(",")[0].strip() for folder, names in pairs}
