"""Reconstruction: how near decoded codes come to the features of each target stream, from each source stream."""

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Four figures for every (target, source) pair of streams, from rows x and reconstructions y of the target decoded
from the source's codes. nmse: mean over rows of |y - x|^2 / |x|^2 (SPARC, arXiv 2507.06265; 0 is perfect, 1 no
better than zero). fvu: sum of |y - x|^2 over the sum of |x - mean row|^2 (0 is perfect, 1 no better than the
mean row). r2: 1 - mean (x - y)^2 / (mean (x - m)^2 + 1e-6) with m one number, the mean over all rows and
columns (Universal SAE, arXiv 2502.03714). cosine: mean over rows of the cosine similarity of x and y (0 where y
is zero).
"""

_CITATION = """
@article{sparc2025,
  title={SPARC: Concept-Aligned Sparse Autoencoders for Cross-Model and Cross-Modal Interpretability},
  journal={arXiv preprint arXiv:2507.06265},
  year={2025}
}
@article{usae2025,
  title={Universal Sparse Autoencoders: Interpretable Cross-Model Concept Alignment},
  journal={arXiv preprint arXiv:2502.03714},
  year={2025}
}
"""

_INPUTS = """
Args:
    predictions: for every row and pair, the reconstruction: float [hidden_size of the target].
    references: the row itself, as the model normalises it: float [hidden_size of the target].
    targets: the target stream of every entry (default: one stream "target").
    sources: the source stream of every entry (default: one stream "source").
Returns:
    nmse, fvu, r2, cosine: each target -> source -> number without unit. fvu is nan where all rows are equal.
"""

FIGURES = ("nmse", "fvu", "r2", "cosine")


def row_terms(originals: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Return float64 [rows, 5]: per row |y - x|^2, |x|^2, |y|^2, x.y and the sum of x.

    Args:
        originals: [rows, hidden_size], x.
        reconstructions: [rows, hidden_size], y.

    Raises:
        ValueError: for arrays of other shapes, or a row with NaN or infinite values.
    """
    if originals.shape != reconstructions.shape or originals.ndim != 2:
        raise ValueError(
            "originals and reconstructions must both be [rows, hidden_size], but they are "
            f"{list(originals.shape)} and {list(reconstructions.shape)}"
        )
    x, y = originals.astype(np.float64), reconstructions.astype(np.float64)
    with np.errstate(invalid="ignore"):  # told below
        sums = [np.einsum("ij,ij->i", first, second) for first, second in ((y - x, y - x), (x, x), (y, y), (x, y))]
        terms = np.stack([*sums, x.sum(axis=1)], axis=1)
    if not np.isfinite(terms).all():
        row = int(np.flatnonzero(~np.isfinite(terms).all(axis=1))[0])
        name = "the original" if not np.isfinite(x[row]).all() else "the reconstruction"
        raise ValueError(f"{name} in row {row} holds NaN or infinite values")
    return terms


def figures_of_terms(terms: np.ndarray, mean_row: np.ndarray) -> dict[str, float]:
    """Return nmse, fvu, r2 and cosine of one pair.

    Args:
        terms: [rows, 5], from `row_terms`, of as many calls as it took.
        mean_row: [hidden_size], the mean of the originals.

    Raises:
        ValueError: for no rows, or naming a row of zeros, whose relative error is undefined.
    """
    if not len(terms):
        raise ValueError("figures of a reconstruction need at least one row")
    error, norm, other_norm, product, total = np.asarray(terms, np.float64).T
    if (norm == 0).any():
        raise ValueError(f"row {int(np.flatnonzero(norm == 0)[0])} holds only zeros; leave such rows out")
    rows, width = len(terms), len(mean_row)
    deviation = norm.sum() - rows * float(np.dot(mean_row, mean_row))
    spread = norm.sum() / (rows * width) - (total.sum() / (rows * width)) ** 2
    # What is left of equal rows is rounding.
    fvu = error.sum() / deviation if deviation > 1e-12 * norm.sum() else np.nan
    lengths = np.sqrt(norm * other_norm)
    return {
        "nmse": float((error / norm).mean()),
        "fvu": float(fvu),
        "r2": float(1 - error.sum() / (rows * width) / (spread + 1e-6)),
        "cosine": float(np.divide(product, lengths, out=np.zeros(rows), where=lengths > 0).mean()),
    }


def reconstruction(
    originals: Mapping[str, np.ndarray], reconstructions: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return figure -> target -> source -> number, for nmse, fvu, r2 and cosine.

    Args:
        originals: target -> rows [rows, hidden_size of the target], normalised as the model does.
        reconstructions: target -> source -> [rows, hidden_size of the target].

    Raises:
        ValueError: for a target without originals, arrays of other shapes, or a row of zeros.
    """
    if missing := sorted(set(reconstructions) - set(originals)):
        raise ValueError(f"there are reconstructions of {missing}, but originals only of {list(originals)}")
    figures: dict[str, dict[str, dict[str, float]]] = {name: {} for name in FIGURES}
    for target, sources in reconstructions.items():
        for source, rows in sources.items():
            terms = row_terms(originals[target], rows)
            mean_row = originals[target].sum(axis=0, dtype=np.float64) / max(len(terms), 1)
            for name, value in figures_of_terms(terms, mean_row).items():
                figures[name].setdefault(target, {})[source] = value
    return figures


def _dense_rows(rows: list, target: str) -> np.ndarray:
    try:
        return np.asarray(rows, np.float64).reshape(len(rows), -1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"every row of `{target}` must have the same number of values") from error


class Reconstruction(evaluate.Metric):
    """`reconstruction` behind the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": rows, "references": rows}),
        )

    def _compute(self, predictions, references, targets=None, sources=None) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        targets = targets or ["target"] * len(predictions)
        sources = sources or ["source"] * len(predictions)
        if not len(targets) == len(sources) == len(predictions):
            raise ValueError(
                f"{len(predictions)} entries need as many targets and sources, not {len(targets)} and {len(sources)}"
            )
        entries: dict[tuple[str, str], list[int]] = {}
        for position, pair in enumerate(zip(targets, sources, strict=True)):
            entries.setdefault(pair, []).append(position)
        figures: dict[str, Any] = {name: {} for name in FIGURES}
        for (target, source), positions in entries.items():
            x, y = (_dense_rows([rows[at] for at in positions], target) for rows in (references, predictions))
            for name, matrix in reconstruction({target: x}, {target: {source: y}}).items():
                figures[name].setdefault(target, {})[source] = matrix[target][source]
        return figures
