"""The k largest of every row, the lower index first among equals, without sorting or copying whole rows."""

import torch
from torch import Tensor

# Below, torch's own selection is as fast (docs/performance.md).
WORTH_GROUPING = 16384
WIDE = 65536


def largest(values: Tensor, k: int) -> Tensor:
    """Return int64 [batch, k]: where values [batch, N] are largest, largest first, the lower index among equals.

    NaN counts as larger than everything, as in `torch.topk`.
    """
    if values.device.type == "cpu":
        return _on_cpu(values, k)
    if values.dtype == torch.float64:
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k].contiguous()
    return _in_blocks(values, k)


def _on_cpu(values: Tensor, k: int) -> Tensor:
    """Take torch's selection where no two of the k + 1 largest are equal, and sort what is large in the other rows."""
    count = min(k + 1, values.shape[1])
    size = 16 if values.shape[1] >= WIDE else 8
    grouped = values.shape[1] >= WORTH_GROUPING and 2 * size * count <= values.shape[1]
    best, indices = _of_groups(values, count, size) if grouped else values.topk(count, dim=1)
    # Largest first, so that NaN, which equals nothing, is at the front of its row.
    repeats = ((best[:, 1:] == best[:, :-1]) | best[:, :-1].isnan()).any(dim=1).nonzero().squeeze(1)
    indices = indices[:, :k].contiguous()
    if len(repeats):
        for rows in repeats.split(max(1, 2**22 // values.shape[1])):
            indices[rows] = _stable(values[rows], k)
    return indices


def _of_groups(values: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest values and their indices: they lie in the groups of the `count` largest maxima.

    A group is every (N / size)-th number, so that the maxima of neighbouring groups are taken together.
    """
    batch, latents = values.shape
    groups = latents // size
    maxima = values[:, : groups * size].unflatten(1, (size, groups)).amax(dim=1)
    of_best = maxima.topk(count, dim=1, sorted=False).indices.unsqueeze(1)
    inside = (of_best + torch.arange(0, groups * size, groups).view(1, -1, 1)).flatten(1)
    left_over = torch.arange(groups * size, latents).expand(batch, -1)
    candidates = torch.cat([inside, left_over], dim=1)
    best, at = values.gather(1, candidates).topk(count, dim=1)
    return best, candidates.gather(1, at)


def _stable(values: Tensor, k: int) -> Tensor:
    """Sort, in every row, what is not below the k-th largest, in the order of the indices."""
    batch, latents = values.shape
    bound = values.topk(k, dim=1).values[:, -1:]
    # NaN is below nothing.
    flat = (values < bound).logical_not_().flatten().nonzero().squeeze(1)
    rows = flat // latents
    counts = rows.bincount(minlength=batch)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(flat)) - first[rows]
    candidates = values.new_full((batch, int(counts.max())), -torch.inf)
    indices = torch.full(candidates.shape, latents)
    candidates[rows, place], indices[rows, place] = values.flatten()[flat], flat - rows * latents
    # What fills up short rows is no larger than anything and comes after it.
    order = candidates.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return indices.gather(1, order)


def _in_blocks(values: Tensor, k: int) -> Tensor:
    """Take the k blocks whose maxima are largest, then the k largest in them; nothing waits for the device.

    Numbers are compared by their place: their order as floats, then the lower index. No two places are equal.
    """
    latents = values.shape[1]
    block = 1
    while block * block * k < latents:
        block *= 2
    blocks = -(-latents // block)
    if blocks * block > latents:
        values = torch.nn.functional.pad(values, (0, blocks * block - latents), value=-torch.inf)
    maxima = values.unflatten(1, (blocks, block)).amax(dim=2)
    chosen = _places(maxima, torch.arange(blocks, device=values.device)).topk(min(k, blocks), dim=1).indices
    candidates = (chosen.unsqueeze(2) * block + torch.arange(block, device=values.device)).flatten(1)
    at = _places(values.gather(1, candidates), candidates).topk(k, dim=1).indices
    return candidates.gather(1, at)


def _places(values: Tensor, indices: Tensor) -> Tensor:
    """Return int64 numbers in the order of the values, NaN above everything, and among equals of falling index."""
    bits = values.float().view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = keys.masked_fill(values == 0, 0).masked_fill(values.isnan(), 0x7FFFFFFF)
    return (keys.long() << 32) - indices
