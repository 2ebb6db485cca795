"""Concept alignment: how alike the labels are of the samples on which a latent fires in different streams."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.sparse import csr_array

from .checked_input import CSR, checked_labels, checked_streams, class_matrix, codes_of_streams

_DESCRIPTION = """
Generalised Jaccard of per-latent label counts between streams. With n_s[c] the samples of class c on which a
latent is active in stream s, two streams score sum_c min(n_s[c], n_t[c]) / sum_c max(n_s[c], n_t[c]), and a
latent scores the mean over the pairs of streams in which it is active at all. 1: the same labels in every
stream; 0: no label in common. Samples without a label are left out: where a latent fires on such samples only it
is not active. A latent active in fewer than two streams scores 0, as in the SPARC paper (arXiv
2507.06265, concept alignment); the mean over latents active in at least two streams is given beside it. With a
taxonomy, classes are lifted to their ancestor at every depth, from 0 (one class) to the deepest (the classes
themselves).
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
    values: for every sample float [streams, k], their values; a latent is active where its value is positive.
    labels: for every sample the list of its class ids.
    num_latents: N.
    label_names: names of the classes, in the order of the ids.
    taxonomy: nested {"LabelName": name, "Subcategory": [...]}, or None for the classes alone.
    streams: names of the streams (default "0", "1", ...).
Returns:
    mean, mean_live: list, one share from 0 to 1 per depth; mean_live is nan where no latent is live.
    per_latent: list [depths][N]; live: list of N bools, active in at least two streams.
"""

# float32 counts whole numbers exactly up to here.
EXACT_IN_FLOAT32 = 2**24


def concept_alignment(
    codes: Mapping[str, CSR], labels: CSR, buckets: np.ndarray | None = None, *, labelled: np.ndarray | None = None
) -> dict[str, Any]:
    """Return label Jaccard figures of a set of latents (SPARC, arXiv 2507.06265).

    Args:
        codes: stream -> sparse [rows, N]; a latent is active where it has a positive value.
        labels: sparse 0/1 [rows, classes].
        buckets: int [depths, classes], the ancestor of every class at every depth, as `taxonomy_buckets` gives it;
            without it the classes count as they are (one depth).
        labelled: bool [rows], the rows whose labels are known, by default those with a label. Where a latent fires on
            other rows only, it is not active: nothing is known of what it fires on.

    Returns:
        {"per_latent": float64 [depths, N], "live": bool [N], "mean": float64 [depths] over all latents,
        "mean_live": float64 [depths] over live latents, nan where there is none}

    Raises:
        ValueError: for arrays that do not fit together, indices outside them, or labels other than 0 and 1.
    """
    codes = checked_streams(codes)
    rows, latents = next(iter(codes.values())).shape
    labels = checked_labels(labels, rows)
    buckets = _checked_buckets(buckets, labels.shape[1])
    labelled = labelled_rows(labels) if labelled is None else np.asarray(labelled, bool)
    if labelled.shape != (rows,):
        raise ValueError(f"`labelled` must have a value for each of the {rows} rows, but it is {list(labelled.shape)}")
    counts, active = {}, {}
    for stream, matrix in codes.items():
        counts[stream], active[stream] = label_counts(matrix, labels, labelled)
    scores = np.empty((len(buckets), latents))
    lifted, columns = counts, np.arange(labels.shape[1])
    for depth in reversed(range(len(buckets))):  # from many buckets to few, each made from the last
        lifted, columns = _lifted(counts, lifted, columns, buckets[depth])
        scores[depth] = jaccard_of_counts(lifted, active)
    live = np.sum(list(active.values()), axis=0) >= 2
    mean_live = scores[:, live].mean(axis=1) if live.any() else np.full(len(scores), np.nan)
    return {"per_latent": scores, "live": live, "mean": scores.mean(axis=1), "mean_live": mean_live}


def labelled_rows(labels: CSR) -> np.ndarray:
    """Return bool [rows]: which rows of sparse labels [rows, classes] have a label."""
    return np.diff(labels.indptr) > 0


def label_counts(codes: CSR, labels: CSR, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return float [N, classes], on how many samples of each class a latent is active, and bool [N], if it is at all.

    Args:
        codes: sparse [rows, N].
        labels: sparse 0/1 [rows, classes].
        weights: bool or int [rows], how often each row counts; once by default.
    """
    per_row = np.diff(codes.indptr)
    times = codes.data > 0 if weights is None else (codes.data > 0) * np.repeat(weights, per_row)
    largest = labels.nnz * (1 if weights is None else max(int(weights.max(initial=0)), 1))
    dtype = np.float32 if largest < EXACT_IN_FLOAT32 else np.float64
    active = csr_array((times.astype(dtype), codes.indices, codes.indptr), shape=codes.shape)
    fired = np.bincount(codes.indices, weights=times, minlength=codes.shape[1]) > 0
    # This way round, rows of codes are read in one piece; the other way jumps from label to label.
    return (labels.T.tocsr().astype(dtype) @ active).toarray().T, fired


def jaccard_of_counts(counts: Mapping[str, np.ndarray], active: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return float64 [N] from stream -> counts [N, classes] and stream -> bool [N], as `label_counts` gives them."""
    totals = {stream: count.sum(axis=1).astype(np.float64) for stream, count in counts.items()}
    shape = len(next(iter(active.values())))
    scores, pairs = np.zeros(shape), np.zeros(shape)
    for first, second in itertools.combinations(counts, 2):
        both = active[first] & active[second]
        smaller = np.minimum(counts[first], counts[second]).sum(axis=1).astype(np.float64)
        larger = totals[first] + totals[second] - smaller
        scores += np.where(both, smaller / np.maximum(larger, 1), 0)
        pairs += both
    return scores / np.maximum(pairs, 1)


def taxonomy_buckets(label_names: Sequence[str], taxonomy: Mapping[str, Any]) -> np.ndarray:
    """Return int64 [depths, classes]: the number of every class's ancestor at depth 0, 1, ... of a taxonomy.

    A class that is not as deep stays what it is. A name in several places counts at the deepest one.

    Args:
        label_names: names of the classes.
        taxonomy: nested {"LabelName": name, "Subcategory": [...]}, as Open Images gives it.

    Raises:
        ValueError: for a class the taxonomy does not have, or another kind of taxonomy.
    """
    if not isinstance(taxonomy, Mapping) or "LabelName" not in taxonomy:
        raise ValueError(
            'the taxonomy must be nested {"LabelName": name, "Subcategory": [...]}, as that of Open Images, but it is '
            f"{str(taxonomy)[:80]}"
        )
    if not len(label_names):
        raise ValueError("there are no label names to look up in the taxonomy")
    lines = _lines(taxonomy)
    if missing := [name for name in label_names if name not in lines]:
        raise ValueError(
            f"{len(missing)} of {len(label_names)} classes are not in the taxonomy, the first is {missing[0]!r}; its "
            f"`LabelName` entries must be the dataset's label names"
        )
    bucket_of_name = {name: position for position, name in enumerate(lines)}
    paths = [[*lines[name], name] for name in label_names]
    depths = max(len(path) for path in paths)
    return np.array([[bucket_of_name[path[min(depth, len(path) - 1)]] for path in paths] for depth in range(depths)])


def _lines(taxonomy: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return name -> the names above it at its deepest place, in the order the names first occur."""
    lines: dict[str, list[str]] = {}
    waiting: list[tuple[Any, list[str]]] = [(taxonomy, [])]
    while waiting:
        node, above = waiting.pop()
        children = node.get("Subcategory") or () if isinstance(node, Mapping) else None
        name = node.get("LabelName") if isinstance(node, Mapping) else None
        if not isinstance(name, str) or not isinstance(children, list | tuple):
            raise ValueError(
                f'every node of the taxonomy must be {{"LabelName": name, "Subcategory": [...]}}: {str(node)[:80]}'
            )
        if name not in lines or len(lines[name]) < len(above):
            lines[name] = above
        waiting += [(child, [*above, name]) for child in reversed(children)]
    return lines


def _checked_buckets(buckets: np.ndarray | None, classes: int) -> np.ndarray:
    if buckets is None:
        return np.arange(classes)[None]
    buckets = np.asarray(buckets)
    if buckets.ndim != 2 or buckets.shape[1] != classes or not len(buckets) or buckets.dtype.kind not in "iu":
        raise ValueError(
            f"`buckets` must be whole numbers [depths, classes] for {classes} classes, but it is "
            f"{list(buckets.shape)} {buckets.dtype}"
        )
    return buckets


def _lifted(
    counts: Mapping[str, np.ndarray], deeper: Mapping[str, np.ndarray], columns: np.ndarray, buckets: np.ndarray
) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    """Add up the columns of one bucket.

    Args:
        counts: stream -> [N, classes].
        deeper: stream -> [N, columns], the same counts with some columns added up already.
        columns: int [classes], the column of `deeper` each class went to.
        buckets: int [classes].

    Returns:
        stream -> [N, buckets], and the column each class went to.
    """
    used, position = np.unique(buckets, return_inverse=True)
    width = int(columns.max()) + 1
    parent = np.zeros(width, np.int64)
    parent[columns] = position
    if not np.array_equal(parent[columns], position):  # no hierarchy: classes of one column part again
        deeper, parent, width = counts, position, len(buckets)
    if width == len(used) and np.array_equal(parent, np.arange(width)):
        return deeper, position
    into = np.zeros((width, len(used)), np.float32)
    into[np.arange(width), parent] = 1
    return {stream: count @ into.astype(count.dtype) for stream, count in deeper.items()}, position


class ConceptAlignment(evaluate.Metric):
    """`concept_alignment` behind the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        latents = datasets.List(datasets.List(datasets.Value("int32")))
        strengths = datasets.List(datasets.List(datasets.Value("float32")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"indices": latents, "values": strengths, "labels": datasets.List(datasets.Value("int32"))}
            ),
        )

    def _compute(self, indices, values, labels, num_latents, label_names, taxonomy=None, streams=None) -> dict:  # pyright: ignore[reportIncompatibleMethodOverride]
        codes = codes_of_streams(indices, values, num_latents, streams)
        matrix = class_matrix(labels, len(label_names))
        buckets = None if taxonomy is None else taxonomy_buckets(label_names, taxonomy)
        return {name: value.tolist() for name, value in concept_alignment(codes, matrix, buckets).items()}
