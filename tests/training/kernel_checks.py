"""Triton's kernels beside torch's operators; `test_gpu_kernels.py` runs this file in a process of its own.

With TRITON_INTERPRET=1 the kernels run on the CPU, with SPARC_KERNELS_ON=cuda on a GPU.
"""

import contextlib
import os
from unittest import mock

import pytest
import torch
from conftest import random_features, tiny_model, torch_operators_only
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_hf.model import sparse_ops
from sparc_hf.model.sparse_ops import GradientTerm, Selection, decode_errors, gather_preactivations, unit_norm_
from sparc_hf.training import optimizer
from sparc_hf.training.gpu import adam, check, decode, operators, row_sums
from sparc_hf.training.gpu import top_k as selecting
from sparc_hf.training.optimizer import SparcAdam
from sparc_hf.training.step_kernel import load_gpu_kernels

DEVICE = os.environ.get("SPARC_KERNELS_ON", "cpu")
operators.register()
# Sums of some tens of numbers of about 1, in float32 in another order: 1e-5 is about 80 roundings of the largest.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# A result that is stored as bfloat16 is rounded to 8 bits once; everything before is float32. The interpreter cuts the
# other bits off, where a GPU rounds to the nearest.
CLOSE_IN_BFLOAT16 = {"rtol": 2**-7 if DEVICE == "cpu" else 2**-8, "atol": 1e-5}
examples = settings(deadline=None, max_examples=15, derandomize=True, database=None)


@contextlib.contextmanager
def kernels():
    """Let the package use the kernels, on whatever device they run here."""
    with (
        mock.patch.object(sparse_ops, "gpu_ops", return_value=torch.ops.sparc_hf_gpu),
        mock.patch.object(optimizer, "gpu_ops", return_value=torch.ops.sparc_hf_gpu),
    ):
        yield


@contextlib.contextmanager
def torch_only():
    """Let the package use torch's operators."""
    with (
        mock.patch.object(sparse_ops, "gpu_ops", return_value=None),
        mock.patch.object(optimizer, "gpu_ops", return_value=None),
        torch_operators_only(),
    ):
        yield


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def stable_top_k(values: torch.Tensor, k: int) -> torch.Tensor:
    return values.cpu().sort(dim=1, descending=True, stable=True).indices[:, :k]


SPECIAL = [float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0]
kinds = st.sampled_from(["random", "rounded", "special", "equal", "hardly finite"])


def rows_of(kind: str, batch: int, latents: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    values = drawn(batch, latents, seed=seed)
    draws = torch.Generator().manual_seed(seed)
    if kind == "rounded":
        values = values.round()
    elif kind == "special":
        places = torch.randint(0, 2 * len(SPECIAL), (batch, latents), generator=draws).to(DEVICE)
        special = torch.tensor(SPECIAL, device=DEVICE)
        values = torch.where(places < len(SPECIAL), special[places % len(SPECIAL)], values)
    elif kind == "equal":
        values = torch.full_like(values, 0.25)
    elif kind == "hardly finite":
        values[:, torch.rand(latents, generator=draws).to(DEVICE) < 0.95] = -torch.inf
    return values.to(dtype)


@examples
@given(
    kind=kinds,
    batch=st.integers(1, 3),
    latents=st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_top_k_of_a_row_held_whole(kind, batch, latents, dtype, seed, data):
    k = data.draw(st.sampled_from([1, latents]) | st.integers(1, latents))
    values = rows_of(kind, batch, latents, seed, dtype)
    assert torch.equal(selecting.of_rows(values, k).cpu(), stable_top_k(values, k))


@examples
@given(
    kind=kinds,
    batch=st.integers(1, 3),
    latents=st.integers(40, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    k=st.integers(1, 9),
    block=st.sampled_from([2, 4]),
    seed=st.integers(0, 999),
)
def test_top_k_by_blocks(kind, batch, latents, dtype, k, block, seed):
    values = rows_of(kind, batch, latents, seed, dtype)
    with mock.patch.object(selecting, "NUMBERS_AT_ONCE", 64):  # several programs a row
        assert torch.equal(selecting.of_blocks(values, k, block).cpu(), stable_top_k(values, k))


@pytest.mark.parametrize(("latents", "k"), [(9000, 3), (700, 600), (20000, 64)])
def test_top_k_of_a_sum_in_every_size(latents, k):
    """By blocks, with more than a program takes, and with the sizes of a real step."""
    parts = [drawn(2, latents, seed=seed).round(decimals=1) for seed in range(3)]
    indices = torch.ops.sparc_hf_gpu.top_k_of_sum(parts, k)
    assert torch.equal(indices.cpu(), stable_top_k(parts[0] + parts[1] + parts[2], k))


# codes, batch, latents, width, k: one of each; widths that fill no block, or several; k = N; more codes than three.
SHAPES = [(1, 1, 1, 1, 1), (3, 4, 30, 37, 5), (2, 3, 40, 300, 33), (1, 2, 6, 16, 6), (5, 3, 20, 10, 1)]


@pytest.mark.parametrize("most_k", [decode.MOST_K, 0])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_errors_forward_and_backward(shape, most_k):
    codes, batch, latents, width, k = shape
    selection = Selection(drawn(batch, latents).topk(k, dim=1).indices, latents)
    sizes = ((codes, batch, k), (latents, width), (width,), (batch, width))
    tensors = [drawn(*size, seed=number) for number, size in enumerate(sizes)]
    weights = drawn(codes, batch, seed=9)

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        values, atoms, pre_bias, rows = (tensor.to(dtype).requires_grad_() for tensor in tensors)
        with mock.patch.object(decode, "MOST_K", most_k):
            found = decode_errors(values, atoms, pre_bias, rows, (rows - pre_bias).detach(), selection)
            gradients = torch.autograd.grad((found[0] * weights).sum(), [values, atoms, pre_bias, rows])
        return [*found, *gradients]

    with kernels():
        mine = results(torch.float32)
    with torch_only():
        reference = results(torch.float64)
    for one, other in zip(mine, reference, strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double() / scale, other / scale, **CLOSE)


def test_decode_of_bfloat16_adds_up_in_float32():
    selection = Selection(drawn(4, 30).topk(9, dim=1).indices, 30)
    values, atoms, targets = (
        drawn(*shape, seed=seed, dtype=torch.bfloat16) for seed, shape in enumerate([(3, 4, 9), (30, 37), (4, 37)])
    )
    residuals, errors, dots = torch.ops.sparc_hf_gpu.residuals(values, atoms, selection.indices, targets)
    with torch_only():
        rows = targets.float()
        wanted = values.float().requires_grad_()
        exact, left = decode_errors(wanted, atoms.float(), torch.zeros_like(rows[0]), rows, rows, selection)
        (gradient,) = torch.autograd.grad(exact.sum() / 2, wanted)
    assert (residuals.dtype, errors.dtype, dots.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(residuals.float(), left, **CLOSE_IN_BFLOAT16)
    torch.testing.assert_close(errors, exact.detach(), **CLOSE)
    torch.testing.assert_close(dots, gradient, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("latents", "width", "k"), [(1, 1, 1), (90, 300, 70)])
def test_dots_with_atoms(latents, width, k, dtype):
    indices = drawn(3, latents).topk(k, dim=1).indices
    rows, atoms = drawn(3, width, seed=1, dtype=dtype), drawn(latents, width, seed=2, dtype=dtype)
    found = torch.ops.sparc_hf_gpu.dots(rows, atoms, indices)
    expected = (atoms.double()[indices] * rows.double().unsqueeze(1)).sum(dim=2)
    assert found.dtype == dtype
    close = CLOSE if dtype == torch.float32 else CLOSE_IN_BFLOAT16
    torch.testing.assert_close(found.double(), expected, rtol=close["rtol"], atol=1e-4)


def chosen(batch: int, latents: int, k: int) -> Selection:
    """Latent 1 in every row, many latents in none."""
    indices = torch.stack([torch.randperm(latents // 2, generator=torch.Generator().manual_seed(row))[:k] + 2
                           for row in range(batch)])  # fmt: skip
    indices[:, 0] = 1
    return Selection(indices.to(DEVICE), latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 4, 1), (3, 30, 37, 12, 5), (2, 9, 300, 16, 6)])
def test_row_and_value_sums(shape, dtype):
    codes, batch, width, latents, k = shape
    selection = chosen(batch, latents, k)
    rows, values = drawn(codes, batch, width, dtype=dtype), drawn(codes, batch, k, seed=1, dtype=dtype)
    with kernels():
        sums, again = selection.sum_rows(rows, values), selection.sum_rows(rows, values)
        of_values = selection.sum_values(values[0])
    with torch_only():
        selection = Selection(selection.indices, latents)
        expected = selection.sum_rows(rows.double(), values.double())
        expected_values = selection.sum_values(values[0].double())
    close = CLOSE if dtype == torch.float32 else CLOSE_IN_BFLOAT16
    assert sums.dtype == dtype
    assert torch.equal(sums, again)
    assert not sums[0].any()  # nobody selected it
    torch.testing.assert_close(sums.double(), expected, **close)
    torch.testing.assert_close(of_values.double(), expected_values, **close)
    added = torch.ones(latents, width, device=DEVICE)
    row_sums.sum_rows(rows, values, *selection.transposed, added)
    torch.testing.assert_close(added.double(), expected + 1, **CLOSE)


def test_the_inverse_index_is_torchs():
    selection = chosen(30, 40, 5)
    with torch_only():
        expected = selection.transposed
    assert all(map(torch.equal, torch.ops.sparc_hf_gpu.transpose(selection.indices.reshape(-1), 40), expected))


def test_encoder_gradients():
    selection = chosen(6, 40, 5)
    tensors = [drawn(*shape, seed=seed) for seed, shape in enumerate([(6, 11), (40, 11), (40,), (11,)])]
    weights = drawn(6, 5, seed=7)

    def gradients() -> list[torch.Tensor]:
        rows, weight, bias, pre_bias = (tensor.clone().requires_grad_() for tensor in tensors)
        centered = (rows - pre_bias).detach()
        gathered = (centered @ weight.T + bias).detach().gather(1, selection.indices)
        found = gather_preactivations(rows, weight, bias, pre_bias, centered, gathered, selection)
        return list(torch.autograd.grad((found * weights).sum(), [rows, weight, bias, pre_bias]))

    with kernels():
        mine = gradients()
    with torch_only():
        reference = gradients()
    for one, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize(
    ("terms", "dtype", "steps"),
    [(1, torch.float32, 1), (2, torch.float32, 4), (4, torch.float32, 70000), (2, torch.bfloat16, 4)],
)
def test_adam_is_torchs_after_adding_up(unit_norm, terms, dtype, steps):
    latents, width = 12, 37
    start, first, second = (
        drawn(latents, width, dtype=dtype),
        drawn(latents, width, seed=1),
        drawn(latents, width, seed=2),
    )
    second = second.square()
    parts = [
        GradientTerm(
            chosen(batch, latents, 5), drawn(batch % 3 + 1, batch, 5, seed=batch), drawn(batch % 3 + 1, batch, width)
        )
        for batch in range(4, 4 + terms)
    ]
    first, second = first.to(dtype), second.to(dtype)
    mine, moments = start.clone(), (first.clone(), second.clone())
    inverse = [term.selection.transposed for term in parts]
    with kernels():
        torch.ops.sparc_hf_gpu.adam_step(
            mine,
            *moments,
            [term.coefficients for term in parts],
            [term.rows for term in parts],
            [order for order, _ in inverse],
            [offsets for _, offsets in inverse],
            torch.tensor(float(steps), device=DEVICE),
            unit_norm,
            0.9,
            0.999,
            1e-2,
            1e-8,
        )
    # In double, from the numbers that the kernel was given.
    reference = torch.nn.Parameter(start.double())
    with torch_only(), torch.no_grad():
        reference.grad = sum(
            Selection(term.selection.indices, latents).sum_rows(term.rows.double(), term.coefficients.double())
            for term in parts
        )
        if unit_norm:
            unit_norm_(reference, reference.grad)
        plain = torch.optim.Adam([reference], lr=1e-2)
        plain.state[reference] = {
            "step": torch.tensor(float(steps - 1)),
            "exp_avg": first.double(),
            "exp_avg_sq": second.double(),
        }
        plain.step()
    close = CLOSE if dtype == torch.float32 else CLOSE_IN_BFLOAT16
    torch.testing.assert_close(mine.double(), reference.data, **close)
    torch.testing.assert_close(moments[0].double(), plain.state[reference]["exp_avg"], **close)
    torch.testing.assert_close(moments[1].double(), plain.state[reference]["exp_avg_sq"], **close)


@pytest.mark.parametrize("beta", [0.0, 0.999])
def test_the_first_steps_are_corrected_to_the_last_digits(beta):
    """With a gradient that stays the same every step has the length of the learning rate."""
    selection = Selection(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 1)
    parameter, moments = torch.zeros(1, 1, device=DEVICE), [torch.zeros(1, 1, device=DEVICE) for _ in range(2)]
    one, order, offsets = torch.ones(1, 1, 1, device=DEVICE), *selection.transposed
    for step in range(1, 6):
        count = torch.tensor(float(step), device=DEVICE)
        factors = (count, False, beta, beta, 1.0, 0.0)
        torch.ops.sparc_hf_gpu.adam_step(parameter, *moments, [one], [one], [order], [offsets], *factors)
        assert parameter.item() == pytest.approx(-step, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "as_terms"),
    [({}, True), ({}, False), ({"selection": "local"}, True), ({"auxk": 0, "cross_coef": 0.0}, True)],
)
def test_steps_of_a_model(settings, as_terms):
    """Losses, weights and moments of a few accumulated steps, some latents dead."""

    def trained() -> tuple[list[torch.Tensor], SparcAdam]:
        model = tiny_model(2, num_latents=12, k=3, **{"auxk": 2} | settings).train().to(DEVICE)
        model.finds_dead_on_host = False  # as on a GPU
        model.gradient_terms = {} if as_terms else None
        adam_of_model = SparcAdam(model, lr=1e-2)
        losses = []
        for step in range(2):
            for name in model.config.stream_names:
                getattr(model.steps_since_fired, name)[4:9] = 100
            for part in range(2):  # micro-batches
                rows = {name: x.to(DEVICE) for name, x in random_features(model, 2, seed=2 * step + part).items()}
                loss = model(rows).loss
                loss.backward()
                losses.append(loss.detach())
            adam_of_model.step()
            adam_of_model.zero_grad()
        return [*losses, *(parameter.detach() for parameter in model.parameters())], adam_of_model

    with kernels():
        mine, my_adam = trained()
    with torch_only():
        reference, plain_adam = trained()
    for one, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    pairs = zip(my_adam.param_groups[0]["params"], plain_adam.param_groups[0]["params"], strict=True)
    for one, other in ((my_adam.state[one], plain_adam.state[other]) for one, other in pairs):
        assert one["step"] == other["step"] == 2
        torch.testing.assert_close(one["exp_avg"], other["exp_avg"], **CLOSE)
        torch.testing.assert_close(one["exp_avg_sq"], other["exp_avg_sq"], **CLOSE)


def test_a_parameter_that_cannot_be_updated_in_place_is_an_error():
    with pytest.raises(ValueError, match="expected a contiguous parameter"):
        adam.adam_step(*[drawn(5, 3).t()] * 3, [], [], [], [], torch.ones(()), False, 0.9, 0.999, 1e-3, 1e-8)


def test_wider_rows_than_a_program_takes_are_an_error():
    with mock.patch.object(adam, "MOST_COLUMNS", 36), pytest.raises(ValueError, match="at most 36 numbers, got 37"):
        adam.adam_step(*[drawn(2, 37)] * 3, [], [], [], [], torch.ones(()), False, 0.9, 0.999, 1e-3, 1e-8)


def test_the_check_before_a_run_passes_and_tells_a_wrong_kernel():
    with torch_only():
        assert check.kernels_that_differ(DEVICE) == []
    with torch_only(), mock.patch.object(check, "sum_values", return_value=torch.zeros(check.LATENTS, device=DEVICE)):
        assert check.kernels_that_differ(DEVICE) == ["value sums"]


def test_a_wrong_kernel_is_not_used(caplog):
    with (
        mock.patch.object(torch.ops, "sparc_hf_gpu", object()),
        mock.patch.object(check, "kernels_that_differ", return_value=["top-k"]),
    ):
        assert not load_gpu_kernels(DEVICE)
    assert "['top-k'] differ" in caplog.text


def test_the_operators_are_for_gpus_only():
    assert load_gpu_kernels(DEVICE)
    assert sparse_ops.gpu_ops(torch.zeros(1)) is None
    assert sparse_ops.compiled_ops(torch.zeros(1)) is not torch.ops.sparc_hf_gpu
