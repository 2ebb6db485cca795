"""From the words of a command line to a filled dataclass: flags, presets, settings files."""

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from sparc_hf.cli.guards import yes_or_no
from sparc_hf.files.checked_reading import read_yaml


def trust_remote_code_flag() -> Any:
    """Declare the flag of the commands that load encoders."""
    text = "Run code from the encoders' repositories, where they need it; look at that code first."
    return field(default=False, metadata={"help": text})


@dataclass(frozen=True)
class Command:
    """One verb of the command line.

    Attributes:
        summary: its line in `sparc --help`.
        arguments: "module:Class" of the dataclass whose fields are its flags.
        run: takes the filled dataclass and returns what to print, as JSON-ready values.
        leading: the flag whose values may also be given bare, right after the command.
        writes: the flags that name folders it writes into, which no other process may do at the same time.
        is_shared: whether the processes of a launcher do it together.
    """

    summary: str
    arguments: str
    run: Callable[[Any], Any]
    leading: str | None = None
    writes: tuple[str, ...] = ()
    is_shared: bool = False


def settings_of(name: str, command: Command, argv: Sequence[str], sections: Sequence[str]) -> tuple[Any, bool]:
    """Fill the command's dataclass from preset, config file and flags, the later ones winning.

    Returns:
        The dataclass, and whether to wait for another process that writes into the same folder.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", help="YAML or JSON file with any of these flags")
    files.add_argument("--preset", help="settings that come with the package: " + ", ".join(_presets()))
    if command.writes:
        wait_help = "wait until another process that writes into the same folder is done, instead of refusing"
        files.add_argument("--wait", nargs="?", const=True, default=False, type=yes_or_no, help=wait_help)
    file_flags, flags = files.parse_known_args(argv)
    module, _, class_name = command.arguments.partition(":")
    arguments = getattr(importlib.import_module(module), class_name)

    from transformers import HfArgumentParser
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a second's loading needs no bar
    parser = HfArgumentParser(arguments, prog=f"sparc {name}", description=command.summary, parents=[files])
    # One sentence instead of the usage text, which is longer than a screen.
    parser.error = lambda message: parser.exit(2, f"sparc {name}: {message}; see `sparc {name} --help`\n")
    defaults: list[str] = []
    if file_flags.preset is not None:
        if file_flags.preset not in _presets():
            raise ValueError(f"there is no preset `{file_flags.preset}`; the presets are {sorted(_presets())}")
        defaults += _flags_of(_presets()[file_flags.preset], name, sections)
    if file_flags.config is not None:
        defaults += _flags_of(Path(file_flags.config), name, sections)
    bare = 0
    while command.leading and bare < len(flags) and not flags[bare].startswith("-"):
        bare += 1
    if bare:
        flags = [f"--{command.leading}", *flags]
    flags += ["--wait"] if getattr(file_flags, "wait", False) else []
    # Behind the filled dataclass come the parsed flags that all commands have, and what no flag takes.
    filled, *common, unknown = parser.parse_args_into_dataclasses(
        [*defaults, *flags], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise ValueError(f"there are no flags {unknown}; see `sparc {name} --help`")
    return filled, any(getattr(flags, "wait", False) for flags in common)


def _presets() -> dict[str, Path]:
    return {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}


def _flags_of(file: Path, command: str, sections: Sequence[str]) -> list[str]:
    """Return a settings file as command-line flags; it is flat, or has one section a command."""
    if not file.is_file():
        raise ValueError(f"there is no settings file {file}")
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold settings as `name: value`, but it holds {type(content).__name__}")
    if content and all(isinstance(value, dict) and key in sections for key, value in content.items()):
        content = content.get(command, {})
    flags: list[str] = []
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float | date) or item is None for item in values):
            raise ValueError(f"`{key}` in {file} must be one value or a list of them, but it holds values in others")
        if value is not None:
            flags += [f"--{key}", *map(str, values)]
    return flags
