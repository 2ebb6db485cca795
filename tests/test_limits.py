"""Full disks and too little memory: one sentence, and what was there before is whole."""

import io
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import planted_features, tiny_model
from kill_points import files_of, in_child, outcome
from test_kills import TRAINING, seen_by_users

from sparc_hf import SparcModel, report
from sparc_hf.cli import main
from sparc_hf.codes import CodeTable
from sparc_hf.results import results_of_model

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = {"num_latents": 256, "k": 4, "auxk": 4}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("limits")
    planted_features(100).save(root / "features")
    tiny_model(3, **WIDE).save_pretrained(root / "model")
    return root


@pytest.fixture(autouse=True)
def quick_report(monkeypatch):
    """A page of some size; the real one takes seconds to draw."""
    monkeypatch.setattr(report, "report_html", lambda found: "<p>" * 50_000)


def commands(given: Path, output: Path) -> dict[str, list[str]]:
    settings = [part for name, value in (TRAINING | WIDE).items() for part in (f"--{name}", str(value))]
    model, features = f"--model {given}/model", f"--features {given}/features"
    return {
        "train": f"train {features} --output_dir {output} --overwrite --cpu".split() + settings,
        "encode": f"encode {model} {features} --output {output} --top_samples 3 --overwrite".split(),
        "evaluate": f"evaluate {given}/model {features} --output {output} --no_probes --replicates 0".split(),
        "push a model": f"push --repo a/b {model} --dry_run {output}".split(),
        "push features": f"push --repo a/b {features} --dry_run {output}".split(),
        "concepts": f"concepts {model} {features}".split(),
    }


def limited(arguments: list[str], kind: int, limit: int, told: Path) -> int:
    """Run a command in a child under a limit; what it wrote to stderr goes to a file."""

    def run():
        sys.stderr = io.StringIO()
        resource.setrlimit(kind, (limit, resource.RLIM_INFINITY))
        code = 1
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            told.write_text(sys.stderr.getvalue())
        os._exit(code)

    return outcome(in_child(run))


def sentences(told: Path, command: str) -> list[str]:
    return [line for line in told.read_text().replace("\r", "\n").split("\n") if line.startswith(f"sparc {command}:")]


@pytest.mark.parametrize("name", ["train", "encode", "evaluate", "push a model", "push features"])
def test_files_that_cannot_be_written(given, tmp_path, name):
    """Each limit stops another file: settings, log, weights, optimizer, shards, reports."""
    output, command = tmp_path / "out", commands(given, tmp_path / "out")[name]
    is_new = name.startswith("push")
    if not is_new:
        assert main(command) == 0
        (output / "mine.txt").write_text("mine")
    before = seen_by_users(output) if output.exists() else {}
    stopped = 0
    for limit in (0, 200, 2000, 8000, 30000, 60000, 10**9):
        if is_new:
            shutil.rmtree(output, ignore_errors=True)
        code = limited(command, resource.RLIMIT_FSIZE, limit, tmp_path / "told")
        found = sentences(tmp_path / "told", command[0])
        assert (code, len(found)) in ((0, 0), (2, 1)), (limit, (tmp_path / "told").read_text())
        if code == 2:
            stopped += 1
            assert "cannot be written (" in found[0], limit
            assert "make room" in found[0]
            assert (seen_by_users(output) if output.exists() else {}) == before
    assert stopped >= 3
    assert code == 0
    assert files_of(output) if is_new else (output / "mine.txt").read_text() == "mine"


def test_a_stopped_checkpoint_leaves_the_one_before(given, tmp_path):
    command = commands(given, tmp_path / "run")["train"]
    whole = [*command[:-1], "off", "--output_dir", str(tmp_path / "whole")]
    assert main(whole) == 0
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000004"
    # Not enough for the optimizer, whose moments come with the first step that is saved.
    size = (checkpoint / "optimizer.bin").stat().st_size - 1
    assert limited(command, resource.RLIMIT_FSIZE, size, tmp_path / "told") == 2
    assert "the checkpoint before it is kept" in sentences(tmp_path / "told", "train")[0]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert main([*command, "--resume"]) == 0
    mine, theirs = (SparcModel.from_pretrained(tmp_path / name).state_dict() for name in ("run", "whole"))
    assert all(value.equal(theirs[key]) for key, value in mine.items())


def test_a_full_disk(given, tmp_path):
    """The real thing: a disk that ends in the middle of a checkpoint, a report, a table."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        for name, room in (("train", 60), ("encode", 20), ("evaluate", 100)):
            output = disk / name
            command = commands(given, output)[name]
            assert main(command) == 0
            before = seen_by_users(output)
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            (disk / "filler").write_bytes(bytes(free - room * 1024))
            code = limited(command, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY, tmp_path / "told")
            assert code == 2, (name, (tmp_path / "told").read_text())
            (found,) = sentences(tmp_path / "told", name)
            assert "No space left on device" in found or "the disk is full or fails" in found
            assert seen_by_users(output) == before
            (disk / "filler").unlink()
            assert main([*command, *(["--resume"] if name == "train" else [])]) == 0
        assert SparcModel.from_pretrained(disk / "train").config.num_latents == 256
        assert len(CodeTable.load(disk / "encode")) == 100
        assert results_of_model(disk / "evaluate" / "results.json", given / "model")["rows"] == 100
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("name", ["train", "encode", "evaluate", "push features"])
def test_too_little_memory(given, tmp_path, name):
    """From none to enough: one sentence or success, never a traceback."""
    command = commands(given, tmp_path / "out")[name]
    if not name.startswith("push"):
        assert main(command) == 0
        before = seen_by_users(tmp_path / "out")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for megabytes in (1, 4, 16):
        code = limited(command, resource.RLIMIT_AS, used + (megabytes << 20), tmp_path / "told")
        found = sentences(tmp_path / "told", command[0])
        assert (code, len(found)) in ((0, 0), (2, 1)), (megabytes, (tmp_path / "told").read_text())
        if code == 0:
            break
        assert "there is not enough memory (" in found[0]
        assert "give it more" in found[0]
        if not name.startswith("push"):
            assert seen_by_users(tmp_path / "out") == before
