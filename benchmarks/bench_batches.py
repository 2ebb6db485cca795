"""Rows per second of FeatureBatches, fully shuffled from the page cache, beside the speed of copying memory.

python benchmarks/bench_batches.py --rows 60000 --output batches.json
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from sparc_hf.features.batches import FeatureBatches
from sparc_hf.features.dataset import FeatureDataset


def make(folder: Path, rows: int, widths: list[int], dtype: str, rows_per_shard: int) -> FeatureDataset:
    draws = np.random.default_rng(0)
    arrays = {
        f"stream{n}": draws.standard_normal((rows, width), np.float32).astype(dtype) for n, width in enumerate(widths)
    }
    FeatureDataset.from_arrays(arrays).save(folder, rows_per_shard=rows_per_shard)
    return FeatureDataset.load(folder)


def seconds_of_epoch(batches: FeatureBatches) -> float:
    start = time.perf_counter()
    for batch in batches:
        next(iter(batch.values()))
    return time.perf_counter() - start


def seconds_of_copy(rows: int, columns: int) -> float:
    """Time of copying as many float32, in blocks of a batch's size."""
    block = torch.randn(256, columns)
    start = time.perf_counter()
    for _ in range(rows // 256):
        block.clone()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60000)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 512, 512])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    cases = [("float32", 4096), ("float32", 1000), ("float16", 4096)]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        loaders = {
            case: FeatureBatches(
                make(Path(folder) / f"{case[0]}-{case[1]}", args.rows, args.widths, *case), batch_size=args.batch
            )
            for case in cases
        }
        times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
        copies = []
        for round_number in range(args.rounds + 1):
            copies.append(seconds_of_copy(args.rows, sum(args.widths)))
            for case, loader in loaders.items():
                seconds = seconds_of_epoch(loader)
                if round_number:  # the first epoch fills the page cache
                    times[case].append(seconds)
    for (dtype, shard), values in times.items():
        rate, copy = args.rows / statistics.median(values), args.rows / statistics.median(copies)
        results.append({"stored": dtype, "rows per shard": shard, "rows/s": rate, "copy rows/s": copy})
        print(f"{dtype} in shards of {shard}: {rate:,.0f} rows/s ({rate / copy:.2f} of copying that many float32)")
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
