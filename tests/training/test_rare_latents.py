"""What keeps latents alive: Adam's second moment, and the push of latents that few rows select."""

import math
import os
import signal

import pytest
import torch
from conftest import planted_features, random_features, tiny_model, torch_operators_only
from test_training import arguments, assert_same_weights, log_of, weights

from sparc_hf.model.outputs import SparseCodes
from sparc_hf.training.optimizer import SparcAdam
from sparc_hf.training.rare_latents import LARGEST_DEFICIT, RATE_ROWS, RareLatentPush
from sparc_hf.training.step_kernel import load_step_kernel
from sparc_hf.training.trainer import SparcTrainer, TrainingInterrupted, train

pytestmark = pytest.mark.usefixtures("one_thread")
# With a share of 1 every second latent or so is pushed in every step.
LIVE = {"adam_beta2": 0.95, "rare_latent_push": 0.02, "rare_latent_share": 1.0, "lr_schedule": "linear"}


@pytest.mark.parametrize("as_terms", [False, True])
@pytest.mark.parametrize("beta2", [0.999, 0.95, 0.5])
def test_the_second_moment_is_adams(step_kernel, as_terms, beta2):
    mine, theirs = tiny_model(3), tiny_model(3)
    mine.gradient_terms = {} if as_terms else None
    optimizer = SparcAdam(mine, lr=1e-3, beta2=beta2)
    plain = torch.optim.Adam(theirs.parameters(), lr=1e-3, betas=(0.9, beta2))
    for seed in range(6):
        rows = random_features(mine, seed=seed)
        for model, adam in ((mine, optimizer), (theirs, plain)):
            adam.zero_grad()
            model.train()(rows).loss.backward()
            if model is theirs:
                theirs.prepare_atoms_for_step()
            adam.step()
    for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5, msg=name)
        torch.testing.assert_close(
            optimizer.state[one]["exp_avg_sq"], plain.state[other]["exp_avg_sq"], rtol=1e-3, atol=1e-8
        )


def test_the_second_moment_by_hand(step_kernel):
    """Gradients of 1 and then, 20 steps on, of 1 again: how far the second one moves depends on what is remembered."""
    for beta2, remembered in ((0.999, 20), (0.95, 20)):
        model = tiny_model(1)
        optimizer = SparcAdam(model, lr=1e-3, beta2=beta2)
        bias = next(iter(model.encoders.values())).bias
        for step in range(1, remembered + 2):
            before = bias[0].item()
            bias.grad = torch.full_like(bias, float(step in (1, remembered + 1)))
            optimizer.step()
        average = 0.1 * (1 + 0.9**remembered) / (1 - 0.9 ** (remembered + 1))
        square = (1 - beta2) * (1 + beta2**remembered) / (1 - beta2 ** (remembered + 1))
        assert bias[0].item() - before == pytest.approx(-1e-3 * average / math.sqrt(square), rel=1e-3)


def test_both_objectives_have_the_second_moment_asked_for(tmp_path, planted_folder):
    features = planted_features(100)
    usae = {"objective": "usae", "selection": "local"}
    for number, settings in enumerate(({}, usae)):
        for beta2, more in ((0.999, {}), (0.9, {"adam_beta2": 0.9})):
            trainer = SparcTrainer(
                arguments(tmp_path / f"{number}{beta2}", planted_folder, **settings | more), features
            )
            assert {group["betas"] for group in trainer._adam.param_groups} == {(0.9, beta2)}
            assert trainer._push.push == 0


def pushed_model(
    selection: str = "global", stepped: bool = True
) -> tuple[SparcAdam, RareLatentPush, dict[str, SparseCodes]]:
    """Two streams of eight latents, of which rows select the first three."""
    model = tiny_model(2, num_latents=8, k=2, auxk=2, selection=selection)
    adam = SparcAdam(model, lr=1e-3)
    for encoder in model.encoders.values():
        encoder.bias.data.zero_()
        encoder.bias.grad = torch.zeros(8)
    if stepped:
        adam.step()
    indices = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1]])
    values = {name: torch.arange(1.0, 9).view(4, 2) * scale for scale, name in enumerate(model.config.stream_names, 1)}
    codes = {name: SparseCodes(indices, value, 8) for name, value in values.items()}
    return adam, RareLatentPush(adam, model, push=0.01, share=0.5), codes


@pytest.mark.parametrize("selection", ["global", "local"])
def test_the_push_by_hand(selection):
    adam, push, codes = pushed_model(selection)
    other = list(codes)[1]
    if selection == "local":
        codes[other] = SparseCodes(torch.full((4, 2), 7), codes[other].values, 8)
    rates, expected = torch.full((2, 8), 0.25), torch.zeros(2, 8)
    for _ in range(1000):
        push.add(codes)
        push.apply(4)
        selected = torch.tensor([4, 3, 1, 0, 0, 0, 0, 0]) / 4
        rates[0] += (selected - rates[0]) * 4 / RATE_ROWS
        rates[1] += ((selected if selection == "global" else torch.eye(8)[7] * 2) - rates[1]) * 4 / RATE_ROWS
        deficit = (0.125 / rates).log().clamp(0, LARGEST_DEFICIT)
        expected += 0.01 * torch.tensor([[5.0], [10.0]]) * deficit  # 2, 4, 6, 8 and twice as much
    for at, name in enumerate(codes):
        bias = adam.model.encoders[name].bias
        torch.testing.assert_close(bias.detach(), expected[at], rtol=1e-4, atol=1e-6)
        if at == 0 or selection == "local":
            torch.testing.assert_close(adam.state[bias]["selection_rate"], rates[at], rtol=1e-4, atol=1e-6)
    assert expected[0, :3].sum() == 0
    assert expected[0, 3:].min() > 1


def test_parts_of_a_step_count_as_the_whole():
    whole, push, codes = pushed_model()
    parts, pieces, _ = pushed_model()
    for _ in range(800):
        push.add(codes)
        push.apply(4)
        for rows in (slice(0, 1), slice(1, 4)):
            pieces.add({name: SparseCodes(c.indices[rows], c.values[rows], 8) for name, c in codes.items()})
        pieces.apply(4)
    for name in codes:
        mine, theirs = whole.model.encoders[name].bias, parts.model.encoders[name].bias
        torch.testing.assert_close(mine, theirs)
        assert theirs.max() > 0
    with pytest.raises(ValueError, match="`add` the codes"):
        push.apply(4)


def test_a_first_step_that_was_left_out_leaves_the_optimizer_to_begin():
    adam, push, codes = pushed_model(stepped=False)
    push.add(codes)
    push.apply(4)
    adam.step()
    push.add(codes)
    push.apply(4)
    state = adam.state[adam.model.encoders[next(iter(codes))].bias]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq", "selection_rate"}


def test_a_latent_that_no_row_selects_is_brought_back(tmp_path, planted_folder, monkeypatch):
    original = SparcTrainer.__init__

    def suppressed(trainer, *given):
        original(trainer, *given)
        for encoder in trainer.model.encoders.values():
            encoder.bias.data[:8] = -0.5

    monkeypatch.setattr(SparcTrainer, "__init__", suppressed)
    settings = {"epochs": 40, "reinitialize_every": 0, "auxk": 0, "learning_rate": 1e-3, "dead_after_steps": 50}
    lost = train(arguments(tmp_path / "off", planted_folder, **settings))
    pushed = arguments(tmp_path / "on", planted_folder, rare_latent_push=0.01, rare_latent_share=0.3, **settings)
    found = train(pushed)
    for name in lost.config.stream_names:
        assert lost.dead_latents(name)[:8].all()
        assert not found.dead_latents(name)[:8].any()


def test_nothing_is_pushed_unless_it_is_asked_for(tmp_path, planted_folder, monkeypatch):
    train(arguments(tmp_path / "default", planted_folder))
    monkeypatch.setattr(RareLatentPush, "_deficit", None)
    off = {"adam_beta2": 0.999, "rare_latent_push": 0.0, "rare_latent_share": 0.7}
    train(arguments(tmp_path / "off", planted_folder, **off))
    assert_same_weights(tmp_path / "default", tmp_path / "off")


def test_the_compiled_step_trains_the_same_live_model(tmp_path, planted_folder):
    with torch_operators_only():
        train(arguments(tmp_path / "torch", planted_folder, **LIVE))
    if not load_step_kernel():
        pytest.skip("the compiled step needs a C++ compiler and ninja")
    train(arguments(tmp_path / "compiled", planted_folder, step_kernel="on", **LIVE))
    train(arguments(tmp_path / "plain", planted_folder, step_kernel="on"))
    mine, theirs, plain = (weights(tmp_path / name) for name in ("compiled", "torch", "plain"))
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-3, atol=1e-4)
    assert (mine["encoders.dino.bias"] - plain["encoders.dino.bias"]).abs().max() > 1e-2


@pytest.mark.parametrize("selection", ["global", "local"])
def test_accumulation_equals_the_whole_batch(step_kernel, tmp_path, planted_folder, selection):
    settings = LIVE | {"selection": selection, "step_kernel": "on" if step_kernel == "compiled" else "off"}
    train(arguments(tmp_path / "whole", planted_folder, **settings))
    train(arguments(tmp_path / "pieces", planted_folder, gradient_accumulation_steps=3, **settings))
    mine, theirs = weights(tmp_path / "whole"), weights(tmp_path / "pieces")
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-4, atol=1e-5)


def test_stopped_and_resumed_gives_the_same_bits(tmp_path, planted_folder, monkeypatch):
    train(arguments(tmp_path / "whole", planted_folder, **LIVE))
    original = SparcTrainer._train_step

    def stop_in_step_11(trainer, share, rows):
        original(trainer, share, rows)
        if trainer.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(SparcTrainer, "_train_step", stop_in_step_11)
        with pytest.raises(TrainingInterrupted):
            train(arguments(tmp_path / "run", planted_folder, **LIVE))
    for name, other in (("adam_beta2", 0.9), ("rare_latent_push", 0.1), ("rare_latent_share", 0.5)):
        with pytest.raises(ValueError, match=f"`{name}`: .* -> {other}"):
            train(arguments(tmp_path / "run", planted_folder, resume=True, **LIVE | {name: other}))
    train(arguments(tmp_path / "run", planted_folder, resume=True, **LIVE))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert log_of(tmp_path / "run")[-1]["train/loss"] == log_of(tmp_path / "whole")[-1]["train/loss"]


def test_a_run_from_before_a_setting_was_there_had_its_default(tmp_path):
    plain, live = arguments(tmp_path, tmp_path), arguments(tmp_path, tmp_path, **LIVE)
    saved = {name: value for name, value in plain.to_dict().items() if name not in LIVE}
    assert plain.differences(saved) == []
    assert {told.split("`")[1] for told in live.differences(saved)} == set(LIVE)
