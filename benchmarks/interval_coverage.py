"""How often the 95 % intervals of an evaluation hold what they should, in worlds whose truth is known.

OMP_NUM_THREADS=1 python benchmarks/interval_coverage.py

Of each world many samples of rows are drawn. The truth of a figure is its mean over five times as many other samples:
what another sample of as many rows gives on average. "Bootstrap" is the interval of the percentiles of 200 samples
drawn with replacement, moved so that their mean falls on the value. Widths are those of the new intervals, relative to
the narrowest that could hold: 2 x 1.96 standard deviations of the figure over samples.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from sparc_hf.count_figures import CountFigures
from sparc_hf.intervals import mean_figure, random_groups, share_figure, unit_sums
from sparc_hf.metrics.cross_retrieval.cross_retrieval import vector_ranks

GROUPS = 200
REPLICATES = 200
TRUTH_SAMPLES = 5
Intervals = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class CodeWorld:
    """Rows of causes; each latent answers one cause, in every stream that does not miss it.

    Attributes:
        rows: of a sample.
        latents: N.
        rarest: a cause occurs in a share of rows drawn evenly in its logarithm, from this
        commonest: to this.
        alike: how many latents answer the same cause.
        missed: share of a cause's rows on which a stream misses it.
        labelled: share of the rows that have labels.
    """

    rows: int
    latents: int = 256
    rarest: float = 1e-5
    commonest: float = 0.2
    alike: int = 1
    missed: float = 0.2
    labelled: float = 1.0

    def draw(self, draws: np.random.Generator) -> tuple[dict[str, csr_array], csr_array]:
        """Return codes of three streams and labels of ten classes."""
        causes = self.latents // self.alike
        chances = np.exp(np.linspace(np.log(self.rarest), np.log(self.commonest), causes))
        occurs = draws.random((self.rows, causes), np.float32) < chances
        cause_of_latent = np.arange(self.latents) % causes
        codes = {}
        for stream in ("a", "b", "c"):
            seen = occurs & (draws.random(occurs.shape, np.float32) >= self.missed)
            codes[stream] = csr_array(seen[:, cause_of_latent].astype(np.float32))
        # A class has some of the causes, and occurs at times without any of them.
        of_class = np.eye(10, dtype=np.float32)[np.arange(causes) % 10]
        labels = (occurs.astype(np.float32) @ of_class > 0) | (draws.random((self.rows, 10)) < 0.05)
        labels[draws.random(self.rows) >= self.labelled] = False
        return codes, csr_array(labels.astype(np.float32))

    def part(self, sample: Any, rows: np.ndarray) -> Any:
        codes, labels = sample
        return {stream: matrix[rows] for stream, matrix in codes.items()}, labels[rows]

    def figures(self, sample: Any) -> dict[str, float]:
        return CountFigures(*sample).figures()

    def intervals(self, sample: Any) -> Intervals:
        groups = random_groups(np.arange(self.rows), GROUPS, seed=0)
        found = CountFigures(*sample).with_intervals(groups)
        return {name: (figure["low"], figure["high"]) for name, figure in found.items()}


@dataclass(frozen=True)
class HitWorld:
    """Rows of hits of several pairs of streams, whose mean is the figure; a row's pairs hit together at times.

    Attributes:
        rows: of a sample.
        chance: of a hit.
        pairs: of streams.
        together: share of the rows whose pairs all do the same.
    """

    rows: int
    chance: float
    pairs: int = 6
    together: float = 0.5

    def draw(self, draws: np.random.Generator) -> np.ndarray:
        """Return the share of hits of every row."""
        alone = (draws.random((self.rows, self.pairs)) < self.chance).mean(axis=1)
        same = draws.random(self.rows) < self.chance
        return np.where(draws.random(self.rows) < self.together, same, alone)

    def part(self, sample: Any, rows: np.ndarray) -> Any:
        return sample[rows]

    def figures(self, sample: Any) -> dict[str, float]:
        return {"R@1": float(sample.mean())}

    def intervals(self, sample: Any) -> Intervals:
        found = share_figure(sample, np.ones(len(sample)))
        return {"R@1": (found["low"], found["high"])}


@dataclass(frozen=True)
class GalleryWorld(HitWorld):
    """Hits of noisy queries among noisy references, which other samples of rows draw anew; `chance` is the noise."""

    def draw(self, draws: np.random.Generator) -> np.ndarray:
        rows = draws.normal(size=(self.rows, 8))
        queries, references = (rows + self.chance * draws.normal(size=rows.shape) for _ in range(2))
        return (vector_ranks(queries, references) == 1).astype(float)


@dataclass(frozen=True)
class ErrorWorld:
    """Rows of errors, lognormal, alike within a sample of several rows.

    Attributes:
        samples: how many.
        rows_each: rows of a sample.
        spread: standard deviation of the errors' logarithm.
        alike: share of that variance that is a sample's own.
    """

    samples: int
    rows_each: int = 1
    spread: float = 0.5
    alike: float = 0.5

    def draw(self, draws: np.random.Generator) -> np.ndarray:
        """Return errors [samples, rows of each]."""
        own = np.sqrt(self.alike) * draws.normal(size=(self.samples, 1))
        rest = np.sqrt(1 - self.alike) * draws.normal(size=(self.samples, self.rows_each))
        return np.exp(self.spread * (own + rest))

    def part(self, sample: Any, rows: np.ndarray) -> Any:
        return sample.reshape(-1, 1)[rows % sample.size]

    def figures(self, sample: Any) -> dict[str, float]:
        return {"nmse": float(sample.mean())}

    def intervals(self, sample: Any) -> Intervals:
        units = np.repeat(np.arange(self.samples), self.rows_each)
        found = mean_figure(*unit_sums(sample.reshape(-1), units))
        return {"nmse": (found["low"], found["high"])}

    @property
    def rows(self) -> int:
        return self.samples * self.rows_each


WORLDS: dict[str, Any] = {
    "1,000 rows, latents firing on 1 of 100,000 to 1 of 5 rows": CodeWorld(1000),
    "the same, half of the rows without labels": CodeWorld(1000, labelled=0.5),
    "the same, four latents a cause": CodeWorld(1000, alike=4),
    "the same, no latent rarer than 1 of 100 rows": CodeWorld(1000, rarest=0.01),
    "200 rows, 1 of 10,000 to 1 of 5": CodeWorld(200, rarest=1e-4),
    "60 rows, 64 latents, 1 of 1,000 to 1 of 5": CodeWorld(60, latents=64, rarest=1e-3),
    "30 rows, hit rate 0.98": HitWorld(30, 0.98, pairs=1),
    "30 rows, hit rate 0.98, six pairs": HitWorld(30, 0.98),
    "30 rows, hit rate 0.5, six pairs": HitWorld(30, 0.5),
    "1,000 rows, hit rate 0.98, six pairs": HitWorld(1000, 0.98),
    "1,000 rows, hit rate 0.02, six pairs": HitWorld(1000, 0.02),
    "100 rows, queries and references drawn anew": GalleryWorld(100, 0.5),
    "400 rows, queries and references drawn anew": GalleryWorld(400, 0.5),
    "30 rows, errors of deviation 0.5 in their logarithm": ErrorWorld(30),
    "30 rows, deviation 1": ErrorWorld(30, spread=1.0),
    "1,000 rows, deviation 0.5": ErrorWorld(1000),
    "50 samples of 20 patch tokens, deviation 0.5": ErrorWorld(50, 20),
}


def bootstrap(world: Any, sample: Any) -> Intervals:
    """Return the percentiles of samples drawn with replacement, moved onto the value."""
    draws = np.random.default_rng(0)
    replicates = [
        world.figures(world.part(sample, draws.integers(world.rows, size=world.rows))) for _ in range(REPLICATES)
    ]
    found = {}
    for name, value in world.figures(sample).items():
        drawn = np.array([figures[name] for figures in replicates])
        low, high = np.nanquantile(drawn, [0.025, 0.975]) + value - np.nanmean(drawn)
        found[name] = low, high if name == "nmse" else min(high, 1.0)
    return found


def coverage(world: Any, repeats: int, ways: dict[str, Callable[[Any], Intervals]]) -> dict[str, dict[str, float]]:
    """Return figure -> "truth", and per way the share of samples whose interval holds it, and "<way> width"."""
    draws = np.random.default_rng(0)
    values = [world.figures(world.draw(draws)) for _ in range(TRUTH_SAMPLES * repeats)]
    samples = [world.draw(draws) for _ in range(repeats)]
    found: dict[str, dict[str, float]] = {}
    for name in values[0]:
        drawn = np.array([figures[name] for figures in values])
        found[name] = {"truth": float(np.nanmean(drawn)), "narrowest": float(2 * 1.96 * np.nanstd(drawn))}
    for way, intervals in ways.items():
        of_samples = [intervals(sample) for sample in samples]
        for name, figure in found.items():
            ends = np.array([of_sample[name] for of_sample in of_samples])
            figure[way] = float(np.mean((ends[:, 0] <= figure["truth"]) & (figure["truth"] <= ends[:, 1])))
            figure[f"{way} width"] = float((ends[:, 1] - ends[:, 0]).mean() / figure["narrowest"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats",
        type=int,
        default=120,
        help="samples of a world of codes; ten times as many of others (default 120)",
    )
    args = parser.parse_args()
    print("| world | figure | truth | bootstrap | now | width |\n|---|---|---|---|---|---|")
    for name, world in WORLDS.items():
        repeats = args.repeats if isinstance(world, CodeWorld) else 10 * args.repeats
        ways = {"bootstrap": lambda sample, world=world: bootstrap(world, sample), "now": world.intervals}
        for figure, found in coverage(world, repeats, ways).items():
            shares = f"{found['bootstrap']:.1%} | {found['now']:.1%}"
            print(f"| {name} | {figure} | {found['truth']:.3f} | {shares} | {found['now width']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
