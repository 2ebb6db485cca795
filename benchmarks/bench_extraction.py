"""Share of an extraction's wall time that is spent inside the backbones, with the demo encoders at batch 64.

    python benchmarks/bench_extraction.py --source path/to/imagefolder --text_column captions

The clock starts at the call of `extract_features`, so that opening files, starting workers, checksums and renames
count. A backbone's time is that of `StreamEncoder.rows`, which the main process alone runs.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

from sparc_hf.encoders.stream_encoder import StreamEncoder, load_encoders
from sparc_hf.features.extraction import extract_features
from sparc_hf.features.sources.source import open_source
from sparc_hf.features.stream_records import parse_streams

STREAMS = ["dino=demo:dino:image", "clip_img=demo:clip:image", "clip_txt=demo:clip:text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--text_column")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--repeat", type=int, default=1, help="times that the rows are read, for a longer run")
    parser.add_argument("--profile", action="store_true", help="also print where the main process spends its time")
    args = parser.parse_args()
    dataset = open_source(args.source, args.split)
    dataset = dataset.select([*range(len(dataset))] * args.repeat)
    encoders = load_encoders(parse_streams(STREAMS))
    inside = 0.0
    rows = StreamEncoder.rows

    def timed(self, inputs):
        nonlocal inside
        started = time.perf_counter()
        made = rows(self, inputs)
        inside += time.perf_counter() - started
        return made

    StreamEncoder.rows = timed
    print(f"{len(dataset)} rows, {len(encoders)} streams, batch 64")
    print(f"{'workers':>8}{'seconds':>10}{'rows/s':>9}{'in backbones':>15}{'share':>8}")
    for workers in args.workers:
        with tempfile.TemporaryDirectory() as folder:
            inside = 0.0
            profile = cProfile.Profile()
            started = time.perf_counter()
            if args.profile:
                profile.enable()
            extract_features(
                dataset, encoders, Path(folder) / "set", text_column=args.text_column, workers=workers, batch_size=64
            )
            profile.disable()
            seconds = time.perf_counter() - started
        print(f"{workers:>8}{seconds:>10.2f}{len(dataset) / seconds:>9.0f}{inside:>14.2f}s{inside / seconds:>8.1%}")
        if args.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(14)


if __name__ == "__main__":
    main()
