"""Search by codes: the samples of a stream whose codes are most like a query's, and the latents they share with it."""

from dataclasses import dataclass

import numpy as np

from sparc_hf.codes.code_table import CodeTable
from sparc_hf.metrics.cross_retrieval.cross_retrieval import unit_codes


@dataclass(frozen=True)
class Match:
    """One found sample.

    Attributes:
        row: its row number.
        similarity: cosine of the codes, from 0 to 1.
        shared: (latent, share of the similarity that this latent brings), the largest first; the shares sum to 1.
    """

    row: int
    similarity: float
    shared: list[tuple[int, float]]


class CodeSearch:
    """Codes of a dataset, ready to be searched; memory is that of the codes.

    Args:
        codes: best single-stream codes, because a query stands alone too.
    """

    def __init__(self, codes: CodeTable):
        self.num_latents = codes.num_latents
        self._codes = {stream: unit_codes(codes.csr(stream)) for stream in codes.streams}

    def query(self, stream: str, row: int) -> np.ndarray:
        """Return the code of an indexed sample as float32 [N], of unit length.

        Raises:
            ValueError: for a stream or row that is not indexed.
        """
        codes = self._stream(stream)
        if not 0 <= row < codes.shape[0]:
            raise ValueError(f"the samples are numbered from 0 to {codes.shape[0] - 1}, and {row} is none of them")
        dense = np.zeros(self.num_latents, np.float32)
        entries = slice(codes.indptr[row], codes.indptr[row + 1])
        dense[codes.indices[entries]] = codes.data[entries]
        return dense

    def search(self, stream: str, query: np.ndarray, count: int = 12, *, without: int | None = None) -> list[Match]:
        """Return the most similar samples of a stream, the most similar first, equal ones by row number.

        Samples that share no latent with the query are not found.

        Args:
            stream: where to search.
            query: float [N], a code of any length.
            count: most samples to return.
            without: a row to leave out, such as the query's own.

        Raises:
            ValueError: for an unknown stream.
        """
        codes = self._stream(stream)
        query = query.astype(np.float32) / max(float(np.linalg.norm(query)), 1e-8)
        scores = codes @ query
        if without is not None:
            scores[without] = 0
        rows = np.flatnonzero(scores > 0)
        if len(rows) > count:
            least = np.partition(scores[rows], -count)[-count]
            rows = rows[scores[rows] >= least]
        rows = rows[np.argsort(-scores[rows], kind="stable")][:count]
        return [self._match(codes, int(row), query, float(scores[row])) for row in rows]

    def _stream(self, stream: str):
        if stream not in self._codes:
            raise ValueError(f"there is no stream `{stream}`; the streams are {list(self._codes)}")
        return self._codes[stream]

    def _match(self, codes, row: int, query: np.ndarray, score: float) -> Match:
        entries = slice(codes.indptr[row], codes.indptr[row + 1])
        latents = codes.indices[entries]
        brought = codes.data[entries] * query[latents]
        order = [at for at in np.argsort(-brought, kind="stable") if brought[at] > 0]
        return Match(row, min(score, 1.0), [(int(latents[at]), float(brought[at] / score)) for at in order])
