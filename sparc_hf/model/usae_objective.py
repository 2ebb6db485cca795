"""The objective of Universal Sparse Autoencoders, its gradients made in blocks of rows (arXiv 2502.03714)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from .outputs import SparcOutput, SparseCodes
from .present_rows import AloneRows, PresentRows
from .sparse_ops import NORM_EPS, Selection, dots_with_atoms, product_precision, row_dots, top_k, unit_norm
from .usae_encoder import usae_encoder, usae_preactivations


class UsaeObjective:
    """What `objective="usae"` means: see `SparcObjective` for its sibling.

    From the rows of one source, or of each in turn, to the loss: pre-activations behind a batch norm; that source's
    own k largest; its code decoded, by atoms of unit norm, to every stream; the auxiliary term of the latents that
    come next; `usae_losses`.

    Attributes:
        has_encoder_norm: whether a batch norm follows the encoder, which takes the pre-bias's place.
        rejects_zero_rows: whether a row of zeros has no loss.
        knows_dead_latents: whether the loss depends on which latents are dead, so that a step of several
            micro-batches has to `begin` with all of them.
        selects_together: whether a stream's code depends on the other streams, so that a missing one is imputed.

    Args:
        model: a SparcModel; its parameters and settings are read, and its counters of steps and batch norms advanced
            in training.
    """

    has_encoder_norm = True
    rejects_zero_rows = False  # its errors are absolute
    knows_dead_latents = False
    selects_together = False

    def __init__(self, model: Any):
        self.model = model

    def encode(self, rows: Mapping[str, Tensor], selection: str | None) -> dict[str, SparseCodes]:
        """Return stream -> codes of normalised rows [batch, d]; streams select alone, whatever `selection`."""
        config, codes = self.model.config, {}
        for name, x in rows.items():
            top = self.preactivations(name, x).relu().topk(config.k, dim=-1)
            codes[name] = SparseCodes(top.indices, top.values, config.num_latents)
        return codes

    def losses(
        self,
        rows: Mapping[str, Tensor],
        selection: str | None,
        new_step: bool,
        source: str | None,
        selected: Any,
        present: PresentRows | None = None,
        alone: AloneRows | None = None,
    ) -> SparcOutput:
        """Return losses and codes, and in evaluation mode reconstructions; streams select alone, in this pass.

        A model without imputation takes no `present` and no `alone`.
        """
        sources = list(rows) if source is None else [source]
        if unknown := [name for name in sources if name not in rows]:
            raise ValueError(f"`source` must be one of the given streams {list(rows)}, but it is {unknown[0]!r}")
        model, config = self.model, self.model.config
        # Pre-activations, their gradient, and what either takes in half precision.
        at_once = model.rows_at_once(3)
        settings = UsaeSettings(config.k, config.auxk, float(config.auxk_coef), config.distance, at_once)
        atoms = {name: model.atoms[name] for name in rows}
        passes = {}
        for name in sources:
            encoder, norm = model.encoders[name], model.encoder_norm[name]
            weight, bias = usae_encoder(rows[name], encoder, norm, model.counter_group)
            passes[name] = usae_source_loss(rows[name], weight, bias, rows, atoms, settings)
        codes = {
            name: SparseCodes(source_loss.indices, source_loss.values, config.num_latents)
            for name, source_loss in passes.items()
        }
        if model.training:
            model.count_step([codes], new_step)
        losses = usae_losses(passes)
        reconstructions = None
        if not model.training:
            reconstructions = {
                target: {name: model.decode(code, to=target) for name, code in codes.items()} for target in rows
            }
        return SparcOutput(loss=losses.pop("loss"), losses=losses, codes=codes, reconstructions=reconstructions)

    def preactivations(self, stream: str, rows: Tensor, latents: Any = slice(None)) -> Tensor:
        """Return pre-activations behind the batch norm, [batch, latents], differentiable in the rows."""
        return usae_preactivations(rows, self.model.encoders[stream], self.model.encoder_norm[stream], latents)

    def unit_atoms(self, stream: str) -> Tensor:
        """Return a stream's atoms brought to unit norm, [N, d]; the parameter has any norm."""
        return unit_norm(self.model.atoms[stream])

    def prepare_atoms_for_step(self) -> None:
        """Do nothing: atoms are brought to unit norm at every use."""


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
        main: target -> |r_t|; auxiliary: target -> |r_t - D_t v|.
        indices: int64 [batch, k], the code's latents; values: [batch, k].
    """

    loss: Tensor
    main: dict[str, Tensor]
    auxiliary: dict[str, Tensor]
    indices: Tensor
    values: Tensor


def usae_source_loss(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Mapping[str, Tensor],
    atoms: Mapping[str, Tensor],
    settings: UsaeSettings,
) -> SourceLoss:
    """Encode one source, decode its code to every target and compare.

    With q = max(0, W x + b), z the k largest of q, v the `auxk` largest of the others, D_t atoms brought to unit norm,
    r_t = x_t - D_t z and |.| the mean absolute ("l1") or mean squared ("l2") value, the loss is the sum over t of
    |r_t| + auxk_coef |r_t - D_t v|. Gradients of whatever asks for one are made in the same pass, block by block of
    rows, so that no array [batch, N] lives on. Under autocast the dense products are rounded, and nothing else.

    Args:
        rows: x, [batch, d].
        weight: W, [N, d], with the batch norm worked in; bias: b, [N].
        targets: stream -> x_t, [batch, d_t].
        atoms: stream -> [N, d_t], of any norm.
        settings: k, auxk, auxk_coef, distance and the rows to take at a time.
    """
    inputs = (*targets.values(), *(atoms[name] for name in targets))
    loss, terms, indices, values = _SourceLoss.apply(settings, rows, weight, bias, *inputs)  # pyright: ignore[reportGeneralTypeIssues]
    main, auxiliary = (dict(zip(targets, part, strict=True)) for part in terms)
    return SourceLoss(loss, main, auxiliary, indices, values)


def usae_losses(passes: Mapping[str, SourceLoss]) -> dict[str, Tensor]:
    """Return the loss, the mean over the sources of `passes`, and its terms.

    The loss of a source is summed over targets, not divided by their number; a training step of the paper has one
    source. Only "loss" has a gradient.

    Returns:
        name -> scalar: "loss", "self", "cross", "auxk", "self/<stream>", "cross/<target><-<source>" and
        "auxk/<target><-<source>".
    """
    terms: dict[str, Tensor] = {}
    for source, source_loss in passes.items():
        for target, main in source_loss.main.items():
            terms[f"self/{target}" if source == target else f"cross/{target}<-{source}"] = main
            terms[f"auxk/{target}<-{source}"] = source_loss.auxiliary[target]
    loss = torch.stack([source_loss.loss for source_loss in passes.values()]).mean()
    return {"loss": loss, **{kind: _mean_of(terms, kind) for kind in ("self", "cross", "auxk")}, **terms}


class _SourceLoss(torch.autograd.Function):
    """The loss with the gradients of `usae_source_loss`, made in the forward pass.

    With f and g the derivatives of the main and the auxiliary terms by r, side by side for all targets, and D their
    atoms: dv = - g D^T, dz = - (f + g) D^T, dq is one or the other where q > 0, dW = dq^T x, db = sum of dq,
    dx = dq W, dD_t = - z^T (f + g)_t - v^T g_t and dx_t = (f + g)_t.
    """

    @staticmethod
    def forward(ctx: Any, settings: UsaeSettings, rows: Tensor, weight: Tensor, bias: Tensor, *streams: Tensor):
        targets, atoms = streams[: len(streams) // 2], streams[len(streams) // 2 :]
        step = _Pass(settings, ctx.needs_input_grad[1:], rows, weight, bias, targets, atoms)
        blocks = [step.block(slice(at, at + step.at_once)) for at in range(0, len(rows), step.at_once)]
        indices, values = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        ctx.gradients = step.gradients(indices, values)
        terms = step.means
        ctx.mark_non_differentiable(terms, indices, values)
        return terms[0].sum() + settings.auxk_coef * terms[1].sum(), terms, indices, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this step were used up by a backward pass; call the model again")
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(None if gradient is None else gradient.mul_(grad_outputs[0]) for gradient in gradients)


class _Pass:
    """What one pass over blocks of rows adds up: the terms, and the gradients that are asked for."""

    def __init__(
        self,
        settings: UsaeSettings,
        wanted: Sequence[bool],
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Sequence[Tensor],
        atoms: Sequence[Tensor],
    ):
        self.settings, self.rows, self.targets, self.atoms = settings, rows, targets, atoms
        self.widths = [target.shape[1] for target in targets]
        self.latents = len(weight)
        self.at_once = min(settings.rows_at_once, len(rows))
        self.norms = [torch.linalg.vector_norm(value, dim=1, keepdim=True) + NORM_EPS for value in atoms]
        self.unit = rows.new_empty(self.latents, sum(self.widths))
        for unit, value, norm in zip(self.unit.split(self.widths, dim=1), atoms, self.norms, strict=True):
            torch.div(value, norm, out=unit)
        # Derivatives are made `batch * narrowest` times too large, near 1, which half precision can hold.
        self.scale = 1 / (len(rows) * min(self.widths))
        self.columns = torch.cat([rows.new_full((width,), min(self.widths) / width) for width in self.widths])
        self.precision = product_precision(rows)
        self.low = [value.to(self.precision) for value in (weight, bias, self.unit)]
        self.scratch = [
            torch.empty(self.at_once, self.latents, dtype=self.precision, device=rows.device) for _ in range(2)
        ]
        self.means = torch.zeros(
            2, len(targets), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device
        )
        inputs = (rows, weight, bias, *targets, *atoms)
        sums = [torch.zeros_like(value) if flag else None for value, flag in zip(inputs, wanted, strict=True)]
        self.of_rows, self.of_weight, self.of_bias = sums[:3]
        self.of_targets, self.of_atoms = sums[3 : 3 + len(targets)], sums[3 + len(targets) :]
        self.main_slopes = [
            None if part is None else torch.empty_like(x) for part, x in zip(self.of_atoms, targets, strict=True)
        ]
        self.wants_codes = any(part is not None for part in (self.of_rows, self.of_weight, self.of_bias))
        self.wants_any = any(wanted)

    def block(self, at: slice) -> tuple[Tensor, Tensor]:
        """Take a block of rows in; return its code's latents and values, [rows, k]."""
        settings, precision = self.settings, self.precision
        rows = self.rows[at].to(precision)
        weight, bias, unit = self.low
        scratch, second = (value[: len(rows)] for value in self.scratch)
        positive = torch.addmm(bias, rows, weight.t(), out=scratch).relu_().to(self.rows.dtype)
        indices, (values,) = top_k([positive], settings.k)
        more = _keep_largest_(positive.scatter_(1, indices, 0.0), settings.auxk, second).to(precision)
        residual = torch.cat([target[at] for target in self.targets], dim=1)
        residual -= embedding_bag(indices, self.unit, mode="sum", per_sample_weights=values)
        left = residual - (more @ unit)
        for mean, array in zip(self.means, (residual, left), strict=True):
            for at_target, part in enumerate(array.split(self.widths, dim=1)):
                mean[at_target] += _total(part, settings.distance, mean.dtype) / self.targets[at_target].numel()
        if self.wants_any:
            main = _slope_(residual, settings.distance).mul_(self.columns)
            auxiliary = _slope_(left, settings.distance).mul_(self.columns).mul_(settings.auxk_coef)
            self._add_gradients(at, rows, more, indices, values, main, auxiliary)
        return indices, values

    def _add_gradients(
        self, at: slice, rows: Tensor, more: Tensor, indices: Tensor, values: Tensor, main: Tensor, auxiliary: Tensor
    ) -> None:
        weight, _, unit = self.low
        low_auxiliary = auxiliary.to(self.precision)
        if self.wants_codes:
            grad = torch.mm(low_auxiliary, unit.t(), out=self.scratch[1][: len(rows)])
            of_code = grad.gather(1, indices).to(values.dtype) + dots_with_atoms(indices, self.unit, main)
            torch.ops.aten.threshold_backward.grad_input(grad, more, 0, grad_input=grad)
            grad.scatter_(1, indices, (of_code * (values > 0)).to(self.precision))
            _add_product_(self.of_weight, grad.t(), rows)
            if self.of_bias is not None:
                self.of_bias += grad.sum(dim=0, dtype=values.dtype)
            if self.of_rows is not None:
                self.of_rows[at] = grad @ weight
        parts = zip(main.split(self.widths, dim=1), auxiliary.split(self.widths, dim=1), strict=True)
        for total, (one, other) in zip(self.of_targets, parts, strict=True):
            if total is not None:
                total[at] = one + other
        if any(total is not None for total in self.of_atoms):
            fired = more.scatter_(1, indices, values.to(self.precision)).t()
            for total, slopes, one, other in zip(
                self.of_atoms,
                self.main_slopes,
                main.split(self.widths, dim=1),
                low_auxiliary.split(self.widths, dim=1),
                strict=True,
            ):
                _add_product_(total, fired, other)
                if slopes is not None:
                    slopes[at] = one

    def gradients(self, indices: Tensor, values: Tensor) -> list[Tensor | None]:
        """Return the gradients of rows, weight, bias, targets and atoms, None where none is asked for."""
        selection = Selection(indices, self.latents)
        for total, slopes, value, norm in zip(self.of_atoms, self.main_slopes, self.atoms, self.norms, strict=True):
            if total is not None and slopes is not None:
                total += selection.sum_rows(slopes.unsqueeze(0), values.unsqueeze(0))
                # Through u = a / (|a| + eps): da = (du - <du, a> a / (|a| (|a| + eps))) / (|a| + eps).
                along = row_dots(total, value).unsqueeze(1) / ((norm - NORM_EPS).clamp(min=NORM_EPS) * norm)
                total.addcmul_(value, along, value=-1).div_(norm)
        signs = (-1, -1, -1, *(1 for _ in self.of_targets), *(-1 for _ in self.of_atoms))
        gradients = (self.of_rows, self.of_weight, self.of_bias, *self.of_targets, *self.of_atoms)
        return [
            None if gradient is None else gradient.mul_(sign * self.scale)
            for sign, gradient in zip(signs, gradients, strict=True)
        ]


def _keep_largest_(positive: Tensor, count: int, scratch: Tensor) -> Tensor:
    """Set all but the `count` largest entries of each row [batch, N] of non-negative numbers to zero.

    `scratch` is written to, an array of the same shape.
    """
    if count >= positive.shape[1]:
        return positive
    if positive.device.type != "cpu":  # where asking how many there are would stall
        top = positive.topk(count, dim=1, sorted=False)
        return positive.zero_().scatter_(1, top.indices, top.values)
    # Half the entries are zero, so that many a row has no more than `count`.
    crowded = (torch.gt(positive, 0, out=scratch).sum(dim=1, dtype=torch.float32) > count).nonzero().squeeze(1)
    if len(crowded):
        top = positive[crowded].topk(count, dim=1, sorted=False)
        positive[crowded] = scratch[: len(crowded)].to(positive.dtype).zero_().scatter_(1, top.indices, top.values)
    return positive


def _add_product_(total: Tensor | None, left: Tensor, right: Tensor) -> None:
    if total is None:
        return
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _total(residual: Tensor, distance: str, precision: torch.dtype) -> Tensor:
    return (residual.abs() if distance == "l1" else residual.square()).sum(dtype=precision)


def _slope_(residual: Tensor, distance: str) -> Tensor:
    """Turn r into the derivative of |r| or r^2."""
    return residual.sign_() if distance == "l1" else residual.mul_(2)


def _mean_of(terms: Mapping[str, Tensor], kind: str) -> Tensor:
    terms_of_kind = [value for name, value in terms.items() if name.startswith(f"{kind}/")]
    return torch.stack(terms_of_kind).mean() if terms_of_kind else next(iter(terms.values())).new_zeros(())
