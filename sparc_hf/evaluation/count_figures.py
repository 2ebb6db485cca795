"""Figures made from counts over rows, of all rows or without some: the share of dead latents, the label Jaccard."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sparc_hf.evaluation.intervals import Figure, jackknife_figure, plain_figure
from sparc_hf.metrics.concept_alignment.concept_alignment import jaccard_of_counts, label_counts, labelled_rows

BOUNDS = (0.0, 1.0)


class CountFigures:
    """Counts over all rows, from which a group of rows can be taken out again without counting the others.

    Args:
        codes: stream -> sparse codes [rows, N].
        labels: sparse 0/1 [rows, classes], or None.
    """

    def __init__(self, codes: Mapping[str, Any], labels: Any = None):
        self.codes, self.labels = codes, labels
        self.fires = {stream: _fires(matrix) for stream, matrix in codes.items()}
        self.num_latents = len(next(iter(self.fires.values())))
        if labels is not None:
            self.counts, self.active = self._label_counts(np.arange(labels.shape[0]))
            self.scores = jaccard_of_counts(self.counts, _positive(self.active))

    def figures(self) -> dict[str, float]:
        """Return "dead_share", the mean over streams of the share of latents that fire on no row, and with labels
        "jaccard" and "jaccard_live", the mean label Jaccard over all latents and over those active in two streams."""
        figures = {"dead_share": _dead_share(self.fires)}
        return figures if self.labels is None else figures | _jaccards(self.scores, self.active)

    def without(self, rows: np.ndarray) -> dict[str, float]:
        """Return the figures of all rows but these, int [rows left out]."""
        fires = {stream: self.fires[stream] - _fires(matrix[rows]) for stream, matrix in self.codes.items()}
        figures = {"dead_share": _dead_share(fires)}
        if self.labels is None:
            return figures
        counts, active = self._label_counts(rows)
        touched = np.flatnonzero(np.sum(list(active.values()), axis=0))
        left = {stream: self.active[stream] - active[stream] for stream in active}
        scores = self.scores.copy()
        scores[touched] = jaccard_of_counts(
            {stream: self.counts[stream][touched] - counts[stream][touched] for stream in counts},
            {stream: firing[touched] > 0 for stream, firing in left.items()},
        )
        return figures | _jaccards(scores, left)

    def with_intervals(self, groups: Iterable[np.ndarray]) -> dict[str, Figure]:
        """Return the figures with intervals from leaving out each group of rows; without groups, plain."""
        left_out = [self.without(rows) for rows in groups]
        # The spread of one latent that fires once: where none does, the data cannot show it.
        return {
            name: jackknife_figure(
                value,
                np.array([figures[name] for figures in left_out]),
                bounds=BOUNDS,
                least_spread=1 / self.num_latents if name == "dead_share" else 0.0,
            )
            if left_out
            else plain_figure(value)
            for name, value in self.figures().items()
        }

    def _label_counts(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return stream -> counts [N, classes] and stream -> labelled rows a latent fires on [N], over some rows."""
        labels = self.labels[rows]
        labelled = labelled_rows(labels)
        counts, active = {}, {}
        for stream, matrix in self.codes.items():
            codes = matrix[rows]
            counts[stream], _ = label_counts(codes, labels)
            active[stream] = _fires(codes[np.flatnonzero(labelled)])
        return counts, active


def _fires(codes: Any) -> np.ndarray:
    """Return int64 [N], on how many rows each latent fires."""
    return np.bincount(codes.indices[codes.data > 0], minlength=codes.shape[1])


def _dead_share(fires: Mapping[str, np.ndarray]) -> float:
    return float(np.mean([(rows == 0).mean() for rows in fires.values()]))


def _jaccards(scores: np.ndarray, active: Mapping[str, np.ndarray]) -> dict[str, float]:
    live = np.sum(list(_positive(active).values()), axis=0) >= 2
    return {
        "jaccard": float(scores.mean()),
        "jaccard_live": float(scores[live].mean()) if live.any() else float("nan"),
    }


def _positive(counts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {stream: values > 0 for stream, values in counts.items()}
