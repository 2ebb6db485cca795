"""Sums per latent over the rows that chose it, found by the inverse index: no atomics, the same bits every time."""

# No type tells what Triton makes of a function.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows that are in flight together; a latent that every row chooses is a long loop over them.
ENTRIES_AT_ONCE = 8
VALUES_AT_ONCE = 64
COLUMNS = 256


@triton.jit
def sum_of_entries(
    rows,
    coefficients,
    order,
    first,
    last,
    batch,
    k,
    width,
    column,
    inside,
    CODES: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
):
    """[COLUMN_TILE]: the sum over a latent's entries, first to last, and over the codes, of coefficient * row."""
    total = tl.zeros([COLUMN_TILE], tl.float32)
    for start in range(first * CODES, last * CODES, ENTRIES):
        number = start + tl.arange(0, ENTRIES)
        present = number < last * CODES
        entry = tl.load(order + number // CODES, mask=present, other=0)
        code = number % CODES
        coefficient = tl.load(coefficients + code * batch * k + entry, mask=present, other=0.0).to(tl.float32)
        row = code * batch + entry // k
        tile = tl.load(
            rows + row[:, None] * width + column[None, :], mask=present[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(coefficient[:, None] * tile, axis=0)
    return total


@triton.jit
def rows_per_latent(
    rows,
    coefficients,
    order,
    offsets,
    out,
    batch,
    k,
    width,
    CODES: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    ADD: tl.constexpr,
):
    """One latent and one block of columns of `sum_rows`."""
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMN_TILE + tl.arange(0, COLUMN_TILE)
    inside = column < width
    first, last = tl.load(offsets + latent), tl.load(offsets + latent + 1)
    total = sum_of_entries(
        rows, coefficients, order, first, last, batch, k, width, column, inside, CODES, ENTRIES, COLUMN_TILE
    )
    place = out + latent * width + column
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total, mask=inside)


@triton.jit
def values_per_latent(values, order, offsets, out, ENTRIES: tl.constexpr):
    """One latent of `sum_values`."""
    latent = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + latent), tl.load(offsets + latent + 1)
    total = tl.zeros([ENTRIES], tl.float32)
    for start in range(first, last, ENTRIES):
        number = start + tl.arange(0, ENTRIES)
        present = number < last
        entry = tl.load(order + number, mask=present, other=0)
        total += tl.load(values + entry, mask=present, other=0.0).to(tl.float32)
    tl.store(out + latent, tl.sum(total, axis=0))


def sum_rows(rows: Tensor, values: Tensor, order: Tensor, offsets: Tensor, added_to: Tensor | None = None) -> Tensor:
    """Return [N, d]: for each latent, the rows [P, batch, d] that chose it, weighted by values [P, batch, k].

    Args:
        rows: [P, batch, d].
        values: [P, batch, k].
        order: int64 [batch * k], entries sorted by latent.
        offsets: int64 [N + 1], where each latent's entries start.
        added_to: takes the sums on top of what it holds, in place of a new array.
    """
    (codes, batch, width), k, latents = rows.shape, values.shape[2], len(offsets) - 1
    out = torch.empty(latents, width, dtype=rows.dtype, device=rows.device) if added_to is None else added_to
    columns = min(triton.next_power_of_2(width), COLUMNS)
    rows_per_latent[(latents, triton.cdiv(width, columns))](
        rows.contiguous(),
        values.contiguous(),
        order,
        offsets,
        out,
        batch,
        k,
        width,
        codes,
        ENTRIES_AT_ONCE,
        columns,
        added_to is not None,
    )
    return out


def sum_values(values: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Return [N]: for each latent the sum of its values [batch, k]."""
    out = torch.empty(len(offsets) - 1, dtype=values.dtype, device=values.device)
    values_per_latent[(len(out),)](values.contiguous(), order, offsets, out, VALUES_AT_ONCE, num_warps=1)
    return out
