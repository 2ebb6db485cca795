"""The loss of Universal Sparse Autoencoders and its gradients, made in blocks of rows (arXiv 2502.03714)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from .sparse_ops import Selection, dots_with_atoms, top_k


class UsaeSettings(NamedTuple):
    """What a pass needs to know of the config, and the rows it may take at a time."""

    k: int
    auxk: int
    auxk_coef: float
    distance: str
    rows_at_once: int


class SourceLoss(NamedTuple):
    """What one source's code gives.

    Attributes:
        loss: scalar, sum over the targets t of |r_t| + auxk_coef |r_t - D_t v|; the only one with a gradient.
        main: [targets], |r_t|.
        auxiliary: [targets], |r_t - D_t v|.
        indices: int64 [batch, k], the code's latents; values: [batch, k].
        residuals: target -> r_t = x_t - D_t z, [batch, d].
    """

    loss: Tensor
    main: Tensor
    auxiliary: Tensor
    indices: Tensor
    values: Tensor
    residuals: dict[str, Tensor]


def usae_source_loss(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Mapping[str, Tensor],
    atoms: Mapping[str, Tensor],
    settings: UsaeSettings,
) -> SourceLoss:
    """Encode one source, decode its code to every target and compare.

    With q = max(0, W x + b), z the k largest of q, v the `auxk` largest of the others, r_t = x_t - D_t z and |.| the
    mean absolute ("l1") or mean squared ("l2") value, the loss is the sum over t of |r_t| + auxk_coef |r_t - D_t v|.
    Gradients of what asks for one are made in the same pass, block by block, so that no array [batch, N] lives on.
    Under autocast the products of rows and parameters are rounded, and nothing else.

    Args:
        rows: x, [batch, d].
        weight: W, [N, d], with the batch norm worked in; bias: b, [N].
        targets: stream -> x_t, [batch, d_t].
        atoms: stream -> D_t, [N, d_t], of unit norm.
        settings: k, auxk, auxk_coef, distance and the rows to take at a time.
    """
    widths = [target.shape[1] for target in targets.values()]
    inputs = (*targets.values(), *(atoms[name] for name in targets))
    loss, terms, indices, values, residuals = _SourceLoss.apply(settings, rows, weight, bias, *inputs)  # pyright: ignore[reportGeneralTypeIssues]
    parts = dict(zip(targets, residuals.split(widths, dim=1), strict=True))
    return SourceLoss(loss, terms[0], terms[1], indices, values, parts)


def usae_losses(found: Mapping[str, SourceLoss]) -> dict[str, Tensor]:
    """Return the loss, the mean over the sources of `found`, and its terms.

    The loss of a source is summed over targets, not divided by their number; a training step of the paper has one
    source. Only "loss" has a gradient.

    Returns:
        name -> scalar: "loss", "self", "cross", "auxk", "self/<stream>", "cross/<target><-<source>" and
        "auxk/<target><-<source>".
    """
    terms: dict[str, Tensor] = {}
    for source, part in found.items():
        for target, main, auxiliary in zip(part.residuals, part.main, part.auxiliary, strict=True):
            terms[f"self/{target}" if source == target else f"cross/{target}<-{source}"] = main
            terms[f"auxk/{target}<-{source}"] = auxiliary
    loss = torch.stack([part.loss for part in found.values()]).mean()
    return {"loss": loss, **{kind: _mean_of(terms, kind) for kind in ("self", "cross", "auxk")}, **terms}


class _SourceLoss(torch.autograd.Function):
    """The loss with the gradients of `usae_source_loss`, made in the forward pass.

    With f = - dloss/dr_t for the main term, g for the auxiliary one, side by side for all targets, and D their atoms:
    dv = g D^T, dz = (f + g) D^T, dq is both where q > 0, dW = dq^T x, db = sum of dq, dx = dq W,
    dD_t = z^T (f + g)_t + v^T g_t and dx_t = - (f + g)_t.
    """

    @staticmethod
    def forward(ctx: Any, settings: UsaeSettings, rows: Tensor, weight: Tensor, bias: Tensor, *streams: Tensor):
        targets, atoms = streams[: len(streams) // 2], streams[len(streams) // 2 :]
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[1:4]
        wants_targets = ctx.needs_input_grad[4 : 4 + len(targets)]
        wants_atoms = ctx.needs_input_grad[4 + len(targets) :]
        batch, latents = len(rows), len(weight)
        widths = [target.shape[1] for target in targets]
        narrowest = min(widths)
        # f and g are made `batch * narrowest` times too large, and negative, near 1, which half precision can hold.
        scale = -1 / (batch * narrowest)
        columns = torch.cat([rows.new_full((width,), narrowest / width) for width in widths])
        every_atom = torch.cat(atoms, dim=1)
        precision = _product_precision(rows)
        low_weight, low_bias, low_atoms = (value.to(precision) for value in (weight, bias, every_atom))
        at_once = min(settings.rows_at_once, batch)
        scratch = [torch.empty(at_once, latents, dtype=precision, device=rows.device) for _ in range(2)]
        residuals = rows.new_empty(batch, sum(widths))
        terms = rows.new_zeros(2, len(targets))
        grad_rows = torch.empty_like(rows) if wants_rows else None
        grad_targets = torch.empty_like(residuals) if any(wants_targets) else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if wants_bias else None
        grad_atoms = [
            torch.zeros_like(value) if wanted else None for value, wanted in zip(atoms, wants_atoms, strict=True)
        ]
        found = []
        for start in range(0, batch, at_once):
            block = slice(start, min(start + at_once, batch))
            low_rows, size = rows[block].to(precision), block.stop - start
            positive = torch.addmm(low_bias, low_rows, low_weight.t(), out=scratch[0][:size]).relu_().to(rows.dtype)
            indices, (values,) = top_k([positive], settings.k)
            found.append((indices, values))
            more = _keep_largest_(positive.scatter_(1, indices, 0.0), settings.auxk)
            low_more = more.to(precision)
            residual = residuals[block]
            torch.cat([target[block] for target in targets], dim=1, out=residual)
            residual -= embedding_bag(indices, every_atom, mode="sum", per_sample_weights=values)
            left = residual - (low_more @ low_atoms).to(rows.dtype)
            for term, array in zip(terms, (residual, left), strict=True):
                term += torch.stack([_total(part, settings.distance) for part in array.split(widths, dim=1)])
            if not any(ctx.needs_input_grad):
                continue
            main = _slope(residual, settings.distance).mul_(columns)
            auxiliary = _slope_(left, settings.distance).mul_(columns).mul_(settings.auxk_coef)
            if grad_targets is not None:
                torch.add(main, auxiliary, out=grad_targets[block])
            low_auxiliary = auxiliary.to(precision)
            if wants_weight or wants_bias or wants_rows:
                grad = torch.mm(low_auxiliary, low_atoms.t(), out=scratch[1][:size])
                of_code = grad.gather(1, indices).to(rows.dtype) + dots_with_atoms(indices, every_atom, main)
                grad = torch.ops.aten.threshold_backward.grad_input(grad, low_more, 0, grad_input=grad)
                grad.scatter_(1, indices, (of_code * (values > 0)).to(precision))
                _add_product_(grad_weight, grad.t(), low_rows)
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0, dtype=rows.dtype)
                if grad_rows is not None:
                    grad_rows[block] = grad @ low_weight
            if any(wants_atoms):
                fired = low_more.scatter_(1, indices, values.to(precision)).t()
                for total, part in zip(grad_atoms, low_auxiliary.split(widths, dim=1), strict=True):
                    _add_product_(total, fired, part)
        indices, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        selection = Selection(indices, latents)
        for total, part, column in zip(grad_atoms, residuals.split(widths, dim=1), widths, strict=True):
            if total is not None:
                slope = _slope(part, settings.distance) * (narrowest / column)
                total += selection.sum_rows(slope.unsqueeze(0), values.unsqueeze(0))
        terms /= batch * torch.tensor(widths, device=rows.device)
        by_target = [None] * len(targets)
        if grad_targets is not None:
            by_target = [
                part.neg() if wanted else None
                for part, wanted in zip(grad_targets.split(widths, dim=1), wants_targets, strict=True)
            ]
        ctx.gradients = [grad_rows, grad_weight, grad_bias, *by_target, *grad_atoms]
        ctx.scale = scale
        ctx.mark_non_differentiable(terms, indices, values, residuals)
        return terms[0].sum() + settings.auxk_coef * terms[1].sum(), terms, indices, values, residuals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        factor = grad_outputs[0] * ctx.scale
        return None, *(None if gradient is None else gradient * factor for gradient in ctx.gradients)


def _product_precision(rows: Tensor) -> torch.dtype:
    """Return the number format of products: autocast's where it is on."""
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype


def _keep_largest_(positive: Tensor, count: int) -> Tensor:
    """Set all but the `count` largest entries of each row [batch, N] of non-negative numbers to zero."""
    if count >= positive.shape[1]:
        return positive
    if positive.device.type != "cpu":
        top = positive.topk(count, dim=1, sorted=False)
        return positive.zero_().scatter_(1, top.indices, top.values)
    # Half the entries are zero, so that a row often has no more than `count`; the rest are few enough to look at.
    crowded = ((positive > 0).sum(dim=1) > count).nonzero().squeeze(1)
    if len(crowded):
        top = positive[crowded].topk(count, dim=1, sorted=False)
        positive[crowded] = positive.new_zeros(len(crowded), positive.shape[1]).scatter_(1, top.indices, top.values)
    return positive


def _add_product_(total: Tensor | None, left: Tensor, right: Tensor) -> None:
    if total is None:
        return
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _total(residual: Tensor, distance: str) -> Tensor:
    return residual.abs().sum() if distance == "l1" else residual.square().sum()


def _slope(residual: Tensor, distance: str) -> Tensor:
    """Return the derivative of |r| or r^2."""
    return residual.sign() if distance == "l1" else 2 * residual


def _slope_(residual: Tensor, distance: str) -> Tensor:
    return residual.sign_() if distance == "l1" else residual.mul_(2)


def _mean_of(terms: Mapping[str, Tensor], kind: str) -> Tensor:
    chosen = [value for name, value in terms.items() if name.startswith(f"{kind}/")]
    return torch.stack(chosen).mean() if chosen else next(iter(terms.values())).new_zeros(())
