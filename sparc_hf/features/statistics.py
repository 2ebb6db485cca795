"""Mean and standard deviation of a stream, for models that standardise its rows."""

import numpy as np

from sparc_hf.features.batches import RowSource

SAMPLE_ROWS = 100_000
BLOCK_ROWS = 4096


def standardization_of(
    features: RowSource, stream: str, sample_rows: int = SAMPLE_ROWS, per_channel: bool = False
) -> dict[str, float | list[float]]:
    """Return `mean` and `std` to standardise a stream by.

    Args:
        features: the dataset.
        stream: which stream.
        sample_rows: they are estimated from at most so many rows, evenly spaced from the first to the last of those
            that have the stream.
        per_channel: one number a channel, so that every channel weighs the same in a loss; by default one number each
            over all rows and channels, as the code of USAE standardises (arXiv 2502.03714).

    Returns:
        `mean` and `std` (unbiased) for the stream record, next to `normalize: "standardize"`. A channel that does not
        vary has std 0 and becomes 0, in rows in which it does vary too.

    Raises:
        ValueError: if there is nothing to divide by: fewer than two numbers, or all of them equal.
    """
    present = np.flatnonzero(features.present(stream))
    rows = present[
        np.unique(np.linspace(0, len(present) - 1, min(sample_rows, len(present))).round().astype(np.int64))
    ]
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for start in range(0, len(rows), BLOCK_ROWS):
        # Blocks are merged by their means, because sums of squares lose the digits of a large mean.
        block = features.array(stream, rows[start : start + BLOCK_ROWS]).astype(np.float64)
        block = block if per_channel else block.reshape(-1, 1)
        shift = block.mean(axis=0) - mean
        total = count + len(block)
        squares = squares + ((block - block.mean(axis=0)) ** 2).sum(axis=0) + shift**2 * count * len(block) / total
        mean, count = mean + shift * len(block) / total, total
    if count < 2 or not squares.any():
        raise ValueError(f"stream `{stream}` cannot be standardised: its {count} numbers do not vary")
    std = np.sqrt(squares / (count - 1))
    return (
        {"mean": mean.tolist(), "std": std.tolist()} if per_channel else {"mean": float(mean[0]), "std": float(std[0])}
    )
