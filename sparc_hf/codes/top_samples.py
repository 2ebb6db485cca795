"""The samples that activate a latent most, for every latent and stream, in one pass over a code table."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from sparc_hf.codes.code_table import CodeTable
from sparc_hf.files.atomic_files import new_file

TOP_SAMPLES_FILE = "top_samples.parquet"


@dataclass(frozen=True)
class TopSamples:
    """The m strongest samples of every latent in one stream, strongest first, equal ones by row number.

    Attributes:
        rows: int64 [N, m], row numbers; -1 where a latent is active on fewer samples.
        values: float32 [N, m], their values; 0 there.
    """

    rows: np.ndarray
    values: np.ndarray


def top_samples(codes: CodeTable, count: int = 20, *, rows_at_once: int = 16384) -> dict[str, TopSamples]:
    """Return stream -> the `count` strongest samples of every latent, in one pass.

    Memory is that of the result and of `rows_at_once` rows of codes, however long the table.

    Raises:
        ValueError: for a `count` below 1.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, but it is {count}")
    shape = (codes.num_latents, count)
    best = {name: TopSamples(np.full(shape, -1, np.int64), np.zeros(shape, np.float32)) for name in codes.streams}
    for start in tqdm(range(0, len(codes), rows_at_once), desc="top samples", unit="block", leave=False):
        block = codes.rows(start, start + rows_at_once)
        for name, top in best.items():
            _merge(top, block.indices(name), block.values(name), start)
    return best


def _merge(top: TopSamples, indices: np.ndarray, values: np.ndarray, first_row: int) -> None:
    """Put the entries of a block, all of later rows than those seen so far, among the best."""
    # An entry that only equals the last of the best comes from a later row and loses.
    positions = np.flatnonzero((values > top.values[indices, -1]).reshape(-1))
    latents, strengths = indices.reshape(-1)[positions], values.reshape(-1)[positions]
    rows = first_row + positions // indices.shape[1]
    touched = np.unique(latents)
    known = top.rows[touched] >= 0
    latents = np.concatenate([np.repeat(touched, known.sum(axis=1)), latents])
    strengths = np.concatenate([top.values[touched][known], strengths])
    rows = np.concatenate([top.rows[touched][known], rows])
    # By latent, the strongest first, equal ones by row: lexsort takes its last key first.
    order = np.lexsort((rows, -strengths, latents))
    latents, strengths, rows = latents[order], strengths[order], rows[order]
    starts = np.searchsorted(latents, touched)
    rank = np.arange(len(latents)) - np.repeat(starts, np.diff([*starts, len(latents)]))
    among_best = rank < top.rows.shape[1]
    top.values[latents[among_best], rank[among_best]] = strengths[among_best]
    top.rows[latents[among_best], rank[among_best]] = rows[among_best]


def write_top_samples(best: dict[str, TopSamples], path: str | Path) -> None:
    """Write parquet with one line per stream, latent and rank; the file appears complete or not at all."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    tables = []
    for name, top in best.items():
        latents, ranks = np.nonzero(top.rows >= 0)
        columns = {
            "stream": pa.array([name] * len(latents), pa.string()),
            "latent": latents.astype(np.int32),
            "rank": (ranks + 1).astype(np.int32),
            "row": top.rows[latents, ranks],
            "value": top.values[latents, ranks],
        }
        tables.append(pa.table(columns))
    with new_file(path) as file:
        write_table(pa.concat_tables(tables), file, write_page_checksum=True)
