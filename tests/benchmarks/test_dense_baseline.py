"""The model's losses and gradients beside the plain dense form, over random shapes."""

import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.model.sparse_ops import GradientTerm, Selection
from sparc_hf.training.optimizer import SparcAdam, add_up_terms

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
    rows = {name: torch.randn(5, width) for name, width in zip(streams, widths, strict=True)}
    # Errors are relative: of a row of almost nothing they would be little but rounding.
    return model, dense, {name: x / x.norm(dim=1, keepdim=True).clamp(max=1) for name, x in rows.items()}


@settings(deadline=None, max_examples=50)
@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    latents=st.integers(1, 40),
    selection=st.sampled_from(["global", "local"]),
    cross_coef=st.sampled_from([0.0, 1.0]),
    dead=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**31 - 1),
    on_host=st.booleans(),
    data=st.data(),
)
def test_losses_gradients_and_counters_are_the_dense_ones(
    step_kernel, widths, latents, selection, cross_coef, dead, seed, on_host, data
):
    k, auxk = data.draw(st.integers(1, latents)), data.draw(st.integers(1, latents))
    model, dense, rows = pair(
        widths, seed, num_latents=latents, k=k, auxk=auxk, selection=selection, cross_coef=cross_coef
    )
    model.finds_dead_on_host = on_host
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


@settings(deadline=None, max_examples=30)
@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    latents=st.integers(1, 40),
    selection=st.sampled_from(["global", "local"]),
    seed=st.integers(0, 2**31 - 1),
    data=st.data(),
)
def test_bfloat16_rounds_the_encoder_product_and_nothing_else(step_kernel, widths, latents, selection, seed, data):
    """The gradients are those of the dense form with the selected values put in place of the exact ones."""
    k = data.draw(st.integers(1, latents))
    model, dense, rows = pair(widths, seed, num_latents=latents, k=k, auxk=0, selection=selection)
    with torch.autocast("cpu", torch.bfloat16):
        mine = model(rows)
    mine.loss.backward()
    own, crossed = [], []
    for source, x in rows.items():
        code = mine.codes[source].to_dense().detach()
        exact = dense.encoders[source](x - dense.pre_bias[source])
        values = (exact + (code - exact).detach()) * (code > 0)
        for target, y in rows.items():
            terms = own if source == target else crossed
            terms.append(dense._nmse(values @ dense.atoms[target] + dense.pre_bias[target], y))
    loss = sum(own) / len(own) + sum(crossed) / max(1, len(crossed))
    loss.backward()
    torch.testing.assert_close(mine.loss, loss, rtol=1e-5, atol=1e-5)
    for (name, one), (_, other) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        scale = max(1.0, other.grad.abs().max().item())
        assert torch.allclose(one.grad / scale, other.grad / scale, rtol=1e-5, atol=1e-5), name
        assert one.grad.dtype == torch.float32


@pytest.mark.parametrize("widths", [[6, 4], [200, 129, 64]], ids=str)
@pytest.mark.parametrize("selection", ["global", "local"])
def test_a_few_optimizer_steps_stay_together(step_kernel, widths, selection):
    """Torch's Adam beside SparcAdam, which takes dense gradients and, the second time, terms."""
    for as_terms in (False, True):
        model, dense, rows = pair(widths, 0, num_latents=32, k=4, auxk=4, selection=selection)
        model.gradient_terms = {} if as_terms else None
        plain, optimizer = torch.optim.Adam(dense.parameters(), lr=1e-3), SparcAdam(model, lr=1e-3)
        for _ in range(6):
            plain.zero_grad()
            dense(rows)["loss"].backward()
            dense.prepare_atoms_for_step()
            plain.step()
            optimizer.zero_grad()
            model(rows).loss.backward()
            optimizer.step()
        for one, other in zip(model.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        mine, theirs = optimizer.state_dict()["state"], plain.state_dict()["state"]
        for number, state in theirs.items():
            assert mine[number].keys() == state.keys()
            for key, value in state.items():
                torch.testing.assert_close(mine[number][key], value, rtol=1e-4, atol=1e-7)


def test_the_moments_do_not_drift_from_those_of_double_precision(step_kernel):
    """One entry a latent, so that a gradient is known to the last bit and only the update itself can differ."""
    model = SparcModel(SparcConfig(streams={"dino": {"hidden_size": 80}}, num_latents=32, k=4, auxk=4))
    name, weight = "encoders.dino.weight", model.encoders["dino"].weight
    model.gradient_terms, optimizer = {name: []}, SparcAdam(model, lr=1e-3)
    model.encoders["dino"].bias.grad = torch.zeros(32)
    model.pre_bias["dino"].grad = torch.zeros(80)
    exact, average, square = (torch.zeros(32, 80, dtype=torch.float64) for _ in range(3))
    exact += weight.detach()
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    draws = torch.Generator().manual_seed(0)
    for step in range(1, 190):
        gradient, weight.grad = torch.randn(32, 80, generator=draws), None
        selection = Selection(torch.arange(32).unsqueeze(1), 32)
        model.gradient_terms[name].append(GradientTerm(selection, torch.ones(1, 32, 1), gradient.unsqueeze(0)))
        optimizer.step()
        average = beta1 * average + (1 - beta1) * gradient.double()
        square = beta2 * square + (1 - beta2) * gradient.double() ** 2
        exact -= 1e-3 * average / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + 1e-8)
    state = optimizer.state[weight]
    # Rounding goes both ways; a constant that is off goes one way in every entry. 0.999 itself, as torch's Adam and
    # this one multiply by it in float32, leaves 1.2e-6.
    assert (state["exp_avg_sq"].double() / square - 1).mean().abs() < 2e-6
    torch.testing.assert_close(state["exp_avg_sq"].double(), square, rtol=5e-6, atol=0)
    torch.testing.assert_close(state["exp_avg"].double(), average, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weight.detach().double(), exact, rtol=0, atol=1e-6)


def test_terms_add_up_to_the_dense_gradients(step_kernel):
    """Two micro-batches, with and without terms."""
    gradients = []
    for as_terms in (False, True):
        model, _, rows = pair([6, 4], 0, num_latents=32, k=4, auxk=4)
        model.steps_since_fired.stream0[:9] = 100
        model.gradient_terms = {} if as_terms else None
        for part in (slice(0, 2), slice(2, 5)):
            model({name: value[part] for name, value in rows.items()}).loss.backward()
        add_up_terms(model)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
