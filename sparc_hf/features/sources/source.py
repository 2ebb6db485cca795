"""Where samples come from: datasets of any stored form, and their image and text columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import datasets

FILE_FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
PREFERRED_NAMES = {"image": ("image",), "text": ("text", "caption", "captions")}


@dataclass(frozen=True)
class Source:
    """Samples with the labels that come along.

    Attributes:
        dataset: rows with an image column, a text column, or both; an IterableDataset where it is streamed.
        text_column: which column holds the text, where the source knows.
        labels_column: which column holds class ids or lists of them, where there are labels.
        label_names: name of class id i.
        taxonomy: nested `{"LabelName": ..., "Subcategory": [...]}` over the label names.
        facts: what repeats it, as JSON values.
    """

    dataset: "datasets.Dataset | datasets.IterableDataset"
    text_column: str | None = None
    labels_column: str | None = None
    label_names: list[str] | None = None
    taxonomy: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def open_source(
    source: str, split: str | None = None, streaming: bool = False
) -> "datasets.Dataset | datasets.IterableDataset":
    """Open a Hub dataset, an imagefolder, a folder of `save_to_disk`, or a parquet, csv, json or arrow file.

    Args:
        source: Hub id or path.
        split: which split; needed where there are several. A Hub dataset downloads only this one.
        streaming: read rows as they come, without downloading or converting the whole first.

    Raises:
        ValueError: if it cannot be opened, or the split is missing or has to be chosen.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(source).expanduser()
    options: dict[str, Any] = {"split": split, "streaming": streaming}
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset = datasets.load_from_disk(str(path))
        elif path.is_file() and path.suffix in FILE_FORMATS:
            dataset = datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), **options)
        else:
            dataset = datasets.load_dataset(str(path) if path.is_dir() else source, **options)
    # The files fail in as many ways as datasets has readers.
    except Exception as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ValueError(f"cannot open `{source}` as a dataset: {reason}") from error
    if not isinstance(dataset, dict):
        return dataset
    splits = list(dataset)
    if split is None and len(splits) > 1:
        raise ValueError(f"`{source}` has the splits {splits}; choose one with `split`")
    name = splits[0] if split is None else split
    if name not in splits:
        raise ValueError(f"`{source}` has no split `{name}`; its splits are {splits}")
    return dataset[name]


def schema_of(dataset: "datasets.Dataset | datasets.IterableDataset") -> Any:
    """Return the column types, which a stream without a schema tells by its first row only.

    Raises:
        ValueError: for an empty stream.
    """
    import datasets

    if dataset.features is not None:
        return dataset.features
    first = list(dataset.take(1))
    if not first:
        raise ValueError("the dataset has no rows")
    return datasets.Dataset.from_list(first).features


def rows_with_images(columns: Mapping[str, Sequence[Any]], types: Mapping[str, Any]) -> "datasets.Dataset":
    """Make a dataset of columns, strings without a type in `types`; `image` holds files that nothing has looked at."""
    import datasets

    features = datasets.Features({name: types.get(name, datasets.Value("string")) for name in columns})
    dataset = datasets.Dataset.from_dict({name: list(values) for name, values in columns.items()}, features=features)
    return dataset.cast_column("image", datasets.Image(decode=False))


def find_column(dataset: "datasets.Dataset | datasets.IterableDataset", modality: Literal["image", "text"]) -> str:
    """Return the column of images, or of texts or lists of texts, by type, and by name where several have the type.

    Raises:
        ValueError: if there is none, or several without a usual name.
    """
    fits = is_image if modality == "image" else _is_text
    features = schema_of(dataset)
    names = [name for name, feature in features.items() if fits(feature)]
    for name in PREFERRED_NAMES[modality]:
        if name in names:
            return name
    if len(names) != 1:
        problem = f"several {modality} columns, {names}" if names else f"no {modality} column among {list(features)}"
        raise ValueError(f"the dataset has {problem}; name one with `{modality}_column`")
    return names[0]


def is_image(feature: Any) -> bool:
    """Return whether a column's type is that of images."""
    from datasets import Image

    return isinstance(feature, Image)


def _is_text(feature: Any) -> bool:
    from datasets import List, Value

    inner = feature.feature if isinstance(feature, List) else feature
    return isinstance(inner, Value) and inner.dtype in ("string", "large_string")
