"""How much latents of a model matter, and how evenly they fire across its streams, from its codes of a dataset."""

from collections.abc import Mapping
from typing import Any

from sparc_hf.metrics.concept_universality.concept_universality import concept_universality
from sparc_hf.modeling_sparc import SparcModel


def latent_universality(model: SparcModel, codes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `concept_universality` of a model's codes (Universal SAE, arXiv 2502.03714).

    Firing starts above the model's dead threshold. A latent's energy in a stream is its mean value times the norm of
    its atom as `decode` uses it, so with `objective="usae"` its mean value.

    Args:
        model: any objective.
        codes: stream -> its sparse codes [rows, N].

    Raises:
        ValueError: as `concept_universality`.
    """
    norms = {name: model.decoding_atoms(name).detach().float().norm(dim=1).cpu().numpy() for name in codes}
    return concept_universality(codes, atom_norms=norms, threshold=float(model.config.dead_threshold))
