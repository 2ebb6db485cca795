"""What commands look at before they work (folders, ports, switches), and a sentence where memory ends."""

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sparc_hf.files.output_folder import check_output_folder

MEMORY_WORDS = (
    *("allocate memory", "out of memory", "not enough memory", "bad_alloc"),
    *("start new thread", "map segment from shared object"),
)
MEMORY_FLAGS = ("batch_size", "max_preactivation_mb", "workers", "rows_per_shard", "retrieval_rows")


def locked_folders(settings: Any, flags: Sequence[str], *, wait: bool, is_shared: bool) -> ExitStack:
    """Keep other processes out of the folders that some flags name, until the returned stack is closed.

    Args:
        settings: the filled flags of a command.
        flags: those that name folders; folders of models count where they are on this disk.
        wait: wait for a process that is in one of them.
        is_shared: whether the processes of a launcher do the work together.

    Raises:
        FolderInUse: telling who is in one of them.
        ValueError: for one that cannot be made or written, before any is.
    """
    folders = {flag: Path(value) for flag in flags if (value := getattr(settings, flag)) and _is_local(flag, value)}
    with ExitStack() as stack:
        if folders:
            from sparc_hf.files.folder_lock import launched_rank, locked_folder

            for flag, folder in folders.items():
                check_output_folder(folder, flag)
            for folder in folders.values():
                stack.enter_context(locked_folder(folder, wait=wait, rank=launched_rank() if is_shared else 0))
        return stack.pop_all()


def _is_local(flag: str, value: str) -> bool:
    return flag != "model" or Path(value).is_dir()


def check_address(host: str, port: int | None) -> None:
    """Look whether the Space can listen there, before it prepares what it shows."""
    if port is not None and not 0 < port < 1 << 16:
        raise ValueError(f"`port` must be from 1 to 65535, but it is {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(f"nothing can listen on `host` {host}, `port` {port}: {error.strerror}") from error


def memory_sentence(error: BaseException, settings: Any) -> str | None:
    """Return what to tell where an error, of whatever library, says that there is no memory left; None elsewhere."""
    if not isinstance(error, MemoryError) and not any(words in str(error) for words in MEMORY_WORDS):
        return None
    smaller = [f"--{name}" for name in MEMORY_FLAGS if hasattr(settings, name)]
    advice = "give it more" + (f", or lower {' or '.join(smaller)}" if smaller else "")
    can_resume = hasattr(settings, "resume")
    outcome = "continue from the last checkpoint with --resume" if can_resume else "what was there before is unchanged"
    reason = " ".join(str(error).split())[:200] or "allocation failed"
    return f"there is not enough memory ({reason}); {advice}; {outcome}"


def yes_or_no(text: str) -> bool:
    """Read the value of a switch in a settings file; ValueError for another word."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise ValueError(f"expected true or false, but got {text!r}")
    return words[text.lower()]
