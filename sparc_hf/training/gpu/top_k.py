"""Exact top-k that reads a row once: the k blocks whose maxima are largest hold the k largest numbers.

Numbers are compared as integers: the number's place among all floats, then the lower index. In that order no two are
equal, so k blocks are enough whatever values repeat, and the result does not depend on how the work is divided.
"""

# No type tells what Triton makes of a function.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_hf.model.sparse_ops import sum_of
from sparc_hf.model.top_k import largest

LOWEST_KEY = tl.constexpr(-(2**31))
LOWEST_PLACE = tl.constexpr(-(2**63))
# What a program holds in registers: 32 places of 64 bits in each of 256 threads.
MOST_PLACES = 8192
MOST_K = 512
NUMBERS_AT_ONCE = 4096
WARPS = 8


@triton.jit
def order_keys(values):
    """int32 in the order of the floats; NaN of either sign above everything, both zeros equal."""
    values = values.to(tl.float32)
    bits = values.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = tl.where(values == 0.0, 0, keys)
    return tl.where(values != values, 0x7FFFFFFF, keys)


@triton.jit
def block_maxima(values, maxima, latents, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Keys of the largest value of each block of BLOCK latents: [batch, latents] -> int32 [batch, blocks]."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    latent = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    present = latent < latents
    keys = order_keys(tl.load(values + row * latents + latent, mask=present, other=0.0))
    largest_keys = tl.max(tl.where(present, keys, LOWEST_KEY), axis=1)
    tl.store(maxima + row * blocks + block, largest_keys, mask=block < blocks)


@triton.jit
def store_largest(places, out, k):
    """Write the indices of the k highest places, the highest first; places are key * 2^32 - index."""
    for rank in range(k):
        best = tl.max(places, axis=0)
        tl.store(out + rank, (0 - best) & 0xFFFFFFFF)
        places = tl.where(places == best, LOWEST_PLACE, places)


@triton.jit
def largest_blocks(maxima, out, blocks, k, PLACES: tl.constexpr):
    """The k blocks of the largest maxima: int32 [batch, blocks] -> int64 [batch, k]."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, PLACES)
    present = block < blocks
    keys = tl.load(maxima + row * blocks + block, mask=present, other=0).to(tl.int64)
    store_largest(tl.where(present, (keys << 32) - block, LOWEST_PLACE), out + row * k, k)


@triton.jit
def largest_latents(
    values, chosen, out, latents, k, BLOCK: tl.constexpr, PLACES: tl.constexpr, IN_BLOCKS: tl.constexpr
):
    """The k largest of a row's chosen blocks, or with IN_BLOCKS False of the whole row: int64 [batch, k]."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    if IN_BLOCKS:
        block = tl.load(chosen + row * k + place // BLOCK, mask=place // BLOCK < k, other=0)
        latent = block * BLOCK + place % BLOCK
        present = (place // BLOCK < k) & (latent < latents)
    else:
        latent = place.to(tl.int64)
        present = latent < latents
    keys = order_keys(tl.load(values + row * latents + latent, mask=present, other=0.0)).to(tl.int64)
    store_largest(tl.where(present, (keys << 32) - latent, LOWEST_PLACE), out + row * k, k)


def block_size(latents: int, k: int) -> int:
    """Return the power of two that makes blocks and the numbers in k of them about equally many."""
    block = 1
    while block * block * k < latents:
        block *= 2
    return block


def top_k_of_sum(parts: list[Tensor], k: int) -> Tensor:
    """Return int64 [batch, k]: the k largest of the sum of several [batch, N], the lower index first among equals."""
    values = sum_of(parts).contiguous()
    latents = values.shape[1]
    if k > MOST_K or values.dtype == torch.float64:
        return largest(values, k)
    if latents <= MOST_PLACES:
        return of_rows(values, k)
    block = block_size(latents, k)
    fits = max(triton.cdiv(latents, block), triton.next_power_of_2(k) * block) <= 2 * MOST_PLACES
    return of_blocks(values, k, block) if fits else largest(values, k)


def of_rows(values: Tensor, k: int) -> Tensor:
    """Return the k largest of rows [batch, N] that a program holds whole."""
    batch, latents = values.shape
    out = torch.empty(batch, k, dtype=torch.int64, device=values.device)
    places = triton.next_power_of_2(latents)
    largest_latents[(batch,)](values, out, out, latents, k, 1, places, False, num_warps=WARPS)
    return out


def of_blocks(values: Tensor, k: int, block: int) -> Tensor:
    """Return the k largest of rows [batch, N] by the maxima of at least k blocks."""
    batch, latents = values.shape
    blocks = triton.cdiv(latents, block)
    out = torch.empty(batch, k, dtype=torch.int64, device=values.device)
    maxima, chosen = torch.empty(batch, blocks, dtype=torch.int32, device=values.device), torch.empty_like(out)
    at_once = max(1, NUMBERS_AT_ONCE // block)
    block_maxima[(batch, triton.cdiv(blocks, at_once))](values, maxima, latents, blocks, block, at_once)
    largest_blocks[(batch,)](maxima, chosen, blocks, k, triton.next_power_of_2(blocks), num_warps=WARPS)
    places = triton.next_power_of_2(k) * block
    largest_latents[(batch,)](values, chosen, out, latents, k, block, places, True, num_warps=WARPS)
    return out
