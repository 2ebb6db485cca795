"""Seconds and peak memory of importing HDF5 feature files of the earlier SPARC project, which this makes itself.

python benchmarks/bench_import.py --rows 100000 --output import.json
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

WIDTHS = {"dino": 768, "clip_img": 512, "clip_txt": 512}
CHUNK_ROWS = 1000


def make(folder: Path, rows: int) -> dict[str, Path]:
    """Write one file per stream as the earlier extractors did: float32, gzip, chunks of a few rows."""
    draws = np.random.default_rng(0)
    files = {name: folder / f"{name}.h5" for name in WIDTHS}
    for name, width in WIDTHS.items():
        with h5py.File(files[name], "w", libver="latest") as file:
            features = file.create_dataset(
                "features", (rows, width), "float32", chunks=(32, width), compression="gzip"
            )
            for start in range(0, rows, CHUNK_ROWS):
                count = min(CHUNK_ROWS, rows - start)
                features[start : start + count] = draws.standard_normal((count, width), np.float32)
            file["indices"] = np.arange(rows, dtype=np.int32)
    return files


def import_once(sources: list[str], output: str) -> None:
    """Import in this process and print its seconds and peak memory."""
    from sparc_hf.cli.import_files import ImportArguments, run_import

    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    features = run_import(ImportArguments(source=sources, output=output))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": len(features), "seconds": seconds, "peak_mb": peak, "peak_of_imports_mb": loaded}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000], help="sizes to measure")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        import_once(args.child[1:], args.child[0])
        return
    found = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            files = make(Path(folder), rows)
            sources = [f"{name}={path}" for name, path in files.items()]
            command = [sys.executable, __file__, "--child", str(Path(folder) / "made"), *sources]
            # A process of its own, whose peak memory is that of the import alone.
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"{rows:,} rows x {len(WIDTHS)} streams: {found[-1]['seconds']:.1f} s, {found[-1]['peak_mb']:.0f} MB"
            )
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
