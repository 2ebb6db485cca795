"""A run that was stopped, killed or finished, and is started again: the log, the weights, and what is left alone."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import planted_features
from kill_points import in_child, outcome
from test_training import arguments, assert_same_weights, log_of

from sparc_hf import SparcModel
from sparc_hf.cli import main
from sparc_hf.features import FeatureDataset
from sparc_hf.training import SparcTrainer, TrainingInterrupted, train

pytestmark = pytest.mark.usefixtures("one_thread")
# 600 rows less 60 make 9 steps an epoch; entries are logged each 5 steps and saved each 3.
SETTINGS = {"eval_fraction": 0.1, "checkpoint_every": 3, "logging_every": 5, "epochs": 3}
USAE = {"objective": "usae", "selection": "local", "auxk": 8, "max_grad_norm": 1.0, "lr_schedule": "cosine"}


def told(folder: Path) -> list[dict]:
    """The log without what depends on the clock."""
    return [{key: value for key, value in entry.items() if key != "rows_per_second"} for entry in log_of(folder)]


@pytest.fixture(scope="module", params=[{}, USAE], ids=["sparc", "usae"])
def straight(request, tmp_path_factory, planted_folder):
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(arguments(folder, planted_folder, **SETTINGS, **request.param))
    return folder, request.param


def steps_before(monkeypatch, number: int, what: str) -> None:
    """Let a run stop or die right after its n-th step, before anything is done about it."""
    original = SparcTrainer._train_step

    def stop(trainer, share, rows):
        original(trainer, share, rows)
        if trainer.step + 1 == number:
            os.kill(os.getpid(), getattr(signal, what))

    monkeypatch.setattr(SparcTrainer, "_train_step", stop)


@pytest.mark.parametrize("number", [1, 2, 4, 7, 9, 10, 18, 23, 27])
def test_the_log_of_a_run_that_was_stopped(straight, tmp_path, planted_folder, monkeypatch, number):
    """Before the first entry, between entries, and at the end of an epoch, with its validation still to come."""
    whole, kind = straight
    with monkeypatch.context() as patch:
        steps_before(patch, number, "SIGTERM")
        with pytest.raises(TrainingInterrupted):
            train(arguments(tmp_path / "run", planted_folder, **SETTINGS, **kind))
    train(arguments(tmp_path / "run", planted_folder, resume=True, **SETTINGS, **kind))
    assert told(tmp_path / "run") == told(whole)
    assert_same_weights(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [2, 4, 9, 10, 11, 19])
def test_the_log_of_a_run_that_was_killed(straight, tmp_path, planted_folder, monkeypatch, number):
    whole, kind = straight
    with monkeypatch.context() as patch:
        steps_before(patch, number, "SIGKILL")
        work = in_child(lambda: train(arguments(tmp_path / "run", planted_folder, **SETTINGS, **kind)))
        assert outcome(work) == -signal.SIGKILL
    train(arguments(tmp_path / "run", planted_folder, resume=True, **SETTINGS, **kind))
    assert told(tmp_path / "run") == told(whole)
    assert_same_weights(tmp_path / "run", whole)


def test_a_run_that_was_killed_twice(straight, tmp_path, planted_folder, monkeypatch):
    whole, kind = straight
    for number in (8, 16):
        with monkeypatch.context() as patch:
            steps_before(patch, number, "SIGKILL")
            settings = SETTINGS | kind | {"resume": number > 8}
            given = arguments(tmp_path / "run", planted_folder, **settings)
            assert outcome(in_child(partial(train, given))) == -signal.SIGKILL
    with open(tmp_path / "run" / "training_log.jsonl", "a") as log:
        log.write('{"step": 15, "tra')
    train(arguments(tmp_path / "run", planted_folder, resume=True, **SETTINGS, **kind))
    assert told(tmp_path / "run") == told(whole)


@pytest.mark.parametrize("resume", [True, False])
def test_starting_again_without_a_checkpoint_starts_the_log_again(tmp_path, planted_folder, monkeypatch, resume):
    settings = SETTINGS | {"checkpoint_every": 0}
    train(arguments(tmp_path / "whole", planted_folder, **settings))
    with monkeypatch.context() as patch:
        steps_before(patch, 12, "SIGKILL")
        assert outcome(in_child(lambda: train(arguments(tmp_path / "run", planted_folder, **settings)))) != 0
    assert len(log_of(tmp_path / "run")) == 3
    train(arguments(tmp_path / "run", planted_folder, resume=resume, **settings))
    assert told(tmp_path / "run") == told(tmp_path / "whole")


def test_a_finished_run_is_finished(tmp_path, planted_folder, capsys, monkeypatch):
    model = train(arguments(tmp_path / "run", planted_folder, **SETTINGS))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    monkeypatch.setattr(SparcTrainer, "_train_step", None)
    for overwrite in (False, True):  # a job that is put back into the queue has both flags
        again = train(arguments(tmp_path / "run", planted_folder, resume=True, overwrite=overwrite, **SETTINGS))
        assert all(value.equal(again.state_dict()[key]) for key, value in model.state_dict().items())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    with pytest.raises(
        ValueError, match=r"is finished, and not with these settings \(`epochs`: 3 -> 4\).*--overwrite"
    ):
        train(arguments(tmp_path / "run", planted_folder, resume=True, **SETTINGS | {"epochs": 4}))


def test_overwrite_and_resume_together_replace_a_run_of_other_settings(tmp_path, planted_folder, monkeypatch):
    train(arguments(tmp_path / "run", planted_folder, **SETTINGS))
    settings = SETTINGS | {"seed": 1, "overwrite": True, "resume": True}
    with monkeypatch.context() as patch:
        steps_before(patch, 11, "SIGKILL")
        assert outcome(in_child(lambda: train(arguments(tmp_path / "run", planted_folder, **settings)))) != 0
    assert json.loads((tmp_path / "run" / "training_arguments.json").read_text())["seed"] == 0
    train(arguments(tmp_path / "run", planted_folder, **settings))
    assert json.loads((tmp_path / "run" / "training_arguments.json").read_text())["seed"] == 1
    train(arguments(tmp_path / "straight", planted_folder, **SETTINGS | {"seed": 1}))
    assert_same_weights(tmp_path / "run", tmp_path / "straight")
    assert told(tmp_path / "run") == told(tmp_path / "straight")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "straight"}


def test_a_killed_overwrite_goes_on_by_resume_and_the_old_model_serves_meanwhile(
    tmp_path, planted_folder, monkeypatch
):
    old = train(arguments(tmp_path / "run", planted_folder, **SETTINGS))
    settings = SETTINGS | {"seed": 1}
    with monkeypatch.context() as patch:
        steps_before(patch, 11, "SIGTERM")
        with pytest.raises(TrainingInterrupted, match=r"run\.training.*--resume"):
            train(arguments(tmp_path / "run", planted_folder, overwrite=True, **settings))
    served = SparcModel.from_pretrained(tmp_path / "run")
    assert all(value.equal(served.state_dict()[key]) for key, value in old.state_dict().items())
    assert len(log_of(tmp_path / "run.training")) == 3
    with pytest.raises(ValueError, match=r"already holds a run"):
        train(arguments(tmp_path / "run", planted_folder, **settings))
    train(arguments(tmp_path / "run", planted_folder, resume=True, **settings))
    assert not (tmp_path / "run.training").exists()
    assert json.loads((tmp_path / "run" / "training_arguments.json").read_text())["seed"] == 1


@pytest.mark.parametrize("kind", ["zero", "nan"])
def test_unusable_validation_rows_are_found_before_training(tmp_path, kind):
    good = planted_features(100)
    arrays = {name: good.array(name) for name in good.stream_names}
    arrays["dino"][7] = 0 if kind == "zero" else float("nan")
    good.save(tmp_path / "features")
    FeatureDataset.from_arrays(arrays, ids=good.ids).save(tmp_path / "eval")
    with pytest.raises(ValueError, match=r"dino.*row 7 \(id 'sample-7'\)"):
        train(arguments(tmp_path / "run", tmp_path / "features", eval_features=str(tmp_path / "eval")))
    assert not (tmp_path / "run").exists()


def test_nothing_of_an_older_run_goes_before_all_has_been_looked_at(tmp_path, planted_folder, capsys):
    train(arguments(tmp_path / "run", planted_folder, **SETTINGS))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    bad = planted_features(50)
    arrays = {name: bad.array(name) for name in bad.stream_names}
    arrays["dino"][7] = 0
    FeatureDataset.from_arrays(arrays).save(tmp_path / "bad")
    base = f"train --output_dir {tmp_path}/run --overwrite --cpu --num_latents 48 --k 4 --auxk 8"
    for flags in (
        f"--features {tmp_path}/missing",
        f"--features {tmp_path}/bad",
        f"--features {planted_folder} --streams audio",
        f"--features {planted_folder} --report_to trackio",
        f"--features {planted_folder} --k 400",
        f"--features {planted_folder} --batch_size 0",
        f"--features {planted_folder} --eval_features {tmp_path}/bad",
    ):
        assert main([*base.split(), *flags.split()]) == 2
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: data for path, data in after.items() if "bad" not in path.parts} == before


def test_a_folder_of_something_else_is_not_trained_into(tmp_path, planted_folder):
    for name in ("config.json", "results.json", "sparc_features.json", "report.html", "checkpoints"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("{}")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=f"holds {name} and is not the folder of a run"):
                train(arguments(folder, planted_folder, overwrite=overwrite))
        assert [path.name for path in folder.iterdir()] == [name]


def test_overwriting_the_folder_one_stands_in(tmp_path, planted_folder, monkeypatch):
    train(arguments(tmp_path / "run", planted_folder, epochs=1))
    monkeypatch.chdir(tmp_path / "run")
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be replaced as a whole, because it is .* the folder you are in"):
        train(arguments(Path(), planted_folder, epochs=1, overwrite=True))
    assert time.monotonic() - started < 30
    train(arguments(Path(), planted_folder, epochs=1, resume=True))
