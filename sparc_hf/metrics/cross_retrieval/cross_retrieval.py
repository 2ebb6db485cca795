"""Cross retrieval: the rank of a sample's counterpart among all samples of another stream."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.sparse import csr_array

from .checked_input import CSR, checked_matrix, codes_of_samples

_DESCRIPTION = """
Every query row looks for its counterpart, the reference row of the same number, among all reference rows by
cosine similarity (SPARC, arXiv 2507.06265, retrieval). Its rank is 1 plus the number of other references that
are at least as similar; similarities within 1e-6 count as equal, so that rounding decides nothing, and a tie is
therefore never a hit. A row without any active latent is equally similar to everything and ranks last. R@n:
share of ranks of at most n; median_rank: the lower of the two middle ranks; mrr: mean of 1 / rank.

For codes of a model with global selection, use single-stream codes. In joint codes all streams of a sample
choose the latents together, so query and counterpart share the very set of latents that retrieval compares: the
answer leaks into the question.
"""

_CITATION = """
@article{sparc2025,
  title={SPARC: Concept-Aligned Sparse Autoencoders for Cross-Model and Cross-Modal Interpretability},
  journal={arXiv preprint arXiv:2507.06265},
  year={2025}
}
"""

_INPUTS = """
Configuration "codes" (default), args:
    query_indices, reference_indices: for every row int32 [k], the selected latents of two streams.
    query_values, reference_values: for every row float [k], their values.
    num_latents: N.
    depths: the n of R@n (default 1, 5, 10).
Configuration "vectors", args:
    queries, references: for every row float [hidden_size].
    depths: the n of R@n (default 1, 5, 10).
Returns:
    R@1, R@5, R@10: shares from 0 to 1. median_rank: rank from 1. mrr: from 0 to 1. rows: number of references.
"""

TIE = 1e-6
# Latents active in a larger share of rows go through a dense product, the others through a sparse one.
COMMON_SHARE = 1 / 32
# 64 MiB of float32; all of them would be rows x rows.
SIMILARITIES_AT_ONCE = 2**24


def code_ranks(queries: CSR, references: CSR) -> np.ndarray:
    """Return int64 [rows]: the rank of reference i among all references for query i, by cosine similarity.

    The rank counts the references at least as similar as the counterpart, itself included; similarities within 1e-6
    count as equal. Memory is a few times `SIMILARITIES_AT_ONCE` floats besides the codes.

    Args:
        queries: sparse [rows, N], non-negative codes of one stream.
        references: sparse [rows, N], codes of another stream for the same samples.

    Raises:
        ValueError: for arrays of different shapes, indices outside them, or NaN or infinite values.
    """
    queries, references = checked_matrix(queries, "the queries"), checked_matrix(references, "the references")
    _check_pairs(queries.shape, references.shape)
    queries, references = unit_codes(queries), unit_codes(references)
    rows = queries.shape[0]
    used = [np.bincount(codes.indices, minlength=codes.shape[1]) / max(rows, 1) for codes in (queries, references)]
    common = np.sqrt(used[0] * used[1]) > COMMON_SHARE
    dense = queries[:, common].toarray(), np.ascontiguousarray(references[:, common].toarray().T)
    sparse = queries[:, ~common], references[:, ~common].T.tocsr()

    def similarities(start: int, stop: int) -> np.ndarray:
        cosines = dense[0][start:stop] @ dense[1]
        cosines += (sparse[0][start:stop] @ sparse[1]).toarray()
        return cosines

    return _ranks(similarities, rows)


def vector_ranks(queries: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return int64 [rows]: the rank of reference i for query i, as `code_ranks`, of dense rows [rows, hidden_size].

    Raises:
        ValueError: for arrays of different shapes, or a row with NaN or infinite values.
    """
    _check_pairs(queries.shape, references.shape)
    queries = _unit_vectors(queries, "queries")
    references = np.ascontiguousarray(_unit_vectors(references, "references").T)
    return _ranks(lambda start, stop: queries[start:stop] @ references, len(queries))


def retrieval_figures(ranks: np.ndarray, depths: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return R@n for every n of `depths`, median_rank (the lower of two middle ranks), mrr and rows.

    Raises:
        ValueError: for no ranks, ranks below 1, or depths that are no whole numbers from 1.
    """
    ranks = np.asarray(ranks)
    if not len(ranks) or not (ranks >= 1).all():
        raise ValueError("retrieval needs at least one row, and ranks from 1")
    if wrong := [depth for depth in depths if not isinstance(depth, int | np.integer) or depth < 1]:
        raise ValueError(f"`depths` must be whole numbers from 1, but {wrong[0]!r} is among them")
    figures: dict[str, float] = {f"R@{depth}": float((ranks <= depth).mean()) for depth in depths}
    middle = int(np.sort(ranks)[(len(ranks) - 1) // 2])
    return figures | {"median_rank": middle, "mrr": float((1 / ranks).mean()), "rows": len(ranks)}


def _check_pairs(queries: tuple[int, ...], references: tuple[int, ...]) -> None:
    if queries != references or len(queries) != 2 or not queries[0]:
        raise ValueError(
            f"queries and references must pair up, at least one of each, but their shapes are {queries}, {references}"
        )


def _ranks(similarities: Any, rows: int) -> np.ndarray:
    ranks = np.empty(rows, np.int64)
    block = max(1, min(1024, SIMILARITIES_AT_ONCE // max(rows, 1)))
    for start in range(0, rows, block):
        cosines = similarities(start, min(start + block, rows))
        own = cosines[np.arange(len(cosines)), start + np.arange(len(cosines))]
        ranks[start : start + block] = np.count_nonzero(cosines >= (own - TIE)[:, None], axis=1)
    return ranks


def unit_codes(codes: CSR) -> CSR:
    """Return sparse float32 [rows, N] codes scaled to unit length; rows without a positive value stay zero."""
    codes = csr_array(codes, dtype=np.float32, copy=True)
    codes.sum_duplicates()
    lengths = np.diff(codes.indptr)
    row_of_entry = np.repeat(np.arange(len(lengths)), lengths)
    norms = np.sqrt(np.bincount(row_of_entry, weights=codes.data.astype(np.float64) ** 2, minlength=len(lengths)))
    codes.data /= np.maximum(norms, 1e-8).astype(np.float32)[row_of_entry]
    return codes


def _unit_vectors(rows: np.ndarray, name: str) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    # In double precision, so that the squares of large values stay finite.
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    if not np.isfinite(norms).all():
        raise ValueError(f"row {int(np.flatnonzero(~np.isfinite(norms))[0])} of `{name}` holds NaN or infinite values")
    return rows / np.maximum(norms, 1e-8)[:, None].astype(np.float32)


def _dense_rows(rows: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(rows, np.float32).reshape(len(rows), -1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"every row of `{name}` must have the same number of values") from error


class CrossRetrieval(evaluate.Metric):
    """`code_ranks` or `vector_ranks`, and `retrieval_figures`, behind the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        values, latents = datasets.List(datasets.Value("float32")), datasets.List(datasets.Value("int32"))
        if self.config_name == "vectors":
            features = {"queries": values, "references": values}
        elif self.config_name in ("default", "codes"):
            features = {
                "query_indices": latents,
                "query_values": values,
                "reference_indices": latents,
                "reference_values": values,
            }
        else:
            raise ValueError(f'the configuration must be "codes" or "vectors", but it is {self.config_name!r}')
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, *, num_latents=None, depths=(1, 5, 10), **inputs) -> dict[str, float]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.config_name == "vectors":
            vectors = (_dense_rows(inputs[name], name) for name in ("queries", "references"))
            return retrieval_figures(vector_ranks(*vectors), depths)
        if num_latents is None:
            raise ValueError("ranks over codes need `num_latents`")
        query, reference = (
            codes_of_samples(inputs[f"{side}_indices"], inputs[f"{side}_values"], num_latents, f"the {side}")
            for side in ("query", "reference")
        )
        return retrieval_figures(code_ranks(query, reference), depths)
