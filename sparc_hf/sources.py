"""Where samples come from: datasets of any stored form, their image and text columns, and streams as strings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import datasets

FILE_FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
PREFERRED_NAMES = {"image": ("image",), "text": ("text", "caption", "captions")}
MODALITIES = ("image", "text")


def open_source(source: str, split: str | None = None) -> "datasets.Dataset":
    """Open a Hub dataset, an imagefolder, a folder of `save_to_disk`, or a parquet, csv, json or arrow file.

    Args:
        source: Hub id or path.
        split: which split; needed where there are several. A Hub dataset downloads only this one.

    Raises:
        ValueError: if it cannot be opened, or the split is missing or has to be chosen.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(source).expanduser()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(path))
        elif path.is_file() and path.suffix in FILE_FORMATS:
            found = datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=split)
        else:
            found = datasets.load_dataset(str(path) if path.is_dir() else source, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot open `{source}` as a dataset: {reason}") from error
    if isinstance(found, datasets.Dataset):
        return found
    splits = list(found)
    if split is None and len(splits) > 1:
        raise ValueError(f"`{source}` has the splits {splits}; choose one with `split`")
    name = splits[0] if split is None else split
    if name not in splits:
        raise ValueError(f"`{source}` has no split `{name}`; its splits are {splits}")
    return found[name]


def find_column(dataset: "datasets.Dataset", modality: Literal["image", "text"]) -> str:
    """Return the column of images, or of texts or lists of texts, by type, and by name where several have the type.

    Raises:
        ValueError: if there is none, or several without a usual name.
    """
    fits = _is_image if modality == "image" else _is_text
    found = [name for name, feature in dataset.features.items() if fits(feature)]
    for name in PREFERRED_NAMES[modality]:
        if name in found:
            return name
    if len(found) != 1:
        problem = (
            f"several {modality} columns, {found}" if found else f"no {modality} column among {dataset.column_names}"
        )
        raise ValueError(f"the dataset has {problem}; name one with `{modality}_column`")
    return found[0]


def parse_streams(specifications: Sequence[str]) -> list[dict[str, Any]]:
    """Return stream records from strings `name=encoder:modality[:pooling]`.

    Raises:
        ValueError: for a string of another form, or a name that occurs twice.
    """
    records = []
    for text in specifications:
        name, _, rest = text.partition("=")
        parts = rest.rsplit(":", 2)
        pooling = parts.pop() if len(parts) == 3 and parts[1] in MODALITIES else None
        encoder, modality = ":".join(parts[:-1]), parts[-1]
        if not name.isidentifier() or not encoder or modality not in MODALITIES:
            raise ValueError(
                f"cannot read the stream {text!r}; write name=encoder:modality[:pooling], for example "
                "dino=facebook/dinov2-base:image"
            )
        record = {"name": name, "encoder": encoder, "modality": modality}
        records.append(record | ({"pooling": pooling} if pooling else {}))
    names = [record["name"] for record in records]
    if len(set(names)) != len(names):
        raise ValueError(f"every stream needs its own name, but they are {names}")
    return records


def _is_image(feature: Any) -> bool:
    from datasets import Image

    return isinstance(feature, Image)


def _is_text(feature: Any) -> bool:
    from datasets import List, Value

    inner = feature.feature if isinstance(feature, List) else feature
    return isinstance(inner, Value) and inner.dtype in ("string", "large_string")
