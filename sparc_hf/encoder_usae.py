"""The encoder of Universal Sparse Autoencoders: a linear map with a batch norm (arXiv 2502.03714)."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .sparse_ops import row_dots

# A part of the rows at a time: fresh memory for all of them costs more than their product.
ROWS_AT_ONCE = 512


def usae_preactivations(rows: Tensor, encoder: nn.Linear, norm: nn.BatchNorm1d, latents: Any = slice(None)) -> Tensor:
    """Return BatchNorm(W x + c) of rows x [batch, d] for some latents, [batch, latents], all of them by default.

    The batch norm uses the statistics it has kept, in training mode too, and keeps them as they are.
    """
    hidden = F.linear(rows, encoder.weight[latents], encoder.bias[latents])
    mean, variance = cast(Tensor, norm.running_mean)[latents], cast(Tensor, norm.running_var)[latents]
    return F.batch_norm(hidden, mean, variance, norm.weight[latents], norm.bias[latents], eps=norm.eps)


def usae_encoder(rows: Tensor, encoder: nn.Linear, norm: nn.BatchNorm1d, group: Any = None) -> tuple[Tensor, Tensor]:
    """Return weight [N, d] and bias [N] whose product with rows x [batch, d] is BatchNorm(W x + c).

    In training the batch norm uses, and keeps, the statistics of the rows of all processes of `group`; otherwise those
    it has kept. They come from the rows' own, so that nothing [batch, N] is made. Added up over processes, the
    gradients are those of the summed loss.

    Raises:
        ValueError: for a training step of one row, which has no variance.
    """
    parameters = encoder.weight, encoder.bias, norm.weight, norm.bias
    # Half precision would lose the digits of a small variance.
    with torch.autocast(rows.device.type, enabled=False):
        if not norm.training:
            mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            scale = norm.weight * (variance + norm.eps).rsqrt()
            return encoder.weight * scale.unsqueeze(1), norm.bias + scale * (encoder.bias - mean)
        count, mean_row, covariance = _row_statistics(rows, group)
        weight, bias, mean, variance = _NormalizedEncoder.apply(*parameters, mean_row, covariance, norm.eps)  # pyright: ignore[reportGeneralTypeIssues]
    with torch.no_grad():
        unbiased = variance * (count / (count - 1).clamp(min=1))
        for kept, seen in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            cast(Tensor, kept).lerp_(seen, cast(float, norm.momentum))
        cast(Tensor, norm.num_batches_tracked).add_(1)
    return weight, bias


class _NormalizedEncoder(torch.autograd.Function):
    """W' = s W and b' = beta + s (c - m), where h = W x + c has mean m and variance v and s = gamma / sqrt(v + eps).

    With mu and C the rows' mean and covariance, m = W mu + c and v_i = <W_i, C W_i>. With G and g the gradients of W'
    and b': ds_i = <G_i, W_i> + g_i (c - m)_i, dm = - s g, dv = - s^3 / (2 gamma^2) ds, dW = s G + dm mu^T + 2 dv C W,
    dgamma = ds / sqrt(v + eps), dbeta = g; c cancels out of b', so that its gradient is zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor,
        gain: Tensor,
        shift: Tensor,
        mean_row: Tensor,
        covariance: Tensor,
        eps: float,
    ):
        product = weight @ covariance
        # Rounding may leave less than nothing of a variance of zero.
        variance = row_dots(product, weight).clamp_(min=0)
        mean = torch.mv(weight, mean_row)
        inverse = (variance + eps).rsqrt()
        scale = gain * inverse
        ctx.save_for_backward(weight, gain, mean_row, product, mean, inverse)
        mean_of_preactivations = mean + bias
        ctx.mark_non_differentiable(mean_of_preactivations, variance)
        return weight * scale.unsqueeze(1), shift - scale * mean, mean_of_preactivations, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, gain, mean_row, product, mean, inverse = ctx.saved_tensors
        grad_weight, grad_shift = grad_outputs[:2]
        scale = gain * inverse
        grad_scale = row_dots(grad_weight, weight) - grad_shift * mean
        grad_mean = -scale * grad_shift
        grad_variance = -0.5 * grad_scale * scale * inverse.square()
        wants_mean_row, wants_covariance = ctx.needs_input_grad[4:6]
        return (
            (grad_weight * scale.unsqueeze(1))
            .addr_(grad_mean, mean_row)
            .addcmul_(product, 2 * grad_variance.unsqueeze(1)),
            torch.zeros_like(grad_shift),
            grad_scale * inverse,
            grad_shift,
            grad_mean @ weight if wants_mean_row else None,
            (weight * grad_variance.unsqueeze(1)).t() @ weight if wants_covariance else None,
            None,
        )


def _row_statistics(rows: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return number, mean [d] and covariance [d, d] of the rows of all processes."""
    if group is None and len(rows) < 2:
        raise ValueError("batch norm needs at least two rows in a training step, but this one has 1")
    count = _sum_of_processes(rows.new_full((), len(rows)), group)
    mean_row = _sum_of_processes(rows.sum(dim=0), group) / count
    squares = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype, device=rows.device)
    for block in rows.split(ROWS_AT_ONCE):
        centered = block - mean_row
        squares = squares.addmm(centered.t(), centered)
    return count, mean_row, _sum_of_processes(squares, group) / count


def _sum_of_processes(value: Tensor, group: Any) -> Tensor:
    if group is None:
        return value
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(value, group=group)
