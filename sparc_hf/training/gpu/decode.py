"""Decode, squared error and the values' gradients of all codes of a row, in one program that reads an atom once."""

# No type tells what Triton makes of a function.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparc_hf.model.sparse_ops import row_energy

# Numbers of atoms that a program of 128 threads holds in registers: 32 in each thread. Twice as many do not fit where
# the width is no multiple of 16.
ATOM_NUMBERS = 4096
MOST_K = 1024
DOTS_AT_ONCE = 32
WARPS = 4


@triton.jit
def residuals_of_row(
    values,
    atoms,
    indices,
    targets,
    residuals,
    errors,
    dots,
    batch,
    k,
    width,
    CODES: tl.constexpr,
    CODE_TILE: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """For a row and every code: r = D^T z - target, |r|^2 and <D_j, r>, in float32.

    A block of columns of the row's atoms is held while every code is decoded and its residual multiplied with them.
    """
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    code = tl.arange(0, CODE_TILE)
    is_entry = entry < k
    latent = tl.load(indices + row * k + entry, mask=is_entry, other=0).to(tl.int64)
    error = tl.zeros([CODE_TILE], tl.float32)
    products = tl.zeros([CODE_TILE, ENTRIES], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        atom = tl.load(
            atoms + latent[:, None] * width + column[None, :], mask=is_entry[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        target = tl.load(targets + row * width + column, mask=inside, other=0.0).to(tl.float32)
        for at in tl.static_range(CODES):
            code_row = at * batch + row
            value = tl.load(values + code_row * k + entry, mask=is_entry, other=0.0).to(tl.float32)
            left = tl.sum(value[:, None] * atom, axis=0) - target
            tl.store(residuals + code_row * width + column, left, mask=inside)
            error += tl.where(code == at, tl.sum(left * left, axis=0), 0.0)
            product = tl.sum(atom * left[None, :], axis=1)
            products += tl.where((code == at)[:, None], product[None, :], 0.0)
    code_rows = code.to(tl.int64) * batch + row
    is_code = code < CODES
    tl.store(errors + code_rows, error, mask=is_code)
    tl.store(dots + code_rows[:, None] * k + entry[None, :], products, mask=is_code[:, None] & is_entry[None, :])


@triton.jit
def dots_of_row(rows, atoms, indices, out, k, width, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """The products of a row with ENTRIES of its atoms, in float32."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = entry < k
    latent = tl.load(indices + row * k + entry, mask=is_entry, other=0).to(tl.int64)
    product = tl.zeros([ENTRIES], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        atom = tl.load(
            atoms + latent[:, None] * width + column[None, :], mask=is_entry[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        part = tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
        product += tl.sum(atom * part[None, :], axis=1)
    tl.store(out + row * k + entry, product, mask=is_entry)


def dots(rows: Tensor, atoms: Tensor, indices: Tensor) -> Tensor:
    """Return [batch, k]: the products of each row [batch, d] with its atoms, those of [N, d] at indices [batch, k]."""
    (batch, k), width = indices.shape, atoms.shape[1]
    out = torch.empty(batch, k, dtype=atoms.dtype, device=atoms.device)
    columns = min(triton.next_power_of_2(width), ATOM_NUMBERS // DOTS_AT_ONCE)
    dots_of_row[(batch, triton.cdiv(k, DOTS_AT_ONCE))](
        rows.contiguous(),
        atoms.contiguous(),
        indices.contiguous(),
        out,
        k,
        width,
        DOTS_AT_ONCE,
        columns,
        num_warps=WARPS,
    )
    return out


def decode_residuals(values: Tensor, atoms: Tensor, indices: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return residuals [P, batch, d], their squares' sums [P, batch], and their products with the atoms [P, batch, k].

    Args:
        values: [P, batch, k].
        atoms: [N, d].
        indices: int64 [batch, k].
        targets: [batch, d].

    Sums are made in float32; residuals are returned in the atoms' dtype, the rest in float32.
    """
    (codes, batch, k), width = values.shape, atoms.shape[1]
    if k > MOST_K:
        return _with_torch(values, atoms, indices, targets)
    residuals = torch.empty(codes, batch, width, dtype=atoms.dtype, device=atoms.device)
    errors = torch.empty(codes, batch, dtype=torch.float32, device=atoms.device)
    products = torch.empty(codes, batch, k, dtype=torch.float32, device=atoms.device)
    entries = triton.next_power_of_2(k)
    columns = min(triton.next_power_of_2(width), max(8, ATOM_NUMBERS // entries))
    residuals_of_row[(batch,)](
        values.contiguous(),
        atoms.contiguous(),
        indices.contiguous(),
        targets.contiguous(),
        residuals,
        errors,
        products,
        batch,
        k,
        width,
        codes,
        triton.next_power_of_2(codes),
        entries,
        columns,
        num_warps=WARPS,
    )
    return residuals, errors, products


def _with_torch(values: Tensor, atoms: Tensor, indices: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    decoded = [F.embedding_bag(indices, atoms, mode="sum", per_sample_weights=code) for code in values.to(atoms.dtype)]
    residuals = torch.stack(decoded) - targets
    products = torch.stack([dots(code, atoms, indices) for code in residuals])
    return residuals, row_energy(residuals.float()), products.float()
