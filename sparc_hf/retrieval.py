"""Ranks and recall of a sample's counterpart in another stream."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array


def counterpart_ranks(queries: "csr_array", references: "csr_array", *, block: int = 1024) -> np.ndarray:
    """Return int64 [rows]: the rank of reference i among all references for query i, by cosine similarity.

    The rank counts the other references at least as similar, plus one: whoever ties with the counterpart stands
    before it, so a tie is never a hit. A row without any active latent has similarity 0 to everything.

    Args:
        queries: [rows, N], positive codes of one stream.
        references: [rows, N], codes of another stream for the same samples.
        block: queries at a time; memory is block x rows similarities.

    Raises:
        ValueError: for arrays of different shapes.
    """
    if queries.shape != references.shape:
        raise ValueError(
            f"queries and references must pair up, but their shapes are {queries.shape}, {references.shape}"
        )
    queries, references = _unit_rows(queries), _unit_rows(references)
    columns = references.T.tocsr()
    total = len(queries.indptr) - 1
    ranks = np.empty(total, np.int64)
    for start in range(0, total, block):
        similarity = (queries[start : start + block] @ columns).toarray()
        rows = np.arange(similarity.shape[0])
        own = similarity[rows, start + rows]
        ranks[start : start + block] = (similarity >= own[:, None]).sum(axis=1)
    return ranks


def recall_at(ranks: np.ndarray, depth: int) -> float:
    """Return the share of ranks that are at most `depth`."""
    return float((ranks <= depth).mean())


def _unit_rows(rows: "csr_array") -> "csr_array":
    from scipy.sparse import csr_array

    rows = csr_array(rows, dtype=np.float64)
    norms = np.sqrt(np.asarray((rows * rows).sum(axis=1)).reshape(-1))
    lengths = np.diff(rows.indptr)
    return csr_array((rows.data / np.repeat(np.maximum(norms, 1e-8), lengths), rows.indices, rows.indptr), rows.shape)
