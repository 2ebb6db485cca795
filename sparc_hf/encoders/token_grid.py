"""Patch tokens on another grid, so that the tokens of several backbones stand for the same places."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import interpolate


def resample_tokens(tokens: Tensor, grid: Sequence[int], to: Sequence[int]) -> Tensor:
    """Resample patch tokens to another grid, bilinearly and antialiased, as USAE does (arXiv 2502.03714).

    Pixel centres are at half steps; where the grid shrinks the triangle filter widens with the scale.

    Args:
        tokens: float [batch, grid rows * grid columns, hidden], the grid row by row, without prefix tokens.
        grid: rows and columns of the tokens.
        to: rows and columns to make.

    Returns:
        [batch, to rows * to columns, hidden]; `tokens` itself where nothing changes.

    Raises:
        ValueError: if the tokens do not fill `grid`.
    """
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"{list(tokens.shape)} tokens do not fill a grid of {grid[0]} x {grid[1]}")
    if tuple(grid) == tuple(to):
        return tokens
    image = tokens.unflatten(1, (grid[0], grid[1])).permute(0, 3, 1, 2)
    resampled = interpolate(image, size=(to[0], to[1]), mode="bilinear", antialias=True, align_corners=False)
    return resampled.flatten(2).transpose(1, 2).contiguous()
