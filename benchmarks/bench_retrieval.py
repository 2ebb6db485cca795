"""Ranks over codes beside the dense way: N-wide rows, normalised, one matrix product, ranks by counting.

python benchmarks/bench_retrieval.py --rows 10000 --output retrieval.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array

from sparc_hf.metrics.cross_retrieval.cross_retrieval import code_ranks


def random_codes(rows: int, latents: int, k: int, seed: int) -> csr_array:
    """Codes in which some latents are common and most are rare, as in trained models."""
    draws = np.random.default_rng(seed)
    popularity = 1 / (np.arange(latents) + 50.0)
    keys = np.log1p(-draws.random((rows, latents), np.float32)) / popularity[None].astype(np.float32)
    chosen = np.argpartition(-keys, k, axis=1)[:, :k]
    values = draws.random((rows, k), np.float32)
    return csr_array((values.reshape(-1), chosen.reshape(-1), np.arange(0, rows * k + 1, k)), shape=(rows, latents))


def dense_ranks(queries: csr_array, references: csr_array) -> np.ndarray:
    one, other = (
        torch.nn.functional.normalize(torch.from_numpy(codes.toarray()), dim=1) for codes in (queries, references)
    )
    similarity = one @ other.T
    return (similarity >= similarity.diagonal()[:, None]).sum(dim=1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    queries, references = (random_codes(args.rows, args.latents, args.k, seed) for seed in (0, 1))
    works = {"sparse": code_ranks, "dense": dense_ranks}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(args.rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work(queries, references)
            times[name].append(time.perf_counter() - start)
    result = {name: statistics.median(values) for name, values in times.items()}
    result["dense / sparse"] = statistics.median(d / s for d, s in zip(times["dense"], times["sparse"], strict=True))
    print(" | ".join(f"{name} {value:.3g}" for name, value in result.items()))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
