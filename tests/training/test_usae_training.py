"""Universal Sparse Autoencoders through the same loop."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, planted_features
from test_training import assert_same_weights, environment, flags, log_of, weights

from sparc_hf import SparcModel
from sparc_hf.training.arguments import SparcTrainingArguments
from sparc_hf.training.trainer import SparcTrainer, TrainingInterrupted, train

USAE = {
    "objective": "usae",
    "selection": "local",
    "num_latents": 48,
    "k": 8,
    "auxk": 24,
    "auxk_coef": 0.1,
    "batch_size": 64,
    "epochs": 3,
    "learning_rate": 5e-3,
    "final_learning_rate": 1e-5,
    "lr_schedule": "cosine",
    "warmup_steps": 3,
    "weight_decay": 1e-5,
    "max_grad_norm": 1.0,
    "reinitialize_every": 0,
    "logging_every": 5,
    "checkpoint_every": 0,
    "cpu": True,
}


def arguments(folder, features, **settings) -> SparcTrainingArguments:
    return SparcTrainingArguments(features=str(features), output_dir=str(folder), **(USAE | settings))


def test_every_pair_of_streams_is_explained_in_part(tmp_path, planted_folder):
    """R2 above 0 from every source to every target, on held-out rows."""
    features = planted_features(600)
    training, held_out = features.split(480)
    settings = {"epochs": 150, "learning_rate": 1e-2, "num_latents": 96, "auxk": 48}
    model = SparcTrainer(arguments(tmp_path / "run", planted_folder, **settings), training, held_out).train()
    rows = {name: torch.from_numpy(held_out.array(name)) for name in held_out.stream_names}
    with torch.no_grad():
        codes = model.encode(rows)
        for target, x in model.normalize(rows).items():
            for code in codes.values():
                left = (x - model.decode(code, to=target)).square().mean()
                assert 1 - left / x.var(unbiased=False) > 0.3
    validations = [entry["eval/loss"] for entry in log_of(tmp_path / "run") if "eval/loss" in entry]
    assert validations[-1] < 0.8 * validations[0]


def test_a_step_moves_the_source_alone(tmp_path, planted_folder):
    trainer = SparcTrainer(arguments(tmp_path / "run", planted_folder, warmup_steps=0), planted_features(600))
    batch = next(iter(trainer.batches))
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    source = trainer._source_of_step()
    trainer._train_step(batch, 64)
    for key, value in trainer.model.named_parameters():
        # The gradient of a bias before a batch norm is zero, here to the last bit.
        moves = key.split(".")[1] == source and value.requires_grad and key != f"encoders.{source}.bias"
        assert torch.equal(before[key], value) != moves, key


def test_sources_are_drawn_evenly_and_by_the_seed(tmp_path, planted_folder):
    drawn = {}
    for seed in (0, 1):
        trainer = SparcTrainer(arguments(tmp_path / str(seed), planted_folder, seed=seed), planted_features(600))
        drawn[seed] = []
        for trainer.step in range(300):
            drawn[seed].append(trainer._source_of_step())
        counts = np.unique(drawn[seed], return_counts=True)[1]
        assert len(counts) == 3
        assert counts.min() > 60
    assert drawn[0] != drawn[1]


def test_stopped_and_resumed_gives_the_same_bits(tmp_path, planted_folder, monkeypatch):
    train(arguments(tmp_path / "whole", planted_folder))
    original = SparcTrainer._train_step

    def stop_in_step_11(trainer, share, rows):
        original(trainer, share, rows)
        if trainer.step == 11:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(SparcTrainer, "_train_step", stop_in_step_11)
    with pytest.raises(TrainingInterrupted):
        train(arguments(tmp_path / "stopped", planted_folder))
    monkeypatch.undo()
    train(arguments(tmp_path / "stopped", planted_folder, resume=True))
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, planted_folder):
    train(arguments(tmp_path / "one", planted_folder))
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py")]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *flags(tmp_path / "two", planted_folder, **USAE)],
        env=environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    mine, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in mine:
        # The bias before a batch norm has no gradient but rounding, which Adam enlarges, and the mean follows it.
        noisy = (key.startswith("encoders") and key.endswith("bias")) or key.endswith("running_mean")
        if not noisy:
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-4, atol=1e-4)
    one, two = log_of(tmp_path / "one")[-1], log_of(tmp_path / "two")[-1]
    assert two["train/loss"] == pytest.approx(one["train/loss"], abs=1e-4)
    assert SparcModel.from_pretrained(tmp_path / "two").encoder_norm["dino"].num_batches_tracked > 0


def test_what_does_not_fit_the_objective_is_refused(tmp_path, planted_folder):
    with pytest.raises(ValueError, match=r"set `selection=.local.`"):
        arguments(tmp_path / "run", planted_folder, selection="global")
    with pytest.raises(ValueError, match="`center` sets pre-biases"):
        arguments(tmp_path / "run", planted_folder, center=True)


def rates_in_force(trainer) -> list[float]:
    """Train, and return the rate at which each update moved its stream."""
    rates, step = [], trainer.optimizer.step

    def monitored():
        moved = [group["lr"] for group in trainer.optimizer.param_groups if group["params"][0].grad is not None]
        assert len(moved) == 1
        rates.extend(moved)
        step()

    trainer.optimizer.step = monitored
    trainer.train()
    return rates


@pytest.fixture
def earlier_schedule(golden):
    told = json.loads((golden / "usae.json").read_text())["cosine_schedule"]
    rates = {"learning_rate": told["base"], "final_learning_rate": told["final"]}
    return told, {"warmup_steps": told["warmup_iters"], "batch_size": 60, "schedule_after_update": True, **rates}


def test_the_schedule_of_the_earlier_code(earlier_schedule, tmp_path, planted_folder):
    """One model: the table of the rates in force."""
    told, settings = earlier_schedule
    args = arguments(tmp_path / "run", planted_folder, streams=["dino"], **settings)
    trainer = SparcTrainer(args, planted_features(600))
    assert trainer.total_steps == told["total_iters"]
    assert rates_in_force(trainer) == pytest.approx(told["lr_in_force_at_update"][:30], rel=1e-6)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(told["lr_in_force_at_update"][30], rel=1e-6)
    # Without it the first update has the start of the warm-up.
    plain = arguments(tmp_path / "plain", planted_folder, **(settings | {"schedule_after_update": False}))
    assert SparcTrainer(plain, planted_features(600)).optimizer.param_groups[0]["lr"] == 0
    with pytest.raises(ValueError, match="needs `lr_schedule` cosine"):
        arguments(tmp_path / "none", planted_folder, schedule_after_update=True, lr_schedule="linear")


def test_every_model_goes_through_a_schedule_of_its_own(earlier_schedule, tmp_path, planted_folder, monkeypatch):
    """Worked by hand: the k-th time a model is drawn it has the table's k-th rate, whatever the others did."""
    told, settings = earlier_schedule
    names = ["dino", "clip_img", "clip_txt"]
    sources = [names[int(digit)] for digit in "201120010212222010210021020112"]
    monkeypatch.setattr(SparcTrainer, "_source_of_step", lambda trainer: sources[trainer.step])
    occurrences = [sources[:step].count(name) for step, name in enumerate(sources)]
    assert occurrences[:12] == [0, 0, 0, 1, 1, 1, 2, 2, 3, 2, 3, 3]
    by_hand = [told["lr_in_force_at_update"][number] for number in occurrences]
    trainer = SparcTrainer(arguments(tmp_path / "run", planted_folder, **settings), planted_features(600))
    assert rates_in_force(trainer) == pytest.approx(by_hand, rel=1e-6)
    last = log_of(tmp_path / "run")[-1]
    for name in names:
        assert last[f"learning_rate/{name}"] == pytest.approx(
            told["lr_in_force_at_update"][sources.count(name)], rel=1e-6
        )


def test_a_resumed_run_keeps_every_models_place_in_its_schedule(
    earlier_schedule, tmp_path, planted_folder, monkeypatch
):
    _, settings = earlier_schedule
    train(arguments(tmp_path / "whole", planted_folder, **settings))
    original = SparcTrainer._train_step

    def stop_in_step_11(trainer, share, rows):
        original(trainer, share, rows)
        if trainer.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SparcTrainer, "_train_step", stop_in_step_11)
    with pytest.raises(TrainingInterrupted):
        train(arguments(tmp_path / "stopped", planted_folder, **settings))
    monkeypatch.undo()
    train(arguments(tmp_path / "stopped", planted_folder, resume=True, **settings))
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_half_precision_and_micro_batches_train_as_well(tmp_path, planted_folder):
    losses = {}
    for name, settings in {"plain": {}, "bf16": {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}}.items():
        train(arguments(tmp_path / name, planted_folder, **settings))
        losses[name] = log_of(tmp_path / name)[-1]["train/loss"]
    assert losses["bf16"] != losses["plain"]
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=0.03)
