"""Training on rows of which some lack streams, and with streams given alone."""

import itertools

import numpy as np
import pytest
import torch
from conftest import planted_features, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from sparc_hf import FeatureDataset, SparcModel
from sparc_hf.training.arguments import SparcTrainingArguments
from sparc_hf.training.given_streams import AloneDraws
from sparc_hf.training.imputation import add_imputation, moments_of
from sparc_hf.training.trainer import SparcTrainer, train

STREAMS = ["dino", "clip_img", "clip_txt"]
SETTINGS = {"num_latents": 32, "k": 4, "auxk": 4, "batch_size": 50, "epochs": 2, "learning_rate": 5e-3, "cpu": True}


def planted(start: int, stop: int) -> FeatureDataset:
    return planted_features(800).select(slice(start, stop))


def lacking(share: float, stream: str = "clip_txt", rows: int = 600) -> FeatureDataset:
    """Planted rows of which a share lacks a stream."""
    features = planted(0, rows)
    present = np.random.default_rng(1).random(rows) >= share
    arrays = {name: features.array(name) for name in STREAMS}
    return FeatureDataset.from_arrays(arrays, streams=features.streams, present={stream: present})


def arguments(folder, features="", **settings) -> SparcTrainingArguments:
    return SparcTrainingArguments(features=str(features), output_dir=str(folder), **{**SETTINGS, **settings})


def columns_of(model: SparcModel) -> dict[str, slice]:
    ends = np.cumsum(list(model.config.hidden_sizes.values()))
    return {
        name: slice(int(end) - size, int(end))
        for end, (name, size) in zip(ends, model.config.hidden_sizes.items(), strict=True)
    }


def test_moments_are_those_of_the_rows_that_are_there():
    model, features = tiny_model(3), lacking(0.6)
    mean, covariance = moments_of(model, features)
    has_text = features.present("clip_txt")
    raw = {name: torch.from_numpy(features.array(name, np.flatnonzero(has_text))) for name in STREAMS}
    paired = {name: x.double().numpy() for name, x in model.normalize(raw).items()}
    images = {name: torch.from_numpy(features.array(name)) for name in STREAMS[:2]}
    every = {name: x.double().numpy() for name, x in model.normalize(images).items()}
    columns = columns_of(model)
    np.testing.assert_allclose(mean[columns["clip_txt"]], paired["clip_txt"].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(mean[columns["dino"]], every["dino"].mean(axis=0), atol=1e-6)
    expected = np.cov(np.hstack([every["dino"], every["clip_img"]]).T, bias=True)
    both = slice(0, columns["clip_img"].stop)
    # Moved a little, to where all of it is a covariance.
    np.testing.assert_allclose(covariance[both, both], expected, rtol=0.1, atol=0.02)
    across = np.cov(np.hstack([paired["dino"], paired["clip_txt"]]).T, bias=True)
    across = across[: columns["dino"].stop, columns["dino"].stop :]
    width = (model.config.hidden_sizes["dino"] + model.config.hidden_sizes["clip_txt"]) / 2
    shrunk = across * has_text.sum() / (has_text.sum() + width)
    np.testing.assert_allclose(covariance[columns["dino"], columns["clip_txt"]], shrunk, rtol=0.1, atol=0.02)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-12


@pytest.mark.parametrize("share", [0.5, 0.97])
def test_a_covariance_of_few_pairs_stays_one_and_guesses_better_than_the_mean(share):
    model, features = tiny_model(3), lacking(share)
    imputation = add_imputation(model, features)
    assert torch.linalg.eigvalsh(imputation.covariance.double()).min() > -1e-6
    # Chosen on rows kept out: of 18 pairs a small one believes too much, of 300 it does not.
    assert (imputation.settings["ridge"] > 0.003) == (share == 0.97)
    held_out = planted(600, 800)
    rows = model.normalize({name: torch.from_numpy(held_out.array(name)) for name in STREAMS})
    guess = imputation.complete({"dino": rows["dino"]})["clip_txt"]
    mean = imputation.mean[columns_of(model)["clip_txt"]]
    errors = [(x - rows["clip_txt"]).square().sum().item() for x in (guess, mean)]
    assert errors[0] < errors[1]


def test_a_stream_that_two_rows_have_is_believed_little():
    features = planted(0, 100)
    present = np.arange(100) % 99 == 0
    arrays = {name: features.array(name) for name in STREAMS}
    few = FeatureDataset.from_arrays(arrays, streams=features.streams, present={"clip_txt": present})
    assert add_imputation(tiny_model(3), few).settings["ridge"] == 1.0


def test_streams_that_no_row_has_together_say_nothing_of_each_other():
    features = planted(0, 400)
    is_first = np.arange(400) < 200
    present = {"dino": is_first, "clip_img": is_first, "clip_txt": ~is_first}
    arrays = {name: features.array(name) for name in STREAMS}
    unpaired = FeatureDataset.from_arrays(arrays, streams=features.streams, present=present)
    model = tiny_model(3)
    imputation = add_imputation(model, unpaired)
    columns = columns_of(model)
    assert imputation.covariance[columns["dino"], columns["clip_txt"]].abs().max() < 1e-6
    assert imputation.covariance[columns["dino"], columns["clip_img"]].abs().max() > 1e-3
    assert torch.equal(imputation.offsets, torch.zeros_like(imputation.offsets))


def test_a_run_on_rows_that_lack_streams_is_saved_resumed_and_encodes(tmp_path):
    lacking(0.5).save(tmp_path / "features")
    settings = {"alone_share": 0.5, "checkpoint_every": 7, "eval_fraction": 0.1}
    whole = train(arguments(tmp_path / "whole", tmp_path / "features", **settings))
    trainer = SparcTrainer(
        arguments(tmp_path / "other", **settings), *_split(FeatureDataset.load(tmp_path / "features"))
    )
    after_step, steps = trainer._after_step, []

    def stop_later(epoch):
        after_step(epoch)
        steps.append(epoch)
        if len(steps) == 9:
            raise KeyboardInterrupt

    trainer._after_step = stop_later
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = train(arguments(tmp_path / "other", tmp_path / "features", resume=True, **settings))
    for (name, mine), theirs in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    loaded = SparcModel.from_pretrained(tmp_path / "whole")
    rows = {"dino": torch.from_numpy(planted(600, 620).array("dino"))}
    assert loaded.encode(rows, streams=["clip_txt"])["clip_txt"].indices.shape == (20, 4)
    log = (tmp_path / "whole" / "training_log.jsonl").read_text()
    assert "train/alone" in log
    assert "eval/cross/clip_txt<-dino" in log
    assert "NaN" not in log


def _split(features: FeatureDataset) -> tuple[FeatureDataset, FeatureDataset]:
    from sparc_hf.training.rows import random_split

    return random_split(features, 0.1, 0)


def test_training_learns_the_stream_that_most_rows_lack(tmp_path):
    """Its term over the rows that have it falls, as that of the others."""
    held_out = planted(600, 800)
    trainer = SparcTrainer(arguments(tmp_path / "run", epochs=20), lacking(0.8), held_out)
    before = trainer._evaluate()
    trainer.train()
    after = trainer._evaluate()
    for term in ("eval/self/clip_txt", "eval/cross/clip_txt<-dino", "eval/cross/dino<-clip_txt"):
        assert after[term] < 0.8 * before[term], term


def test_one_stream_has_no_others_to_be_given_without(tmp_path):
    trainer = SparcTrainer(arguments(tmp_path / "run", streams=["dino"], alone_share=0.5), planted(0, 100))
    trainer.train()
    assert "train/alone" not in (tmp_path / "run" / "training_log.jsonl").read_text()


def test_rows_with_none_of_the_streams_of_a_run_are_left_out(tmp_path, caplog):
    trainer = SparcTrainer(arguments(tmp_path / "run", streams=["clip_txt"]), lacking(0.6))
    assert trainer.rows == lacking(0.6).present("clip_txt").sum() < 600
    assert f"{600 - trainer.rows} of 600 rows have none of the streams" in caplog.text
    trainer.train()
    pair = SparcTrainer(arguments(tmp_path / "pair", streams=["dino", "clip_txt"]), lacking(0.6))
    assert pair.rows == 600
    with pytest.raises(ValueError, match="none of the 50 rows has any of the streams"):
        SparcTrainer(arguments(tmp_path / "none", streams=["clip_txt"]), lacking(1.0, rows=50))


def test_runs_that_cannot_impute_are_refused_before_a_step(tmp_path):
    with pytest.raises(ValueError, match=r"rows lack a stream.*`objective` usae"):
        SparcTrainer(arguments(tmp_path / "a", objective="usae", selection="local"), lacking(0.6))
    with pytest.raises(ValueError, match="leave out `no_impute`"):
        SparcTrainer(arguments(tmp_path / "b", impute=False), lacking(0.6))
    with pytest.raises(ValueError, match="`alone_share` must be from 0 to 1"):
        arguments(tmp_path / "c", alone_share=1.5)
    with pytest.raises(ValueError, match="`selection` local"):
        arguments(tmp_path / "d", alone_share=0.5, selection="local")


@given(
    st.integers(1, 60),
    st.lists(st.integers(0, 60), max_size=4),
    st.floats(0.01, 1.0),
    st.integers(0, 5),
)
def test_rows_given_alone_do_not_depend_on_how_a_step_is_split(rows, cuts, share, step):
    draws = AloneDraws(STREAMS, share, 1.0, seed=3)
    masks = {name: np.random.default_rng(number).random(rows) < 0.5 for number, name in enumerate(STREAMS)}
    masks["dino"] |= ~(masks["clip_img"] | masks["clip_txt"])
    masks = {name: torch.from_numpy(mask) for name, mask in masks.items()}
    whole = draws.of(step, rows, 0, rows, masks)
    expected = (
        {(name, row) for name, at in whole.rows.items() for row in at.tolist()} if whole.share == share else set()
    )
    drawn = set()
    bounds = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    for start, stop in itertools.pairwise(bounds):
        part = draws.of(step, rows, start, stop - start, {name: mask[start:stop] for name, mask in masks.items()})
        assert sum(len(at) for at in part.rows.values()) > 0
        if part.share == share:
            drawn |= {(name, start + row) for name, at in part.rows.items() for row in at.tolist()}
    assert drawn == expected
    assert len({row for _, row in drawn}) == len(drawn) == int(np.floor(rows * share)) or rows * share % 1 > 0.999
    assert all(masks[name][row] for name, row in drawn)
