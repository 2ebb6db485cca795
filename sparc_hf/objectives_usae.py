"""Universal Sparse Autoencoders (arXiv 2502.03714): their encoder and their loss, on the modules of a SparcModel."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sparse_ops import Selection, sparse_decode, unit_norm


def usae_preactivations(rows: Tensor, encoder: nn.Linear, norm: nn.BatchNorm1d, group: Any = None) -> Tensor:
    """Return q = max(0, BatchNorm(W x + c)), [batch, N], of rows x [batch, d].

    In training the batch norm uses, and keeps, the statistics of the rows of all processes of `group`; otherwise those
    it has kept.
    """
    hidden = F.linear(rows, encoder.weight, encoder.bias)
    if group is None or not norm.training:
        return norm(hidden).relu()
    return _shared_batch_norm(hidden, norm, group).relu()


def _shared_batch_norm(hidden: Tensor, norm: nn.BatchNorm1d, group: Any) -> Tensor:
    """Batch norm over the rows of several processes, with the gradient of the statistics through all of them."""
    from torch.distributed.nn.functional import all_reduce

    rows = torch.tensor(float(len(hidden)), device=hidden.device)
    torch.distributed.all_reduce(rows, group=group)
    mean = all_reduce(hidden.sum(dim=0), group=group) / rows
    centered = hidden - mean
    variance = all_reduce(centered.square().sum(dim=0), group=group) / rows
    with torch.no_grad():
        unbiased = variance * (rows / (rows - 1).clamp(min=1))
        for kept, seen in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            cast(Tensor, kept).lerp_(seen, cast(float, norm.momentum))
        cast(Tensor, norm.num_batches_tracked).add_(1)
    return centered * (variance + norm.eps).rsqrt() * norm.weight + norm.bias


def usae_code(positive: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of q [batch, N]: int64 latents and values, both [batch, k]."""
    top = positive.topk(k, dim=-1)
    return top.indices, top.values


def usae_losses(
    rows: Mapping[str, Tensor],
    positive: Mapping[str, Tensor],
    codes: Mapping[str, tuple[Selection, Tensor]],
    atoms: Mapping[str, Tensor],
    *,
    sources: Sequence[str],
    distance: str,
    auxk: int,
    auxk_coef: float,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return the terms of the loss, "loss" among them, and the reconstructions.

    For source s and target t, with D_t the atoms brought to unit norm, r = x_t - D_t z_s and v_s the `auxk` largest
    entries of q_s that are not in the code: |r| + auxk_coef |r - D_t v_s|, where |.| is the mean absolute ("l1") or
    mean squared ("l2") value. The loss is the sum over targets (it is not divided by their number), and its mean over
    sources; a training step of the paper has one source.

    Args:
        rows: stream -> x, [batch, d].
        positive: stream -> q, [batch, N], for the sources.
        codes: stream -> selection and values z [batch, k], for the sources.
        atoms: stream -> [N, d].
        sources: streams that are decoded to all others and to themselves.
        distance: "l1" or "l2".
        auxk: entries of v; the paper takes N // 2.
        auxk_coef: their weight; the paper takes 0.1.

    Returns:
        name -> scalar: "loss", "self", "cross", "auxk", "self/<stream>", "cross/<target><-<source>" and
        "auxk/<target><-<source>"; and target -> source -> reconstruction [batch, d].
    """
    unit = {name: unit_norm(value) for name, value in atoms.items()}
    terms: dict[str, Tensor] = {}
    decoded: dict[str, dict[str, Tensor]] = {target: {} for target in rows}
    total = next(iter(rows.values())).new_zeros(())
    for source in sources:
        selection, values = codes[source]
        left = positive[source].scatter(1, selection.indices, 0.0)
        kept = left.topk(min(auxk, left.shape[1]), dim=-1)
        more = torch.zeros_like(left).scatter(1, kept.indices, kept.values)
        for target, x in rows.items():
            decoded[target][source] = sparse_decode(values, unit[target], selection)
            residual = x - decoded[target][source]
            main = _mean_distance(residual, distance)
            auxiliary = _mean_distance(residual - more @ unit[target], distance)
            terms[f"self/{target}" if source == target else f"cross/{target}<-{source}"] = main
            terms[f"auxk/{target}<-{source}"] = auxiliary
            total = total + main + auxk_coef * auxiliary
    means = {kind: _mean_of(terms, kind) for kind in ("self", "cross", "auxk")}
    return {"loss": total / len(sources), **means, **terms}, decoded


def _mean_distance(residual: Tensor, distance: str) -> Tensor:
    return residual.abs().mean() if distance == "l1" else residual.square().mean()


def _mean_of(terms: Mapping[str, Tensor], kind: str) -> Tensor:
    chosen = [value for name, value in terms.items() if name.startswith(f"{kind}/")]
    return torch.stack(chosen).mean() if chosen else next(iter(terms.values())).new_zeros(())
