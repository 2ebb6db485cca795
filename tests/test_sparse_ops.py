"""The sparse operations against their plain dense forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_hf.sparse_ops import (
    ROWS_IN_CACHE,
    Selection,
    gather_preactivations,
    normalize_rows,
    sparse_decode,
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
    tensors = [
        torch.randn(*size, generator=draws)
        for size in ((batch, width), (latents, width), (latents,), (width,), (latents, width))
    ]
    target = torch.randn(batch, width, generator=draws)

    def gradients(sparse: bool) -> list[torch.Tensor]:
        rows, weight, bias, pre_bias, atoms = (tensor.clone().requires_grad_() for tensor in tensors)
        dense = (rows - pre_bias) @ weight.T + bias
        selection = top(dense.detach(), k)
        if sparse:
            gathered = dense.detach().gather(1, selection.indices)
            values = gather_preactivations(rows, weight, bias, pre_bias, selection, gathered).relu()
            decoded = sparse_decode(values, atoms, selection)
        else:
            mask = torch.zeros_like(dense).scatter(1, selection.indices, 1.0)
            decoded = (dense.relu() * mask) @ atoms
        loss = (decoded - target).pow(2).mean()
        return [loss, *torch.autograd.grad(loss, [rows, weight, bias, pre_bias, atoms])]

    for mine, reference in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_sum_rows_by_hand():
    selection = Selection(torch.tensor([[2, 0], [2, 3]]), num_latents=5)
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    summed = selection.sum_rows(rows, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    expected = [[2.0, 20.0], [0.0, 0.0], [7.0, 70.0], [8.0, 80.0], [0.0, 0.0]]
    assert summed.tolist() == expected
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


@settings(deadline=None, max_examples=30)
@given(shape=SHAPES, times=st.integers(1, 4), shared=st.booleans())
def test_a_stack_of_selections_is_their_rows_one_after_the_other(shape, times, shared):
    batch, width, latents, seed = shape
    draws = _draws(seed)
    k = 1 + seed % latents
    made = [top(torch.randn(batch, latents, generator=draws), k) for _ in range(times)]
    selections = [made[0]] * times if shared else made
    stacked = Selection.stack(selections)
    rows = torch.randn(times * batch, width, generator=draws)
    values = torch.randn(times * batch, k, generator=draws)
    expected = sum(
        selection.sum_rows(row, value)
        for selection, row, value in zip(selections, rows.split(batch), values.split(batch), strict=True)
    )
    torch.testing.assert_close(stacked.sum_rows(rows, values), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        stacked.sum_values(values), torch.zeros(latents).index_add(0, stacked.indices.reshape(-1), values.reshape(-1))
    )


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
