"""A global selection from one array of summed pre-activations, beside an array a stream."""

import gc
from unittest import mock

import pytest
import torch
from conftest import random_features, tiny_model
from torch.profiler import ProfilerActivity, profile

from sparc_hf.model import sparse_ops
from sparc_hf.model.sparse_ops import dots_with_atoms, preactivations_at, sum_alone_is_faster

ALWAYS, NEVER = {"compiled": 0, "torch": 0}, {"compiled": 10**9, "torch": 10**9}


def arrays(rule):
    return mock.patch.object(sparse_ops, "LATENTS_PER_SELECTED", rule)


@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("rows_at_once", [3, 512])
def test_codes_losses_and_gradients_are_those_of_an_array_a_stream(step_kernel, streams, rows_at_once):
    outputs, gradients = [], []
    for rule in (ALWAYS, NEVER):
        model = tiny_model(streams, num_latents=200).train()
        model.max_preactivation_mb = rows_at_once * 4 * 200 / 2**20
        model.steps_since_fired.dino[:20] = 100
        with arrays(rule):
            outputs.append(model(random_features(model, rows=20)))
        outputs[-1].loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    one, several = outputs
    for name, codes in one.codes.items():
        assert torch.equal(codes.indices, several.codes[name].indices)
        torch.testing.assert_close(codes.values, several.codes[name].values, rtol=1e-5, atol=1e-5)
    for name, value in one.losses.items():
        torch.testing.assert_close(value, several.losses[name])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_number_formats_select_what_their_own_sums_say(dtype):
    model = tiny_model(3, num_latents=200).to(dtype)
    features = {name: rows.to(dtype) for name, rows in random_features(model, rows=20).items()}
    with arrays(ALWAYS), torch.no_grad():
        codes = model.encode(features)
        sums = model.objective.summed_preactivations(features)
    rounding = 1e-10 if dtype == torch.float64 else 0.05
    least = sums.gather(1, codes["dino"].indices).amin(dim=1, keepdim=True)
    left_out = sums.scatter(1, codes["dino"].indices, -torch.inf)
    assert (left_out <= least + rounding).all()
    assert codes["dino"].values.dtype == dtype


def test_autocast_rounds_the_sums_and_not_the_values(step_kernel):
    model = tiny_model(3, num_latents=200)
    features = random_features(model, rows=20)
    with arrays(ALWAYS), torch.no_grad():
        exact = model.encode(features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model.encode(features)
    for name, codes in rounded.items():
        rows = features[name] - model.pre_bias[name]
        own = rows @ model.encoders[name].weight.T + model.encoders[name].bias
        torch.testing.assert_close(codes.values, own.gather(1, codes.indices).relu(), rtol=1e-4, atol=1e-4)
        shared = [
            len(set(a) & set(b)) for a, b in zip(codes.indices.tolist(), exact[name].indices.tolist(), strict=True)
        ]
        assert sum(shared) >= 0.9 * codes.indices.numel()


def test_one_stream_given_selects_with_its_offsets():
    model = tiny_model(3, num_latents=200)
    torch.manual_seed(0)
    width = sum(model.config.hidden_sizes.values())
    mixed = torch.randn(width, 400)
    model.set_imputation(torch.zeros(width), mixed @ mixed.T / 400)
    with torch.no_grad():
        model.imputation.offsets.normal_()
    alone = {"dino": random_features(model, rows=20)["dino"]}
    with torch.no_grad():
        plain = model.encode(alone)["dino"].indices
        with arrays(ALWAYS):
            one = model.encode(alone)
        with arrays(NEVER):
            several = model.encode(alone)
        model.imputation.offsets.zero_()
        without = model.encode(alone)["dino"].indices
    assert torch.equal(plain, several["dino"].indices)
    assert not torch.equal(plain, without)
    for name, codes in one.items():
        assert torch.equal(codes.indices, several[name].indices)
        torch.testing.assert_close(codes.values, several[name].values, rtol=1e-4, atol=1e-4)


def test_a_device_always_and_a_processor_from_some_latents_on(step_kernel):
    like = torch.empty(1)
    least = sparse_ops.LATENTS_PER_SELECTED[step_kernel] * 4
    assert not sum_alone_is_faster(like, 2, least - 1, 4)
    assert sum_alone_is_faster(like, 2, least, 4)
    assert not sum_alone_is_faster(like, 1, least, 4)
    assert sum_alone_is_faster(like.to("meta"), 2, 8, 4)
    assert not sum_alone_is_faster(like.to("meta"), 1, 8, 4)


@pytest.mark.parametrize(("rule", "expected"), [(ALWAYS, 1), (NEVER, 4)], ids=["one", "a stream"])
def test_arrays_that_live_during_a_selection(rule, expected):
    """64 rows of 4096 latents, 1 MiB an array; several streams take one each and their sum."""
    model = tiny_model(3, num_latents=4096)
    features = random_features(model, rows=64)
    with arrays(rule), torch.no_grad(), mock.patch.object(sparse_ops, "compiled_ops", return_value=None):
        model.encode(features)
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model.encode(features)
    level = peak = 0
    for event in profiler.profiler.kineto_results.events():
        # What else is given back meanwhile is smaller.
        level += event.nbytes() if event.name() == "[memory]" and abs(event.nbytes()) >= 2**20 else 0
        peak = max(peak, level)
    assert peak == expected * 2**20


@pytest.mark.parametrize("k", [1, 4, 7])
@pytest.mark.parametrize("width", [1, 16, 37, 130])
def test_products_with_atoms(step_kernel, width, k):
    draws = torch.Generator().manual_seed(width)
    table, bias = torch.randn(50, width, generator=draws), torch.randn(50, generator=draws)
    rows, indices = torch.randn(9, width, generator=draws), torch.randint(50, (9, k), generator=draws)
    expected = (rows.double() @ table.double().T).gather(1, indices)
    torch.testing.assert_close(dots_with_atoms(indices, table, rows).double(), expected, rtol=1e-5, atol=1e-5)
    values = preactivations_at(indices, table, bias, rows).double()
    torch.testing.assert_close(values, expected + bias[indices], rtol=1e-5, atol=1e-5)


def test_the_bits_do_not_depend_on_where_weights_lie(step_kernel):
    draws = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(300, 37, generator=draws), torch.zeros(300)
    rows, indices = torch.randn(9, 37, generator=draws), torch.randint(300, (9, 8), generator=draws)
    expected = preactivations_at(indices, weight, bias, rows)
    for offset in (1, 2, 3):
        elsewhere = torch.empty(weight.numel() + offset)[offset:].view_as(weight).copy_(weight)
        assert torch.equal(preactivations_at(indices, elsewhere, bias, rows), expected)
