"""The table of docs/training.md: what keeps latents alive, and what it costs, on rows kept from the training rows.

    python benchmarks/live_latents.py --caption_streams ../shared/data/caption_streams --output runs/live_latents

15 % of each data set's training rows are measured on; held-out rows stay unseen. Finished runs in the output folder
are used again where their settings are the same. Dead: selected with a value above 0 in no row, mean over streams.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from results_table import SETTINGS, caption_rows, demo_rows

from sparc_hf.codes.code_table import encode_features
from sparc_hf.evaluation.suite import EvaluationSettings, evaluate_model
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.files.atomic_files import write_json, write_text
from sparc_hf.files.checked_reading import read_json
from sparc_hf.metrics.latent_liveness.latent_liveness import latent_liveness
from sparc_hf.training.arguments import SparcTrainingArguments
from sparc_hf.training.rows import random_split
from sparc_hf.training.trainer import SparcTrainer

BETA2 = {"adam_beta2": 0.95}
DECAY = {"lr_schedule": "linear", "learning_rate": 2e-3}
PUSH = {"rare_latent_push": 0.003}
VARIANTS = {
    "SPARC's recipe": {},
    "second moment 0.95": BETA2,
    "decay from 2e-3": DECAY,
    "push": PUSH,
    "second moment, decay": BETA2 | DECAY,
    "second moment, push": BETA2 | PUSH,
    "all three": BETA2 | DECAY | PUSH,
    "all three from 3e-3": BETA2 | DECAY | PUSH | {"learning_rate": 3e-3},
}
# Caption streams as in docs/performance.md, from zero pre-biases; the paper's sizes would take hours here.
CAPTIONS = {"k": 32, "auxk": 32, "batch_size": 256, "learning_rate": 1e-3, "epochs": 20}
COLUMNS = (
    ("dead_train", "dead, training rows", ".1%"),
    ("dead_share", "dead", ".1%"),
    ("jaccard", "Jaccard, joint", ".3f"),
    ("nmse_self", "nmse self", ".3f"),
    ("nmse_cross", "nmse cross", ".3f"),
    ("latent_alignment_r_at_1", "codes R@1, joint", ".3f"),
    ("single", "codes R@1, single", ".3f"),
    ("seconds", "training, s", ".0f"),
)


def figures_of_run(folder: Path, settings: dict[str, Any], train: FeatureDataset, kept: FeatureDataset) -> dict:
    """Train and measure one run, or read what it gave before."""
    done = folder / "run.json"
    if done.exists() and (saved := read_json(done, dict[str, Any]))["settings"] == settings:
        return saved["figures"]
    arguments = SparcTrainingArguments(
        features="", output_dir=str(folder), checkpoint_every=0, overwrite=True, cpu=True, impute=False, **settings
    )
    trainer = SparcTrainer(arguments, train)
    started = time.perf_counter()
    model = trainer.train()
    seconds = time.perf_counter() - started
    results = evaluate_model(model, kept, EvaluationSettings(replicates=0, probes=False)).results
    codes = encode_features(model, train, encoding="joint")
    dead = latent_liveness({stream: codes.csr(stream) for stream in codes.streams})["dead_in"]
    figures = {name: figure["value"] for name, figure in results["joint"]["headline"].items()}
    figures["single"] = results["single"]["headline"]["latent_alignment_r_at_1"]["value"]
    figures["dead_train"] = float(np.mean(list(dead.values()))) / model.config.num_latents
    figures["seconds"] = seconds
    write_json(done, {"settings": settings, "figures": figures})
    return figures


def table_line(variant: str, runs: list[dict[str, Any]]) -> str:
    cells = []
    for name, _, form in COLUMNS:
        values = [run[name] for run in runs]
        spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 and name != "seconds" else ""
        cells.append(f"{np.mean(values):{form}}{spread}")
    return f"| {variant} | {' | '.join(cells)} |"


def section(
    name: str,
    shared: dict[str, Any],
    rows: Callable[[], tuple[FeatureDataset, FeatureDataset]],
    args: argparse.Namespace,
) -> list[str]:
    """Return the lines of one data set at one size."""
    train, kept = random_split(rows()[0], 0.15, seed=16)
    per_latent = len(train) * shared["k"] / shared["num_latents"]
    told = ", ".join(f"{key} {value}" for key, value in shared.items())
    lines = ["", f"{name}: {len(train):,} training rows, {per_latent:,.0f} selections a latent and epoch on average, "]
    lines[-1] += f"{len(kept):,} measured rows; {told}."
    lines += ["", f"| variant | {' | '.join(title for _, title, _ in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for variant, replaced in VARIANTS.items():
        if args.variants and variant not in args.variants:
            continue
        runs = []
        for seed in args.seeds:
            folder = args.output / f"{name}-{shared['num_latents']}" / variant.replace(" ", "-").replace(",", "")
            print(folder, seed, flush=True)
            settings = shared | replaced | {"seed": seed}
            runs.append(figures_of_run(folder / f"seed{seed}", settings, train, kept))
        lines.append(table_line(variant, runs))
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caption_streams", type=Path, help="their folder; without it, the demo only")
    parser.add_argument(
        "--latents", type=int, nargs="+", default=[2048], help="N of the caption streams, [8192, 32768]"
    )
    parser.add_argument("--epochs", type=int, help="in place of the data sets' own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="instead of all")
    parser.add_argument("--without_demo", action="store_true", help="the caption streams only")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/live_latents"), help="folder for features and models"
    )
    parser.add_argument("--table", type=Path, help="Markdown file to write (the table is printed too)")
    args = parser.parse_args()
    epochs = {"epochs": args.epochs} if args.epochs else {}
    lines = []
    if not args.without_demo:
        settings = yaml.safe_load((SETTINGS / "demo.yaml").read_text(encoding="utf-8"))
        lines += section("embedded world", settings["train"] | epochs, lambda: demo_rows(settings, args), args)
    for latents in args.latents if args.caption_streams else ():
        shared = {"num_latents": latents} | CAPTIONS | epochs
        lines += section("caption streams", shared, lambda: caption_rows({}, args), args)
    text = "\n".join(lines).strip() + "\n"
    print(text)
    if args.table:
        write_text(args.table, text)


if __name__ == "__main__":
    main()
