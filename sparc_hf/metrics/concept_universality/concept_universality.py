"""Concept universality: how evenly a latent fires across streams, how often in all at once, and with what energy."""

import functools
from collections.abc import Mapping
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.sparse import csr_array

from .checked_input import CSR, checked_streams, codes_of_streams

_DESCRIPTION = """
Per latent, from the rows on which its value exceeds a threshold in each stream (Universal SAE, arXiv
2502.03714, universality and importance of concepts). entropy: firing entropy, -sum_m p_m log2 p_m / log2 M with
p_m the share of its firings that are in stream m; 0 is one stream only, 1 all streams alike, and 0 where it
never fires. cofires: rows on which all streams fire. cofire_proportion: cofires over the firings of a stream.
cofire_iou: cofires over the sum of firings of all streams, at most 1 / M, as the authors' code has it.
cofire_jaccard: cofires over the rows on which any stream fires, from 0 to 1. energy: mean value times the norm
of the atom, per stream and summed.
"""

_CITATION = """
@article{usae2025,
  title={Universal Sparse Autoencoders: Interpretable Cross-Model Concept Alignment},
  journal={arXiv preprint arXiv:2502.03714},
  year={2025}
}
"""

_INPUTS = """
Args:
    indices: for every row int32 [streams, k], the selected latents.
    values: for every row float [streams, k], their values.
    num_latents: N.
    streams: names of the streams (default "0", "1", ...).
    threshold: a latent fires where its value is larger (default 0.1).
Returns:
    entropy, cofire_iou, cofire_jaccard: lists of N numbers from 0 to 1; cofires: list of N numbers of rows;
    fires: stream -> list of N numbers of rows; cofire_proportion: stream -> list of N shares;
    energies: stream -> list of N, in units of the values, for atoms of unit norm; energy: their sum.
"""

# As in the authors' code: keeps a latent that never fires at 0.
EPS = 1e-10


def concept_universality(
    codes: Mapping[str, CSR], *, atom_norms: Mapping[str, np.ndarray] | None = None, threshold: float = 0.1
) -> dict[str, Any]:
    """Return universality figures of every latent (Universal SAE, arXiv 2502.03714).

    Args:
        codes: stream -> sparse [rows, N], non-negative.
        atom_norms: stream -> norms of the atoms [N]; 1 by default.
        threshold: a latent fires where its value is larger.

    Returns:
        {"entropy", "cofire_iou", "cofire_jaccard": float64 [N], "cofires": int64 [N], "fires": stream -> int64 [N],
        "cofire_proportion": stream -> float64 [N], "energies": stream -> float64 [N], "energy": float64 [N]}

    Raises:
        ValueError: for streams of different shapes, no rows, indices, values or norms that do not fit, or a negative
            or undefined threshold.
    """
    codes = checked_streams(codes)
    if not threshold >= 0:
        raise ValueError(f"`threshold` must not be negative or NaN, but it is {threshold}")
    rows, latents = next(iter(codes.values())).shape
    norms = _checked_norms(atom_norms, list(codes), latents)
    firing = {stream: _firing(matrix, threshold) for stream, matrix in codes.items()}
    fires = {stream: np.bincount(matrix.indices, minlength=latents) for stream, matrix in firing.items()}
    together = functools.reduce(lambda first, second: first.multiply(second).tocsr(), firing.values())
    either = functools.reduce(lambda first, second: first.maximum(second).tocsr(), firing.values())
    cofires, anywhere = (np.bincount(csr_array(matrix).indices, minlength=latents) for matrix in (together, either))
    total = np.sum(list(fires.values()), axis=0)
    shares = np.stack(list(fires.values())) / (total + EPS)
    entropy = -(shares * np.log2(shares + EPS)).sum(axis=0) / max(np.log2(len(codes)), EPS)
    energies = {
        stream: np.bincount(matrix.indices, weights=matrix.data, minlength=latents) / rows * norms[stream]
        for stream, matrix in codes.items()
    }
    return {
        "entropy": entropy.clip(0, 1) if len(codes) > 1 else np.zeros(latents),
        "cofires": cofires,
        "fires": fires,
        "cofire_proportion": {stream: cofires / (fired + EPS) for stream, fired in fires.items()},
        "cofire_iou": cofires / (total + EPS),
        "cofire_jaccard": cofires / (anywhere + EPS),
        "energies": energies,
        "energy": np.sum(list(energies.values()), axis=0),
    }


def _checked_norms(norms: Mapping[str, np.ndarray] | None, streams: list[str], latents: int) -> dict[str, np.ndarray]:
    if norms is None:
        return dict.fromkeys(streams, np.ones(latents))
    if missing := [stream for stream in streams if stream not in norms]:
        raise ValueError(f"there are atom norms of {list(norms)}, but none of {missing}")
    checked = {stream: np.asarray(norms[stream], np.float64) for stream in streams}
    for stream, values in checked.items():
        if values.shape != (latents,) or not np.isfinite(values).all():
            raise ValueError(f"the atom norms of `{stream}` must be {latents} finite numbers")
    return checked


def _firing(codes: CSR, threshold: float) -> CSR:
    fired = csr_array(((codes.data > threshold).astype(np.int8), codes.indices, codes.indptr), codes.shape, copy=True)
    fired.eliminate_zeros()
    fired.sum_duplicates()
    return fired


class ConceptUniversality(evaluate.Metric):
    """`concept_universality` behind the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        latents = datasets.List(datasets.List(datasets.Value("int32")))
        strengths = datasets.List(datasets.List(datasets.Value("float32")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"indices": latents, "values": strengths}),
        )

    def _compute(self, indices, values, num_latents, streams=None, threshold=0.1) -> dict:  # pyright: ignore[reportIncompatibleMethodOverride]
        codes = codes_of_streams(indices, values, num_latents, streams)
        figures = concept_universality(codes, threshold=threshold)
        return {
            name: {stream: array.tolist() for stream, array in value.items()}
            if isinstance(value, dict)
            else value.tolist()
            for name, value in figures.items()
        }
