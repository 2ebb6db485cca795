"""The encoder of Universal Sparse Autoencoders: a linear map with a batch norm (arXiv 2502.03714)."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def usae_preactivations(rows: Tensor, encoder: nn.Linear, norm: nn.BatchNorm1d, group: Any = None) -> Tensor:
    """Return q = max(0, BatchNorm(W x + c)), [batch, N], of rows x [batch, d]; see `usae_encoder`."""
    if not norm.training:
        return norm(encoder(rows)).relu()
    return F.linear(rows, *usae_encoder(rows, encoder, norm, group)).relu()


def usae_encoder(rows: Tensor, encoder: nn.Linear, norm: nn.BatchNorm1d, group: Any = None) -> tuple[Tensor, Tensor]:
    """Return weight [N, d] and bias [N] whose product with rows x [batch, d] is BatchNorm(W x + c).

    In training the batch norm uses, and keeps, the statistics of the rows of all processes of `group`; otherwise those
    it has kept. They come from the rows' own, E h = W E x + c and Var h_i = <W_i, Cov(x) W_i>, so that nothing
    [batch, N] is made. Added up over processes, the gradients are those of the summed loss.

    Raises:
        ValueError: for a training step of one row, which has no variance.
    """
    # The product with the covariance would lose the digits of a small variance.
    with torch.autocast(rows.device.type, enabled=False):
        if norm.training:
            mean, variance = _statistics(rows, encoder, norm, group)
        else:
            mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale = norm.weight * (variance + norm.eps).rsqrt()
        return encoder.weight * scale.unsqueeze(1), norm.bias + scale * (encoder.bias - mean)


def _statistics(rows: Tensor, encoder: nn.Linear, norm: nn.BatchNorm1d, group: Any) -> tuple[Tensor, Tensor]:
    """Return mean and variance of W x + c, both [N], over the rows of all processes, and keep them in the norm."""
    if group is None and len(rows) < 2:
        raise ValueError("batch norm needs at least two rows in a training step, but this one has 1")
    count = _sum_of_processes(rows.new_tensor(float(len(rows))), group)
    mean_row = _sum_of_processes(rows.sum(dim=0), group) / count
    centered = rows - mean_row
    covariance = _sum_of_processes(centered.t() @ centered, group) / count
    mean = F.linear(mean_row, encoder.weight, encoder.bias)
    variance = torch.linalg.vecdot(encoder.weight @ covariance, encoder.weight)
    with torch.no_grad():
        unbiased = variance * (count / (count - 1).clamp(min=1))
        for kept, seen in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            cast(Tensor, kept).lerp_(seen, cast(float, norm.momentum))
        cast(Tensor, norm.num_batches_tracked).add_(1)
    return mean, variance


def _sum_of_processes(value: Tensor, group: Any) -> Tensor:
    if group is None:
        return value
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(value, group=group)
