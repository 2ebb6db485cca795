"""Every kernel beside torch's operators on a small example, before a run relies on it."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparc_hf.model.sparse_ops import GradientTerm, Selection, decode_errors, dots_with_atoms, top_k, unit_norm_
from sparc_hf.training.gpu.operators import (
    adam_step,
    decode_residuals,
    dots,
    sum_rows,
    sum_values,
    top_k_of_sum,
    transpose,
)

# Of what is compared; the sums are of a few hundred numbers of about 1, in float32.
TOLERANCE = 1e-4
# A selection in two stages, a width that fills no block, latents that nobody selects.
ROWS, WIDE, LATENTS, WIDTH, K, CODES = 6, 9001, 20, 37, 5, 3
# Adam's usual 1e-8 would make a whole step of a gradient that is rounding and nothing else.
EPS = 1e-2


def kernels_that_differ(device: torch.device | str) -> list[str]:
    """Return the names of the kernels whose results are not those of torch's operators, none if all is well.

    Raises:
        Whatever Triton raises where it cannot compile or start them.
    """
    draws = torch.Generator().manual_seed(0)
    preactivations, rows, atoms, values = (
        torch.randn(*shape, generator=draws).to(device)
        for shape in ((ROWS, WIDE), (CODES, ROWS, WIDTH), (LATENTS, WIDTH), (CODES, ROWS, K))
    )
    selection = Selection(top_k([preactivations[:, :LATENTS]], K)[0], LATENTS)
    inverse = transpose(selection.indices.reshape(-1), LATENTS)
    checks: dict[str, Callable[[], bool]] = {
        "top-k": lambda: torch.equal(top_k_of_sum([preactivations], K), top_k([preactivations], K)[0]),
        "inverse index": lambda: all(map(torch.equal, inverse, selection.transposed)),
        "residuals": lambda: _residuals_agree(values, atoms, rows[0], selection),
        "dots": lambda: _are_close(
            dots(rows[0], atoms, selection.indices), dots_with_atoms(selection.indices, atoms, rows[0])
        ),
        "row sums": lambda: _are_close(sum_rows(rows, values, *inverse), selection.sum_rows(rows, values)),
        "value sums": lambda: _are_close(sum_values(values[0], *inverse), selection.sum_values(values[0])),
        "Adam": lambda: _adam_agrees(atoms, GradientTerm(selection, values, rows)),
    }
    return [name for name, agrees in checks.items() if not agrees()]


def _residuals_agree(values: Tensor, atoms: Tensor, targets: Tensor, selection: Selection) -> bool:
    with torch.enable_grad():
        wanted = values.clone().requires_grad_()
        errors, residuals = decode_errors(wanted, atoms, targets.new_zeros(WIDTH), targets, targets, selection)
        (gradients,) = torch.autograd.grad(errors.sum() / 2, wanted)
    of_kernel = decode_residuals(values, atoms, selection.indices, targets)
    return all(map(_are_close, of_kernel, (residuals, errors, gradients)))


def _adam_agrees(atoms: Tensor, term: GradientTerm) -> bool:
    of_torch, of_kernel = torch.nn.Parameter(atoms.clone()), atoms.clone()
    moments, step = (torch.zeros_like(atoms), torch.zeros_like(atoms)), torch.ones((), device=atoms.device)
    optimizer = torch.optim.Adam([of_torch], lr=0.1, eps=EPS, fused=True)
    of_torch.grad = term.dense()
    with torch.no_grad():
        unit_norm_(of_torch, of_torch.grad)
        optimizer.step()
    inverse = term.selection.transposed
    factors = (step, True, 0.9, 0.999, 0.1, EPS)
    adam_step(of_kernel, *moments, [term.coefficients], [term.rows], [inverse[0]], [inverse[1]], *factors)
    state = optimizer.state[of_torch]
    of_state = (state["exp_avg"], state["exp_avg_sq"])
    return _are_close(of_kernel, of_torch) and all(map(_are_close, moments, of_state))


def _are_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=TOLERANCE, atol=TOLERANCE)
