"""One process at a time writes into a folder; the next one is told who does."""

import contextlib
import errno
import getpass
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from sparc_hf.files.atomic_files import WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# Processes that a killed one had started may hold its locks until they notice, in seconds.
AFTER_A_KILL = 15.0
PAUSE = 0.2


class FolderInUse(ValueError):
    """Another process writes into the folder."""


@contextlib.contextmanager
def locked_folder(path: str | os.PathLike, *, wait: bool = False, rank: int = 0) -> Iterator[None]:
    """Keep other processes of this package from writing into a folder, as long as the `with` block runs.

    The lock is a file beside the folder, or in it where no file can be made beside it. It goes with its process, also
    after a kill. The thread that has it may take it again. On a file system without locks, the mere file is the lock:
    one that a dead process of this machine left is recognised, others name machine and process.

    Args:
        path: the folder, which need not exist.
        wait: wait until the other process is done; otherwise that is an error.
        rank: number of this process among those that a launcher started for one task; they share the lock of rank 0.

    Raises:
        FolderInUse: telling who writes into it.
        OSError: where nothing can be written there.
    """
    if rank > 0:
        yield
        return
    lock = _acquired(Path(path).resolve(), wait)
    outermost = lock.lock_counter == 1
    if outermost and not isinstance(lock, SoftFileLock):
        _leave_note(lock.lock_file)
    try:
        yield
    finally:
        if outermost and not isinstance(lock, SoftFileLock):
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)
        lock.release()


def launched_rank() -> int:
    """Return the number of this process among those of its launcher, 0 without one."""
    return int(os.environ.get("RANK", "0"))


def _acquired(path: Path, wait: bool) -> BaseFileLock:
    """Return the acquired lock of a folder."""
    places = [path.parent / f".{path.name}.lock", path / ".lock"]
    for attempt, place in enumerate(places):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            return _acquired_at(place, path, wait)
        except OSError as error:
            if error.errno not in CLOSED or (attempt == 0 and not path.is_dir()) or attempt == 1:
                raise WriteError(error.errno, f"nothing can be written to `{path}`: {error.strerror}") from error
    raise AssertionError("unreachable: the last place returns or raises")


def _acquired_at(file: Path, path: Path, wait: bool) -> BaseFileLock:
    lock: BaseFileLock = FileLock(file, mode=0o664, is_singleton=True)
    started, has_warned = time.monotonic(), False
    while True:
        holder = _holder(file)
        try:
            lock.acquire(timeout=0)
            if lock.lock_counter > 1 or isinstance(lock, SoftFileLock) or _is_locked_file(file):
                return lock
            lock.release()  # the file we locked had just been removed by its holder
            continue
        except Timeout:
            if not file.exists():  # its holder has just gone; or no file can be made here, and this says why
                os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o664))
                continue
            died = _is_dead(holder) and time.monotonic() - started < AFTER_A_KILL
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            with contextlib.suppress(OSError):  # what the attempt has left
                file.unlink()
            file = file.with_suffix(".softlock")
            lock = SoftFileLock(file, mode=0o664, is_singleton=True)
            continue
        if not wait and not died:
            raise FolderInUse(
                f"`{path}` is being written by {_words(holder)}; wait until that is done (`--wait`), or choose "
                f"another folder{_if_gone(lock, holder, file)}"
            )
        if wait and not died and not has_warned:
            logger.warning("waiting for `%s`, which is being written by %s", path, _words(holder))
            has_warned = True
        time.sleep(PAUSE)


def _is_locked_file(file: Path) -> bool:
    """Return whether the file of this name is locked, which it is not where another one of that name was locked."""
    if fcntl is None:
        return True
    try:
        with open(file, "rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _leave_note(file: str) -> None:
    """Write who holds a lock into its file."""
    note = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "user": _user(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300],
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    with contextlib.suppress(OSError):  # it is a courtesy
        Path(file).write_text(json.dumps(note) + "\n", encoding="utf-8")


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        return None


def _holder(file: Path) -> dict[str, Any]:
    """Return what the file of a lock tells of its holder; nothing where it tells nothing."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    try:
        note = json.loads(text)
    except ValueError:
        lines = text.split()  # of a lock that is a mere file: process and machine
        return {"process": int(lines[0]), "host": lines[1]} if len(lines) > 1 and lines[0].isdecimal() else {}
    return note if isinstance(note, dict) else {}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Return whether a holder was a process of this machine that is gone."""
    process = holder.get("process")
    if holder.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    by = f" by {holder['user']}" if holder.get("user") else ""
    since = f", since {holder['since']}" if holder.get("since") else ""
    place = f"process {holder.get('process')} on {holder.get('host')}"
    return f"`{holder['command']}` ({place}, started{by}{since})" if holder.get("command") else place


def _if_gone(lock: BaseFileLock, holder: dict[str, Any], file: Path) -> str:
    is_elsewhere = holder.get("host") != socket.gethostname()
    return f"; if that process is gone, delete `{file}`" if is_elsewhere or isinstance(lock, SoftFileLock) else ""
