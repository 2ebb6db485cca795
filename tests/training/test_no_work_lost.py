"""Kills, damaged shards, bad rows and full disks: nothing is lost, doubled or half-written."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT
from kill_points import files_of, in_child, outcome
from PIL import Image
from tiny_encoders import save_clip, save_dinov2
from tqdm.auto import tqdm

from sparc_hf.encoders.stream_encoder import load_encoders
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.extraction import extract_features
from sparc_hf.features.sample_reader import _end_with
from sparc_hf.features.stream_records import parse_streams

ROWS = 30
pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"batch_size": 4, "rows_per_shard": 6, "workers": 1}


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    clip, dino = str(save_clip(root / "clip")), str(save_dinov2(root / "dino"))
    return [f"dino={dino}:image", f"clip_img={clip}:image", f"clip_txt={clip}:text"]


@pytest.fixture(scope="module")
def encoders(streams):
    return load_encoders(parse_streams(streams))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(ROWS):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.jpg")
    return folder


@pytest.fixture
def dataset(images):
    return dataset_of(sorted(images.iterdir()), [f"cat {number}" for number in range(ROWS)])


def dataset_of(files: list[Path], texts: list[str]) -> datasets.Dataset:
    columns = {"id": [file.stem for file in files], "image": [str(file) for file in files], "text": texts}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


@pytest.fixture
def straight(dataset, encoders, tmp_path):
    """The same extraction without a stop."""
    extract_features(dataset, encoders, tmp_path / "straight", **SETTINGS)
    return tmp_path / "straight"


@pytest.mark.parametrize("seed", range(10))
def test_killed_at_a_random_moment(dataset, encoders, tmp_path, straight, seed):
    draws = random.Random(seed)
    target = tmp_path / "killed"

    def work():
        extract_features(dataset, encoders, target, **SETTINGS)

    started = time.monotonic()
    assert outcome(in_child(lambda: extract_features(dataset, encoders, tmp_path / "timed", **SETTINGS))) == 0
    length = time.monotonic() - started
    for _ in range(3):
        child = in_child(work)
        time.sleep(draws.uniform(0, length))
        child.kill()
        assert outcome(child) in (0, -signal.SIGKILL)
    extract_features(dataset, encoders, target, **SETTINGS)
    assert files_of(target) == files_of(straight)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_killed_child_does_not_stop_the_progress_bars_of_others():
    """The lock that tqdm makes when it is imported is one of all forked processes."""

    def die_with_the_lock():
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert outcome(in_child(die_with_the_lock)) == -signal.SIGKILL
    assert outcome(in_child(lambda: list(tqdm(range(3), desc="after a kill")))) == 0
    bar = threading.Thread(target=lambda: list(tqdm(range(3), desc="after a kill")), daemon=True)
    bar.start()
    bar.join(10)
    assert not bar.is_alive(), "a dead process holds the lock of this one"


def test_workers_do_not_outlive_a_killed_parent():
    def orphan():
        _end_with(parent=os.getpid())  # which is not this process's parent, as after a kill
        time.sleep(30)

    child = in_child(orphan)
    child.join(10)
    assert child.exitcode == 1


def test_killed_before_every_rename(dataset, encoders, tmp_path, straight, monkeypatch):
    """The states on disk between two renames are all there are, as long as the kernel lives."""
    calls = {"left": 0}
    rename = os.replace

    def dying(*paths):
        calls["left"] -= 1
        if calls["left"] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    deaths = 0
    for stop in range(40):
        target = tmp_path / f"killed-{stop}"

        def work(target=target, stop=stop):
            calls["left"] = stop
            monkeypatch.setattr(os, "replace", dying)
            extract_features(dataset, encoders, target, **{**SETTINGS, "workers": 0})

        code = outcome(in_child(work))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        deaths += 1
        extract_features(dataset, encoders, target, **{**SETTINGS, "workers": 0})
        assert files_of(target) == files_of(straight)
    assert deaths == 1 + 5 * 2 + 3 + 1  # settings; shard and entry; info, state and manifest; the folder


def damage(file: Path, kind: str) -> None:
    whole = bytearray(file.read_bytes())
    if kind == "flipped":
        whole[len(whole) // 2] ^= 1
        file.write_bytes(whole)
    elif kind == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    else:
        file.unlink()


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_a_damaged_shard_is_named_on_open_and_repaired(dataset, encoders, tmp_path, straight, kind, monkeypatch):
    before = files_of(straight)
    damage(straight / "data-00002.arrow", kind)
    for call in (
        lambda: FeatureDataset.load(straight),
        lambda: extract_features(dataset, encoders, straight, **SETTINGS),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=r"data-00002\.arrow.*--repair"):
            call()
    dino, encoded = encoders["dino"], []
    with monkeypatch.context() as patch:
        patch.setattr(dino, "rows", lambda inputs: encoded.append(inputs) or type(dino).rows(dino, inputs))
        extract_features(dataset, encoders, straight, repair=True, **SETTINGS)
    assert sum(len(inputs["pixel_values"]) for inputs in encoded) == 6  # only that shard
    assert files_of(straight) == before
    extract_features(dataset, encoders, straight, repair=True, **SETTINGS)  # nothing to do is no error
    assert files_of(straight) == before
    with pytest.raises(ValueError, match="other settings"):
        extract_features(dataset, encoders, straight, repair=True, **SETTINGS, dtype="float16")
    with pytest.raises(ValueError, match="no feature dataset to repair"):
        extract_features(dataset, encoders, tmp_path / "nothing", repair=True, **SETTINGS)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_a_shard_damaged_before_the_end_is_made_again(dataset, encoders, tmp_path, straight, kind, monkeypatch):
    target = tmp_path / "stopped"
    clip, calls = encoders["clip_img"], []

    def failing(inputs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return type(clip).rows(clip, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(clip, "rows", failing)
        with pytest.raises(KeyboardInterrupt):
            extract_features(dataset, encoders, target, **SETTINGS)
    damage(tmp_path / "stopped.partial" / "data-00001.arrow", kind)
    extract_features(dataset, encoders, target, **SETTINGS)
    assert files_of(target) == files_of(straight)


@pytest.fixture
def bad(images, tmp_path):
    """Thirty rows of which four are unusable: a JPEG without its tail, a text file, no text, blank text."""
    files = []
    for file in sorted(images.iterdir()):
        files.append(tmp_path / "bad" / file.name)
        files[-1].parent.mkdir(exist_ok=True)
        shutil.copy(file, files[-1])
    files[3].write_bytes(files[3].read_bytes()[:-700])
    files[4].write_text("no image")
    texts = [f"cat {number}" for number in range(ROWS)]
    texts[17], texts[29] = "", "  "
    for row in (*range(18, 24), 25):
        texts[row] = "two dogs"
    return dataset_of(files, texts)


def test_bad_rows_are_left_out_and_listed(bad, encoders, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"row 3 \(03\): its image cannot be read .*`on_error` skip"):
        extract_features(bad, encoders, tmp_path / "set", **SETTINGS)
    # Rows 18 to 23, a whole shard, and 25 become NaN in one stream.
    clip = encoders["clip_txt"]
    marked = clip.prepare(["two dogs"])["input_ids"][0].tolist()

    def some_nan(inputs):
        made = type(clip).rows(clip, inputs).clone()
        for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            if ids[mask.bool()].tolist() == marked:
                made[row, 1] = torch.nan
        return made

    monkeypatch.setattr(clip, "rows", some_nan)
    # What stopped goes on with the other setting.
    made = extract_features(bad, encoders, tmp_path / "set", **SETTINGS, on_error="skip")
    lines = [json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()]
    out = [3, 4, 17, *range(18, 24), 25, 29]
    assert [(line["row"], line["id"]) for line in lines] == [(row, f"{row:02}") for row in out]
    assert "image file is truncated" in lines[0]["reason"]
    assert "text is empty" in lines[2]["reason"]
    assert "`clip_txt` gives a NaN" in lines[3]["reason"]
    assert made.rows_skipped == FeatureDataset.load(tmp_path / "set").rows_skipped == len(out)
    kept = [row for row in range(ROWS) if row not in out]
    assert made.ids == [f"{row:02}" for row in kept]
    alone = extract_features(bad.select(kept), encoders, tmp_path / "alone", **SETTINGS)
    for name in encoders:
        np.testing.assert_allclose(made.array(name), alone.array(name), atol=1e-5)
    before = files_of(tmp_path / "set")
    damage(tmp_path / "set" / "data-00000.arrow", "flipped")
    extract_features(bad, encoders, tmp_path / "set", **SETTINGS, on_error="skip", repair=True)
    assert files_of(tmp_path / "set") == before
    with pytest.raises(ValueError, match="`on_error` must be stop, skip or keep"):
        extract_features(bad, encoders, tmp_path / "other", on_error="ignore")


def test_nothing_but_bad_rows(encoders, tmp_path):
    texts = datasets.Dataset.from_dict({"text": ["", " "]})
    with pytest.raises(ValueError, match="no rows were left"):
        extract_features(texts, {"clip_txt": encoders["clip_txt"]}, tmp_path / "set", on_error="skip")


def test_a_real_photograph_without_its_tail(shared_data, encoders, tmp_path):
    files = sorted((shared_data / "photos/train").glob("*.jpg"))[:5]
    for number, file in enumerate(files):
        whole = file.read_bytes()
        (tmp_path / file.name).write_bytes(whole[: -len(whole) // 3] if number == 2 else whole)
    data = dataset_of(sorted(tmp_path.glob("*.jpg")), ["x"] * 5)
    with pytest.raises(ValueError, match=rf"row 2 \({files[2].stem}\): its image cannot be read"):
        extract_features(data, {"dino": encoders["dino"]}, tmp_path / "set")
    made = extract_features(data, {"dino": encoders["dino"]}, tmp_path / "set", on_error="skip")
    assert made.ids == [file.stem for file in files if file != files[2]]


def test_a_full_disk_is_named_and_loses_nothing(dataset, encoders, tmp_path, straight):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(map(len, files_of(straight).values()))
    # The lock beside the folder and its note take room too.
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 2 + (1 << 13)}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        with pytest.raises(OSError, match=r"No space left on device.*make room and run the same again") as caught:
            extract_features(dataset, encoders, disk / "set", **SETTINGS)
        assert caught.value.errno == 28
        kept = sorted((disk / "set.partial").glob("*"))
        assert not [file for file in kept if file.suffix == ".tmp"]
        saved = [file for file in kept if file.suffix == ".arrow"]
        assert saved
        for file in saved:
            assert file.read_bytes() == (straight / file.name).read_bytes()
        subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(disk)], check=True)
        extract_features(dataset, encoders, disk / "set", **SETTINGS)
        assert files_of(disk / "set") == files_of(straight)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def command(dataset, streams, folder: Path, output: Path) -> list[str]:
    if not folder.exists():
        dataset.save_to_disk(str(folder))
    flags = ["--batch_size", "4", "--rows_per_shard", "6", "--workers", "1", "--device", "cpu"]
    return ["extract", "--source", str(folder), "--output", str(output), *flags, "--encoders", *streams]


@pytest.mark.slow
def test_two_processes_equal_one(dataset, streams, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = {"one": [], "two": ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]}
    for name, launch in runs.items():
        extra = [*launch, "--main_process_port", "0", "-m", "sparc_hf.cli"] if launch else ["sparc_hf.cli"]
        result = subprocess.run(
            [sys.executable, "-m", *extra, *command(dataset, streams, tmp_path / "source", tmp_path / name)],
            env=environment | ({"ACCELERATE_USE_CPU": "true"} if launch else {}),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert json.loads(result.stdout)["rows"] == ROWS
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.slow
def test_a_killed_command_goes_on_by_the_same_command(dataset, streams, tmp_path):
    """Also with two processes after one, because shards do not depend on who makes them."""
    from sparc_hf.cli import main

    assert main(command(dataset, streams, tmp_path / "source", tmp_path / "whole")) == 0
    line = command(dataset, streams, tmp_path / "source", tmp_path / "killed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-m", "sparc_hf.cli", *line], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed.partial").glob("*.arrow")) and time.monotonic() < deadline:
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert main(line) == 0
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "killed")
