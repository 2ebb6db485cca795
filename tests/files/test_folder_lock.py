"""One process at a time writes into a folder; the next is told who does."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, planted_features, tiny_model
from kill_points import in_child, outcome

from sparc_hf.cli import main
from sparc_hf.codes.code_table import CodeTable, encode_features
from sparc_hf.files.folder_lock import FolderInUse, locked_folder

pytestmark = pytest.mark.usefixtures("one_thread")


def holding(folder: Path, started: Path, seconds: float = 60.0):
    """A process that holds a folder until it is killed."""

    def hold():
        with locked_folder(folder):
            started.touch()
            time.sleep(seconds)

    child = in_child(hold)
    deadline = time.monotonic() + 60
    while not started.exists() and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert started.exists()
    return child


def test_the_second_is_told_who_holds_the_folder(tmp_path):
    holder = holding(tmp_path / "out", tmp_path / "started")
    with pytest.raises(FolderInUse) as refused, locked_folder(tmp_path / "out"):
        pass
    for words in (str(tmp_path / "out"), f"process {holder.pid} on {socket.gethostname()}", "--wait", "pytest"):
        assert words in str(refused.value)
    with locked_folder(tmp_path / "other"):
        pass
    holder.kill()
    assert outcome(holder) == -signal.SIGKILL
    with locked_folder(tmp_path / "out"):  # the lock went with its process
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["started"]


def test_the_second_may_wait(tmp_path):
    holder = holding(tmp_path / "out", tmp_path / "started", seconds=1.0)
    before = time.monotonic()
    with locked_folder(tmp_path / "out", wait=True):
        assert time.monotonic() - before > 0.3
    assert outcome(holder) == 0


def test_the_same_thread_may_take_it_again_and_another_may_not(tmp_path):
    refusals = []

    def other():
        try:
            with locked_folder(tmp_path / "out"):
                pass
        except FolderInUse as error:
            refusals.append(str(error))

    with locked_folder(tmp_path / "out"):
        with locked_folder(tmp_path / "out"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(refusals) == 1
        assert f"process {os.getpid()} " in refusals[0]
        assert outcome(in_child(other)) == 0  # the child counts its refusal in its own memory
    with locked_folder(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_link_to_the_folder_is_the_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    holder = holding(tmp_path / "out", tmp_path / "started")
    with pytest.raises(FolderInUse), locked_folder(tmp_path / "link"):
        pass
    holder.kill()
    outcome(holder)


def test_processes_of_one_launcher_share_the_lock_of_the_first(tmp_path):
    holder = holding(tmp_path / "out", tmp_path / "started")
    with locked_folder(tmp_path / "out", rank=1):
        pass
    holder.kill()
    outcome(holder)


def without_locks(monkeypatch) -> None:
    import fcntl

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", unsupported)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    holder = holding(tmp_path / "out", tmp_path / "started")
    with pytest.raises(FolderInUse, match=r"if that process is gone, delete `.*\.out\.softlock`"):
        locked_folder(tmp_path / "out").__enter__()
    holder.kill()
    outcome(holder)
    with locked_folder(tmp_path / "out"):  # its file is still there, but its process is not
        pass
    (tmp_path / ".out.softlock").write_text("4711\nanother-machine\n")
    with pytest.raises(FolderInUse, match="process 4711 on another-machine"):
        locked_folder(tmp_path / "out").__enter__()


def test_a_note_of_another_machine_says_what_to_do(tmp_path):
    holder = holding(tmp_path / "out", tmp_path / "started")
    note = {"host": "node7", "process": 12, "user": "me", "command": "sparc train", "since": "now"}
    (tmp_path / ".out.lock").write_text(json.dumps(note))
    with pytest.raises(FolderInUse, match=r"`sparc train` \(process 12 on node7, started by me.*delete"):
        locked_folder(tmp_path / "out").__enter__()
    (tmp_path / ".out.lock").write_bytes(b"\xff\x00nonsense")
    with pytest.raises(FolderInUse, match="another process"):
        locked_folder(tmp_path / "out").__enter__()
    holder.kill()
    outcome(holder)


def test_a_lock_in_the_folder_where_none_can_be_beside_it(tmp_path, monkeypatch):
    """Without the right to write into the parent, as when somebody else made the folder for us."""
    (tmp_path / "out").mkdir()
    original = os.open

    def refuse(path, flags, *arguments, **named):
        if os.path.dirname(os.fspath(path)) == str(tmp_path) and flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return original(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    with locked_folder(tmp_path / "out"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    with pytest.raises(OSError, match=r"nothing can be written to `.*new`: Permission denied"):
        locked_folder(tmp_path / "new").__enter__()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which no file can be made")
def test_where_no_file_can_be_made_nobody_is_said_to_hold_it():
    with pytest.raises(OSError, match=r"^nothing can be written to `/proc/new`"), locked_folder("/proc/new"):
        pass


def test_a_read_only_disk_is_one_sentence(tmp_path, capsys):
    planted_features(20).save(tmp_path / "features")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a read-only disk can be mounted by root only")
    try:
        assert main(["train", "--features", str(tmp_path / "features"), "--output_dir", str(disk / "run")]) == 2
        assert "cannot be written" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("extract", "--source x --encoders a=b:text --output {}/out"),
        ("train", "--features x --output_dir {}/out"),
        ("encode", "--model x --features x --output {}/out"),
        ("evaluate", "x --features x --output {}/out"),
        ("import", "--source x.pth --output {}/out"),
        ("concepts", "--model x --features x --output {}/out"),
        ("explain", "--model x --text x --output {}/out"),
        ("card", "--model {}/out"),
        ("push", "--repo a/b --model x --dry_run {}/out"),
        ("demo", "--output {}/out"),
    ],
)
def test_every_command_that_writes_asks_first(tmp_path, capsys, command, flags):
    (tmp_path / "out").mkdir()
    holder = holding(tmp_path / "out", tmp_path / "started")
    assert main([command, *flags.format(tmp_path).split()]) == 2
    told = capsys.readouterr().err
    assert f"sparc {command}: `{tmp_path}/out` is being written by" in told
    assert told.count("\n") == 1
    holder.kill()
    outcome(holder)


def test_wait_on_the_command_line(tmp_path, capsys):
    holder = holding(tmp_path / "out", tmp_path / "started", seconds=0.5)
    assert main(["card", "--model", str(tmp_path / "missing"), "--wait"]) == 2  # no folder: nothing to wait for
    (tmp_path / "out").mkdir()
    assert main(["card", "--model", str(tmp_path / "out"), "--wait"]) == 2
    assert "holds no model" in capsys.readouterr().err
    assert outcome(holder) == 0
    with pytest.raises(SystemExit):
        main(["card", "--model", "x", "--wait", "perhaps"])


def test_six_processes_write_one_code_table(tmp_path):
    """One of them does, the others say so; nothing is mixed."""
    model, features = tiny_model(2), planted_features(200)

    def work():
        try:
            encode_features(model, features, output=tmp_path / "codes", overwrite=True, batch_size=7)
        except FolderInUse:
            os._exit(3)

    children = [in_child(work) for _ in range(6)]
    codes = [outcome(child) for child in children]
    assert set(codes) <= {0, 3}
    assert codes.count(0) >= 1
    assert len(CodeTable.load(tmp_path / "codes")) == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes"]


@pytest.mark.slow
def test_two_trainings_at_once_as_commands(tmp_path, planted_folder):
    flags = f"--features {planted_folder} --output_dir {tmp_path}/run --cpu --num_latents 48 --k 4 --epochs 60"
    command = [sys.executable, "-m", "sparc_hf.cli", "train", *flags.split(), "--auxk", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([*command, "--seed", str(seed)], **pipes) for seed in range(3)]
    told = [(run.communicate()[1], run.returncode) for run in runs]
    assert sorted(code for _, code in told) == [0, 2, 2]
    for text, code in told:
        assert "Traceback" not in text
        assert code == 0 or "is being written by" in text or "already holds a run" in text
    seed = json.loads((tmp_path / "run" / "training_arguments.json").read_text())["seed"]
    assert told[seed][1] == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
