"""Kills at chosen moments: a command in a forked child that dies before its n-th change of a folder."""

import faulthandler
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

# What Python tells of changes to the file system; "open" counts where it may write.
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
PATIENCE = 300


def in_child(work: Callable[[], object]) -> multiprocessing.Process:
    """Start a forked child that does the work and exits with 0, or fails with its traceback."""

    def run():
        _own_progress_bars()
        torch.set_num_threads(1)
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=sys.__stderr__)
        work()

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child


def _own_progress_bars() -> None:
    """Give this process its own lock for progress bars.

    tqdm's is a semaphore that forked processes share: one that is killed while it holds it would stop the bars of all
    others for ever.
    """
    kinds = [tqdm]
    for kind in kinds:
        kinds += kind.__subclasses__()
    lock = threading.RLock()
    for kind in kinds:
        kind.set_lock(lock)


def outcome(child: multiprocessing.Process) -> int:
    """Wait for a child and return its exit code."""
    child.join(PATIENCE + 30)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def dying(work: Callable[[], object], number: int, root: Path) -> Callable[[], None]:
    """Return work that kills its process before its `number`-th change, counted from 0, below `root`."""

    def run() -> None:
        left = itertools.count(number, -1)

        def watch(event: str, arguments: tuple) -> None:
            changes = event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if changes and isinstance(arguments[0], str | os.PathLike):
                below = os.path.abspath(os.fspath(arguments[0])).startswith(str(root))
                if below and next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        work()

    return run


def killed_everywhere(
    work: Callable[[], object], root: Path, former: Path, every: int = 1, first: int = 0
) -> Iterator[int]:
    """Kill work before each of its changes in turn; yield after each kill, with `root` as it then is.

    Args:
        work: the command.
        root: the folder it works in.
        former: what `root` holds before each start.
        every: take only each n-th change.
        first: start with this change.
    """
    for number in itertools.count(first, every):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(former, root, symlinks=True)
        code = outcome(in_child(dying(work, number, root)))
        if code == 0:
            return
        assert code == -signal.SIGKILL
        yield number


def files_of(folder: Path, hidden: bool = True) -> dict[str, bytes]:
    """Return path -> bytes of all files in a folder, or of those that a user sees."""
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    shown = {path: file for path, file in files.items() if hidden or not f"/{path}".count("/.")}
    return {path: file.read_bytes() for path, file in shown.items()}


def litter_of(folder: Path) -> list[str]:
    """Return the hidden and unfinished things in a folder and below it."""
    marks = (".partial", ".training", ".tmp", ".saving", ".retired")
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.startswith(".") or path.name.endswith(marks)
    ]
