"""Adam from gradient terms: a latent's rows are added up, projected and used in the program that moves its row."""

# No type tells what Triton makes of a function.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_hf.model.sparse_ops import NORM_EPS
from sparc_hf.training.gpu.row_sums import sum_of_entries, sum_rows

MOST_COLUMNS = 16384
TILE_NUMBERS = 8192
# Terms that the kernel adds up itself: a step has one, and one more where the auxiliary term is on. Those of streams
# given alone would be the third, and are added up before.
TERMS = 2


@triton.jit
def adam_row(
    parameter,
    average,
    square,
    dense,
    rows,
    coefficients,
    order,
    offsets,
    batch,
    k,
    more_rows,
    more_coefficients,
    more_order,
    more_offsets,
    more_batch,
    more_k,
    step,
    width,
    keep1,
    keep2,
    take1,
    take2,
    log1,
    log2,
    rate,
    eps,
    norm_eps,
    CODES: tl.constexpr,
    MORE_CODES: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
):
    """One latent's row of `adam_step`; MORE_CODES is 0 where there is one term only."""
    latent = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMN_TILE)
    inside = column < width
    place = latent * width + column
    first, last = tl.load(offsets + latent), tl.load(offsets + latent + 1)
    gradient = sum_of_entries(
        rows, coefficients, order, first, last, batch, k, width, column, inside, CODES, ENTRIES, COLUMN_TILE
    )
    if MORE_CODES > 0:
        first, last = tl.load(more_offsets + latent), tl.load(more_offsets + latent + 1)
        gradient += sum_of_entries(
            more_rows,
            more_coefficients,
            more_order,
            first,
            last,
            more_batch,
            more_k,
            width,
            column,
            inside,
            MORE_CODES,
            ENTRIES,
            COLUMN_TILE,
        )
    if HAS_DENSE:
        gradient += tl.load(dense + place, mask=inside, other=0.0).to(tl.float32)
    number = tl.load(parameter + place, mask=inside, other=0.0).to(tl.float32)
    if UNIT_NORM:
        number = number / (tl.sqrt(tl.sum(number * number, axis=0)) + norm_eps)
        gradient -= tl.sum(gradient * number, axis=0) * number
    first_moment = keep1 * tl.load(average + place, mask=inside, other=0.0).to(tl.float32) + take1 * gradient
    second_moment = keep2 * tl.load(square + place, mask=inside, other=0.0).to(tl.float32)
    second_moment += take2 * gradient * gradient
    # 1 - beta^steps, in double: early on the difference has few of float32's digits.
    steps = tl.load(step).to(tl.float64)
    correction1 = (1.0 - tl.exp(steps * log1)).to(tl.float32)
    correction2 = tl.sqrt((1.0 - tl.exp(steps * log2)).to(tl.float32))
    number -= (rate / correction1) * first_moment / (tl.sqrt(second_moment) / correction2 + eps)
    tl.store(parameter + place, number, mask=inside)
    tl.store(average + place, first_moment, mask=inside)
    tl.store(square + place, second_moment, mask=inside)


def adam_step(
    parameter: Tensor,
    average: Tensor,
    square: Tensor,
    coefficients: list[Tensor],
    rows: list[Tensor],
    orders: list[Tensor],
    offsets: list[Tensor],
    step: Tensor,
    unit_norm: bool,
    beta1: float,
    beta2: float,
    rate: float,
    eps: float,
) -> None:
    """Make one Adam update, in place, of a parameter [N, d] whose gradient is the sum of terms.

    Args:
        parameter, average, square: [N, d], the parameter and its two moments.
        coefficients: of each term [P, batch, k]; rows: [P, batch, d].
        orders, offsets: of each term, entries sorted by latent [batch * k] and where each latent's start [N + 1].
        step: 0-dim, this step's number, counted from 1; it is read on the device.
        unit_norm: bring the parameter's rows to unit norm first, and take from the gradient its part along them.
    """
    latents, width = parameter.shape
    if width > MOST_COLUMNS:
        raise ValueError(f"expected rows of at most {MOST_COLUMNS} numbers, got {width}; use `step_kernel` off")
    if not parameter.is_contiguous():
        raise ValueError("expected a contiguous parameter, since its rows are updated in place; use `step_kernel` off")
    dense = None
    for at in range(TERMS, len(rows)):
        # As its sums are only parts of a gradient, they stay in float32.
        if dense is None:
            dense = torch.zeros(latents, width, dtype=torch.float32, device=parameter.device)
        sum_rows(rows[at], coefficients[at], orders[at], offsets[at], dense)
    terms = [
        (rows[at].contiguous(), coefficients[at].contiguous(), orders[at], offsets[at], *coefficients[at].shape[1:])
        for at in range(min(TERMS, len(rows)))
    ]
    columns = triton.next_power_of_2(width)
    adam_row[(latents,)](
        parameter,
        average,
        square,
        parameter if dense is None else dense,
        *terms[0],
        *terms[-1],
        step,
        width,
        beta1,
        beta2,
        1 - beta1,
        1 - beta2,
        _log(beta1),
        _log(beta2),
        rate,
        eps,
        NORM_EPS,
        rows[0].shape[0],
        rows[1].shape[0] if len(rows) > 1 else 0,
        dense is not None,
        unit_norm,
        max(1, min(8, TILE_NUMBERS // columns)),
        columns,
        num_warps=4 if columns <= 2048 else 8,
    )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
