"""Confidence intervals of figures over rows, by drawing the rows again."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm.auto import tqdm

LEVEL = 0.95


def bootstrap_intervals(
    figures: Callable[[np.ndarray | None], dict[str, float]],
    rows: int,
    *,
    replicates: int,
    seed: int = 0,
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return name -> {"value", "low", "high"}: figures of all rows and their 95 % bootstrap intervals.

    Rows are drawn with replacement, as often as there are rows. The interval is that of the replicates' percentiles,
    moved so that their mean falls on the value: a sample drawn with replacement has fewer different rows, which alone
    makes latents look dead and label counts look unlike.

    Args:
        figures: takes int64 [rows], how often each row counts, or None for once each; returns name -> number.
        rows: number of rows.
        replicates: how often rows are drawn; with 0, `low` and `high` are None.
        seed: of the draws.
        bounds: name -> smallest and largest value a figure can have, which its interval then keeps to.
    """
    values = figures(None)
    draws = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for _ in tqdm(range(replicates), desc="confidence intervals", unit="draw", leave=False):
        weights = np.bincount(draws.integers(rows, size=rows), minlength=rows)
        for name, value in figures(weights).items():
            drawn[name].append(value)
    bounds = bounds or {}
    unbounded = (-np.inf, np.inf)
    return {
        name: {"value": value} | _interval(value, np.array(drawn[name]), bounds.get(name, unbounded))
        for name, value in values.items()
    }


def _interval(value: float, replicates: np.ndarray, bounds: tuple[float, float]) -> dict[str, float | None]:
    replicates = replicates[np.isfinite(replicates)]
    if not len(replicates) or not np.isfinite(value):
        return {"low": None, "high": None}
    shift = value - replicates.mean()
    low, high = np.clip(np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) + shift, *bounds)
    return {"low": float(low), "high": float(high)}
