"""Concept probe: how well one latent tells a class, and how well all features together tell all classes."""

from collections.abc import Sequence
from typing import Any, cast

import datasets
import evaluate
import numpy as np
import torch
from scipy.sparse import csr_array, issparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss
from sklearn.model_selection import train_test_split

from .checked_input import CSR, checked_labels, checked_matrix, class_matrix, codes_of_samples

_DESCRIPTION = """
One-latent probes: for every class, a logistic regression on the value of a single latent, fitted on as many
samples with the class as without it (70 % to fit, 15 % to choose the latent, 15 % to measure), after Gao et al.
(arXiv 2406.04093, probe loss) as in SPARC (arXiv 2507.06265). The candidates are the 20 latents that are active
most often together with the class, the one with the lowest validation loss is measured. loss: cross-entropy in
nats, 0.693 is chance; accuracy: 0.5 is chance; ap: average precision, 0.5 is chance. Beside it, in Python, a
linear multi-label classifier on any features.
"""

_CITATION = """
@article{gao2024,
  title={Scaling and evaluating sparse autoencoders},
  journal={arXiv preprint arXiv:2406.04093},
  year={2024}
}
@article{sparc2025,
  title={SPARC: Concept-Aligned Sparse Autoencoders for Cross-Model and Cross-Modal Interpretability},
  journal={arXiv preprint arXiv:2507.06265},
  year={2025}
}
"""

_INPUTS = """
Args:
    indices: for every sample int32 [k], the selected latents of one stream.
    values: for every sample float [k], their values.
    labels: for every sample the list of its class ids.
    num_latents: N.
    num_classes: number of classes.
    min_count: only classes with more positive (and as many negative) samples are probed (default 50).
    seed: of the drawn negatives and the splits (default 0).
Returns:
    mean_loss, mean_accuracy, mean_ap: over the probed classes, nan where there are none.
    classes: list of class ids; latent, loss, accuracy, ap: lists, one entry per class.
"""

CANDIDATES = 20
# The rows with a class are split in three, each half with and half without it: fewer leave a part without one.
FEWEST_POSITIVES = 6
FITTED_SHARE, HELD_OUT_SHARE = 0.7, 0.3
BATCH_ROWS = 256
STEPS_BETWEEN_CHOICES = 100


def probed_classes(labels: CSR, min_count: int = 50) -> np.ndarray:
    """Return int64: classes that more than `min_count` rows have and as many lack; labels are [rows, classes]."""
    positives = np.bincount(labels.indices, minlength=labels.shape[1])
    return np.flatnonzero((positives > min_count) & (labels.shape[0] - positives > min_count))


def probe_rows(labels: CSR, class_id: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows to fit on, to choose by and to measure on, each half with and half without the class.

    All rows with the class are used, and as many drawn ones without it; where fewer lack it, the other way round.

    Args:
        labels: sparse 0/1 [rows, classes].
        class_id: the class.
        seed: added to the class id in every draw.
    """
    present = np.bincount(_rows_of(labels, class_id), minlength=labels.shape[0]) > 0
    positives, negatives = np.flatnonzero(present), np.flatnonzero(~present)
    draws = np.random.RandomState(1000 + class_id + seed)
    count = min(len(positives), len(negatives))
    if len(positives) > count:
        positives = draws.choice(positives, count, replace=False)
    negatives = draws.choice(negatives, count, replace=False)
    rows = np.concatenate([positives, negatives])
    has = np.repeat([1, 0], count)
    # Both shares are given, as in the earlier notebook: rounding may leave one row over.
    fitted, others, _, held_out = train_test_split(
        rows,
        has,
        train_size=FITTED_SHARE,
        test_size=HELD_OUT_SHARE,
        stratify=has,
        random_state=2000 + class_id + seed,
    )
    validation, test = train_test_split(others, test_size=0.5, stratify=held_out, random_state=3000 + class_id + seed)
    return np.asarray(fitted), np.asarray(validation), np.asarray(test)


def concept_probe(codes: CSR, labels: CSR, *, min_count: int = 50, seed: int = 0) -> dict[str, Any]:
    """Return the one-latent probes of one stream (arXiv 2406.04093, probe loss; arXiv 2507.06265).

    Args:
        codes: sparse [rows, N].
        labels: sparse 0/1 [rows, classes].
        min_count: see `probed_classes`.
        seed: see `probe_rows`.

    Returns:
        {"classes", "latent": int64 [probed], "loss", "accuracy", "ap": float64 [probed], and "mean_loss",
        "mean_accuracy", "mean_ap", nan where nothing is probed}. A class none of whose rows to fit on has an active
        latent has latent -1 and the figures of chance.

    Raises:
        ValueError: for labels of another number of rows, indices or values that do not fit, or a `min_count` that
            leaves too few rows to split.
    """
    codes = checked_matrix(codes, "the codes")
    labels = checked_labels(labels, codes.shape[0])
    if min_count < FEWEST_POSITIVES - 1:
        raise ValueError(
            f"`min_count` must be at least {FEWEST_POSITIVES - 1}, because fewer rows cannot be split in three, "
            f"but it is {min_count}"
        )
    classes = probed_classes(labels, min_count)
    active = csr_array(((codes.data > 0).astype(np.float32), codes.indices, codes.indptr), shape=codes.shape)
    together = (labels.T.tocsr().astype(np.float32) @ active).tocsr()
    probes = [_probe(codes, labels, int(task), together[[task]].toarray()[0], seed) for task in classes]
    columns = np.array(probes, dtype=np.float64).reshape(-1, 4).T
    figures = dict(zip(("loss", "accuracy", "ap"), columns[1:], strict=True))
    means = {f"mean_{name}": float(values.mean()) if len(values) else float("nan") for name, values in figures.items()}
    return {"classes": classes, "latent": columns[0].astype(np.int64), **figures, **means}


def classify(
    rows: Any, labels: CSR, split: Sequence[np.ndarray], *, steps: int = 1500, seed: int = 0
) -> dict[str, Any]:
    """Train a linear multi-label classifier and return its average precision on rows it has not seen.

    The layer is trained by Adam on the binary cross-entropy; of its states every 100 steps, the one with the best mAP
    on the rows to choose by is measured.

    Args:
        rows: features, dense or sparse [rows, width]; brought to unit mean norm.
        labels: sparse 0/1 [rows, classes].
        split: row numbers to fit on, to choose by, and to measure on.
        steps: batches of 256 rows, drawn anew each time.
        seed: of the draws.

    Returns:
        {"map": mean average precision over the classes that occur in the measured rows, nan where none does,
        "ap": float64 [classes], nan for the others}

    Raises:
        ValueError: for labels of other rows, a part without rows, or no steps.
    """
    labels = checked_labels(labels, rows.shape[0])
    fitted, validation, test = split
    if not all(map(len, split)) or steps < 1:
        raise ValueError(
            f"a classifier needs rows to fit on, to choose by and to measure on, and at least one step, but there are "
            f"{len(fitted)}, {len(validation)} and {len(test)} rows and {steps} steps"
        )
    draws = np.random.default_rng(seed)
    width, classes = rows.shape[1], labels.shape[1]
    scale = _mean_norm(rows, fitted)
    # Without the usual first weights, which would be drawn from the caller's random numbers.
    layer = cast(torch.nn.Linear, torch.nn.utils.skip_init(torch.nn.Linear, width, classes))
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(layer.bias, -3.0)  # a chance of 5 %, because most classes are rare
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    best, best_state = -1.0, (layer.weight.detach().clone(), layer.bias.detach().clone())
    for step in range(1, steps + 1):
        batch = draws.choice(fitted, min(BATCH_ROWS, len(fitted)), replace=False)
        optimizer.zero_grad()
        target = torch.from_numpy(_dense(labels, batch))
        scores = layer(torch.from_numpy(_dense(rows, batch) / scale))
        torch.nn.functional.binary_cross_entropy_with_logits(scores, target).backward()
        optimizer.step()
        if step % STEPS_BETWEEN_CHOICES == 0 or step == steps:
            reached = _mean_precision(_precisions(layer, rows, labels, validation, scale))
            if reached > best:
                best, best_state = reached, (layer.weight.detach().clone(), layer.bias.detach().clone())
    with torch.no_grad():
        layer.weight.copy_(best_state[0])
        layer.bias.copy_(best_state[1])
    precisions = _precisions(layer, rows, labels, test, scale)
    return {"map": _mean_precision(precisions), "ap": precisions}


def _probe(codes: CSR, labels: CSR, task: int, together: np.ndarray, seed: int) -> tuple[float, ...]:
    """Return latent, loss, accuracy and average precision of one class."""
    split = probe_rows(labels, task, seed)
    has = np.bincount(_rows_of(labels, task), minlength=labels.shape[0]) > 0
    fitted = codes[split[0]]
    candidates = np.unique(fitted.indices[fitted.data > 0])
    if len(candidates) > CANDIDATES:
        order = np.argsort(-together[candidates], kind="stable")
        candidates = candidates[order[:CANDIDATES]]
    if not len(candidates):
        return -1.0, float(np.log(2)), 0.5, 0.5
    columns = [codes[rows][:, candidates].toarray() for rows in split]
    targets = [has[rows].astype(int) for rows in split]
    best = (np.inf, 0, None)
    for position in range(len(candidates)):
        probe = LogisticRegression(max_iter=200).fit(columns[0][:, [position]], targets[0])
        loss = log_loss(targets[1], probe.predict_proba(columns[1][:, [position]]), labels=[0, 1])
        if loss < best[0]:
            best = (loss, position, probe)
    _, position, probe = best
    assert probe is not None
    chances = probe.predict_proba(columns[2][:, [position]])
    return (
        float(candidates[position]),
        float(log_loss(targets[2], chances, labels=[0, 1])),
        float(((chances[:, 1] > 0.5) == targets[2]).mean()),
        float(average_precision_score(targets[2], chances[:, 1])),
    )


def _rows_of(labels: CSR, class_id: int) -> np.ndarray:
    return np.repeat(np.arange(labels.shape[0]), np.diff(labels.indptr))[labels.indices == class_id]


def _dense(rows: Any, row_numbers: np.ndarray) -> np.ndarray:
    block = rows[row_numbers]
    return np.ascontiguousarray(block.toarray() if issparse(block) else block, dtype=np.float32)


def _mean_norm(rows: Any, row_numbers: np.ndarray) -> float:
    blocks = np.array_split(row_numbers, max(1, len(row_numbers) // 1024))
    norms = np.concatenate([np.linalg.norm(_dense(rows, block), axis=1) for block in blocks])
    return max(float(norms.mean()), 1e-12)


@torch.no_grad()
def _precisions(layer: torch.nn.Linear, rows: Any, labels: CSR, row_numbers: np.ndarray, scale: float) -> np.ndarray:
    blocks = np.array_split(row_numbers, max(1, len(row_numbers) // 1024))
    scores = np.concatenate([layer(torch.from_numpy(_dense(rows, block) / scale)).numpy() for block in blocks])
    has = _dense(labels, row_numbers) > 0
    precisions = np.full(labels.shape[1], np.nan)
    for column in np.flatnonzero(has.any(axis=0)):
        precisions[column] = average_precision_score(has[:, column], scores[:, column])
    return precisions


def _mean_precision(precisions: np.ndarray) -> float:
    occurring = precisions[np.isfinite(precisions)]
    return float(occurring.mean()) if len(occurring) else float("nan")


class ConceptProbe(evaluate.Metric):
    """`concept_probe` behind the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        strengths, ids = datasets.List(datasets.Value("float32")), datasets.List(datasets.Value("int32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"indices": ids, "values": strengths, "labels": ids}),
        )

    def _compute(self, indices, values, labels, num_latents, num_classes, min_count=50, seed=0) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        codes, matrix = codes_of_samples(indices, values, num_latents), class_matrix(labels, num_classes)
        figures = concept_probe(codes, matrix, min_count=min_count, seed=seed)
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in figures.items()}
