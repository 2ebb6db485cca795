"""Columns of a source: which hold images, texts, ids and labels, and whether they can."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparc_hf.features.sources.source import find_column, is_image, schema_of

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Columns:
    """Which source columns become what; None for what there is not.

    Attributes:
        image: images, or paths of images.
        text: texts, or lists of captions, which are joined by a space.
        id: what becomes the `id` of a row.
        labels: class ids or names, or lists of them.
        keep: further columns to copy.
    """

    image: str | None
    text: str | None
    id: str | None
    labels: str | None
    keep: tuple[str, ...]

    @property
    def needed(self) -> list[str]:
        """All source columns, each once."""
        named = [self.image, self.text, self.id, self.labels, *self.keep]
        return list(dict.fromkeys(name for name in named if name is not None))

    @property
    def record(self) -> dict[str, str | None]:
        """What the dataset remembers of its source."""
        return {
            "image_column": self.image,
            "id_column": self.id,
            "text_column": self.text,
            "labels_column": self.labels,
        }


def chosen_columns(
    dataset: "datasets.Dataset | datasets.IterableDataset",
    modalities: set[str],
    *,
    image_column: str | None,
    text_column: str | None,
    id_column: str | None,
    labels_column: str | None,
    keep_columns: Sequence[str],
) -> Columns:
    """Check the named columns, and find those that are needed and not named.

    Raises:
        ValueError: for a column that is not there or cannot be found, or a kept one whose name is taken.
    """
    column_names = list(schema_of(dataset))
    named = [image_column, text_column, id_column, labels_column, *keep_columns]
    if missing := [name for name in named if name is not None and name not in column_names]:
        raise ValueError(f"the dataset has no columns {missing}; it has {column_names}")
    image = (image_column or find_column(dataset, "image")) if "image" in modalities else None
    text = text_column or (find_column(dataset, "text") if "text" in modalities else None)
    _check_kinds(schema_of(dataset), image, text, labels_column)
    source_columns = {
        "id": id_column or ("id" if "id" in column_names else None),
        "text": text,
        "labels": labels_column,
    }
    if taken := [name for name in keep_columns if source_columns.get(name) not in (None, name)]:
        raise ValueError(
            f"columns {taken} cannot be kept, because {source_columns} take their names; rename them first"
        )
    return Columns(
        image=image, keep=tuple(name for name in keep_columns if source_columns.get(name) is None), **source_columns
    )


def _check_kinds(features: Any, image: str | None, text: str | None, labels: str | None) -> None:
    """Raise ValueError where a column cannot be what it is to be, by its type."""
    from datasets import List, Value

    def scalar(name: str) -> str:
        feature = features[name]
        inner = feature.feature if isinstance(feature, List) else feature
        # A ClassLabel is a number; an image stored as a plain record has the parts of one.
        kind = getattr(inner, "dtype", "") if isinstance(inner, Value) or hasattr(inner, "names") else ""
        return "record" if isinstance(inner, dict) and {"bytes", "path"} <= set(inner) else kind.removeprefix("large_")

    wanted = (
        (image, "images, or paths of images", lambda kind: kind in ("string", "binary", "record")),
        (text, "texts, or lists of texts", lambda kind: kind == "string"),
        (labels, "class ids or names, or lists of them", lambda kind: kind == "string" or "int" in kind),
    )
    for name, words, fits in wanted:
        if name is not None and not is_image(features[name]) and not fits(scalar(name)):
            raise ValueError(f"the column `{name}` must hold {words}, but it holds {features[name]}")
