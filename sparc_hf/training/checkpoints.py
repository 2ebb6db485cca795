"""Checkpoints of a training run: saved whole, compared with their checksums before a run goes on from one."""

import logging
import os
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sparc_hf.features.shards import FileChecksums
from sparc_hf.files.atomic_files import checksums_of, first_damage, write_json, writing
from sparc_hf.files.atomic_folders import everything, place, remove_tree
from sparc_hf.files.checked_reading import Count, read_json
from sparc_hf.model_folder import CHECKPOINTS_FOLDER, STATE_FILE

logger = logging.getLogger(__name__)

SCHEDULE_FILE = "schedule.pt"
SUMS_FILE = "loss_sums_{}.pt"


class _State(TypedDict):
    """What `trainer_state.json` must have."""

    step: Count
    settings: dict[str, Any]
    files: FileChecksums


class Checkpoints:
    """The checkpoints of one run, of which the newest few are kept.

    One is a folder `step-<number>` with what Accelerate saves, the learning-rate schedule, the loss sums of every
    process since the last entry of the log, and `trainer_state.json`: step, settings, and the SHA-256 of every file.

    Args:
        folder: the folder of the run.
        accelerator: of the run; its processes save and load together.
        kept: number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, kept: int = 1):
        self.folder = folder / CHECKPOINTS_FOLDER
        self.accelerator = accelerator
        self.kept = kept

    def all(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        folders = self.folder.glob("step-*")
        return sorted(path for path in folders if path.suffix != ".tmp" and (path / STATE_FILE).exists())

    def newest(self) -> Path | None:
        """Return the last complete checkpoint, or None."""
        return next(reversed(self.all()), None)

    def save(self, step: int, state: dict[str, Any], schedule: dict[str, Any], sums: dict[str, Any]) -> Path:
        """Save what a resumed run needs, and remove the oldest checkpoints.

        Args:
            step: the number of steps done.
            state: facts for `trainer_state.json`.
            schedule: state of the learning-rate schedule.
            sums: state of this process's loss sums.

        Raises:
            OSError: saying what to do, if it cannot be written; the checkpoints before it stay.
        """
        folder = self.folder / f"step-{step:08d}"
        unfinished = folder.with_name(folder.name + ".tmp")
        is_main = self.accelerator.is_main_process
        advice = "the checkpoint before it is kept: make room, and continue with --resume"
        with writing(f"the checkpoint `{folder}`", advice):
            if is_main:
                for litter in self.folder.glob("step-*.tmp"):  # of a run that was killed
                    remove_tree(litter)
                unfinished.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(unfinished))
            torch.save(sums, unfinished / SUMS_FILE.format(self.accelerator.process_index))
            self.accelerator.wait_for_everyone()
            if is_main:
                torch.save(schedule, unfinished / SCHEDULE_FILE)
                files = checksums_of(unfinished, sorted(file.name for file in unfinished.iterdir()))
                write_json(unfinished / STATE_FILE, {"step": step, **state, "files": files})
                place(unfinished, folder, everything)
                self._remove_oldest()
        self.accelerator.wait_for_everyone()
        return folder

    def newest_whole(self, verify: bool = True) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint that is as it was saved and its state; None where there is none at all.

        Args:
            verify: compare the SHA-256 of every file; without it only sizes are compared.

        Raises:
            ValueError: if all are damaged.
        """
        newest = [self._newest_whole(verify) if self.accelerator.is_main_process else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(newest)
        if isinstance(newest[0], str):
            raise ValueError(newest[0])
        return newest[0]

    def _newest_whole(self, verify: bool) -> tuple[Path, dict[str, Any]] | str | None:
        """Return checkpoint and state, None, or what is wrong, which all processes are to hear."""
        problem = ""
        for folder in reversed(self.all()):
            try:
                state = read_json(folder / STATE_FILE, _State)
                problem = first_damage(folder, state["files"], verify) or ""
            except (OSError, ValueError) as error:
                problem = f"`{folder / STATE_FILE}` cannot be used: {error}"
            if not problem:
                return folder, state
            logger.warning("the checkpoint %s is damaged (%s), so that the one before it is taken", folder, problem)
        if problem:
            return f"every checkpoint in `{self.folder}` is damaged ({problem}); start again with --overwrite"
        return None

    def load(self, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Load model, optimizer and random states; return those of the schedule, and of all processes' loss sums.

        Raises:
            ValueError: if a file cannot be read, as a damaged one that was not compared.
        """
        try:
            self.accelerator.load_state(str(folder))
            schedule = torch.load(folder / SCHEDULE_FILE, weights_only=True)
            files = sorted(folder.glob(SUMS_FILE.format("*")), key=lambda file: int(file.stem.rpartition("_")[2]))
            return schedule, [torch.load(file, weights_only=True) for file in files]
        except Exception as error:  # whatever a library finds wrong in a damaged file
            raise ValueError(
                f"the checkpoint `{folder}` cannot be read: {' '.join(str(error).split())[:300]}; remove that folder "
                "to continue from the one before it"
            ) from error

    def _remove_oldest(self) -> None:
        for folder in self.all()[: -self.kept]:
            # Under its own name a folder that is removed half would look like a whole one.
            doomed = folder.with_name(folder.name + ".tmp")
            os.replace(folder, doomed)
            remove_tree(doomed)
