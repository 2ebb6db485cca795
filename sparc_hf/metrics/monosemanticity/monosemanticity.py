"""Monosemanticity: how alike a latent's top samples are to an encoder that had no part in choosing them."""

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.sparse import csr_array

_DESCRIPTION = """
Mean cosine similarity of every two of a latent's top samples under the features of an independent stream,
weighted by the product of the two activations (arXiv 2504.02821, monosemanticity score). 1: the samples look
the same to that encoder; 0: as unrelated as orthogonal rows; centre the features first where their rows lie in
a narrow cone.
"""

_CITATION = """
@article{monosemantic2025,
  title={Sparse Autoencoders Learn Monosemantic Features in Vision-Language Models},
  journal={arXiv preprint arXiv:2504.02821},
  year={2025}
}
"""

_INPUTS = """
Args:
    rows: for every latent the row numbers of its top samples, int64 [m]; -1 where it has fewer.
    values: for every latent their activations, float [m].
    features: of an independent stream, float [rows of the dataset, hidden_size].
Returns:
    per_latent: list of N cosines from -1 to 1, nan where a latent has fewer than two samples; mean: over the others,
    nan where there is none; latents: how many those are.
"""


COLUMNS_AT_ONCE = 64


def monosemanticity(rows: np.ndarray, values: np.ndarray, features: np.ndarray) -> dict[str, Any]:
    """Return the monosemanticity of every latent (arXiv 2504.02821).

    With unit features u and activations a, the score is the sum over pairs of a_i a_j u_i.u_j over the sum of a_i a_j,
    which needs no pair: both are a squared sum less its squares.

    Args:
        rows: int [N, m], row numbers of each latent's top samples, -1 where it has fewer.
        values: float [N, m], their activations, not negative.
        features: float [rows, hidden_size], of a stream that had no part in the activations.

    Returns:
        {"per_latent": float64 [N], nan for fewer than two samples, "mean": float, "latents": int}

    Raises:
        ValueError: for arrays that do not fit together, row numbers outside the features, activations that are
            negative or not finite, or features that are not finite.
    """
    rows, values, features = np.asarray(rows), np.asarray(values, np.float64), np.asarray(features)
    if rows.shape != values.shape or rows.ndim != 2 or features.ndim != 2 or features.dtype.kind not in "fiu":
        raise ValueError(
            "`rows` and `values` must both be [latents, m] and `features` numbers [rows, hidden_size], but they are "
            f"{list(rows.shape)}, {list(values.shape)} and {list(features.shape)} {features.dtype}"
        )
    if rows.dtype.kind not in "iu" or rows.min(initial=-1) < -1:
        raise ValueError("`rows` must hold row numbers, and -1 where a latent has fewer samples")
    if rows.max(initial=-1) >= len(features):
        raise ValueError(f"row {rows.max()} is named, but `features` has {len(features)} rows")
    if not np.isfinite(values).all() or values.min(initial=0) < 0:
        latent = int(np.flatnonzero(~np.isfinite(values).all(axis=1) | (values < 0).any(axis=1))[0])
        raise ValueError(f"activations must be 0 or more and finite, but those of latent {latent} are not")
    weights = np.where(rows >= 0, values, 0.0)
    latents, places = np.nonzero(weights > 0)
    strengths, samples = weights[latents, places], rows[latents, places]
    # A few columns at a time: in double precision the features of a large dataset would be copied whole.
    blocks = [slice(start, start + COLUMNS_AT_ONCE) for start in range(0, features.shape[1], COLUMNS_AT_ONCE)]
    lengths = np.sqrt(sum(np.square(features[:, block], dtype=np.float64).sum(axis=1) for block in blocks))
    if not np.isfinite(lengths).all():
        raise ValueError(f"row {int(np.flatnonzero(~np.isfinite(lengths))[0])} of `features` is not finite")
    unit_strengths = strengths / np.maximum(lengths[samples], 1e-12)
    spread = csr_array((unit_strengths, (latents, samples)), shape=(len(rows), len(features)))
    summed = sum(((spread @ features[:, block].astype(np.float64)) ** 2).sum(axis=1) for block in blocks)
    squares = np.bincount(latents, weights=strengths**2 * (lengths[samples] > 0), minlength=len(rows))
    pairs = weights.sum(axis=1) ** 2 - (weights**2).sum(axis=1)
    enough = (weights > 0).sum(axis=1) >= 2
    scores = np.full(len(rows), np.nan)
    scores[enough] = (summed - squares)[enough] / pairs[enough]
    mean = float(scores[enough].mean()) if enough.any() else float("nan")
    return {"per_latent": scores, "mean": mean, "latents": int(enough.sum())}


class Monosemanticity(evaluate.Metric):
    """`monosemanticity` behind the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        values = datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"rows": datasets.List(datasets.Value("int64")), "values": values}),
        )

    def _compute(self, rows, values, features) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            arrays = np.asarray(rows, np.int64), np.asarray(values, np.float64), np.asarray(features)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "every latent must name as many rows and values, and every feature row be as wide"
            ) from error
        figures = monosemanticity(*arrays)
        return figures | {"per_latent": figures["per_latent"].tolist()}
