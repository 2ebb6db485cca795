"""The table of docs/results.md: train every variant on every data set with several seeds, evaluate, and write it.

python benchmarks/results_table.py --caption_streams ../shared/data/caption_streams --table docs/results.md

Settings lie in benchmarks/results. Finished runs in the output folder are used again where their settings are the
same.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sparc_hf.demo.run import world_features
from sparc_hf.evaluation.suite import EvaluationSettings, evaluate_model
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.statistics import standardization_of
from sparc_hf.files.atomic_files import write_json, write_text
from sparc_hf.files.checked_reading import read_json
from sparc_hf.training.arguments import SparcTrainingArguments
from sparc_hf.training.trainer import SparcTrainer

SETTINGS = Path(__file__).parent / "results"
# Headline figure, its column's title, and the encoding it is shown for.
COLUMNS = (
    ("dead_share", "dead", "single"),
    ("jaccard", "Jaccard, joint", "joint"),
    ("jaccard", "Jaccard, single", "single"),
    ("nmse_self", "nmse self", "joint"),
    ("nmse_cross", "nmse cross", "joint"),
    ("nmse_cross", "nmse cross, single", "single"),
    ("latent_alignment_r_at_1", "codes R@1, joint", "joint"),
    ("latent_alignment_r_at_1", "codes R@1, single", "single"),
    ("cross_reconstruction_r_at_1", "cross-rec. R@1, single", "single"),
)


def demo_rows(settings: dict[str, Any], args: argparse.Namespace) -> tuple[FeatureDataset, FeatureDataset]:
    train, test = (
        world_features(args.output / "demo", split, settings["rows"][split], 0) for split in ("train", "test")
    )
    return train, test


def caption_rows(settings: dict[str, Any], args: argparse.Namespace) -> tuple[FeatureDataset, FeatureDataset]:
    from safetensors.numpy import load_file

    arrays = load_file(args.caption_streams / "features.safetensors")
    info = json.loads((args.caption_streams / "info.json").read_text(encoding="utf-8"))
    labels = arrays.pop("labels")
    features = FeatureDataset.from_arrays(
        arrays,
        streams={name: {"normalize": "l2"} for name in arrays},
        labels=labels,
        label_names=info["label_names"],
    )
    return features.split(info["n_train"])


def settings_of_run(shared: dict[str, Any], replaced: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return a variant's settings; the auxiliary term of Universal Sparse Autoencoders decodes half of the latents."""
    settings = shared | replaced | {"seed": seed}
    if settings.get("objective") == "usae":
        settings["auxk"] = settings["num_latents"] // 2
    return settings


def standardized(train: FeatureDataset, test: FeatureDataset) -> tuple[FeatureDataset, FeatureDataset]:
    """Return the same rows, to be standardised by the statistics of the training rows, as USAE wants them."""
    records = [
        record | {"normalize": "standardize"} | standardization_of(train, record["name"]) for record in train.streams
    ]
    made = copy.copy(train), copy.copy(test)
    for features in made:
        features.streams = records
    return made


def results_of_run(
    folder: Path, settings: dict[str, Any], rows: Callable[[], tuple[FeatureDataset, FeatureDataset]], title: str
) -> dict[str, Any]:
    """Train and evaluate one run, or read what it gave before."""
    done = folder / "run.json"
    if done.exists() and (found := read_json(done, dict[str, Any]))["settings"] == settings:
        return found["results"]
    train, test = rows()
    if settings.get("objective") == "usae":
        train, test = standardized(train, test)
    arguments = SparcTrainingArguments(
        features="", output_dir=str(folder), checkpoint_every=0, overwrite=True, cpu=True, impute=False, **settings
    )
    model = SparcTrainer(arguments, train).train()
    found = evaluate_model(model, test, EvaluationSettings(replicates=0, probes=False, dataset=title)).results
    write_json(done, {"settings": settings, "results": found})
    return found


def table_line(variant: str, runs: list[dict[str, Any]]) -> str:
    cells = []
    for name, _, encoding in COLUMNS:
        values = [run[encoding]["headline"][name]["value"] for run in runs]
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.3f}{spread}")
    return f"| {variant} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--caption_streams", type=Path, help="folder of the caption streams; without it, the demo only"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/results"), help="folder for features, models, figures"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="in place of the settings', to try the script out")
    parser.add_argument("--table", type=Path, help="Markdown file to write (the table is printed too)")
    args = parser.parse_args()
    variants = yaml.safe_load((SETTINGS / "variants.yaml").read_text(encoding="utf-8"))
    readers = {"demo": demo_rows} | ({"caption_streams": caption_rows} if args.caption_streams else {})
    seeds = ", ".join(map(str, args.seeds))
    lines = [
        "# Results",
        "",
        "Made by `python benchmarks/results_table.py` from the settings in `benchmarks/results`, on rows no model was",
        f"trained on. Mean ± standard deviation over seeds {seeds}. Joint: all streams of a sample encoded together;",
        "single: each stream alone (with local selection they are the same). R@1 is the mean over the ordered pairs",
        "of streams; chance is 1 / rows. USAE, the other objective, has auxk num_latents / 2 and no centring, and its",
        "rows are standardised (one mean and deviation a stream) where SPARC's have unit norm: its nmse are of those.",
        "An update of it moves one stream, so that each stream has a part of the epochs. Missing streams are not",
        "imputed here, as in the papers; docs/alignment.md has what changes when they are.",
    ]
    for name, reader in readers.items():
        settings = yaml.safe_load((SETTINGS / f"{name}.yaml").read_text(encoding="utf-8"))
        if args.epochs:
            settings["train"]["epochs"] = args.epochs
        cache: list[tuple[FeatureDataset, FeatureDataset]] = []

        def rows(reader=reader, settings=settings, cache=cache):
            if not cache:
                cache.append(reader(settings, args))
            return cache[0]

        lines += ["", f"## {settings['title']}", ""]
        table = []
        for variant, replaced in variants.items():
            runs = []
            for seed in args.seeds:
                chosen = settings_of_run(settings["train"], replaced, seed)
                folder = args.output / name / variant.replace(",", "").replace(" ", "-").lower() / f"seed{seed}"
                print(folder, flush=True)
                runs.append(results_of_run(folder, chosen, rows, settings["title"]))
            table.append(table_line(variant, runs))
            test_rows = runs[0]["rows"]
        told = ", ".join(f"{key} {value}" for key, value in settings["train"].items())
        lines += [f"{test_rows:,} test rows; {told}.", ""]
        lines += [f"| variant | {' | '.join(title for _, title, _ in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        lines += table
    text = "\n".join(lines) + "\n"
    print(text)
    if args.table:
        write_text(args.table, text)


if __name__ == "__main__":
    main()
