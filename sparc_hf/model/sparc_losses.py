"""The terms of the SPARC loss, from the errors of codes (arXiv 2507.06265)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .present_rows import PresentRows


def sparc_losses(
    energies: Mapping[str, Tensor],
    errors: Mapping[str, Mapping[str, Tensor]],
    auxiliary: Mapping[str, tuple[Tensor, Tensor]],
    *,
    cross_coef: float,
    auxk_coef: float,
    present: PresentRows | None = None,
) -> dict[str, Tensor]:
    """Return the terms of the SPARC loss, "loss" among them.

    loss = mean_s nmse(x^(s<-s), x_s) + cross_coef * mean_{s != t} nmse(x^(t<-s), x_t)
         + auxk_coef * mean_s nmse(aux_s, stop(x_s - x^(s<-s) + b_s))

    where nmse(a, x) is the mean over rows of |a - x|^2 / |x|^2. A row that is reconstructed exactly has no residual
    and adds 0 to the auxiliary term. Where rows lack streams, each mean is over the rows that have
    both its streams, and a pair that no row has is left out.

    Args:
        energies: stream -> |x|^2 of its normalised rows, [batch].
        errors: target -> source -> |x^(t<-s) - x_t|^2, [batch].
        auxiliary: stream -> squared errors of the decoded dead latents, and the squared norms of the residuals they
            are compared with, both [batch]; a stream in which nothing is dead is left out, and its term is 0.
        cross_coef: weight of the cross term.
        auxk_coef: weight of the auxiliary term.
        present: which rows have which streams; all have all by default.

    Returns:
        name -> scalar: "loss", "self", "cross", "auxk", "self/<stream>", "cross/<target><-<source>" and
        "auxk/<stream>".
    """
    zero = next(iter(energies.values())).new_zeros(())
    terms: dict[str, Tensor] = {}
    for target, all_sources in errors.items():
        sources = {
            source: squared
            for source, squared in all_sources.items()
            if present is None or not present.never_both(source, target)
        }
        if not sources:
            continue
        # All sources of a target at once: one division and one mean for them.
        ratios = torch.stack(list(sources.values())) / energies[target]
        if present is not None:
            ratios = ratios * present.weights(sources, target, like=ratios)
        for source, term in zip(sources, ratios.mean(dim=-1).unbind(), strict=True):
            terms[f"self/{target}" if source == target else f"cross/{target}<-{source}"] = term
    for name in energies:
        terms[f"auxk/{name}"] = zero
        if name in auxiliary:
            ratios = _residual_nmse(*auxiliary[name])
            weights = 1 if present is None else present.weights([name], name, like=ratios)[0]
            terms[f"auxk/{name}"] = (ratios * weights).mean()
    means = {kind: _mean_of(terms, f"{kind}/", zero) for kind in ("self", "cross", "auxk")}
    loss = means["self"] + cross_coef * means["cross"] + auxk_coef * means["auxk"]
    return {"loss": loss, **means, **terms}


def _residual_nmse(errors: Tensor, energy: Tensor) -> Tensor:
    """Return [batch], in which a row without any residual, reconstructed exactly, counts 0 instead of 0/0."""
    explained = energy > 0
    ratio = errors / torch.where(explained, energy, torch.ones_like(energy))
    return torch.where(explained, ratio, torch.zeros_like(ratio))


def _mean_of(terms: Mapping[str, Tensor], prefix: str, zero: Tensor) -> Tensor:
    terms_of_kind = [value for key, value in terms.items() if key.startswith(prefix)]
    return torch.stack(terms_of_kind).mean() if terms_of_kind else zero
