"""Where files lie that come with the package: inside an installed wheel, or beside the package in a checkout."""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def package_folder() -> Path:
    """Return the folder of this package."""
    return Path(str(files("sparc_hf")))


def templates_folder() -> Path:
    """Return where the card templates lie: inside an installed wheel, or beside the package in a checkout."""
    here = package_folder()
    for folder in (here / "hub_cards", here.parent / "hub_cards"):
        if (folder / "model_card.md").exists():
            return folder
    raise FileNotFoundError("the card templates are missing; install sparc-hf again")


def space_folder() -> Path:
    """Return where the package's own Space lies: inside an installed wheel, or beside the package in a checkout."""
    here = package_folder()
    for folder in (here / "spaces_app", here.parent / "spaces_app"):
        if (folder / "app.py").is_file():
            return folder
    raise FileNotFoundError("the Space's app is missing; install sparc-hf again")
