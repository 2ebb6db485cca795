"""Whether a folder can be written, asked before the work whose result it is to hold."""

import os
from pathlib import Path


def check_output_folder(folder: str | os.PathLike, flag: str = "output") -> None:
    """Raise ValueError where a folder cannot be made or written, naming the flag it was given by; nothing is made."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"`{flag}` must be a folder, but {path} is a file")
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"`{flag}` {path} cannot be made, because {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`{flag}` {path} cannot be written: you may not write in {existing}")
