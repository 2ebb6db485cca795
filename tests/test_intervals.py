"""Intervals: the textbook's where it has one, what leaving rows out gives elsewhere, and coverage in known worlds."""

import importlib.util

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.stats import binom, t

from sparc_hf.count_figures import CountFigures
from sparc_hf.intervals import jackknife_figure, mean_figure, random_groups, share_figure, unit_sums

SEEDS = st.integers(0, 2**31 - 1)


def coverage_benchmark():
    spec = importlib.util.spec_from_file_location("interval_coverage", ROOT / "benchmarks" / "interval_coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, rows=st.integers(2, 60))
def test_the_interval_of_a_mean_is_students_on_the_logarithm(seed, rows):
    values = np.random.default_rng(seed).lognormal(size=rows)
    found = mean_figure(values, np.ones(rows))
    assert found["value"] == pytest.approx(values.mean())
    half = t.ppf(0.975, rows - 1) * values.std(ddof=1) / np.sqrt(rows) / values.mean()
    assert np.log([found["low"], found["high"]]) - np.log(found["value"]) == pytest.approx([-half, half])
    # Rows of one unit bring no more than one of them.
    again = mean_figure(*unit_sums(np.repeat(values, 3), np.repeat(np.arange(rows), 3)))
    assert list(again.values()) == pytest.approx(list(found.values()))


def test_means_without_a_spread():
    assert mean_figure(np.array([2.0]), np.ones(1)) == {"value": 2.0, "low": None, "high": None}
    assert mean_figure(np.zeros(5), np.ones(5))["value"] == 0
    assert mean_figure(np.full(5, 3.0), np.ones(5)) == {"value": 3.0, "low": 3.0, "high": 3.0}


@settings(deadline=None, max_examples=50)
@given(hits=st.integers(0, 40), misses=st.integers(0, 40))
def test_the_interval_of_a_hit_rate_is_agresti_and_coulls(hits, misses):
    rows = hits + misses
    if not rows:
        return
    found = share_figure(np.repeat([1.0, 0.0], [hits, misses]), np.ones(rows))
    assert found["value"] == pytest.approx(hits / rows)
    whole = rows + 1.95996**2
    center = (hits + 1.95996**2 / 2) / whole
    half = 1.95996 * np.sqrt(center * (1 - center) / whole)
    assert [found["low"], found["high"]] == pytest.approx([max(center - half, 0), min(center + half, 1)], abs=1e-5)


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, units=st.integers(1, 30))
def test_the_interval_of_a_share_holds_it(seed, units):
    draws = np.random.default_rng(seed)
    sizes = draws.integers(1, 5, units).astype(float)
    found = share_figure(draws.choice([0.0, 0.3, 1.0], units) * sizes, sizes)
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
    assert found["low"] < found["high"]


@pytest.mark.parametrize("chance", [0.5, 0.9, 0.95, 0.98, 0.99])
def test_hit_rates_over_30_rows_are_covered(chance):
    """Summed over all outcomes; the bootstrap, which knows nothing where all rows hit, holds 0.98 in 45 %."""
    covered = 0.0
    for hits in range(31):
        found = share_figure(np.repeat([1.0, 0.0], [hits, 30 - hits]), np.ones(30))
        covered += binom.pmf(hits, 30, chance) * (found["low"] <= chance <= found["high"])
    assert covered > 0.94


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, rows=st.integers(3, 40))
def test_the_jackknife_of_a_mean_is_students(seed, rows):
    values = np.random.default_rng(seed).random(rows)
    left_out = np.array([np.delete(values, row).mean() for row in range(rows)])
    found = jackknife_figure(values.mean(), left_out, bounds=(-9, 9))
    half = t.ppf(0.975, rows - 1) * values.std(ddof=1) / np.sqrt(rows)
    assert [found["low"], found["high"]] == pytest.approx([values.mean() - half, values.mean() + half])
    clipped = jackknife_figure(values.mean(), left_out, bounds=(values.mean(), 9))
    assert clipped["low"] == values.mean()
    assert jackknife_figure(1.0, np.ones(rows), bounds=(0, 9), least_spread=0.5)["high"] > 1.9
    assert jackknife_figure(float("nan"), left_out, bounds=(0, 1))["low"] is None


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, units=st.integers(1, 30), each=st.integers(1, 4), groups=st.integers(1, 40))
def test_groups_hold_every_row_once_and_units_whole(seed, units, each, groups):
    unit_of_row = np.random.default_rng(seed).permutation(np.repeat(np.arange(units), each)) * 7
    found = list(random_groups(unit_of_row, groups, seed))
    assert len(found) == min(groups, units)
    assert sorted(np.concatenate(found).tolist()) == list(range(units * each))
    of_group = [set(unit_of_row[rows].tolist()) for rows in found]
    assert sum(map(len, of_group)) == units
    assert max(map(len, of_group)) - min(map(len, of_group)) <= 1
    again = random_groups(unit_of_row, groups, seed)
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, rows=st.integers(2, 12), streams=st.integers(1, 3), labelled=st.booleans())
def test_figures_without_some_rows_are_those_of_the_others(seed, rows, streams, labelled):
    draws = np.random.default_rng(seed)
    codes = {
        f"stream {number}": csr_array((draws.random((rows, 6)) < 0.3).astype(np.float32)) for number in range(streams)
    }
    labels = csr_array((draws.random((rows, 4)) < 0.3).astype(np.float32)) if labelled else None
    left_out = draws.choice(rows, draws.integers(1, rows), replace=False)
    others = np.setdiff1d(np.arange(rows), left_out)
    expected = CountFigures(
        {stream: matrix[others] for stream, matrix in codes.items()}, None if labels is None else labels[others]
    ).figures()
    found = CountFigures(codes, labels).without(left_out)
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("alike", [1, 4])
def test_dead_shares_and_label_jaccards_of_rare_latents_are_covered(alike):
    """Of 150 samples 133 or fewer would hold the truth once in 700 such tests, if 95 % did."""
    benchmark = coverage_benchmark()
    world = benchmark.CodeWorld(60, latents=64, rarest=1e-3, alike=alike)
    found = benchmark.coverage(world, 150, {"now": world.intervals})
    for name, figure in found.items():
        assert figure["now"] > 133 / 150, name
        assert 0.9 < figure["now width"] < 2, name
