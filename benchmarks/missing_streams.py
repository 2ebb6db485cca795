"""What training rows that lack a stream cost: the table "Rows that lack a stream" of docs/alignment.md.

    python benchmarks/missing_streams.py --caption_streams ../shared/data/caption_streams --output runs/missing

A share of the training rows loses one stream at random; then one model is trained on all rows and one on those
that are complete, by the recipe of benchmarks/results/alignment.yaml, and both are measured on held-out rows, which
lack nothing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from alignment import data_sets, figures_of, trained

from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.files.atomic_files import write_json, write_text

# The one stream that rows lack: in the embedded world the captions', in the caption streams the only one of its kind.
LACKED = {"demo": "clip_txt", "caption_streams": "lsa"}
COLUMNS = {
    ("joint", "nmse_self"): "together: nmse self",
    ("joint", "nmse_cross"): "nmse cross",
    ("single", "jaccard"): "alone: Jaccard",
    ("single", "nmse_self"): "nmse self",
    ("single", "nmse_cross"): "nmse cross",
    ("single", "latent_alignment_r_at_1"): "codes R@1",
}


def lacking(rows: FeatureDataset, stream: str, share: float) -> FeatureDataset:
    """Return rows of which a share, drawn at random, lacks a stream."""
    if not share:
        return rows
    present = np.random.default_rng(16).random(len(rows)) >= share
    arrays = {name: rows.array(name) for name in rows.stream_names}
    return FeatureDataset.from_arrays(arrays, streams=rows.streams, present={stream: present})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caption_streams", type=Path, help="folder of the caption streams; without, the demo only")
    parser.add_argument("--output", type=Path, default=Path("runs/missing"), help="folder for models and figures")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.5, 0.9])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="in place of the settings', to try the script out")
    args = parser.parse_args()
    text, results = [], {}
    for data, recipe, train, test in data_sets(args):
        settings: dict[str, Any] = {**recipe["train"], "seed": args.seed, "impute": True}
        text += [
            "",
            f"### {recipe['title']}: rows that lack `{LACKED[data]}`",
            "",
            f"| rows that lack it | trained on | {' | '.join(COLUMNS.values())} |",
            "|---" * (len(COLUMNS) + 2) + "|",
        ]
        for share in args.shares:
            rows = lacking(train, LACKED[data], share)
            ways = {"all rows": rows}
            if share:
                ways["complete rows"] = rows.select(rows.complete_rows())
            for way, chosen in ways.items():
                folder = args.output / data / f"seed{args.seed}" / f"{share:g}-{way.split()[0]}"
                model = trained(settings, chosen, folder)
                figures = {encoding: figures_of(model, test, encoding) for encoding in ("joint", "single")}
                results[f"{data}/{share:g}/{way}"] = figures
                cells = [f"{figures[encoding][name]:.3f}" for encoding, name in COLUMNS]
                text.append(f"| {share:.0%} | {len(chosen):,}, {way} | {' | '.join(cells)} |")
                print(folder, json.dumps(figures), flush=True)
    print("\n".join(text))
    write_text(args.output / "table.md", "\n".join(text) + "\n")
    write_json(args.output / "results.json", results)


if __name__ == "__main__":
    main()
