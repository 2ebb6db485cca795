"""The training loop: what it reaches, what it survives, and that splitting the work changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, planted_features, tiny_model, torch_operators_only

from sparc_hf import SparcModel
from sparc_hf.training.arguments import SparcTrainingArguments
from sparc_hf.training.step_kernel import load_step_kernel
from sparc_hf.training.trainer import SparcTrainer, TrainingInterrupted, train

SMALL = {
    "num_latents": 48,
    "k": 4,
    "auxk": 8,
    "dead_after_steps": 10,
    "batch_size": 64,
    "epochs": 3,
    "learning_rate": 5e-3,
    "reinitialize_every": 5,
    "logging_every": 5,
    "checkpoint_every": 0,
    "step_kernel": "off",
    "cpu": True,
}


def arguments(folder: Path, features: Path, **settings) -> SparcTrainingArguments:
    return SparcTrainingArguments(features=str(features), output_dir=str(folder), **(SMALL | settings))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return SparcModel.from_pretrained(folder).state_dict()


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("selection", ["global", "local"])
def test_training_lowers_the_loss_and_saves_a_model(tmp_path, planted_folder, selection):
    model = train(arguments(tmp_path / "run", planted_folder, epochs=10, eval_fraction=0.2, selection=selection))
    entries = log_of(tmp_path / "run")
    losses = [entry["train/loss"] for entry in entries if "train/loss" in entry]
    validations = [entry["eval/loss"] for entry in entries if "eval/loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    assert len(validations) == 10
    assert validations[-1] < 0.8 * validations[0]
    assert not model.training
    loaded = SparcModel.from_pretrained(tmp_path / "run")
    assert loaded.config.stream("dino")["normalize"] == "l2"
    for atoms in loaded.atoms.values():
        torch.testing.assert_close(atoms.norm(dim=1), torch.ones(48), rtol=0, atol=1e-6)
    settings = json.loads((tmp_path / "run" / "training_arguments.json").read_text())
    assert settings["num_latents"] == 48
    assert settings["rows"] == 480


def test_same_seed_same_bits_other_seed_other_bits(tmp_path, planted_folder):
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        train(arguments(tmp_path / name, planted_folder, seed=seed))
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize("pieces", [2, 3, 64])
@pytest.mark.parametrize("selection", ["global", "local"])
def test_accumulation_equals_the_whole_batch(step_kernel, tmp_path, planted_folder, selection, pieces):
    """600 rows at 64 leave a last batch of 24, so uneven pieces are in it, and in the end pieces of one row."""
    settings = {"selection": selection, "step_kernel": "on" if step_kernel == "compiled" else "off", "epochs": 6}
    train(arguments(tmp_path / "whole", planted_folder, **settings))
    train(arguments(tmp_path / "pieces", planted_folder, gradient_accumulation_steps=pieces, **settings))
    mine, theirs = weights(tmp_path / "whole"), weights(tmp_path / "pieces")
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-4, atol=1e-5)
    for one, other in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "pieces"), strict=True):
        assert other["train/auxk"] == pytest.approx(one["train/auxk"], rel=1e-5)
        assert other["dead_share"] == one["dead_share"]
    # The auxiliary term is what makes it hard: some latents are dead, and it is there.
    assert log_of(tmp_path / "whole")[-1]["train/auxk"] > 0
    assert log_of(tmp_path / "whole")[-1]["dead_share"] > 0


def test_the_compiled_step_trains_the_same_model(tmp_path, planted_folder):
    with torch_operators_only():
        train(arguments(tmp_path / "torch", planted_folder))
    if not load_step_kernel():
        pytest.skip("the compiled step needs a C++ compiler and ninja")
    train(arguments(tmp_path / "compiled", planted_folder, step_kernel="on"))
    train(arguments(tmp_path / "again", planted_folder, step_kernel="on"))
    assert_same_weights(tmp_path / "compiled", tmp_path / "again")
    mine, theirs = weights(tmp_path / "compiled"), weights(tmp_path / "torch")
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_stop_signal_saves_and_resume_gives_the_same_bits(tmp_path, planted_folder, schedule, monkeypatch):
    settings = {"lr_schedule": schedule, "warmup_steps": 4, "eval_fraction": 0.1, "max_grad_norm": 1.0}
    train(arguments(tmp_path / "whole", planted_folder, **settings))
    original = SparcTrainer._train_step

    def stop_in_step_11(trainer, share, rows):
        original(trainer, share, rows)
        if trainer.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SparcTrainer, "_train_step", stop_in_step_11)
    with pytest.raises(TrainingInterrupted, match="--resume") as stopped:
        train(arguments(tmp_path / "stopped", planted_folder, **settings))
    assert stopped.value.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    train(arguments(tmp_path / "stopped", planted_folder, resume=True, **settings))
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    steps = [(entry["step"], "eval/loss" in entry) for entry in log_of(tmp_path / "stopped")]
    assert steps == [(entry["step"], "eval/loss" in entry) for entry in log_of(tmp_path / "whole")]


COMMAND = [sys.executable, "-m", "sparc_hf.cli", "train"]


def flags(folder: Path, features: Path, **settings) -> list[str]:
    given = {"features": features, "output_dir": folder} | SMALL | settings
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, planted_folder):
    """SIGKILL in the middle of an epoch, then the same command with --resume."""
    settings = {"epochs": 200, "checkpoint_every": 7, "auxk": 8}
    whole = subprocess.run(
        [*COMMAND, *flags(tmp_path / "whole", planted_folder, **settings)], env=environment(), capture_output=True
    )
    assert whole.returncode == 0, whole.stderr.decode()[-2000:]
    command = [*COMMAND, *flags(tmp_path / "killed", planted_folder, **settings)]
    killed = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / "checkpoints").glob("step-*[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed = subprocess.run([*command, "--resume"], env=environment(), capture_output=True)
    assert resumed.returncode == 0, resumed.stderr.decode()[-2000:]
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "processes", "settings"),
    [
        ("accelerate", 2, {}),
        ("torchrun", 4, {"gradient_accumulation_steps": 2, "step_kernel": "on"}),
        # Too few latents for terms to be the shorter message, and clipping, which needs dense gradients.
        ("torchrun", 2, {"num_latents": 8, "batch_size": 300, "max_grad_norm": 1.0}),
        ("torchrun", 2, {"adam_beta2": 0.95, "rare_latent_push": 0.02, "rare_latent_share": 1.0, "alone_share": 0.3}),
        ("torchrun", 2, {"rare_latent_push": 0.02, "rare_latent_share": 1.0, "selection": "local"}),
    ],
    ids=["terms", "terms-4", "dense", "live", "live-local"],
)
def test_several_processes_equal_one(tmp_path, planted_folder, script, processes, settings):
    """Gloo processes, at the same rows per step, with auxiliary term, re-initialisation and accumulation.

    The one process makes each step from the whole batch.
    """
    train(arguments(tmp_path / "one", planted_folder, epochs=4, **(settings | {"gradient_accumulation_steps": 1})))
    launch = {
        "accelerate": ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes"],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node"],
    }[script]
    launch.append(str(processes))
    port = ["--main_process_port", "0"] if script == "accelerate" else []
    result = subprocess.run(
        [
            *[sys.executable, "-m", *launch, *port, str(ROOT / "train.py")],
            *flags(tmp_path / "two", planted_folder, epochs=4, **settings),
        ],
        env=environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    mine, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-5, atol=1e-5)
    last, other = log_of(tmp_path / "one")[-1], log_of(tmp_path / "two")[-1]
    assert other["train/loss"] == pytest.approx(last["train/loss"], abs=1e-5)
    assert other["exchanged_megabytes_per_step"] > 0
    assert other["dead_share"] == last["dead_share"]


def test_nan_loss_stops_with_step_stream_and_checkpoint(tmp_path, planted_folder, monkeypatch):
    original = SparcTrainer._train_step

    def poison(trainer, share, rows):
        if trainer.step == 12:
            with torch.no_grad():
                trainer.model.atoms["clip_img"][:] = float("inf")
        original(trainer, share, rows)

    monkeypatch.setattr(SparcTrainer, "_train_step", poison)
    with pytest.raises(FloatingPointError, match=r"step 12 .*clip_img.*step-00000010"):
        train(arguments(tmp_path / "run", planted_folder, checkpoint_every=5))
    monkeypatch.undo()
    train(arguments(tmp_path / "run", planted_folder, checkpoint_every=5, resume=True))
    train(arguments(tmp_path / "clean", planted_folder, checkpoint_every=5))
    assert_same_weights(tmp_path / "run", tmp_path / "clean")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_every_file_of_a_run_obeys_the_umask(tmp_path, planted_folder, umask):
    former = os.umask(umask)
    try:
        train(arguments(tmp_path / "run", planted_folder, epochs=1, checkpoint_every=4))
        tiny_model(2).save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    finally:
        os.umask(former)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "optimizer.bin", "config.json"}
    assert len([path for path in files if "-of-" in path.name]) > 1
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~umask)}
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*") if path.is_dir()} == {oct(0o777 & ~umask)}


def test_a_finished_run_is_not_overwritten_unasked(tmp_path, planted_folder):
    train(arguments(tmp_path / "run", planted_folder, epochs=1))
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"--resume.*--overwrite"):
        train(arguments(tmp_path / "run", planted_folder, epochs=1))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    train(arguments(tmp_path / "run", planted_folder, epochs=1, seed=9, overwrite=True))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before
    assert {entry["epoch"] for entry in log_of(tmp_path / "run")} == {0}


def test_resume_refuses_other_settings(tmp_path, planted_folder):
    train(arguments(tmp_path / "run", planted_folder, checkpoint_every=5))
    with pytest.raises(ValueError, match=r"`learning_rate`: 0\.005 -> 0\.1"):
        train(arguments(tmp_path / "run", planted_folder, learning_rate=0.1, resume=True))


def test_centering_starts_at_the_mean_of_the_normalised_rows(tmp_path, planted_folder):
    from sparc_hf.features.dataset import FeatureDataset

    args = arguments(tmp_path / "run", planted_folder, center=True)
    features = FeatureDataset.load(planted_folder)
    trainer = SparcTrainer(args, features)
    rows = torch.nn.functional.normalize(torch.from_numpy(features.array("dino")), dim=1)
    torch.testing.assert_close(trainer.model.pre_bias["dino"].detach(), rows.mean(dim=0), rtol=1e-4, atol=1e-5)
    other = SparcTrainer(arguments(tmp_path / "other", planted_folder), features)
    assert other.model.pre_bias["dino"].abs().sum() == 0


def test_zero_or_nan_rows_are_found_before_training(tmp_path):
    from sparc_hf.features.dataset import FeatureDataset

    good = planted_features(100)
    arrays = {name: good.array(name) for name in good.stream_names}
    arrays["dino"][17] = 0
    FeatureDataset.from_arrays(arrays, ids=good.ids).save(tmp_path / "features")
    with pytest.raises(ValueError, match=r"dino.*zeros.*row 17.*sample-17"):
        train(arguments(tmp_path / "run", tmp_path / "features"))
    assert not (tmp_path / "run").exists()


def test_some_streams_only_and_trackers(tmp_path, planted_folder):
    model = train(arguments(tmp_path / "run", planted_folder, epochs=1, streams=["clip_txt"], report_to="tensorboard"))
    assert model.config.stream_names == ["clip_txt"]
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    with pytest.raises(ImportError, match=r'pip install "sparc-hf\[trackers\]"'):
        train(arguments(tmp_path / "other", planted_folder, report_to="trackio"))
    with pytest.raises(ValueError, match=r"`streams` names \['audio'\]"):
        train(arguments(tmp_path / "other", planted_folder, streams=["audio"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"selection": "some"}, "`selection` must be one of"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, but it is 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"eval_fraction": 1.0}, "`eval_fraction` must be"),
        ({"eval_fraction": 0.5, "eval_features": "x"}, "give only one"),
        ({"warmup_steps": -1}, "`warmup_steps` must not be negative"),
        ({"adam_beta2": 1.0}, "`adam_beta2` must be at least 0 and below 1, but it is 1.0"),
        ({"rare_latent_push": -0.1}, "`rare_latent_push` must not be negative"),
        ({"rare_latent_share": 0.0}, "`rare_latent_share` be above 0"),
        ({"rare_latent_push": 0.1, "objective": "usae", "selection": "local"}, "`rare_latent_push` raises biases"),
    ],
)
def test_impossible_settings(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, tmp_path, **settings)


def test_mixed_precision_trains(tmp_path, planted_folder):
    train(arguments(tmp_path / "bf16", planted_folder, epochs=2, mixed_precision="bf16"))
    train(arguments(tmp_path / "fp32", planted_folder, epochs=2))
    low, full = log_of(tmp_path / "bf16")[-1], log_of(tmp_path / "fp32")[-1]
    assert low["train/loss"] == pytest.approx(full["train/loss"], rel=0.05)
    assert weights(tmp_path / "bf16")["atoms.dino"].dtype == torch.float32


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_half_precision_that_a_cpu_has_not_is_refused(tmp_path, planted_folder, monkeypatch, way):
    if way == "environment":  # as `accelerate launch --mixed_precision fp16` says it
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"`mixed_precision` fp16 needs a GPU.* on cpu; choose bf16 or no"):
        train(arguments(tmp_path / "run", planted_folder, mixed_precision="fp16" if way == "flag" else None))
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    train(arguments(tmp_path / "run", planted_folder, epochs=1))
