"""Folders of pictures that know what they were drawn from, so that those of another model or setting are not kept."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from sparc_hf.atomic_files import new_file, writing
from sparc_hf.atomic_folders import carry_over, place, recover, refuse_fixed_place, remove_tree
from sparc_hf.folder_lock import locked_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130
# The text in a PNG that tells its origin: a digest of the model, and one of everything else.
ORIGIN_KEY = "sparc_hf"


@dataclass(frozen=True)
class PictureFolder:
    """A folder of pictures of one model.

    Attributes:
        path: the folder to draw into.
        model: digest of the model.
    """

    path: Path
    model: str

    def has(self, name: str, *facts: Any) -> bool:
        """Return whether a picture of this model and these facts, JSON values, is there already.

        Raises:
            ValueError: where the file of that name is somebody else's, and would be lost.
        """
        path = self.path / name
        if not path.exists():
            return False
        if (origin := _origin_of(path)) is None:
            raise ValueError(f"`{path}` was not drawn by this package and is not replaced; choose another folder")
        return origin == self._origin(facts)

    def save(self, figure: "Figure", name: str, *facts: Any) -> None:
        """Write a figure as PNG, with its origin in it; the file appears complete or not at all.

        Raises:
            ValueError: as `has`.
            OSError: saying what to do, if it cannot be written.
        """
        self.has(name)
        advice = "the pictures before it are kept: make room and run the same again"
        with writing(f"`{self.path / name}`", advice), new_file(self.path / name) as file:
            figure.savefig(file, format="png", dpi=DPI, metadata={ORIGIN_KEY: self._origin(facts)})

    def is_outdated(self, entry: Path) -> bool:
        """Return whether an entry of the folder is a picture of another model."""
        origin = _origin_of(entry)
        return origin is not None and not origin.startswith(self.model)

    def _origin(self, facts: tuple[Any, ...]) -> str:
        return f"{self.model} {hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()}"


@contextmanager
def picture_folder(output: str | os.PathLike, model: torch.nn.Module) -> Iterator[PictureFolder]:
    """Give the folder to draw a model's pictures into.

    Where `output` has pictures of another model, the new ones are drawn in `<output>.partial`, which takes its place
    in one step when all are there; the files of others in it come along.

    Raises:
        ValueError: where another process draws there, or such a folder cannot be replaced.
    """
    output = Path(output).resolve()
    partial = output.with_name(output.name + ".partial")
    digest = _digest_of(model)
    here, beside = PictureFolder(output, digest), PictureFolder(partial, digest)
    with locked_folder(output):
        recover(output)
        if not output.is_dir() or not any(map(here.is_outdated, output.iterdir())):
            remove_tree(partial)  # left by a run that was killed
            output.mkdir(parents=True, exist_ok=True)
            yield here
            return
        refuse_fixed_place(output)
        if partial.is_dir() and any(map(beside.is_outdated, partial.iterdir())):
            remove_tree(partial)
        partial.mkdir(exist_ok=True)
        carry_over(output, partial, here.is_outdated)
        yield beside
        place(partial, output, here.is_outdated)


def _digest_of(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        digest.update(name.encode())
        # As bytes, because numpy has no bfloat16.
        digest.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _origin_of(path: Path) -> str | None:
    """Return the origin of a picture of this package; None for any other entry of a folder."""
    if path.suffix != ".png" or not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            return image.info.get(ORIGIN_KEY)
    except (OSError, ValueError, SyntaxError):  # what Pillow calls damage
        return None
