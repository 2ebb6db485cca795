"""Folders that take their place whole, also where two folders cannot be exchanged."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
from kill_points import killed_everywhere

from sparc_hf import atomic_folders
from sparc_hf.atomic_files import WriteError, new_file, sync_tree, write_text, writing
from sparc_hf.atomic_folders import check_place, exchange, named, new_folder, recover
from sparc_hf.feature_files import read_manifest

OURS = named("a.txt", "b.txt")


def make(path: Path, text: str) -> None:
    with new_folder(path, OURS, last="b.txt") as folder:
        for name in ("a.txt", "b.txt"):
            write_text(folder / name, text)


def texts(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir() if file.is_file()}


@pytest.fixture
def older(tmp_path) -> Path:
    """A folder with files of ours and of others: a file, a folder, a link to nothing."""
    folder = tmp_path / "root" / "out"
    folder.parent.mkdir()
    make(folder, "old")
    (folder / "mine.txt").write_text("mine")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "x.txt").write_text("x")
    (folder / "link").symlink_to("nowhere")
    (folder / "deep").chmod(0o750)
    return folder


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("can_link", [True, False])
def test_a_new_folder_takes_the_place_of_an_older_one(older, monkeypatch, can_exchange, can_link):
    if not can_exchange:
        monkeypatch.setattr(atomic_folders, "exchange", lambda *_: False)
    if not can_link:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    older.chmod(0o770)
    make(older, "new")
    assert texts(older) == {"a.txt": "new", "b.txt": "new", "mine.txt": "mine"}
    assert (older / "deep" / "er" / "x.txt").read_text() == "x"
    assert os.readlink(older / "link") == "nowhere"
    assert (older / "deep").stat().st_mode & 0o777 == 0o750
    assert older.stat().st_mode & 0o777 == 0o770
    assert [path.name for path in older.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_killed_anywhere(older, tmp_path, monkeypatch, can_exchange):
    """Where two folders cannot be exchanged, the name may be missing for a moment, which the next one mends."""
    root, former = tmp_path / "root", tmp_path / "former"
    older.parent.rename(former)
    if not can_exchange:
        monkeypatch.setattr(atomic_folders, "exchange", lambda *_: False)
    missing = kills = 0
    for _ in killed_everywhere(lambda: make(older, "new"), root, former):
        kills += 1
        missing += not older.exists()
        check_place(older, OURS)  # what every writer does first
        assert texts(older) in (
            {"a.txt": "old", "b.txt": "old", "mine.txt": "mine"},
            {"a.txt": "new", "b.txt": "new", "mine.txt": "mine"},
        )
        make(older, "newer")
        assert texts(older) == {"a.txt": "newer", "b.txt": "newer", "mine.txt": "mine"}
        assert [path.name for path in root.iterdir()] == ["out"]
    assert kills > 10
    assert missing == (0 if can_exchange else 1)


def test_a_reader_finds_a_folder_whose_replacement_was_killed(tmp_path):
    from conftest import planted_features

    planted_features(20).save(tmp_path / "set")
    (tmp_path / "set").rename(tmp_path / ".set.old")
    assert read_manifest(tmp_path / "set")["rows"] == 20
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_exception_leaves_the_older_folder(older):
    def fail():
        with new_folder(older, OURS) as folder:
            write_text(folder / "a.txt", "new")
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert texts(older)["a.txt"] == "old"
    assert [path.name for path in older.parent.iterdir()] == ["out"]


def test_files_of_others_that_come_meanwhile_stay(older):
    with new_folder(older, OURS) as folder:
        write_text(folder / "a.txt", "new")
        (older / "late.txt").write_text("late")
    assert texts(older) == {"a.txt": "new", "mine.txt": "mine", "late.txt": "late"}


def test_a_failed_second_rename_is_undone(older, monkeypatch):
    monkeypatch.setattr(atomic_folders, "exchange", lambda *_: False)
    rename = os.replace

    def failing(source, target):
        if Path(target) == older and Path(source).name == ".out.new":
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="broken"):
        make(older, "new")
    assert texts(older)["a.txt"] == "old"


def test_where_one_stands_files_move_one_by_one(older, monkeypatch, tmp_path):
    monkeypatch.chdir(older)
    with pytest.raises(ValueError, match="name a folder below it"):
        make(Path(), "new")
    assert texts(older)["a.txt"] == "old"
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "fresh")
    make(Path(), "new")
    assert texts(Path()) == {"a.txt": "new", "b.txt": "new", "mine.txt": "mine"}


def test_killed_where_one_stands(tmp_path, monkeypatch):
    """Nothing older is there, so nothing is mixed; the file that counts comes last."""
    root, former = tmp_path / "root", tmp_path / "former"
    (former / "out").mkdir(parents=True)
    (former / "out" / "mine.txt").write_text("mine")
    monkeypatch.setattr(atomic_folders, "_stays_in_place", lambda path: path.name == "out")
    for _ in killed_everywhere(lambda: make(root / "out", "new"), root, former):
        seen = texts(root / "out")
        assert "b.txt" not in seen or seen == {"a.txt": "new", "b.txt": "new", "mine.txt": "mine"}
        make(root / "out", "new")
        assert texts(root / "out") == {"a.txt": "new", "b.txt": "new", "mine.txt": "mine"}


def test_a_mount_point_can_be_filled_but_not_replaced(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a disk can be mounted by root only")
    try:
        make(disk, "new")
        assert texts(disk) == {"a.txt": "new", "b.txt": "new"}
        with pytest.raises(ValueError, match="it is a mount point"):
            make(disk, "newer")
        make(disk / "below", "new")
        assert exchange(disk / "below", tmp_path) is False  # of two file systems
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="must be a folder, but it is a file"):
        make(tmp_path / "file", "new")
    recover(tmp_path / "file")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "a.txt", "old")

    def fail():
        with new_file(tmp_path / "a.txt") as file:
            file.write(b"half")
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert texts(tmp_path) == {"a.txt": "old"}
    (tmp_path / ".a.txt.0123abcd.tmp").write_text("left by a killed writer")
    with new_file(tmp_path / "a.txt") as file, new_file(tmp_path / "a.txt") as other:
        file.write(b"first")
        other.write(b"last")
    assert texts(tmp_path) == {"a.txt": "first"}  # whose block ended last


def test_modes_are_what_the_umask_leaves(tmp_path):
    former = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
        (tmp_path / "tight.bin").write_text("x")
        (tmp_path / "tight.bin").chmod(0o600)
        (tmp_path / "run.sh").write_text("x")
        (tmp_path / "run.sh").chmod(0o755)
        sync_tree(tmp_path)
    finally:
        os.umask(former)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"a.txt": 0o640, "tight.bin": 0o640, "run.sh": 0o755}


def test_errors_of_a_disk_become_one_sentence_and_others_stay():
    def fail(error: Exception):
        with writing("`x`", "make room"):
            raise error

    with pytest.raises(WriteError, match=r"`x` cannot be written \(No space left on device\); make room") as full:
        fail(OSError(errno.ENOSPC, "full"))
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(WriteError, match="the disk is full or fails"):
        fail(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"))
    for other in (FileNotFoundError("there is no folder"), RuntimeError("CUDA error"), PermissionError(13, "no")):
        with pytest.raises(type(other)) as same:
            fail(other)
        assert same.value is other
