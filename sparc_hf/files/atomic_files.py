"""Files that appear whole or not at all, and the checksums that tell a damaged one."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# The last field of a JSON file, with the SHA-256 of the file's own bytes, taken with zeros in its place.
CHECKSUM_FIELD = "file_sha256"
_ZEROS = b"0" * 64
_LABEL, _END = f'"{CHECKSUM_FIELD}": "'.encode(), b'"\n}\n'
# What a full, limited, closed or broken disk answers, and how torch tells that a file could not be written.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
TORCH_WRITE_ERRORS = ("inline_container", "iostream error", "PytorchStreamWriter")


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Give a file to write bytes into, which takes the place of `path` once it is whole and on the disk.

    Its mode is what the umask leaves. What killed writers of the same file left behind is removed.
    """
    path = Path(path)
    _remove_litter(path)
    unfinished = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    with open(unfinished, "xb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            _claim(file)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames closed files only
                file.close()
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8; it appears whole or not at all."""
    with new_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | os.PathLike, content: Mapping[str, Any], indent: int = 2) -> None:
    """Write an object as JSON with a checksum of the file itself; it appears whole or not at all."""
    text = json.dumps({**content, CHECKSUM_FIELD: _ZEROS.decode()}, indent=indent, ensure_ascii=False) + "\n"
    data = text.encode("utf-8")
    with new_file(path) as file:
        file.write(data[: -len(_ZEROS + _END)] + hashlib.sha256(data).hexdigest().encode() + _END)


def check_own_checksum(data: bytes, path: str | os.PathLike) -> None:
    """Compare a JSON file's bytes with the checksum that `write_json` put into it.

    A file without one, such as one written by hand, is not compared.

    Raises:
        ValueError: where they differ.
    """
    head, digits, end = data[: -len(_ZEROS + _END)], data[-len(_ZEROS + _END) : -len(_END)], data[-len(_END) :]
    # A field that is damaged itself still resembles one.
    alike = sum(ours == theirs for ours, theirs in zip(head[-len(_LABEL) :], _LABEL, strict=False))
    if alike < 0.7 * len(_LABEL):
        return
    expected = hashlib.sha256(head + _ZEROS + end).hexdigest().encode()
    if not head.endswith(_LABEL) or digits != expected:
        raise ValueError(
            f"`{path}` is damaged: its checksum is another than the one in it; make it again, or, if you changed it "
            f"by hand, take out its last field, `{CHECKSUM_FIELD}`"
        )


def sha256_of(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def checksums_of(folder: str | os.PathLike, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return name -> {"bytes", "sha256"} of files in a folder."""
    paths = {name: Path(folder) / name for name in names}
    return {name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in paths.items()}


def first_damage(folder: str | os.PathLike, files: Mapping[str, Mapping[str, Any]], verify: bool = True) -> str | None:
    """Return what is wrong with the first of `files` that is not as `checksums_of` found it, or None.

    Args:
        folder: where the files lie.
        files: what `checksums_of` returned, or some of it.
        verify: compare the SHA-256, which reads all bytes; without it only sizes are compared.
    """
    for name, checksum in files.items():
        path = Path(folder) / name
        if not path.is_file():
            return f"`{path}` is missing"
        if path.stat().st_size != checksum["bytes"]:
            return f"`{path}` has {path.stat().st_size} bytes instead of {checksum['bytes']}"
        if verify and sha256_of(path) != checksum["sha256"]:
            return f"the SHA-256 of `{path}` is not the one that was noted when it was written"
    return None


class WriteError(OSError):
    """Something could not be written; says what, why and what to do."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextlib.contextmanager
def writing(what: str, advice: str) -> Iterator[None]:
    """Turn what libraries raise where a disk is full, or fails, into one sentence: what failed, why, what to do.

    Raises:
        WriteError: with the number of the cause. Other errors stay as they are.
    """
    try:
        yield
    except WriteError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if (cause := _disk_error(error)) is None:
            raise
        number, reason = cause
        raise WriteError(number, f"{what} cannot be written ({reason}); {advice}") from error


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    with contextlib.suppress(OSError):  # not every file system can, and the data are written
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make all files in `folder` and below durable, and readable for whom the umask leaves."""
    mode = _mode_of_new_files()
    for place, _, names in os.walk(folder):
        for path in (Path(place) / name for name in names):
            if path.is_symlink() or not path.is_file():
                continue
            with contextlib.suppress(OSError), open(path, "rb") as file:
                # Some libraries write their files for the owner alone.
                if path.stat().st_mode & 0o777 == 0o600 and path.stat().st_uid == os.geteuid():
                    path.chmod(mode)
                os.fsync(file.fileno())
        sync_folder(Path(place))


def _mode_of_new_files() -> int:
    """Return the mode that the umask gives a new file."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if match := re.search(r"^Umask:\s*([0-7]+)$", status, re.MULTILINE):
            return 0o666 & ~int(match[1], 8)
    mask = os.umask(0o077)  # elsewhere only setting it tells it
    os.umask(mask)
    return 0o666 & ~mask


def _disk_error(error: BaseException) -> tuple[int, str] | None:
    """Return number and words of the disk's error behind what a library raised, or None where that is another one."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    for link in links:
        number = link.errno if isinstance(link, OSError) else None
        if number is None and isinstance(link, SafetensorError) and (match := re.search(r"os error (\d+)", str(link))):
            number = int(match[1])
        if number in DISK_ERRORS:
            return number, os.strerror(number)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH_WRITE_ERRORS):
        return errno.EIO, "the disk is full or fails"
    return None


def _remove_litter(path: Path) -> None:
    """Remove unfinished files for `path` whose writers are gone; where that cannot be told they stay."""
    for litter in path.parent.glob(f".{glob.escape(path.name[:100])}.*.tmp") if fcntl else ():
        with contextlib.suppress(OSError):
            with open(litter, "rb") as file:
                _claim(file)
            litter.unlink()


def _claim(file: Any) -> None:
    """Hold an unfinished file for as long as it is open; OSError where another process does."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
