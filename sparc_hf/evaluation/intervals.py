"""95 % intervals of figures: what another sample of as many rows would give on average.

Drawing rows again with replacement leaves more than a third of them out, which alone makes rare latents look dead, and
changes nothing about rows that all hit. So means and shares have intervals of their own here, and figures made from
counts are measured again with a part of the rows left out.
"""

from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np

LEVEL = 0.95
# Half of the squared normal quantile of the level: pseudo-observations on either side (Agresti and Coull 1998).
PSEUDO_UNITS = 1.9207


class Figure(TypedDict):
    """A figure with its interval, as results.json has it; null where it is undefined or has none."""

    value: float | None
    low: float | None
    high: float | None


def plain_figure(value: float | None) -> Figure:
    """Return a figure without an interval."""
    return {"value": value, "low": None, "high": None}


def mean_figure(sums: np.ndarray, sizes: np.ndarray) -> Figure:
    """Return the mean of what is never negative, such as errors, with an interval that is symmetric in its logarithm.

    The spread is that of units drawn whole, by the ratio of their sums to their sizes.

    Args:
        sums: float [units], the sum over each unit's rows.
        sizes: float [units], how many rows a unit has; above 0.
    """
    units, mean = len(sums), float(np.sum(sums) / np.sum(sizes))
    if units < 2 or not mean > 0:
        return plain_figure(mean)
    spread = np.sqrt(units / (units - 1) * np.square(sums - mean * sizes).sum()) / np.sum(sizes)
    factor = np.exp(_quantile(units - 1) * spread / mean)
    return {"value": mean, "low": float(mean / factor), "high": float(mean * factor)}


def share_figure(sums: np.ndarray, sizes: np.ndarray) -> Figure:
    """Return a mean of values from 0 to 1, such as hits, with Agresti and Coull's interval (1998).

    Two units that all miss and two that all hit (1.92, half the squared normal quantile) are added for the interval,
    so that it does not vanish where all rows hit. Of units of one row with hits of 0 and 1 it is exactly theirs.

    Args:
        sums: float [units], the sum over each unit's rows.
        sizes: float [units], how many rows a unit has; above 0.
    """
    value = float(np.sum(sums) / np.sum(sizes))
    size = np.mean(sizes)
    sums, sizes = np.concatenate([sums, [0, size]]), np.concatenate([sizes, [size, size]])
    weights = np.ones(len(sums))
    weights[-2:] = PSEUDO_UNITS
    whole = np.sum(weights * sizes)
    center = np.sum(weights * sums) / whole
    half = np.sqrt(2 * PSEUDO_UNITS * np.sum(weights * np.square(sums - center * sizes))) / whole
    low, high = np.clip([center - half, center + half], 0, 1)
    return {"value": value, "low": float(low), "high": float(high)}


def jackknife_figure(
    value: float, left_out: np.ndarray, *, bounds: tuple[float, float], least_spread: float = 0.0
) -> Figure:
    """Return a figure with the interval of its grouped jackknife (Quenouille, Tukey; Efron and Stein 1981).

    On average the jackknife's variance is at least the true one, whatever the figure (Efron and Stein's inequality),
    so that the interval is rather too wide than too narrow.

    Args:
        value: of all rows.
        left_out: float [groups], the figure without each group of rows; of groups drawn at random.
        bounds: smallest and largest value the figure can have.
        least_spread: standard error that the interval has at least.
    """
    left_out = left_out[np.isfinite(left_out)]
    groups = len(left_out)
    if groups < 2 or not np.isfinite(value):
        return plain_figure(value)
    variance = (groups - 1) / groups * np.square(left_out - left_out.mean()).sum()
    half = _quantile(groups - 1) * np.sqrt(variance + least_spread**2)
    low, high = np.clip([value - half, value + half], *bounds)
    return {"value": value, "low": float(low), "high": float(high)}


def random_groups(units: np.ndarray, groups: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the rows of each of `groups` groups, alike in size and drawn at random, units staying whole.

    Args:
        units: int [rows], the unit of each row.
        groups: how many, at most one a unit.
        seed: of the draw.
    """
    names, unit_of_row = np.unique(units, return_inverse=True)
    groups = min(groups, len(names))
    group_of_unit = np.random.default_rng(seed).permutation(len(names)) % groups
    order = np.argsort(group_of_unit[unit_of_row], kind="stable")
    yield from np.split(order, np.cumsum(np.bincount(group_of_unit[unit_of_row], minlength=groups))[:-1])


def unit_sums(values: Sequence[float] | np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the values of each unit's rows, and how many rows it has."""
    _, unit_of_row = np.unique(units, return_inverse=True)
    return np.bincount(unit_of_row, weights=values), np.bincount(unit_of_row).astype(np.float64)


def _quantile(freedom: int) -> float:
    """Return Student's quantile of the level."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
