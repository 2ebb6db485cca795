"""Dictionary stability: whether two runs learned the same atoms, and which atoms bridge two streams of one space."""

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from .checked_input import CSR, checked_matrix

_DESCRIPTION = """
Matches the atoms of two dictionaries one to one so that the sum of their cosine similarities is largest
(Hungarian algorithm), as stability of dictionaries is measured in Archetypal SAE (arXiv 2502.12892). stability:
mean cosine of the matched atoms; 1 is the same dictionary in any order. same_place: mean cosine of atoms of the
same number, without matching. Beside it, in Python, the bridge score of two streams whose rows lie in one
space, such as CLIP's images and texts (arXiv 2504.11695).
"""

_CITATION = """
@article{archetypal2025,
  title={Archetypal SAE: Adaptive and Stable Dictionary Learning for Concept Extraction in Large Vision Models},
  journal={arXiv preprint arXiv:2502.12892},
  year={2025}
}
@article{bridge2025,
  title={Interpreting the linear structure of vision-language model embedding spaces},
  journal={arXiv preprint arXiv:2504.11695},
  year={2025}
}
"""

_INPUTS = """
Args:
    predictions: for every latent its atom in one run, float [hidden_size].
    references: for every latent its atom in the other run, float [hidden_size].
Returns:
    stability, same_place: cosines from -1 to 1. match: for every latent of the first run its partner in the second.
    cosines: list of N, the cosine with the partner.
"""

# So that scores are [512, N] and never [N, N].
LATENTS_AT_ONCE = 512


def match_atoms(atoms: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """Match two dictionaries by the Hungarian algorithm on cosine similarity (arXiv 2502.12892, stability).

    Args:
        atoms: [N, hidden_size], one atom per latent; of any norm.
        others: [N, hidden_size], atoms of another run on the same stream.

    Returns:
        {"stability", "same_place": mean cosines, "match": int64 [N], "cosines": float64 [N]}

    Raises:
        ValueError: for dictionaries of different shapes, without atoms, or with NaN or infinite values.
    """
    if atoms.shape != others.shape or atoms.ndim != 2 or not len(atoms):
        raise ValueError(
            f"both dictionaries must be [latents, hidden_size], but they are {list(atoms.shape)}, {list(others.shape)}"
        )
    cosines = _unit_rows(atoms) @ _unit_rows(others).T
    rows, match = linear_sum_assignment(cosines, maximize=True)
    matched = cosines[rows, match]
    return {
        "stability": float(matched.mean()),
        "same_place": float(np.diagonal(cosines).mean()),
        "match": match,
        "cosines": matched,
    }


def bridge_scores(codes: CSR, others: CSR, atoms: np.ndarray, other_atoms: np.ndarray) -> dict[str, Any]:
    """Return how much latents bridge two streams of one space (arXiv 2504.11695, bridge score).

    The score of latent i of one stream and j of the other is mean over rows of z_i z'_j, times the cosine of their
    atoms: high where they fire on the same samples and point the same way.

    Args:
        codes: sparse [rows, N], of one stream.
        others: sparse [rows, N], of the other stream for the same samples.
        atoms: [N, hidden_size], of the first stream.
        other_atoms: [N, hidden_size], of the other stream; the same space.

    Returns:
        {"bridge": float64 [N], the scores of each latent of the first stream summed over those of the other,
        "own": float64 [N], the part with itself, "own_share": the latter's share of all positive scores, nan where
        there are none}

    Raises:
        ValueError: for codes or atoms that do not pair up, or hold indices or values that do not fit.
    """
    codes, others = checked_matrix(codes, "the codes"), checked_matrix(others, "the other codes")
    if codes.shape != others.shape or not codes.shape[0]:
        raise ValueError(f"the codes must be of the same samples and latents, but are {codes.shape}, {others.shape}")
    if atoms.shape != other_atoms.shape or len(atoms) != codes.shape[1]:
        raise ValueError(
            f"the atoms must be [{codes.shape[1]}, hidden_size] of one space, but are {list(atoms.shape)}, "
            f"{list(other_atoms.shape)}"
        )
    units, other_units = _unit_rows(atoms), _unit_rows(other_atoms)
    by_latent = csr_array(codes.T.tocsr())
    bridge, own, positive = np.zeros(len(atoms)), np.zeros(len(atoms)), 0.0
    for start in range(0, len(atoms), LATENTS_AT_ONCE):
        stop = min(start + LATENTS_AT_ONCE, len(atoms))
        together = (by_latent[start:stop] @ others).toarray() / codes.shape[0]
        scores = together * (units[start:stop] @ other_units.T)
        bridge[start:stop] = scores.sum(axis=1)
        own[start:stop] = scores[np.arange(stop - start), np.arange(start, stop)]
        positive += float(scores.clip(min=0).sum())
    share = float(own.clip(min=0).sum() / positive) if positive > 0 else float("nan")
    return {"bridge": bridge, "own": own, "own_share": share}


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise ValueError(f"atom {int(np.flatnonzero(~np.isfinite(norms))[0])} holds NaN or infinite values")
    return rows / np.maximum(norms, 1e-12)


class DictionaryStability(evaluate.Metric):
    """`match_atoms` behind the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": rows, "references": rows}),
        )

    def _compute(self, predictions, references) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            atoms, others = (np.asarray(rows, np.float64).reshape(len(rows), -1) for rows in (predictions, references))
        except (TypeError, ValueError) as error:
            raise ValueError("every atom must have the same number of values") from error
        figures = match_atoms(atoms, others)
        return figures | {"match": figures["match"].tolist(), "cosines": figures["cosines"].tolist()}
