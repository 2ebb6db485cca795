"""What lies in the folder of a model and its run, which of it belongs together, and how it gets there."""

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparc_hf.files.atomic_files import new_file, sync_folder, sync_tree, writing
from sparc_hf.files.atomic_folders import (
    carry_over,
    discard,
    named,
    new_folder,
    place,
    recover,
    refuse_fixed_place,
    remove_tree,
)
from sparc_hf.files.checked_reading import read_json
from sparc_hf.files.folder_lock import locked_folder
from sparc_hf.model.modeling_sparc import SparcModel

STATE_FILE = "trainer_state.json"
LOG_FILE = "training_log.jsonl"
SETTINGS_FILE = "training_arguments.json"
RESULTS_FILE = "results.json"
ORIGIN_FILE = "imported_from.json"
PICTURE_FILE = "reconstruction.png"
CHECKPOINTS_FOLDER = "checkpoints"
# Without the last of these that is there, a folder holds no model: they appear after everything else.
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
WHOLE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# Where the card goes beside a README.md that somebody else wrote.
CARD_FILE, OTHER_CARD_FILE = "README.md", "model_card.md"
# What was found out about the weights, and is nothing to other ones.
FINDINGS = (RESULTS_FILE, "concepts.json", PICTURE_FILE)
# What stays true of a model whose weights, and with them its joint codes, are as they were.
KEPT_WITH_SAME_CODES = (SETTINGS_FILE, ORIGIN_FILE, LOG_FILE, "concepts.json")
# Tells that a run has been replaced, wherever a kill has left it.
REPLACED_MARK = ".replaced"
# Where the files of a model are written before they appear.
SAVING_FOLDER = ".model"
MODEL_FILES = (
    *("config.json", *WEIGHTS, *FINDINGS, SETTINGS_FILE, ORIGIN_FILE, OTHER_CARD_FILE),
    *(SAVING_FOLDER, ".*.tmp", REPLACED_MARK),
)
RUN_FILES = (LOG_FILE, CHECKPOINTS_FOLDER)
# What a run would replace or be mistaken for, and what tells a folder of another kind.
FOREIGN_FILES = (
    *("config.json", *WEIGHTS, *FINDINGS, ORIGIN_FILE, *RUN_FILES),
    *("sparc_features.json", "sparc_codes.json", "report.html"),
)


def is_ours(entry: Path) -> bool:
    """Return whether an entry of a model's folder belongs to the model or its run, and goes when they are replaced."""
    if entry.name == CARD_FILE:
        return is_model_card(entry)
    if entry.name == "sparc" and entry.is_dir():  # what Accelerate's trackers call their folder
        return any(entry.rglob("events.out.tfevents*"))
    is_code = entry.suffix == ".py" and (Path(inspect.getfile(SparcModel)).parent / entry.name).is_file()
    return is_code or named(*MODEL_FILES, *RUN_FILES)(entry)


def is_model_card(path: Path) -> bool:
    """Return whether a README.md is a card that this package wrote."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    return start.startswith(b"---\n") and b"\nlibrary_name: sparc-hf\n" in start.split(b"\n---\n")[0] + b"\n"


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a whole model."""
    return any((folder / name).is_file() for name in WHOLE_WEIGHTS)


def holds_run(folder: Path) -> bool:
    """Return whether a folder holds a model or a checkpoint."""
    return holds_model(folder) or any((folder / CHECKPOINTS_FOLDER).glob(f"step-*/{STATE_FILE}"))


@dataclass(frozen=True)
class RunFolder:
    """Where a training run works, and where its model will be.

    A run that replaces an older one works in `<output>.training`, and takes its place when it is done.

    Attributes:
        output: the folder of the finished model.
        folder: the folder of log, settings and checkpoints while the run goes on.
        is_finished: whether `folder` already holds the model.
        is_resumed: whether what `folder` holds is to be continued.
    """

    output: Path
    folder: Path
    is_finished: bool
    is_resumed: bool

    def begin(self) -> None:
        """Make the folder ready, after all has been looked at; what a killed run left goes."""
        recover(self.output)
        self._remove_replaced()
        if self.folder != self.output and not self.is_resumed:
            discard(self.folder, self.output)
        self.folder.mkdir(parents=True, exist_ok=True)

    def finish(self, model: SparcModel, complete: Callable[[Path], Any] | None = None) -> None:
        """Save the model and let it take its place.

        Args:
            model: the trained model.
            complete: adds to the folder what else belongs to the model, such as its card.

        Raises:
            OSError: saying what to do, if something cannot be written.
        """
        with writing(
            f"the model in `{self.folder}`", "make room, and continue with --resume from the last checkpoint"
        ):
            if self.folder != self.output:
                carry_over(self.output, self.folder, is_ours)
            save_model(model, self.folder, complete)
            self.take_place()

    def take_place(self) -> None:
        """Let the finished run take the place of the one that it replaces."""
        recover(self.output)
        remove_tree(self.folder / SAVING_FOLDER)
        if self.folder != self.output:
            if self.output.exists():
                (self.output / REPLACED_MARK).touch()
            place(self.folder, self.output, is_ours)
        self._remove_replaced()

    def _remove_replaced(self) -> None:
        """Remove the run that was replaced, where a kill came before that."""
        unfinished = _unfinished(self.output)
        if (unfinished / REPLACED_MARK).exists():
            discard(unfinished, self.output)


def _unfinished(output: Path) -> Path:
    """Return where a run works that replaces the one in `output`."""
    return output.with_name(output.name + ".training")


def claimed_run(output: str | os.PathLike, *, resume: bool, overwrite: bool) -> RunFolder:
    """Look where a run may work; nothing is changed.

    Raises:
        ValueError: where `output` is a file, holds something else, or holds a run that is neither resumed nor
            overwritten.
    """
    output = Path(output).resolve()
    unfinished = _unfinished(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output_dir` must be a folder, but {output} is a file")
    if resume and (unfinished / SETTINGS_FILE).is_file() and not (unfinished / REPLACED_MARK).exists():
        return RunFolder(output, unfinished, holds_model(unfinished), is_resumed=True)
    if not holds_run(output):
        _refuse_foreign_files(output)
        return RunFolder(output, output, is_finished=False, is_resumed=resume)
    if resume:
        return RunFolder(output, output, holds_model(output), is_resumed=True)
    if not overwrite:
        raise ValueError(
            f"{output} already holds a run; continue it with --resume, replace it with --overwrite, "
            "or choose another --output_dir"
        )
    refuse_fixed_place(output)
    return RunFolder(output, unfinished, is_finished=False, is_resumed=False)


def _refuse_foreign_files(output: Path) -> None:
    """Raise ValueError where a folder without a run holds files that a run would replace or be mistaken for."""
    if not output.is_dir() or (output / SETTINGS_FILE).is_file():
        return
    if foreign := sorted(entry.name for entry in output.iterdir() if named(*FOREIGN_FILES)(entry)):
        raise ValueError(f"{output} holds {foreign[0]} and is not the folder of a run; choose another --output_dir")


def save_model(model: SparcModel, folder: str | Path, complete: Callable[[Path], Any] | None = None) -> None:
    """Save a model's files into a folder that may hold others; the weights appear last.

    A model that is there gives way in one step, with all that belongs to it.

    Args:
        model: the model.
        folder: the folder, made where it does not exist.
        complete: adds to the folder what else belongs to the model, before the weights are there.
    """
    folder = Path(folder)
    if holds_model(folder):
        with locked_folder(folder), new_folder(folder, is_ours, last="model.safetensors") as replacing:
            save_model(model, replacing, complete)
        return
    unfinished = folder / SAVING_FOLDER
    remove_tree(unfinished)
    unfinished.mkdir(parents=True)
    model.save_pretrained(unfinished)
    sync_tree(unfinished)
    files = sorted(unfinished.iterdir(), key=lambda file: file.name in WHOLE_WEIGHTS)
    weights = [file for file in files if named(*WEIGHTS)(file)]
    for file in files:
        if file not in weights:
            os.replace(file, folder / file.name)
    try:
        if complete is not None:
            complete(folder)
    finally:  # what a run of days has made is saved first of all
        for file in weights:
            os.replace(file, folder / file.name)
        remove_tree(unfinished)
        sync_folder(folder)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the run that made a model, or None where they are not known."""
    file = folder / SETTINGS_FILE
    return read_json(file, dict[str, Any]) if file.is_file() else None


def cut_log(path: Path, step: int) -> None:
    """Drop the log entries that a run will write again which goes on behind `step`, validation at that step too."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            is_known = entry["step"] < step or (entry["step"] == step and not any(map(_is_validation, entry)))
        except (ValueError, KeyError, TypeError):  # a killed process may have left half a line
            continue
        if is_known:
            lines.append(line + "\n")
    with new_file(path) as file:
        file.write("".join(lines).encode("utf-8"))


def _is_validation(name: str) -> bool:
    return name.startswith("eval/")
