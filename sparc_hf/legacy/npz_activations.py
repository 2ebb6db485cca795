"""Patch-token activations of Universal Sparse Autoencoders: npz files in an ImageNet-like tree."""

import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparc_hf.encoders.token_grid import resample_tokens
from sparc_hf.legacy.declared_sizes import check_declared
from sparc_hf.model.stream_record import check_stream_name

COMBINED = "_combined"
STATISTICS_IMAGES = 512


@dataclass
class _Image:
    """The files of one image: a combined one, or one per model."""

    id: str
    label: int
    files: dict[str, Path] = field(default_factory=dict)


class ActivationTree:
    """Tokens of every image as rows, image by image, class folders and image names in sorted order.

    Files are `<class>/<image>_<model>.npz` with `activation` [tokens, width] and `label`, or
    `<class>/<image>_combined.npz` with one such array per model; the underscore before the model may be missing.
    Tokens before the square of patches (class token, registers) are dropped, and the patches resampled to one grid.

    Args:
        folder: the tree, with or without a folder per split above the class folders.
        split: which split, where there are several.
        models: the models to read, in order; by default all, by name.
        grid: rows and columns of the common grid; by default the smallest of the models' own.

    Attributes:
        records: stream records with `grid`, and mean and standard deviation as that project standardised: one number
            each over all tokens and channels, of at most 512 images spread evenly.
        rows: number of rows, images times tokens.
        label_names: the class folders.
        source: where the rows came from, as JSON values.

    Raises:
        ValueError: for a tree without such files, images that lack a model, or two files that do not fit, naming both.
    """

    def __init__(
        self,
        folder: Path,
        *,
        split: str | None = None,
        models: Sequence[str] = (),
        grid: Sequence[int] | None = None,
    ):
        from datasets import List, Value

        self.folder = _split_folder(folder, split)
        self._images, self.label_names = _listed_images(self.folder, models)
        first = self._images[0]
        activations, _ = _read(first)
        self._models = list(models) or sorted(activations)
        for name in self._models:
            check_stream_name(name)
        self._tokens = {name: activations[name].shape for name in self._models}
        grids = {name: _grid(first.files, name, shape[0]) for name, shape in self._tokens.items()}
        self._grids = grids
        self.grid = list(grid) if grid is not None else min(grids.values())
        self.tokens = self.grid[0] * self.grid[1]
        self.rows = len(self._images) * self.tokens
        self.records = [
            {
                "name": name,
                "hidden_size": int(self._tokens[name][1]),
                "pooling": "tokens",
                "grid": self.grid,
                "normalize": "standardize",
                **statistics,
            }
            for name, statistics in self._statistics().items()
        ]
        self.columns = {
            "id": Value("string"),
            "labels": List(Value("int32")),
            "sample": Value("int64"),
            "token": Value("int32"),
        }
        self.source = {
            "imported_from": "npz activations of Universal Sparse Autoencoders",
            "files": {"folder": self.folder.name, "images": len(self._images)},
        }

    def __enter__(self) -> "ActivationTree":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def blocks(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of one image at a time from row `start` on, with `id`, `labels`, `sample` and `token`."""
        for number in range(start // self.tokens, len(self._images)):
            skipped = max(start - number * self.tokens, 0)
            image = self._images[number]
            block: dict[str, Any] = {}
            for name, patches in self._patches(image).items():
                rows = torch.from_numpy(patches.astype(np.float32))[None]
                block[name] = resample_tokens(rows, self._grids[name], self.grid)[0, skipped:].numpy()
            count = self.tokens - skipped
            yield block | {
                "id": [image.id] * count,
                "labels": [[image.label]] * count,
                "sample": [number] * count,
                "token": list(range(skipped, self.tokens)),
            }

    def _patches(self, image: _Image) -> dict[str, np.ndarray]:
        """Return model -> patch tokens [grid rows * grid columns, width], after comparison with the first image."""
        activations, labels = _read(image)
        for name in self._models:
            shape = activations[name].shape if name in activations else None
            if shape != self._tokens[name]:
                first = self._images[0]
                raise ValueError(
                    f"`{_file_of(first.files, name)}` has activations {list(self._tokens[name])} but "
                    f"`{_file_of(image.files, name)}` has {'none' if shape is None else list(shape)} for {name}; "
                    "every image needs the same models and tokens"
                )
        first_model, *others = labels or [""]
        for model in others:
            if labels[first_model] != labels[model]:
                raise ValueError(
                    f"`{image.files[first_model]}` has label {labels[first_model]} but `{image.files[model]}` has "
                    f"{labels[model]}; they are not of one image"
                )
        return {name: activations[name][-self._grids[name][0] * self._grids[name][1] :] for name in self._models}

    def _statistics(self) -> dict[str, dict[str, float]]:
        """Return model -> `mean` and unbiased `std` over the tokens and channels of at most 512 images."""
        spread = np.linspace(0, len(self._images) - 1, min(STATISTICS_IMAGES, len(self._images)))
        moments = {name: (0, 0.0, 0.0) for name in self._models}
        for number in np.unique(spread.round().astype(int)):
            for name, patches in self._patches(self._images[number]).items():
                moments[name] = _merged(moments[name], patches.astype(np.float64))
        for name, (count, _, squares) in moments.items():
            if count < 2 or squares == 0:
                raise ValueError(f"the activations of `{name}` cannot be standardised: all of them are the same")
        return {
            name: {"mean": float(mean), "std": float(np.sqrt(squares / (count - 1)))}
            for name, (count, mean, squares) in moments.items()
        }


def has_activations(folder: Path) -> bool:
    """Return whether there is an npz file in a folder, one, two or three folders down."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.npz", "*/*.npz", "*/*/*.npz"))


def _merged(moments: tuple[int, float, float], values: np.ndarray) -> tuple[int, float, float]:
    """Merge count, mean and sum of squared deviations with those of `values`: sums of squares would lose digits."""
    count, mean, squares = moments
    total = count + values.size
    shift = values.mean() - mean
    squares += ((values - values.mean()) ** 2).sum() + shift**2 * count * values.size / total
    return total, mean + shift * values.size / total, squares


def _split_folder(folder: Path, split: str | None) -> Path:
    """Return the folder whose subfolders are classes."""
    if split is None and next(folder.glob("*/*.npz"), None):
        return folder
    splits = sorted(path.name for path in folder.iterdir() if next(path.glob("*/*.npz"), None))
    if split is None and len(splits) == 1:
        split = splits[0]
    if split is None or split not in splits:
        raise ValueError(
            f"`{folder}` has the splits {splits}; choose one with `split`"
            if splits
            else f"`{folder}` has no activations: they are `<class>/<image>_<model>.npz`, or `_combined.npz`"
        )
    return folder / split


def _listed_images(folder: Path, models: Sequence[str]) -> tuple[list[_Image], list[str]]:
    """Return the images in order, and the class folders."""
    classes = sorted(path.name for path in folder.iterdir() if next(path.glob("*.npz"), None))
    images: list[_Image] = []
    for label, class_name in enumerate(classes):
        images_by_name: dict[str, _Image] = {}
        for file in (folder / class_name).glob("*.npz"):
            name, model = _image_and_model(file, models)
            if not models or model in (*models, COMBINED):
                images_by_name.setdefault(name, _Image(f"{class_name}/{name}", label)).files[model] = file
        images += [images_by_name[name] for name in sorted(images_by_name)]
    if not images:
        raise ValueError(f"`{folder}` has no activations of the models {list(models)}")
    expected = images[0]
    for image in images:
        if set(image.files) != set(expected.files):
            lacking, having = (image, expected) if len(image.files) < len(expected.files) else (expected, image)
            model = sorted(set(having.files) - set(lacking.files))[0]
            raise ValueError(
                f"image `{lacking.id}` has files for {sorted(lacking.files)} but `{having.id}` has "
                f"`{having.files[model]}` too; every image needs the same models"
            )
    return images, classes


def _image_and_model(file: Path, models: Sequence[str]) -> tuple[str, str]:
    """Split a file name into image and model, whether or not an underscore stands between them."""
    if file.stem.endswith(COMBINED):
        return file.stem.removesuffix(COMBINED), COMBINED
    for model in models:
        if file.stem.endswith(model):
            return file.stem.removesuffix(model).removesuffix("_"), model
    image, _, last = file.stem.rpartition("_")
    match = re.fullmatch(r"(\d*)(\D.*)", last)
    if not image or match is None:
        raise ValueError(f"`{file}` is not named <image>_<model>.npz; name the models with `models`")
    number, model = match.groups()
    return (f"{image}_{number}" if number else image), model


def _read(image: _Image) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Return model -> activations [tokens, width], and model -> label where the files have one."""
    activations, labels = {}, {}
    for model, file in image.files.items():
        arrays = _arrays(file)
        if model == COMBINED:
            activations |= arrays
        elif "activation" in arrays:
            activations[model] = arrays["activation"]
            if "label" in arrays:
                labels[model] = _label_of(arrays["label"], file)
        else:
            raise ValueError(f"`{file}` has no `activation`; it holds {sorted(arrays)}")
    for model, values in activations.items():
        if values.ndim == 3 and len(values) == 1:  # a batch of one
            activations[model] = values = values[0]
        if values.ndim != 2 or values.dtype.kind != "f":
            file = _file_of(image.files, model)
            raise ValueError(
                f"`{file}` needs activations [tokens, width], but has {values.dtype} {list(values.shape)}"
            )
    return activations, labels


def _arrays(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file.

    Raises:
        ValueError: if it is no file of arrays, is damaged, or unpacks to far more than activations would.
    """
    if not file.is_file():
        raise ValueError(f"`{file}` is no regular file")
    try:
        with zipfile.ZipFile(file) as packed:
            declared = sum(entry.file_size for entry in packed.infolist())
        check_declared(declared, file.stat().st_size, f"`{file}`")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    # Damaged files fail in many ways, a header that claims too much in a MemoryError.
    except Exception as error:
        raise ValueError(f"cannot read `{file}`: {error}") from error


def _label_of(label: np.ndarray, file: Path) -> int:
    if label.size != 1 or label.dtype.kind not in "iu":
        raise ValueError(f"`{file}` needs a whole number as `label`, but has {label.dtype} {list(label.shape)}")
    return int(label.item())


def _file_of(files: dict[str, Path], model: str) -> Path:
    return files.get(model) or files[COMBINED]


def _grid(files: dict[str, Path], model: str, tokens: int) -> list[int]:
    """Return the grid of patches that ends a sequence of tokens; a few prefix tokens may come before it."""
    side = isqrt(tokens)
    # One class token and up to eight registers; more would rather be a grid that is not square.
    if not side or tokens - side**2 > 9:
        raise ValueError(
            f"`{_file_of(files, model)}` has {tokens} tokens for {model}, which are not a square grid of patches with "
            "a class token and registers before it"
        )
    return [side, side]
