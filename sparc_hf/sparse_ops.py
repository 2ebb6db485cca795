"""The only place that computes a selection, a sparse encode, a sparse decode and the unit norm of atoms.

A code has k of N latents active, so everything after the pre-activations works on indices and values of shape
[batch, k]. The backward passes write each latent's gradient row once: the selection is sorted by latent, and the
rows that chose a latent are summed as one bag (`embedding_bag` over the transposed selection).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-8
ROWS_IN_CACHE = 256
STD_EPS = 1e-5


class Selection:
    """Which latents each row uses, with its transpose (latent -> rows) made once and only when asked for.

    Args:
        indices: int64 [batch, k], the selected latents of each row.
        num_latents: N.
    """

    def __init__(self, indices: Tensor, num_latents: int):
        self.indices = indices
        self.num_latents = num_latents
        self._transposed: tuple[Tensor, Tensor, Tensor] | None = None
        self._parts: list[Selection] = []

    @property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """(order, rows, offsets): entries sorted by latent, the row of each, and where each latent's entries start."""
        if self._transposed is None:
            flat = self.indices.reshape(-1)
            order = torch.argsort(flat, stable=True)
            counts = torch.bincount(flat, minlength=self.num_latents)
            self._transposed = (order, order // self.indices.shape[1], counts.cumsum(0) - counts)
        return self._transposed

    @classmethod
    def stack(cls, parts: Sequence["Selection"]) -> "Selection":
        """Return the selection of all rows of several, [sum of batches, k], one after the other."""
        stacked = cls(torch.cat([part.indices for part in parts]), parts[0].num_latents)
        stacked._parts = list(parts)
        return stacked

    def sum_rows(self, rows: Tensor, values: Tensor) -> Tensor:
        """Return [N, d]: for each latent, the rows [batch, d] that chose it, weighted by values [batch, k]."""
        if self._parts:
            # Part by part: a part's rows stay in the processor's cache, and parts may share their transpose.
            sizes = [part.indices.shape[0] for part in self._parts]
            pieces = zip(self._parts, rows.split(sizes), values.split(sizes), strict=True)
            part, piece, weights = next(pieces)
            total = part.sum_rows(piece, weights)
            for part, piece, weights in pieces:
                total += part.sum_rows(piece, weights)
            return total
        order, row_of_entry, offsets = self.transposed
        weights = values.reshape(-1)[order]
        return F.embedding_bag(
            row_of_entry, rows.contiguous(), offsets, mode="sum", per_sample_weights=weights.to(rows.dtype)
        )

    def sum_values(self, values: Tensor) -> Tensor:
        """Return [N]: for each latent the sum of its values [batch, k]."""
        flat = values.reshape(-1)
        return torch.zeros(self.num_latents, dtype=flat.dtype, device=flat.device).index_add_(
            0, self.indices.reshape(-1), flat
        )


def sum_of(preactivations: Sequence[Tensor]) -> Tensor:
    """Return the sum of several [batch, N], in their order, in one new array at most."""
    if len(preactivations) == 1:
        return preactivations[0]
    total = preactivations[0] + preactivations[1]
    for other in preactivations[2:]:
        total += other
    return total


class _GatherPreactivations(torch.autograd.Function):
    """Selected pre-activations whose backward touches only the selected rows of the encoder.

    With g the gradient of the selected pre-activations: dW_i = sum of g * (x - b) over the rows that chose i,
    dc_i = sum of g, dx = sum over the row's latents of g W_i, and db = - sum_i dc_i W_i.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, pre_bias: Tensor, gathered: Tensor, selection):
        ctx.save_for_backward(rows, weight, pre_bias)
        ctx.selection = selection
        return gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight, pre_bias = ctx.saved_tensors
        selection: Selection = ctx.selection
        grad = grad_outputs[0].to(weight.dtype)
        grad_bias = selection.sum_values(grad)
        grad_rows = _bag(selection.indices, weight, grad) if ctx.needs_input_grad[0] else None
        grad_weight = selection.sum_rows(rows - pre_bias, grad) if ctx.needs_input_grad[1] else None
        grad_pre_bias = -(grad_bias @ weight) if ctx.needs_input_grad[3] else None
        return grad_rows, grad_weight, grad_bias, grad_pre_bias, None, None


def gather_preactivations(
    rows: Tensor, weight: Tensor, bias: Tensor, pre_bias: Tensor, selection: Selection, gathered: Tensor
) -> Tensor:
    """Give the selected pre-activations W_i (x - b) + c_i, [batch, k], a gradient without the dense ones.

    Args:
        rows: [batch, d], normalised features x.
        weight: [N, d]; bias: [N]; pre_bias: [d].
        selection: the latents of each row.
        gathered: [batch, k], the pre-activations at the selection, from the dense product already made.
    """
    return _GatherPreactivations.apply(rows, weight, bias, pre_bias, gathered.to(weight.dtype), selection)  # pyright: ignore[reportReturnType]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, atoms: Tensor, selection: Selection):
        ctx.save_for_backward(values, atoms)
        ctx.selection = selection
        return _bag(selection.indices, atoms, values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        values, atoms = ctx.saved_tensors
        selection: Selection = ctx.selection
        grad = grad_outputs[0].contiguous()
        grad_values = _bag_weight_gradient(selection.indices, atoms, grad) if ctx.needs_input_grad[0] else None
        grad_atoms = selection.sum_rows(grad, values) if ctx.needs_input_grad[1] else None
        return grad_values, grad_atoms, None


def sparse_decode(values: Tensor, atoms: Tensor, selection: Selection) -> Tensor:
    """Return [batch, d]: each row's atoms [N, d], weighted by its values [batch, k]."""
    return _Decode.apply(values.to(atoms.dtype), atoms, selection)  # pyright: ignore[reportReturnType]


def _bag(indices: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights.to(table.dtype))


def _bag_weight_gradient(indices: Tensor, table: Tensor, grad: Tensor) -> Tensor:
    """Return [batch, k]: the product of each row's gradient [batch, d] with each of its atoms."""
    batch, k = indices.shape
    flat = indices.reshape(-1)
    row_of_entry = torch.arange(batch, device=flat.device).repeat_interleave(k)
    offsets = torch.arange(0, batch * k, k, device=flat.device)
    # The operator behind embedding_bag's own backward; it never makes the [batch, k, d] array of gathered atoms.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, table, flat, offsets, row_of_entry, 0, -1
    ).view(batch, k)


def unit_norm(rows: Tensor) -> Tensor:
    """Divide every row of [n, d] by its L2 norm (+ 1e-8, so an all-zero row stays zero)."""
    return rows / (rows.norm(dim=-1, keepdim=True) + NORM_EPS)


def unit_norm_(rows: Tensor, gradient: Tensor | None = None) -> None:
    """Bring the rows of [N, d] to unit norm in place, then take from each gradient row its part along the row.

    Works through blocks that stay in the processor's cache, so that memory is passed once.
    """
    block = ROWS_IN_CACHE if rows.device.type == "cpu" else rows.shape[0]
    for start in range(0, rows.shape[0], block):
        atoms = rows[start : start + block]
        atoms.div_(atoms.norm(dim=-1, keepdim=True).add_(NORM_EPS))
        if gradient is not None:
            part = gradient[start : start + block]
            along = torch.linalg.vecdot(part, atoms).unsqueeze(-1)
            part.addcmul_(atoms, along, value=-1)


def normalize_rows(rows: Tensor, kind: str, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Normalise feature rows [batch, d] as a stream record says.

    "l2" divides by the row's norm (+ 1e-8, so an all-zero row stays zero); "standardize" gives
    (x - mean) / (std + 1e-5) with `statistics` = (mean, std), each [d] or [1]; "none" returns the rows as they are.
    """
    if kind == "l2":
        return unit_norm(rows)
    if statistics is not None:
        mean, std = statistics
        return (rows - mean) / (std + STD_EPS)
    return rows
