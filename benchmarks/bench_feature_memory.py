"""Peak memory of writing and reading back feature rows, which must not grow with their number.

    python benchmarks/bench_feature_memory.py --rows 100000 300000

Each size runs in a process of its own. Anonymous memory (what cannot be given back to the page cache) is watched
while rows are written in batches of 1,024 by `FeatureWriter` and read back, checksums verified, as shuffled batches.
The peak of the resident set is given too: it counts mapped file pages, which the kernel keeps as long as nobody needs
the room.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def status(key: str) -> float:
    """Return a memory figure of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"this kernel has no {key}")


class Peak:
    """The largest anonymous memory while a block runs, in MB, looked at every 5 ms."""

    def __enter__(self) -> "Peak":
        self.megabytes, self._on = status("RssAnon"), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._on:
            self.megabytes = max(self.megabytes, status("RssAnon"))
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()


def measure(rows: int, width: int, folder: Path) -> dict[str, float]:
    import numpy as np

    from sparc_hf.features.batches import FeatureBatches
    from sparc_hf.features.dataset import FeatureDataset
    from sparc_hf.features.writer import FeatureWriter

    draws = np.random.default_rng(0)
    block = draws.standard_normal((1024, width), np.float32).astype(np.float16)
    before = status("RssAnon")
    started = time.perf_counter()
    with (
        Peak() as writing,
        FeatureWriter(folder / "set", {"x": {"hidden_size": width}}, dtype="float16", extra_columns=["id"]) as out,
    ):
        for start in range(0, rows, 1024):
            count = min(1024, rows - start)
            out.append({"x": block[:count], "id": [str(row) for row in range(start, start + count)]})
    written = time.perf_counter()
    with Peak() as reading:
        features = FeatureDataset.load(folder / "set")
        seen = sum(len(batch["x"]) for batch in FeatureBatches(features, batch_size=1024))
    if seen != rows:
        raise SystemExit(f"{seen} of {rows} rows came back")
    return {
        "rows": rows,
        "before_mb": before,
        "write_peak_mb": writing.megabytes,
        "read_peak_mb": reading.megabytes,
        "resident_peak_mb": status("VmHWM"),
        "write_s": written - started,
        "read_s": time.perf_counter() - written,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000])
    parser.add_argument("--width", type=int, default=1792)
    parser.add_argument("--folder", help="where to write; a folder with room for all rows")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.rows[0], args.width, Path(args.folder))))
        return
    for rows in args.rows:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            command = [sys.executable, __file__, "--child", "--rows", str(rows), "--width", str(args.width)]
            output = subprocess.run([*command, "--folder", folder], capture_output=True, text=True, check=True).stdout
            print({key: round(value, 1) for key, value in json.loads(output).items()})


if __name__ == "__main__":
    main()
