"""Latent liveness: which latents fire at all, in which streams, and how often."""

import itertools
from collections.abc import Mapping
from typing import Any

import datasets
import evaluate
import numpy as np

from .checked_input import CSR, checked_streams, codes_of_streams

_DESCRIPTION = """
Counts latents by the streams in which they are alive, that is, fire on at least one of the given samples: dead
in all, alive in all, and every pattern of some but not all streams (SPARC, arXiv 2507.06265, dead and alive
latents), with the dead latents of every stream and a histogram of how often latents fire.
"""

_CITATION = """
@article{sparc2025,
  title={SPARC: Concept-Aligned Sparse Autoencoders for Cross-Model and Cross-Modal Interpretability},
  journal={arXiv preprint arXiv:2507.06265},
  year={2025}
}
"""

_INPUTS = """
Args:
    indices: for every sample int32 [streams, k], the selected latents.
    values: for every sample float [streams, k], their values.
    num_latents: N.
    streams: names of the streams (default "0", "1", ...).
    threshold: a latent fires where its value is larger (default 0).
Returns:
    dead, alive_in_all: numbers of latents.
    alive_in: list, at position n the number of latents alive in exactly n streams.
    patterns: "a+b" -> number of latents alive in just these streams, for the patterns that occur.
    dead_in: stream -> number of latents that never fire there.
    frequency: stream -> list of N shares of samples, from 0 to 1.
    histogram: {"edges": shares of samples, "counts": stream -> live latents between two edges}.
"""

# Quarter decades; rarer latents than one in a million samples stand in the first bin.
FREQUENCY_EDGES = np.logspace(-6, 0, 25)


def latent_liveness(codes: Mapping[str, CSR], *, threshold: float = 0.0) -> dict[str, Any]:
    """Return how many latents are alive where (SPARC, arXiv 2507.06265).

    Args:
        codes: stream -> sparse [rows, N].
        threshold: a latent fires where its value is larger.

    Returns:
        {"dead", "alive_in_all": int, "alive_in": list of streams + 1 numbers, "patterns": "a+b" -> int,
        "dead_in": stream -> int, "frequency": stream -> float64 [N] shares of rows,
        "histogram": {"edges": float64 [bins + 1], "counts": stream -> int64 [bins]}}

    Raises:
        ValueError: for streams of different shapes, no rows, indices or values that do not fit, or a negative or
            undefined threshold.
    """
    codes = checked_streams(codes)
    if not threshold >= 0:
        raise ValueError(f"`threshold` must not be negative or NaN, but it is {threshold}")
    rows, latents = next(iter(codes.values())).shape
    frequency = {
        stream: np.bincount(matrix.indices[matrix.data > threshold], minlength=latents) / rows
        for stream, matrix in codes.items()
    }
    alive = np.stack([share > 0 for share in frequency.values()])
    streams = list(codes)
    patterns = {}
    for pattern, count in zip(*np.unique(alive.T, axis=0, return_counts=True), strict=True):
        if 0 < pattern.sum() < len(streams):
            patterns["+".join(itertools.compress(streams, pattern))] = int(count)
    floor = FREQUENCY_EDGES[0]
    counts = {
        stream: np.histogram(np.maximum(share[share > 0], floor), FREQUENCY_EDGES)[0]
        for stream, share in frequency.items()
    }
    return {
        "dead": int((~alive.any(axis=0)).sum()),
        "alive_in_all": int(alive.all(axis=0).sum()),
        "alive_in": np.bincount(alive.sum(axis=0), minlength=len(streams) + 1).tolist(),
        "patterns": patterns,
        "dead_in": {stream: int((share == 0).sum()) for stream, share in frequency.items()},
        "frequency": frequency,
        "histogram": {"edges": FREQUENCY_EDGES, "counts": counts},
    }


class LatentLiveness(evaluate.Metric):
    """`latent_liveness` behind the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        latents = datasets.List(datasets.List(datasets.Value("int32")))
        strengths = datasets.List(datasets.List(datasets.Value("float32")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"indices": latents, "values": strengths}),
        )

    def _compute(self, indices, values, num_latents, streams=None, threshold=0.0) -> dict:  # pyright: ignore[reportIncompatibleMethodOverride]
        codes = codes_of_streams(indices, values, num_latents, streams)
        figures = latent_liveness(codes, threshold=threshold)
        counts = {stream: count.tolist() for stream, count in figures["histogram"]["counts"].items()}
        return figures | {
            "frequency": {stream: share.tolist() for stream, share in figures["frequency"].items()},
            "histogram": {"edges": figures["histogram"]["edges"].tolist(), "counts": counts},
        }
