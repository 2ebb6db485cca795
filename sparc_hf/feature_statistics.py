"""Mean and standard deviation of a stream, for models that standardise its rows."""

from typing import Protocol

import numpy as np

SAMPLE_ROWS = 100_000
BLOCK_ROWS = 4096


class StreamRows(Protocol):
    """What this module needs to know of a feature dataset."""

    def __len__(self) -> int: ...

    def array(self, stream: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Return rows of one stream, float32 [rows, hidden_size]."""
        ...


def standardization_of(features: StreamRows, stream: str, sample_rows: int = SAMPLE_ROWS) -> dict[str, float]:
    """Return `mean` and `std`, one number each over all rows and channels, as USAE standardises (arXiv 2502.03714).

    Args:
        features: the dataset.
        stream: which stream.
        sample_rows: they are estimated from at most so many rows, evenly spaced from the first to the last.

    Returns:
        `mean` and `std` (unbiased) for the stream record, next to `normalize: "standardize"`.

    Raises:
        ValueError: if there is nothing to divide by: fewer than two numbers, or all of them equal.
    """
    rows = np.unique(np.linspace(0, len(features) - 1, min(sample_rows, len(features))).round().astype(np.int64))
    count, mean, squares = 0, 0.0, 0.0
    for start in range(0, len(rows), BLOCK_ROWS):
        # Blocks are merged by their means, because sums of squares lose the digits of a large mean.
        block = features.array(stream, rows[start : start + BLOCK_ROWS]).astype(np.float64)
        shift = block.mean() - mean
        total = count + block.size
        squares += ((block - block.mean()) ** 2).sum() + shift**2 * count * block.size / total
        mean, count = mean + shift * block.size / total, total
    if count < 2 or squares == 0:
        raise ValueError(f"stream `{stream}` cannot be standardised: its {count} numbers do not vary")
    return {"mean": float(mean), "std": float(np.sqrt(squares / (count - 1)))}
