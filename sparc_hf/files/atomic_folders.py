"""Folders that take their place whole: an older one gives way in one step, and files of others in it come along."""

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from sparc_hf.files.atomic_files import sync_folder, sync_tree

logger = logging.getLogger(__name__)

# Tells what in a folder belongs to its kind, and goes when it is replaced; everything else is somebody's.
Ours = Callable[[Path], bool]

# Of Linux's renameat2: paths as from here, and exchange the two.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def named(*patterns: str) -> Ours:
    """Return what tells the entries of a folder whose names fit one of the patterns."""
    return lambda entry: any(fnmatch(entry.name, pattern) for pattern in patterns)


def everything(entry: Path) -> bool:
    """Tell that an entry is ours, whatever it is."""
    return True


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, ours: Ours, last: str = "") -> Iterator[Path]:
    """Give a folder to fill, which takes the place of `path` at the end of the `with` block.

    It holds what of an older folder is not ours.

    Before that, and after an exception or a kill at any moment, `path` is as it was; what a killed run left goes with
    the next.

    Args:
        path: the folder to make.
        ours: tells what in an older folder of that name is replaced; the rest of it comes along.
        last: see `place`.

    Raises:
        ValueError: as `check_place`, before anything is done.
    """
    path = Path(path).resolve()
    check_place(path, ours)
    unfinished = unfinished_folder(path)
    remove_tree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        if path.exists() and unfinished.parent != path:
            carry_over(path, unfinished, ours)
        yield unfinished
        place(unfinished, path, ours, last)
    finally:
        remove_tree(unfinished)


def unfinished_folder(path: Path) -> Path:
    """Return where the folder that will be `path` is made: beside it, or in it where it cannot be exchanged."""
    return path / ".new" if _stays_in_place(path) else path.with_name(f".{path.name}.new")


def check_place(path: Path, ours: Ours) -> None:
    """Look, before any work, whether a folder can take the place of `path`, and mend what a kill left half-way.

    Raises:
        ValueError: where `path` is a file, or a folder to be replaced that cannot be exchanged as a whole.
    """
    recover(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"`{path}` must be a folder, but it is a file")
    # A run that was killed while it moved its files into place has left the rest of them.
    if _stays_in_place(path) and any(map(ours, path.iterdir())) and not (path / ".new").exists():
        refuse_fixed_place(path)


def refuse_fixed_place(path: Path) -> None:
    """Raise ValueError where another folder cannot take the place of `path` in one step."""
    if _stays_in_place(path):
        raise ValueError(
            f"`{path}` cannot be replaced as a whole, because it is a mount point, the folder you are in, or in a "
            "folder that cannot be written to; name a folder below it"
        )


def place(folder: Path, path: Path, ours: Ours, last: str = "") -> None:
    """Let a finished folder take the place of `path`.

    An older folder gives way in one step, and what is not ours in it comes along. Where a folder cannot be exchanged
    (see `check_place`), the files move one by one.

    Args:
        folder: the finished folder, where `unfinished_folder` says or anywhere beside `path`.
        path: its final name.
        ours: tells what of the older folder goes.
        last: name of the file without which the folder counts as unfinished; it moves last.
    """
    if folder.parent == path:
        _move_in(folder, path, last)
        return
    if path.exists():
        carry_over(path, folder, ours)
        shutil.copymode(path, folder)
    sync_tree(folder)
    if not path.exists() or not any(path.iterdir()):
        os.replace(folder, path)
    elif exchange(folder, path):
        discard(folder, path)
    else:
        try:
            os.replace(path, _retired(path))
            os.replace(folder, path)
        finally:
            recover(path)
    sync_folder(path.parent)


def recover(path: Path) -> None:
    """Give a folder its name back where a kill came between the two renames that replace it; for writers."""
    if is_half_replaced(path):
        os.replace(_retired(path), path)
    discard(_retired(path), path)
    remove_tree(_discarded(path))


def is_half_replaced(path: Path) -> bool:
    """Return whether a kill, or a process that is at it now, left `path` without its folder."""
    return _retired(path).exists() and not path.exists()


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False, and nothing done, where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    sys.audit("os.rename", os.fspath(first), os.fspath(second), -1, -1)
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), os.fspath(second))


def carry_over(source: Path, target: Path, ours: Ours) -> None:
    """Let `target` have what is not ours of `source` too, as links to the same files, or as copies.

    What `target` has already stays.
    """
    for entry in sorted(source.iterdir()):
        if not ours(entry):
            _link(entry, target / entry.name)


def discard(folder: Path, path: Path) -> None:
    """Remove a folder that belongs to `path`; after a kill, half of it is never mistaken for the whole."""
    if folder.exists():
        remove_tree(_discarded(path))
        os.replace(folder, _discarded(path))
        remove_tree(_discarded(path))


def remove_tree(folder: Path) -> None:
    """Remove a folder, as far as that goes; what cannot be removed is named in the log and harms nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        logger.warning("`%s` is of no use any more but could not be removed", folder)


def _link(entry: Path, target: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        target.mkdir(exist_ok=True)
        for inner in entry.iterdir():
            _link(inner, target / inner.name)
        shutil.copystat(entry, target)
    elif not os.path.lexists(target):
        try:
            os.link(entry, target, follow_symlinks=False)
        except OSError:  # a file system without links, or a file that others may not link to
            copied = target.with_name(f".{target.name[:100]}.tmp")
            shutil.copy2(entry, copied, follow_symlinks=False)
            os.replace(copied, target)


def _move_in(folder: Path, path: Path, last: str) -> None:
    """Move the entries of a folder into `path`, which it lies in."""
    sync_tree(folder)
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == last):
        former = path / entry.name
        if former.is_dir() and not former.is_symlink():
            remove_tree(former)
        os.replace(entry, former)
    sync_folder(path)


def _stays_in_place(path: Path) -> bool:
    """Return whether a folder cannot be exchanged: a mount point, one somebody stands in, one in a closed folder."""
    if not path.is_dir():
        return False
    return os.path.ismount(path) or Path.cwd().is_relative_to(path) or not os.access(path.parent, os.W_OK)


def _retired(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _discarded(path: Path) -> Path:
    return path.with_name(f".{path.name}.gone")
