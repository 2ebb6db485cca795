"""The model's losses and gradients beside the plain dense form, over random shapes."""

import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_hf import SparcConfig, SparcModel

sys.path.insert(0, str(ROOT / "benchmarks"))
from dense_baseline import DenseSparc


def pair(widths: list[int], seed: int, **sizes) -> tuple[SparcModel, DenseSparc, dict[str, torch.Tensor]]:
    streams = {f"stream{number}": {"hidden_size": width} for number, width in enumerate(widths)}
    config = SparcConfig(streams=streams, dead_after_steps=3, **sizes)
    torch.manual_seed(seed)
    model = SparcModel(config).train()
    with torch.no_grad():
        for name in streams:
            model.encoders[name].bias.normal_(std=0.1)
            model.pre_bias[name].normal_(std=0.1)
    dense = DenseSparc(config).train()
    dense.load_state_dict(model.state_dict())
    return model, dense, {name: torch.randn(5, width) for name, width in zip(streams, widths, strict=True)}


@settings(deadline=None, max_examples=50)
@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    latents=st.integers(1, 40),
    selection=st.sampled_from(["global", "local"]),
    cross_coef=st.sampled_from([0.0, 1.0]),
    dead=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**31 - 1),
    data=st.data(),
)
def test_losses_gradients_and_counters_are_the_dense_ones(widths, latents, selection, cross_coef, dead, seed, data):
    k, auxk = data.draw(st.integers(1, latents)), data.draw(st.integers(1, latents))
    model, dense, rows = pair(
        widths, seed, num_latents=latents, k=k, auxk=auxk, selection=selection, cross_coef=cross_coef
    )
    dying = torch.rand(latents, generator=torch.Generator().manual_seed(seed)) < dead
    for side in (model, dense):
        for name in rows:
            getattr(side.steps_since_fired, name)[dying] = 100
    mine, theirs = model(rows), dense(rows)
    torch.testing.assert_close(mine.loss, theirs["loss"], rtol=1e-5, atol=1e-5)
    for name, value in mine.losses.items():
        if "/" in name:
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)
    mine.loss.backward()
    theirs["loss"].backward()
    # Near-zero rows divide by almost nothing, so gradients are compared relative to their largest entry.
    for (name, one), (_, other) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        expected = torch.zeros_like(one) if other.grad is None else other.grad
        found = torch.zeros_like(one) if one.grad is None else one.grad
        scale = max(1.0, expected.abs().max().item())
        assert torch.allclose(found / scale, expected / scale, rtol=1e-5, atol=1e-5), name
    for one, other in zip(model.steps_since_fired.buffers(), dense.steps_since_fired.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("steps", [5])
def test_a_few_optimizer_steps_stay_together(steps):
    model, dense, rows = pair([6, 4], 0, num_latents=32, k=4, auxk=4)
    optimizers = [
        torch.optim.Adam(model.parameters(), lr=1e-3, fused=True),
        torch.optim.Adam(dense.parameters(), lr=1e-3),
    ]
    for _ in range(steps):
        for side, optimizer in zip((model, dense), optimizers, strict=True):
            optimizer.zero_grad()
            side(rows)["loss"].backward()
            side.prepare_atoms_for_step()
            optimizer.step()
    for one, other in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
