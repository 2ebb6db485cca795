"""The sparse operations against their plain dense forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_hf.model.sparse_ops import (
    ROWS_IN_CACHE,
    Selection,
    decode_errors,
    gather_preactivations,
    normalize_rows,
    sparse_decode,
    top_k,
    unit_norm,
    unit_norm_,
)

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31 - 1))


def _draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def top(preactivations: torch.Tensor, k: int) -> Selection:
    return Selection(preactivations.topk(k, dim=1).indices, preactivations.shape[1])


@settings(deadline=None, max_examples=60)
@given(shape=SHAPES, data=st.data())
def test_encode_and_decode_have_the_dense_gradients(shape, data):
    batch, width, latents, seed = shape
    k = data.draw(st.integers(1, latents))
    draws = _draws(seed)
    # In float64, because sums whose terms cancel keep no fixed number of float32's digits.
    tensors = [
        torch.randn(*size, generator=draws, dtype=torch.float64)
        for size in ((batch, width), (latents, width), (latents,), (width,), (latents, width))
    ]
    target = torch.randn(batch, width, generator=draws, dtype=torch.float64)

    def gradients(sparse: bool) -> list[torch.Tensor]:
        rows, weight, bias, pre_bias, atoms = (tensor.clone().requires_grad_() for tensor in tensors)
        dense = (rows - pre_bias) @ weight.T + bias
        selection = top(dense.detach(), k)
        if sparse:
            gathered = dense.detach().gather(1, selection.indices)
            centered = (rows - pre_bias).detach()
            values = gather_preactivations(rows, weight, bias, pre_bias, centered, gathered, selection).relu()
            decoded = sparse_decode(values, atoms, selection)
        else:
            mask = torch.zeros_like(dense).scatter(1, selection.indices, 1.0)
            decoded = (dense.relu() * mask) @ atoms
        loss = (decoded - target).pow(2).mean()
        return [loss, *torch.autograd.grad(loss, [rows, weight, bias, pre_bias, atoms])]

    for mine, reference in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


def test_sum_rows_by_hand():
    selection = Selection(torch.tensor([[2, 0], [2, 3]]), num_latents=5)
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = torch.tensor([[2.0, 20.0], [0.0, 0.0], [7.0, 70.0], [8.0, 80.0], [0.0, 0.0]])
    assert torch.equal(selection.sum_rows(rows.unsqueeze(0), values.unsqueeze(0)), expected)
    two_codes = selection.sum_rows(torch.stack([rows, rows + 1]), torch.stack([values, torch.zeros(2, 2)]))
    assert torch.equal(two_codes, expected)
    assert selection.sum_values(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [2.0, 0.0, 4.0, 4.0, 0.0]


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES)
def test_projected_gradients_are_orthogonal_to_unit_atoms(shape):
    _, width, latents, seed = shape
    draws = _draws(seed)
    raw = torch.randn(latents, width, generator=draws)
    norms = raw.norm(dim=1)
    gradient = torch.randn(latents, width, generator=draws)
    atoms, projected = raw.clone(), gradient.clone()
    unit_norm_(atoms, projected)
    torch.testing.assert_close(atoms, unit_norm(raw))
    # The 1e-8 under the division shortens an atom that was almost zero.
    torch.testing.assert_close(atoms.norm(dim=1), norms / (norms + 1e-8))
    along = (gradient * atoms).sum(dim=1)
    left = along * (1 - atoms.pow(2).sum(dim=1))
    torch.testing.assert_close((projected * atoms).sum(dim=1), left, rtol=0, atol=1e-5)


def test_blocks_of_atoms_cover_all_rows():
    """More rows than one block holds, and a last block that is not full."""
    atoms, gradient = torch.randn(2 * ROWS_IN_CACHE + 3, 4), torch.randn(2 * ROWS_IN_CACHE + 3, 4)
    expected = unit_norm(atoms)
    along = (gradient * expected).sum(dim=1, keepdim=True)
    expected_gradient = gradient - along * expected
    unit_norm_(atoms, gradient)
    torch.testing.assert_close(atoms, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@settings(deadline=None, max_examples=60)
@given(shape=SHAPES, codes=st.integers(1, 5), data=st.data())
def test_decode_errors_have_the_dense_gradients(step_kernel, shape, codes, data):
    batch, width, latents, seed = shape
    k = data.draw(st.integers(1, latents))
    draws = _draws(seed)
    selection = top(torch.randn(batch, latents, generator=draws), k)
    sizes = ((codes, batch, k), (latents, width), (width,), (batch, width))
    tensors = [torch.randn(*size, generator=draws) for size in sizes]
    weights = torch.randn(codes, batch, generator=draws)

    def gradients(sparse: bool) -> list[torch.Tensor]:
        values, atoms, pre_bias, rows = (tensor.clone().requires_grad_() for tensor in tensors)
        if sparse:
            centered = (rows - pre_bias).detach()
            errors, _ = decode_errors(values, atoms, pre_bias, rows, centered, selection)
        else:
            dense = values.new_zeros(codes, batch, latents).scatter(2, selection.indices.expand(codes, -1, -1), values)
            errors = (dense @ atoms + pre_bias - rows).pow(2).sum(dim=-1)
        return [errors, *torch.autograd.grad((errors * weights).sum(), [values, atoms, pre_bias, rows])]

    for mine, reference in zip(gradients(True), gradients(False), strict=True):
        scale = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(mine / scale, reference / scale, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(shape=SHAPES, parts=st.integers(1, 4), rounded=st.booleans(), data=st.data())
def test_top_k_is_that_of_the_sum(step_kernel, shape, parts, rounded, data):
    batch, _, latents, seed = shape
    latents = 7 * latents
    k = data.draw(st.integers(1, latents))
    made = [torch.randn(batch, latents, generator=_draws(seed + part)) for part in range(parts)]
    if rounded:
        made = [part.round() for part in made]  # many equal sums
    indices, gathered = top_k(made, k)
    total = sum(made[1:], made[0])
    torch.testing.assert_close(total.gather(1, indices), total.topk(k, dim=1).values)
    assert all(len(set(row)) == k for row in indices.tolist())
    for part, values in zip(made, gathered, strict=True):
        assert torch.equal(values, part.gather(1, indices))


def test_top_k_survives_nan_and_infinity(step_kernel):
    rows = torch.randn(4, 1000)
    rows[0, 5], rows[1] = torch.nan, torch.nan
    rows[2, 7], rows[2, 8] = torch.inf, -torch.inf
    indices, _ = top_k([rows], 64)
    assert indices.min() >= 0
    assert indices.max() < 1000
    assert all(len(set(row)) == 64 for row in indices.tolist())
    assert indices[0, 0] == 5
    assert indices[2, 0] == 7
    assert 8 not in indices[2]


def test_top_k_orders_equal_numbers_by_latent(step_kernel):
    rows = torch.tensor([[0.0, -0.0, 1.0, 1.0, 0.0, -1.0], [-0.0, torch.nan, 2.0, -torch.nan, torch.inf, 2.0]])
    assert top_k([rows], 6)[0].tolist() == [[2, 3, 0, 1, 4, 5], [1, 3, 4, 2, 5, 0]]


def test_transpose_lists_every_entry_under_its_latent(step_kernel):
    selection = Selection(torch.tensor([[2, 0], [2, 3]]), num_latents=5)
    order, offsets = selection.transposed
    assert order.tolist() == [1, 0, 2, 3]
    assert offsets.tolist() == [0, 1, 1, 3, 4, 4]


def test_normalisation_by_hand():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert torch.equal(normalize_rows(rows, "none"), rows)
    torch.testing.assert_close(normalize_rows(rows, "l2"), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    statistics = (torch.tensor([1.0, 2.0]), torch.tensor([2.0]))
    torch.testing.assert_close(
        normalize_rows(rows, "standardize", statistics), torch.tensor([[1.0, 1.0], [-0.5, -1.0]]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_values_decode_with_float32_atoms(dtype):
    selection = Selection(torch.tensor([[1, 0]]), 2)
    decoded = sparse_decode(torch.tensor([[2.0, 1.0]], dtype=dtype), torch.eye(2), selection)
    assert decoded.tolist() == [[1.0, 2.0]]
