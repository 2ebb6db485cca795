"""What a pushed Space consists of: its app, this package in one of two ways, and a demo that is ready to be shown."""

import shutil
from importlib.metadata import PackageNotFoundError, requires
from importlib.resources import files
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from sparc_hf.files.checked_reading import read_text
from sparc_hf.files.installed_folders import templates_folder
from sparc_hf.space.data import SHIPPED_FOLDER, ship_demo
from sparc_hf.version import __version__

DISTRIBUTION = "sparc-hf"
# How a Space gets this package: a copy beside its app.py, or from the package index by version.
PACKAGE_WAYS = ("source", "index")
PACKAGE_FOLDER = "sparc_hf"
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*", "*.pyc")


def prepare_space(
    space: Path, folder: Path, *, package: str = "source", with_demo: bool = True, cache: str | None = None
) -> None:
    """Copy a Space into a folder that the Hub can build and start.

    The Hub installs requirements.txt before it copies anything else of a repository, so a wheel beside it would not be
    found; the package's source, which only has to lie beside app.py, always is.

    Args:
        space: folder with `app.py`, `README.md` and `requirements.txt`, which names this package.
        folder: existing folder to write into.
        package: "source" for a copy of this package with its dependencies in requirements.txt, or "index" for this
            version in requirements.txt, which then has to be on the package index.
        with_demo: put the prepared demo in where the app shows it (it calls `open_space`); made now where the cache
            does not have it.
        cache: as in `open_space`.

    Raises:
        ValueError: for a folder that is no Space, an unknown way, or where this package's dependencies are not known.
    """
    missing = [name for name in ("app.py", "README.md", "requirements.txt") if not (space / name).is_file()]
    if missing:
        raise ValueError(f"{space} is no Space: it lacks {missing}")
    if package not in PACKAGE_WAYS:
        raise ValueError(f"`package` must be one of {list(PACKAGE_WAYS)}, but it is {package!r}")
    lines = read_text(space / "requirements.txt").splitlines()
    wanted = [line for line in lines if _extras_of(line) is not None]
    shutil.copytree(space, folder, ignore=LEFT_OUT, dirs_exist_ok=True)
    for came_along in (PACKAGE_FOLDER, SHIPPED_FOLDER):
        shutil.rmtree(folder / came_along, ignore_errors=True)
    required = [requirement for line in lines for requirement in _required_instead(line, package)]
    (folder / "requirements.txt").write_text("\n".join(dict.fromkeys(required)) + "\n", encoding="utf-8")
    if wanted and package == "source":
        _copy_package(folder / PACKAGE_FOLDER)
    if wanted and with_demo and "open_space(" in read_text(space / "app.py"):
        ship_demo(folder / SHIPPED_FOLDER, cache)


def dependencies(extras: set[str]) -> list[str]:
    """Return the requirements of this package as it is installed, with those of some extras.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError as error:
        raise ValueError(
            f"{DISTRIBUTION} is not installed here, so its dependencies are not known; install it, for example with "
            "`pip install -e .`"
        ) from error
    requirements = []
    for requirement in map(Requirement, lines):
        marker, requirement.marker = requirement.marker, None
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            requirements.append(str(requirement))
    return requirements


def _extras_of(line: str) -> set[str] | None:
    """Return the extras with which a line of requirements.txt asks for this package; None where it does not."""
    try:
        requirement = Requirement(line.split("#")[0].strip())
    except InvalidRequirement:  # an option, an empty line or an address
        return None
    is_this = requirement.name.lower().replace("_", "-") == DISTRIBUTION
    return set(requirement.extras) if is_this else None


def _required_instead(line: str, package: str) -> list[str]:
    extras = _extras_of(line)
    if extras is None:
        return [line]
    if package == "source":
        return dependencies(extras)
    named = f"[{','.join(sorted(extras))}]" if extras else ""
    return [f"{DISTRIBUTION}{named}=={__version__}"]


def _copy_package(target: Path) -> None:
    """Copy this package's source with its templates, as a wheel holds them."""
    shutil.copytree(str(files("sparc_hf")), target, ignore=LEFT_OUT)
    shutil.copytree(templates_folder(), target / "hub_cards", ignore=LEFT_OUT, dirs_exist_ok=True)
