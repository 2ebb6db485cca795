"""The training objective over codes and reconstructions, as named terms (SPARC, arXiv 2507.06265)."""

from collections.abc import Mapping

import torch
from torch import Tensor


def mean_square(rows: Tensor) -> Tensor:
    """Return [batch]: the mean over columns of rows [batch, d] squared."""
    return rows.pow(2).mean(dim=-1)


def nmse(reconstruction: Tensor, rows: Tensor, energy: Tensor | None = None) -> Tensor:
    """Return the normalised mean squared error, mean over rows of mean_d (a - x)^2 / mean_d x^2.

    Args:
        reconstruction: a, [..., batch, d]; leading dimensions are kept.
        rows: x, [batch, d].
        energy: [batch], mean_d x^2, where it is at hand already.
    """
    return (mean_square(reconstruction - rows) / (mean_square(rows) if energy is None else energy)).mean(dim=-1)


def sparc_losses(
    rows: Mapping[str, Tensor],
    reconstructions: Mapping[str, Tensor],
    auxiliary: Mapping[str, Tensor],
    pre_biases: Mapping[str, Tensor],
    *,
    cross_coef: float,
    auxk_coef: float,
) -> dict[str, Tensor]:
    """Return the terms of the SPARC loss, "loss" among them.

    loss = mean_s nmse(x^(s<-s), x_s) + cross_coef * mean_{s != t} nmse(x^(t<-s), x_t)
         + auxk_coef * mean_s nmse(aux_s, stop(x_s - x^(s<-s) + b_s))

    A row that is reconstructed exactly has no residual and adds 0 to the auxiliary term.

    Args:
        rows: stream -> normalised features [batch, d].
        reconstructions: target -> [sources, batch, d of the target], the sources in the order of `rows`; or of the
            target itself alone, [1, batch, d].
        auxiliary: stream -> decoded dead latents [batch, d]; a stream in which nothing is dead is left out, and its
            term is 0.
        pre_biases: stream -> [d].
        cross_coef: weight of the cross term.
        auxk_coef: weight of the auxiliary term.

    Returns:
        name -> scalar: "loss", "self", "cross", "auxk", "self/<stream>", "cross/<target><-<source>" and
        "auxk/<stream>".
    """
    zero = next(iter(rows.values())).new_zeros(())
    terms: dict[str, Tensor] = {}
    for target, stacked in reconstructions.items():
        sources = list(rows) if len(stacked) > 1 else [target]
        for source, term in zip(sources, nmse(stacked, rows[target]).unbind(), strict=True):
            terms[f"self/{target}" if source == target else f"cross/{target}<-{source}"] = term
    for name, value in rows.items():
        terms[f"auxk/{name}"] = zero
        if name in auxiliary:
            stacked = reconstructions[name]
            own = stacked[list(rows).index(name) if len(stacked) > 1 else 0]
            residual = (value - own + pre_biases[name]).detach()
            terms[f"auxk/{name}"] = _residual_nmse(auxiliary[name], residual)
    means = {kind: _mean_of(terms, f"{kind}/", zero) for kind in ("self", "cross", "auxk")}
    loss = means["self"] + cross_coef * means["cross"] + auxk_coef * means["auxk"]
    return {"loss": loss, **means, **terms}


def _residual_nmse(reconstruction: Tensor, residual: Tensor) -> Tensor:
    """Nmse in which a row without any residual, reconstructed exactly, counts 0 instead of 0/0."""
    energy = mean_square(residual)
    explained = energy > 0
    ratio = mean_square(reconstruction - residual) / torch.where(explained, energy, torch.ones_like(energy))
    return torch.where(explained, ratio, torch.zeros_like(ratio)).mean()


def _mean_of(terms: Mapping[str, Tensor], prefix: str, zero: Tensor) -> Tensor:
    chosen = [value for key, value in terms.items() if key.startswith(prefix)]
    return torch.stack(chosen).mean() if chosen else zero
