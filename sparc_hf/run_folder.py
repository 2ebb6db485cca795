"""What a training run keeps in its output folder: checkpoints, settings, log and model files."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sparc_hf.modeling_sparc import SparcModel

STATE_FILE = "trainer_state.json"
LOG_FILE = "training_log.jsonl"
SETTINGS_FILE = "training_arguments.json"
RESULTS_FILE = "results.json"
# What was found out about the weights, and is nothing to other ones.
FINDINGS = (RESULTS_FILE, "concepts.json", "reconstruction.png")


def save_model(model: SparcModel, folder: str | Path) -> None:
    """Save a model's files into a folder that may hold others; each file appears complete or not at all.

    Results and concept names of the weights that were there are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".model-") as unfinished:
        model.save_pretrained(unfinished)
        # The weights go last: a folder with new weights then always has their config.
        for file in sorted(Path(unfinished).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(file, folder / file.name)
    for name in FINDINGS:
        (folder / name).unlink(missing_ok=True)


def claim_output_dir(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may write into `folder`, and clear what an overwritten run would confuse.

    Raises:
        ValueError: where the folder is a file, or holds a run that is neither resumed nor overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` must be a folder, but {folder} is a file")
    used = (folder / "model.safetensors").exists() or newest_checkpoint(folder) is not None
    if used and not resume and not overwrite:
        raise ValueError(
            f"{folder} already holds a run; continue it with --resume, replace it with --overwrite, "
            "or choose another --output_dir"
        )
    if used and overwrite and not resume and int(os.environ.get("RANK", "0")) == 0:
        shutil.rmtree(checkpoints_dir(folder), ignore_errors=True)
        (folder / LOG_FILE).unlink(missing_ok=True)


def checkpoints_dir(folder: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return folder / "checkpoints"


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    found = checkpoints_dir(folder).glob("step-*")
    return sorted(path for path in found if path.suffix != ".tmp" and (path / STATE_FILE).exists())


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint of a run, or None."""
    return next(reversed(checkpoints(folder)), None)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; the file appears complete or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def cut_log(path: Path, step: int) -> None:
    """Drop the log entries past `step`, which the resumed run will write again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # A killed process may have left half a line.
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text("".join(kept), encoding="utf-8")
    os.replace(unfinished, path)
