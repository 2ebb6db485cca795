"""Accumulated gradients of a step are those of its whole batch, dead latents and all."""

import itertools
import weakref

import pytest
import torch
from conftest import random_features, tiny_model

from sparc_hf import SparcModel

CUTS = [0, 5, 6, 17, 24]


def model_with_dead_latents(selection: str) -> SparcModel:
    model = tiny_model(3, selection=selection).train()
    for number, name in enumerate(model.config.stream_names):
        # One step further, all of them are dead but those that fire in the step.
        getattr(model.steps_since_fired, name)[number::2] = model.config.dead_after_steps
    return model


def parts_of(features: dict) -> list[dict]:
    return [{name: rows[start:stop] for name, rows in features.items()} for start, stop in itertools.pairwise(CUTS)]


@pytest.mark.parametrize("selection", ["global", "local"])
def test_gradients_add_up_to_those_of_the_whole_batch(step_kernel, selection):
    whole, accumulated = model_with_dead_latents(selection), model_with_dead_latents(selection)
    features = random_features(whole, rows=CUTS[-1])
    expected = whole(features)
    expected.loss.backward()
    auxiliary = 0.0
    selected = accumulated.begin_step(parts_of(features))
    for part, chosen in zip(parts_of(features), selected, strict=True):
        output = accumulated(part, selected=chosen)
        share = len(part["dino"]) / CUTS[-1]
        (output.loss * share).backward()
        auxiliary += output.losses["auxk"].item() * share
    assert auxiliary > 0
    assert auxiliary == pytest.approx(expected.losses["auxk"].item(), rel=1e-5)
    for (name, mine), theirs in zip(accumulated.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    for mine, theirs in zip(accumulated.buffers(), whole.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_rows_of_a_micro_batch_are_let_go_before_the_one_after_the_next():
    model, former = model_with_dead_latents("global"), []

    def micro_batches():
        for seed in range(4):
            features = random_features(model, seed=seed)
            assert not any(rows() is not None for rows in former[: -len(features)])
            former.extend(weakref.ref(rows) for rows in features.values())
            yield features

    assert len(model.begin_step(micro_batches())) == 4


def test_nothing_is_counted_in_evaluation_mode():
    model = model_with_dead_latents("local").eval()
    before = [buffer.clone() for buffer in model.buffers()]
    features = random_features(model)
    (selected,) = model.begin_step([features], selection="global")
    output, expected = model(features, selected=selected), model(features, selection="global")
    assert output.loss == expected.loss
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))


def test_wrong_calls_are_value_errors(step_kernel):
    model = model_with_dead_latents("local")
    features = random_features(model, rows=CUTS[-1])
    selected = model.begin_step(parts_of(features))
    for rows in (features, parts_of(features)[1]):
        with pytest.raises(ValueError, match="what `begin_step` returned for it"):
            model(rows, selected=selected[0])
    with pytest.raises(ValueError, match="at least one micro-batch"):
        model.begin_step([])
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(ValueError, match=r"needs every stream.*dino"):
        model.begin_step([features, {name: rows for name, rows in features.items() if name != "dino"}])
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))
    with pytest.raises(ValueError, match="no auxiliary term of dead latents"):
        tiny_model(2, objective="usae", selection="local").begin_step([features])
