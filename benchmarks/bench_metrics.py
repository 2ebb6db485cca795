"""Metrics at the size of Open Images' test split, on synthetic codes: seconds, and peak memory after each.

python benchmarks/bench_metrics.py --output metrics.json
python benchmarks/bench_metrics.py --skip_retrieval --loop_rows 10000
"""

import argparse
import itertools
import json
import resource
import time
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from sparc_hf.codes.code_table import CodeTable
from sparc_hf.codes.top_samples import top_samples
from sparc_hf.metrics.concept_alignment.concept_alignment import concept_alignment
from sparc_hf.metrics.cross_retrieval.cross_retrieval import code_ranks
from sparc_hf.metrics.latent_liveness.latent_liveness import latent_liveness

DEPTHS = 6


def random_codes(rows: int, latents: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents and values [rows, k], some latents common and most rare, no latent twice in a row."""
    draws = np.random.default_rng(seed)
    popularity = np.cumsum(1 / (np.arange(latents) + 50.0))
    drawn = np.searchsorted(popularity, draws.random((rows, 2 * k)) * popularity[-1]).astype(np.int32)
    order = np.argsort(drawn, axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order, axis=1)
    repeated = np.zeros_like(ordered, dtype=bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    again = np.zeros_like(repeated)
    np.put_along_axis(again, order, repeated, axis=1)
    first = np.argsort(again, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(drawn, first, axis=1), draws.random((rows, k), np.float32) + 0.01


def random_labels(rows: int, classes: int, per_row: int, seed: int) -> csr_array:
    draws = np.random.default_rng(seed)
    columns = (classes * draws.random((rows, per_row)) ** 3).astype(np.int32)
    matrix = csr_array((np.ones(rows * per_row, np.float32), columns.ravel(), np.arange(0, columns.size + 1, per_row)),
                       shape=(rows, classes))  # fmt: skip
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def random_buckets(classes: int, seed: int) -> np.ndarray:
    """Ancestors at six depths: 1, 4, 20, 80, 300 and all classes."""
    draws = np.random.default_rng(seed)
    sizes = [1, 4, 20, 80, 300]
    return np.stack([*(np.sort(draws.integers(0, size, classes)) for size in sizes), np.arange(classes)])


def alignment_by_loops(codes: dict[str, csr_array], labels: csr_array, buckets: np.ndarray) -> np.ndarray:
    """Latent by latent, depth by depth and pair by pair, with sparse slices."""
    columns = {stream: matrix.tocsc() for stream, matrix in codes.items()}
    scores = np.zeros((len(buckets), next(iter(codes.values())).shape[1]))
    for latent in range(scores.shape[1]):
        rows = {stream: matrix[:, [latent]].indices for stream, matrix in columns.items()}
        counts = {stream: labels[found].sum(axis=0) for stream, found in rows.items()}
        for depth, bucket in enumerate(buckets):
            lifted = {stream: np.bincount(bucket, weights=count) for stream, count in counts.items()}
            found = []
            for one, other in itertools.combinations(codes, 2):
                if len(rows[one]) and len(rows[other]):
                    larger = np.maximum(lifted[one], lifted[other]).sum()
                    found.append(np.minimum(lifted[one], lifted[other]).sum() / max(larger, 1))
            scores[depth, latent] = np.mean(found) if found else 0
    return scores


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=126_020)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--classes", type=int, default=601)
    parser.add_argument("--loop_rows", type=int, default=10_000, help="rows for the comparison with Python loops")
    parser.add_argument("--skip_retrieval", action="store_true", help="leave out the ranks, which take minutes")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    streams = ("dino", "clip_img", "clip_txt")
    drawn = {name: random_codes(args.rows, args.latents, args.k, seed) for seed, name in enumerate(streams)}
    table = CodeTable.from_arrays(
        {name: latents for name, (latents, _) in drawn.items()},
        {name: values for name, (_, values) in drawn.items()},
        args.latents,
        "single",
    )
    labels, buckets = random_labels(args.rows, args.classes, 6, 0), random_buckets(args.classes, 0)
    result: dict[str, float] = {"peak GB, data": peak_gb()}

    def timed(name, work):
        start = time.perf_counter()
        found = work()
        result[f"{name}, s"] = time.perf_counter() - start
        result[f"peak GB, {name}"] = peak_gb()
        print(f"{name}: {result[f'{name}, s']:.2f} s, peak so far {peak_gb():.2f} GB", flush=True)
        return found

    codes = timed("CSR of three streams", lambda: {name: table.csr(name) for name in streams})
    timed(f"alignment at {DEPTHS} depths", lambda: concept_alignment(codes, labels, buckets))
    timed("liveness", lambda: latent_liveness(codes))
    timed("top 20 samples", lambda: top_samples(table, 20))
    part = {name: matrix[: args.loop_rows] for name, matrix in codes.items()}
    ours = timed(
        f"alignment, {args.loop_rows} rows", lambda: concept_alignment(part, labels[: args.loop_rows], buckets)
    )
    loops = timed(
        f"alignment by loops, {args.loop_rows} rows",
        lambda: alignment_by_loops(part, labels[: args.loop_rows], buckets),
    )
    np.testing.assert_allclose(ours["per_latent"], loops)
    result["loops / ours"] = (
        result[f"alignment by loops, {args.loop_rows} rows, s"] / result[f"alignment, {args.loop_rows} rows, s"]
    )
    print(f"loops / ours {result['loops / ours']:.1f}")
    if not args.skip_retrieval:
        timed("ranks of one pair", lambda: code_ranks(codes["dino"], codes["clip_img"]))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
