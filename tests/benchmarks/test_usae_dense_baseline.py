"""The model's losses, gradients and steps beside the plain dense form, over random shapes."""

import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.training.optimizer import UsaeAdamW

sys.path.insert(0, str(ROOT / "benchmarks"))
from usae_dense_baseline import DenseUsae


def pair(widths: list[int], seed: int, batch: int, **sizes) -> tuple[SparcModel, DenseUsae, dict[str, torch.Tensor]]:
    streams = {f"stream{number}": {"hidden_size": width} for number, width in enumerate(widths)}
    config = SparcConfig(streams=streams, selection="local", objective="usae", auxk_coef=0.1, **sizes)
    torch.manual_seed(seed)
    model, dense = SparcModel(config), DenseUsae(config)
    with torch.no_grad():
        for name in streams:
            model.encoders[name].bias.normal_(std=0.1)
            model.atoms[name].normal_()
            model.encoder_norm[name].weight.uniform_(0.5, 1.5)
            model.encoder_norm[name].bias.normal_()
            model.encoder_norm[name].running_mean.normal_()
    dense.load_state_dict({name: model.state_dict()[name] for name in dense.state_dict()})
    rows = {name: torch.randn(batch, width) + 1 for name, width in zip(streams, widths, strict=True)}
    return model, dense, rows


@settings(deadline=None, max_examples=40)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    latents=st.integers(1, 30),
    batch=st.integers(4, 14),
    distance=st.sampled_from(["l1", "l2"]),
    seed=st.integers(0, 2**31 - 1),
    rows_at_once=st.integers(1, 14),
    training=st.booleans(),
    data=st.data(),
)
def test_losses_and_all_gradients_are_the_dense_ones(
    widths, latents, batch, distance, seed, rows_at_once, training, data
):
    k, auxk = data.draw(st.integers(1, latents)), data.draw(st.integers(1, latents))
    source = f"stream{data.draw(st.integers(0, len(widths) - 1))}"
    model, dense, rows = pair(widths, seed, batch, num_latents=latents, k=k, auxk=auxk, distance=distance)
    model.double().train(training)
    dense.double().train(training)
    model.max_preactivation_mb = rows_at_once * latents * 12 / 2**20
    mine_rows, their_rows = ({name: x.double().requires_grad_() for name, x in rows.items()} for _ in range(2))
    mine, theirs = model(mine_rows, source=source), dense(their_rows, source)
    torch.testing.assert_close(mine.loss, theirs["loss"], rtol=1e-9, atol=1e-9)
    for name, value in theirs.items():
        if "/" in name:
            torch.testing.assert_close(mine.losses[name], value, rtol=1e-9, atol=1e-9)
    mine.loss.backward()
    theirs["loss"].backward()
    ours = dict(model.named_parameters())
    for name, other in dense.named_parameters():
        expected = torch.zeros_like(other) if other.grad is None else other.grad
        found = torch.zeros_like(other) if ours[name].grad is None else ours[name].grad
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found / scale, expected / scale, rtol=1e-6, atol=1e-6, msg=name)
    for name, x in their_rows.items():
        torch.testing.assert_close(mine_rows[name].grad, x.grad, rtol=1e-6, atol=1e-6, msg=name)
    buffers = dict(model.named_buffers())
    for name, other in dense.named_buffers():
        torch.testing.assert_close(buffers[name], other, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_steps_stay_together(distance):
    """The earlier project's step, with gradients for all, beside one of the source's parameters alone."""
    sizes = {"num_latents": 48, "k": 4, "auxk": 24, "distance": distance}
    model, dense, rows = pair([12, 7, 16], 0, 40, **sizes)
    model.train()
    theirs = dense.train().optimizers(1e-3, 1e-5)
    mine = UsaeAdamW(model, 1e-3, 1e-5)
    for source in ("stream1", "stream0", "stream1", "stream2"):
        expected = dense.train_step(rows, source, theirs, 1.0)
        mine.zero_grad()
        with mine.only(source):
            loss = model(rows, source=source).loss
            loss.backward()
        torch.testing.assert_close(loss, expected["loss"], rtol=1e-5, atol=1e-5)
        assert all(value.grad is None for name, value in model.named_parameters() if name.split(".")[1] != source)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        mine.step()
    ours = dict(model.named_parameters())
    assert all(value.requires_grad for name, value in ours.items() if not name.startswith("pre_bias"))
    for name, other in dense.named_parameters():
        # A bias before a batch norm has no gradient; the dense form has rounding noise there, which Adam enlarges.
        if not (name.startswith("encoders") and name.endswith("bias")):
            torch.testing.assert_close(ours[name], other, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_bfloat16_is_near_and_serves_one_backward(distance):
    model, _, rows = pair([40, 24], 0, 200, num_latents=64, k=8, auxk=32, distance=distance)
    model.train()
    found = {}
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(rows, source="stream0").loss
        loss.backward()
        assert all(value.grad.dtype == torch.float32 for value in model.parameters() if value.grad is not None)
        found[bf16] = loss, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert not torch.equal(found[True][0], found[False][0])
    torch.testing.assert_close(found[True][0], found[False][0], rtol=5e-3, atol=0)
    for name, exact in found[False][1].items():
        if exact.any():
            assert torch.cosine_similarity(found[True][1][name].flatten(), exact.flatten(), dim=0) > 0.97, name
    loss = model(rows, source="stream0").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()


def test_a_training_step_of_one_row_is_refused():
    model, _, rows = pair([6], 0, 1, num_latents=8, k=2, auxk=4)
    with pytest.raises(ValueError, match="at least two rows"):
        model.train()(rows)
    assert model.eval()(rows).loss.isfinite()
