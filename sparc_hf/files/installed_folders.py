"""Where files lie that come with the package: inside an installed wheel, or beside the package in a checkout."""

from importlib.resources import files
from pathlib import Path


def package_folder() -> Path:
    """Return the folder of this package."""
    return Path(str(files("sparc_hf")))


def templates_folder() -> Path:
    """Return where the card templates lie: inside an installed wheel, or beside the package in a checkout."""
    return _folder_with("hub_cards", "model_card.md", "the card templates are missing")


def space_folder() -> Path:
    """Return where the package's own Space lies: inside an installed wheel, or beside the package in a checkout."""
    return _folder_with("spaces_app", "app.py", "the Space's app is missing")


def _folder_with(name: str, file: str, fault: str) -> Path:
    here = package_folder()
    for folder in (here / name, here.parent / name):
        if (folder / file).is_file():
            return folder
    raise FileNotFoundError(f"{fault}; install sparc-hf again")
