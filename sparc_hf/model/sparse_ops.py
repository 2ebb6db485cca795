"""The only place that computes a selection, a sparse encode, a sparse decode and the unit norm of atoms.

A code has k of N latents active, so everything after the pre-activations works on indices [batch, k] and values
[P, batch, k], where P codes share one selection. The gradient of a parameter [N, d] is a sum of few terms, each a
weighted sum of rows per latent (`GradientTerm`). By default a backward pass adds them up to the dense array that torch
optimizers want, writing each latent's row once; an optimizer that takes the terms themselves saves that array.

Compiled operators (step_kernel.py) are used where they are loaded and fit: float32 on a CPU, Triton's on a GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .top_k import largest

GATHERED_NUMBERS = 2**20  # of atoms that are copied side by side at a time on a CPU, 4 MiB
# From which N / k on a CPU makes the sum of several streams' pre-activations faster than each stream's own.
LATENTS_PER_SELECTED = {"compiled": 128, "torch": 512}
NORM_EPS = 1e-8
ROWS_IN_CACHE = 256
STD_EPS = 1e-5


def compiled_ops(like: Tensor) -> Any:
    """Return the compiled operators where they are loaded and take a tensor such as this, else None."""
    if gpu := gpu_ops(like):
        return gpu
    fits = like.device.type == "cpu" and like.dtype in (torch.float32, torch.int64)
    return torch.ops.sparc_hf if fits and hasattr(torch.ops.sparc_hf, "residuals") else None


def gpu_ops(like: Tensor) -> Any:
    """Return the operators of Triton where they are loaded and take a tensor such as this, else None."""
    fits = like.device.type == "cuda" and like.dtype != torch.float64
    return torch.ops.sparc_hf_gpu if fits and hasattr(torch.ops.sparc_hf_gpu, "residuals") else None


def product_precision(rows: Tensor) -> torch.dtype:
    """Return the number format of products: autocast's where it is on."""
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype


class Selection:
    """Which latents each row uses, with its transpose (latent -> rows) made once and only when asked for.

    Args:
        indices: int64 [batch, k], the selected latents of each row.
        num_latents: N.
    """

    def __init__(self, indices: Tensor, num_latents: int):
        self.indices = indices
        self.num_latents = num_latents
        self._transposed: tuple[Tensor, Tensor] | None = None

    @property
    def transposed(self) -> tuple[Tensor, Tensor]:
        """(order [batch * k], offsets [N + 1]): entries sorted by latent, and where each latent's entries start."""
        if self._transposed is None:
            flat = self.indices.reshape(-1)
            if ops := compiled_ops(flat):
                order, offsets = ops.transpose(flat, self.num_latents)
            else:
                latents, order = torch.sort(flat, stable=True)
                offsets = torch.searchsorted(latents, torch.arange(self.num_latents + 1, device=flat.device))
            self._transposed = order, offsets
        return self._transposed

    def sum_rows(self, rows: Tensor, values: Tensor) -> Tensor:
        """Return [N, d]: for each latent, the rows [P, batch, d] that chose it, weighted by values [P, batch, k]."""
        order, offsets = self.transposed
        codes, batch, k = values.shape
        if gpu := gpu_ops(rows):
            return gpu.sum_rows(rows, values, order, offsets)
        # A latent's entries are those of all codes, so that its row is written once.
        first_rows = torch.arange(0, codes * batch, batch, device=order.device)
        row_of_entry = ((order // k).unsqueeze(1) + first_rows).reshape(-1)
        weights = values.to(rows.dtype).flatten(1)[:, order].t().reshape(-1)
        return F.embedding_bag(
            row_of_entry,
            rows.reshape(codes * batch, -1),
            offsets[:-1] * codes,
            mode="sum",
            per_sample_weights=weights,
        )

    def sum_values(self, values: Tensor) -> Tensor:
        """Return [N]: for each latent the sum of its values [batch, k]."""
        if gpu := gpu_ops(values):
            return gpu.sum_values(values, *self.transposed)
        flat = values.reshape(-1)
        return torch.zeros(self.num_latents, dtype=flat.dtype, device=flat.device).index_add_(
            0, self.indices.reshape(-1), flat
        )


@dataclass
class GradientTerm:
    """A part of the gradient of a parameter [N, d]: for each latent a weighted sum of rows.

    Attributes:
        selection: the latents of each row.
        coefficients: [P, batch, k], the weight of a row in the gradient of each of its latents.
        rows: [P, batch, d].
        dots: [P, batch, k], the products of each row with the parameter's rows of its latents, where they are known.
    """

    selection: Selection
    coefficients: Tensor
    rows: Tensor
    dots: Tensor | None = None

    def dense(self) -> Tensor:
        """Return the term as [N, d]."""
        return self.selection.sum_rows(self.rows, self.coefficients)

    def products(self) -> Tensor | None:
        """Return the products of the term's rows with the parameter's, [N], where `dots` are known."""
        return None if self.dots is None else self.selection.sum_values((self.coefficients * self.dots).sum(dim=0))


def _gradient(terms: list[GradientTerm] | None, term: GradientTerm) -> Tensor | None:
    """Give a term to the list that asks for it, or return it as a dense gradient."""
    if terms is None:
        return term.dense()
    terms.append(term)
    return None


def top_k(preactivations: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Select the latents whose sum over several pre-activations [batch, N] is largest, largest first.

    Among equal sums the lower latent comes first.

    Returns:
        int64 [batch, k], and each one's pre-activations there, [P, batch, k].
    """
    indices = top_latents(preactivations, k)
    return indices, torch.stack([part.gather(1, indices) for part in preactivations])


def top_latents(preactivations: Sequence[Tensor], k: int) -> Tensor:
    """Return the latents whose sum over several pre-activations [batch, N] is largest, largest first, [batch, k]."""
    if ops := compiled_ops(preactivations[0]):
        return ops.top_k_of_sum([part.contiguous() for part in preactivations], k)
    return largest(sum_of(preactivations), k)


def sum_alone_is_faster(like: Tensor, streams: int, num_latents: int, k: int) -> bool:
    """Return whether to make the sum of streams' pre-activations alone, and each one's own where selected only.

    It takes one array [batch, N] in place of one a stream, and a second look at selected rows of the encoder, which on
    a CPU is worth it where few of many latents are selected.
    """
    if like.device.type != "cpu":
        return streams > 1
    least = LATENTS_PER_SELECTED["torch" if compiled_ops(like) is None else "compiled"]
    return streams > 1 and num_latents >= least * k


def sum_of_products(bias: Tensor, rows: Sequence[Tensor], weights: Sequence[Tensor], scratch: Tensor) -> Tensor:
    """Return bias [N] + the sum of rows [batch, d] times weights [N, d], in the first rows of one array [.., N].

    All have the number format of the product: autocast leaves products into a given array alone.
    """
    total = torch.addmm(bias, rows[0], weights[0].t(), out=scratch[: len(rows[0])])
    for part, weight in zip(rows[1:], weights[1:], strict=True):
        total.addmm_(part, weight.t())
    return total


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
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        pre_bias: Tensor,
        centered: Tensor,
        gathered: Tensor,
        selection: Selection,
        terms: list[GradientTerm] | None,
    ):
        ctx.save_for_backward(centered, weight)
        ctx.selection, ctx.terms = selection, terms
        return gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        centered, weight = ctx.saved_tensors
        selection: Selection = ctx.selection
        grad = grad_outputs[0].to(weight.dtype)
        wants_rows, wants_weight, wants_bias, wants_pre_bias = ctx.needs_input_grad[:4]
        # With terms, what the weight adds to the pre-bias's gradient is left to who takes them.
        wants_pre_bias = wants_pre_bias and ctx.terms is None
        grad_bias = selection.sum_values(grad) if wants_bias or wants_pre_bias else None
        grad_rows = _bag(selection.indices, weight, grad) if wants_rows else None
        term = GradientTerm(selection, grad.unsqueeze(0), centered.unsqueeze(0))
        grad_weight = _gradient(ctx.terms, term) if wants_weight else None
        grad_pre_bias = -(grad_bias @ weight) if grad_bias is not None and wants_pre_bias else None
        return grad_rows, grad_weight, grad_bias, grad_pre_bias, None, None, None, None


def gather_preactivations(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor,
    centered: Tensor,
    gathered: Tensor,
    selection: Selection,
    terms: list[GradientTerm] | None = None,
) -> Tensor:
    """Give the selected pre-activations W_i (x - b) + c_i, [batch, k], a gradient without the dense ones.

    Args:
        rows: [batch, d], normalised features x.
        weight: [N, d]; bias: [N]; pre_bias: [d].
        centered: [batch, d], x - b, outside the graph.
        gathered: [batch, k], the pre-activations at the selection, from the dense product already made.
        selection: the latents of each row.
        terms: takes the weight's gradient in place of its `.grad`; the pre-bias's gradient then lacks - dc W, which
            needs a pass over the weight.
    """
    return _GatherPreactivations.apply(  # pyright: ignore[reportReturnType]
        rows, weight, bias, pre_bias, centered, gathered.to(weight.dtype), selection, terms
    )


class _DecodeErrors(torch.autograd.Function):
    """Squared errors e = |D^T z + b - x|^2 of P codes, with r = D^T z + b - x and u_j = <D_j, r>.

    With g the gradient of e: dz_j = 2 g u_j, dD_i = sum of 2 g z r over the rows that chose i, db = sum of 2 g r and
    dx = - 2 g r. r and u are made in the forward pass, where the atoms are in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        atoms: Tensor,
        pre_bias: Tensor,
        rows: Tensor,
        centered: Tensor,
        selection: Selection,
        terms: list[GradientTerm] | None,
    ):
        if ops := compiled_ops(atoms):
            residuals, errors, dots = ops.residuals(
                values.contiguous(), atoms, selection.indices.contiguous(), centered.contiguous()
            )
        else:
            residuals, dots = _residuals(values, atoms, selection.indices, centered, any(ctx.needs_input_grad))
            errors = row_energy(residuals)
        ctx.save_for_backward(values, residuals, dots)
        ctx.selection, ctx.terms = selection, terms
        ctx.mark_non_differentiable(residuals)
        return errors, residuals

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        values, residuals, dots = ctx.saved_tensors
        wants_values, wants_atoms, wants_pre_bias, wants_rows = ctx.needs_input_grad[:4]
        scale = 2 * grad_outputs[0]
        term = GradientTerm(ctx.selection, scale.unsqueeze(-1) * values, residuals, dots)
        grad_values = scale.unsqueeze(-1) * dots if wants_values else None
        grad_atoms = _gradient(ctx.terms, term) if wants_atoms else None
        grad_pre_bias = scale.reshape(-1) @ residuals.flatten(0, 1) if wants_pre_bias else None
        grad_rows = -(scale.unsqueeze(-1) * residuals).sum(dim=0) if wants_rows else None
        return grad_values, grad_atoms, grad_pre_bias, grad_rows, None, None, None


def decode_errors(
    values: Tensor,
    atoms: Tensor,
    pre_bias: Tensor,
    rows: Tensor,
    centered: Tensor,
    selection: Selection,
    terms: list[GradientTerm] | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode P codes that share a selection and compare them with the rows of one stream.

    Args:
        values: [P, batch, k].
        atoms: D, [N, d]; pre_bias: b, [d].
        rows: x, [batch, d].
        centered: [batch, d], x - b, outside the graph.
        selection: the latents of each row.
        terms: takes the atoms' gradient in place of their `.grad`.

    Returns:
        Squared errors [P, batch], and the residuals D^T z + b - x, [P, batch, d], outside the graph.
    """
    return _DecodeErrors.apply(  # pyright: ignore[reportReturnType]
        values.to(atoms.dtype), atoms, pre_bias, rows, centered, selection, terms
    )


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
        grad_values = dots_with_atoms(selection.indices, atoms, grad) if ctx.needs_input_grad[0] else None
        grad_atoms = selection.sum_rows(grad.unsqueeze(0), values.unsqueeze(0)) if ctx.needs_input_grad[1] else None
        return grad_values, grad_atoms, None


def sparse_decode(values: Tensor, atoms: Tensor, selection: Selection) -> Tensor:
    """Return [batch, d]: each row's atoms [N, d], weighted by its values [batch, k]."""
    return _Decode.apply(values.to(atoms.dtype), atoms, selection)  # pyright: ignore[reportReturnType]


def _bag(indices: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights.to(table.dtype))


def _gathered(indices: Tensor, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of [batch, k] and their atoms, [rows, k, d], one after the other in the same memory."""
    (batch, k), width = indices.shape, table.shape[1]
    at_once = max(1, min(batch, GATHERED_NUMBERS // max(1, k * width)))
    memory = table.new_empty(at_once * k, width)
    for start in range(0, batch, at_once):
        chosen = indices[start : start + at_once].reshape(-1)
        atoms = torch.index_select(table, 0, chosen, out=memory[: len(chosen)])
        yield slice(start, start + at_once), atoms.view(-1, k, width)


@torch.no_grad()
def _residuals(
    values: Tensor, atoms: Tensor, indices: Tensor, centered: Tensor, wants_dots: bool
) -> tuple[Tensor, Tensor]:
    """Return D^T z + b - x of P codes, [P, batch, d], and where asked for its products with atoms, [P, batch, k]."""
    if not wants_dots or atoms.device.type != "cpu":
        residuals = torch.stack([_bag(indices, atoms, part) for part in values]).sub_(centered)
        dots = [dots_with_atoms(indices, atoms, part) for part in residuals] if wants_dots else list(values)
        return residuals, torch.stack(dots)
    (codes, batch, k), width = values.shape, atoms.shape[1]
    by_row = values.transpose(0, 1).contiguous()
    residuals, dots = atoms.new_empty(batch, codes, width), atoms.new_empty(batch, codes, k)
    # Atoms are copied once for all codes, decoded and multiplied again. Autocast leaves products into `out` alone.
    for rows, chosen in _gathered(indices, atoms):
        torch.baddbmm(centered[rows].unsqueeze(1), by_row[rows], chosen, beta=-1, out=residuals[rows])
        torch.bmm(residuals[rows], chosen.mT, out=dots[rows])
    return residuals.transpose(0, 1).contiguous(), dots.transpose(0, 1)


@torch.no_grad()
def dots_with_atoms(indices: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Return [batch, k]: the product of each row [batch, d] with each of its atoms in a table [N, d]."""
    rows = rows.to(table.dtype)
    if ops := compiled_ops(table):
        return ops.dots(rows.contiguous(), table, indices.contiguous())
    batch, k = indices.shape
    flat = indices.reshape(-1)
    row_of_entry = torch.arange(batch, device=flat.device).repeat_interleave(k)
    offsets = torch.arange(0, batch * k, k, device=flat.device)
    # The operator behind embedding_bag's own backward; it never makes the [batch, k, d] array of gathered atoms.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows, table, flat, offsets, row_of_entry, 0, -1
    ).view(batch, k)


@torch.no_grad()
def preactivations_at(indices: Tensor, weight: Tensor, bias: Tensor, centered: Tensor) -> Tensor:
    """Return the pre-activations W (x - b) + c of x - b [batch, d] at each row's latents, [batch, k]."""
    if weight.device.type != "cpu" or compiled_ops(weight) is not None:
        return dots_with_atoms(indices, weight, centered) + bias[indices]
    # The same bits wherever the weights lie in memory, as the dense product gives, and torch's operator does not.
    values = weight.new_empty(len(indices), 1, indices.shape[1])
    for rows, chosen in _gathered(indices, weight):
        torch.bmm(centered[rows].unsqueeze(1), chosen.mT, out=values[rows])
    return values.squeeze(1) + bias[indices]


def row_energy(rows: Tensor) -> Tensor:
    """Return |x|^2 of rows [..., d], in float32 under autocast too."""
    return rows.square().sum(dim=-1)


def row_dots(one: Tensor, other: Tensor) -> Tensor:
    """Return <one_i, other_i>, [n], of the rows of two [n, d], on a CPU without another array of their size."""
    block = ROWS_IN_CACHE if one.device.type == "cpu" else max(1, one.shape[0])
    return torch.cat([torch.linalg.vecdot(*parts) for parts in zip(one.split(block), other.split(block), strict=True)])


def unit_norm(rows: Tensor) -> Tensor:
    """Divide every row of [n, d] by its L2 norm (+ 1e-8, so an all-zero row stays zero)."""
    return rows / (rows.norm(dim=-1, keepdim=True) + NORM_EPS)


def unit_norm_(rows: Tensor, gradient: Tensor | None = None, products: Tensor | None = None) -> None:
    """Bring the rows of [N, d] to unit norm in place, then take from each gradient row its part along the row.

    Works through blocks that stay in the processor's cache, so that memory is passed once.

    Args:
        rows: [N, d].
        gradient: [N, d].
        products: [N], those of gradient rows and rows as they come, where known.
    """
    block = ROWS_IN_CACHE if rows.device.type == "cpu" else rows.shape[0]
    for start in range(0, rows.shape[0], block):
        atoms = rows[start : start + block]
        norm = atoms.norm(dim=-1, keepdim=True).add_(NORM_EPS)
        atoms.div_(norm)
        if gradient is not None:
            part = gradient[start : start + block]
            if products is None:
                along = torch.linalg.vecdot(part, atoms).unsqueeze(-1)
            else:
                along = products[start : start + block].unsqueeze(-1) / norm
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
