"""The table of docs/alignment.md: what a stream's code is worth when the stream stands alone.

    python benchmarks/alignment.py --caption_streams ../shared/data/caption_streams --output runs/alignment

Every seed trains one model by the paper's recipe, whose weights none of the lines changes: they are ways to encode one
stream alone. Then it trains one by the preset `aligned`. Below them stands what linear regression and canonical
correlation analysis of the streams themselves reach. With --validation all is measured on 15 % of the training rows,
on which settings are to be chosen; without, on the held-out rows.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from results_table import SETTINGS, caption_rows, demo_rows

from sparc_hf import SparcModel
from sparc_hf.evaluation.suite import EvaluationSettings, Measurements
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.files.atomic_files import write_json, write_text
from sparc_hf.metrics.cross_retrieval.cross_retrieval import vector_ranks
from sparc_hf.training.arguments import SparcTrainingArguments
from sparc_hf.training.imputation import add_imputation
from sparc_hf.training.rows import random_split
from sparc_hf.training.trainer import SparcTrainer

COLUMNS = {
    "jaccard": "Jaccard",
    "nmse_self": "nmse self",
    "nmse_cross": "nmse cross",
    "latent_alignment_r_at_1": "codes R@1",
    "dead_share": "dead",
    "nmse_missing_of_three": "nmse of one from two",
}
# Settings of the imputation, each with one thing more than that before it; None has no selection offsets.
STEPS: dict[str, dict[str, float] | None] = {
    "missing streams imputed": None,
    "+ selection offsets": {"shared": 0.0, "fit_steps": 0},
    "+ given rows moved towards what is shared": {"fit_steps": 0},
    "+ values fitted (the default)": {},
}
# Of the covariance between two streams and of each, as a share of the mean variance.
CCA_RIDGE = 0.1


def data_sets(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], FeatureDataset, FeatureDataset]]:
    """Yield name, recipe, training rows and held-out rows: of the embedded world, and the caption streams if given."""
    recipes = yaml.safe_load((SETTINGS / "alignment.yaml").read_text(encoding="utf-8"))
    readers = {"demo": demo_rows} | ({"caption_streams": caption_rows} if args.caption_streams else {})
    for data, reader in readers.items():
        recipe = recipes[data]
        if args.epochs:
            recipe["train"]["epochs"] = args.epochs
        yield data, recipe, *reader(recipe, args)


def trained(settings: dict[str, Any], rows: FeatureDataset, folder: Path) -> SparcModel:
    if not (folder / "model.safetensors").exists():
        arguments = SparcTrainingArguments(
            features="", output_dir=str(folder), checkpoint_every=0, cpu=True, **{"impute": False, **settings}
        )
        SparcTrainer(arguments, rows).train()
    return SparcModel.from_pretrained(folder).eval()


def figures_of(model: SparcModel, rows: FeatureDataset, encoding: str) -> dict[str, float]:
    headline = Measurements(model, rows, encoding, EvaluationSettings(replicates=0)).main_figures()["headline"]
    figures = {name: headline[name]["value"] for name in COLUMNS if name in headline}
    if encoding != "joint":
        missing = "ignore" if encoding == "single_ignoring" else "impute"
        figures["nmse_missing_of_three"] = nmse_of_missing(model, rows, missing)
    return figures


@torch.no_grad()
def nmse_of_missing(model: SparcModel, features: FeatureDataset, missing: str) -> float:
    """Return the mean error of each stream reconstructed from all others."""
    rows = {name: torch.from_numpy(features.array(name)) for name in model.config.stream_names}
    errors = []
    for target in rows:
        given = {name: x for name, x in rows.items() if name != target}
        asked = [target] if missing == "impute" else list(given)
        original = model.normalize({target: rows[target]})[target]
        for code in model.encode(given, missing=missing, streams=asked).values():
            residual = model.decode(code, to=target) - original
            errors.append((residual.square().sum(dim=1) / original.square().sum(dim=1)).mean().item())
    return float(np.mean(errors))


def lines_of_seed(
    settings: dict[str, Any], train: FeatureDataset, test: FeatureDataset, folder: Path
) -> dict[str, dict[str, float]]:
    """Return line -> column -> figure of the models of one seed."""
    model = trained(settings, train, folder)
    lines = {
        "all streams together": figures_of(model, test, "joint"),
        "alone, as if there were no others": figures_of(model, test, "single_ignoring"),
    }
    for name, replaced in STEPS.items():
        imputation = add_imputation(
            model, train, **({"shared": 0.0, "fit_steps": 0} if replaced is None else replaced)
        )
        if replaced is None:
            imputation.offsets.zero_()
        lines[name] = figures_of(model, test, "single")
    aligned = trained(
        settings | aligned_settings() | {"impute": True}, train, folder.with_name(f"{folder.name}-aligned")
    )
    lines["preset aligned: all streams together"] = figures_of(aligned, test, "joint")
    return lines | {"preset aligned: alone": figures_of(aligned, test, "single")}


def aligned_settings() -> dict[str, Any]:
    preset = resources.files("sparc_hf.cli") / "presets" / "aligned.yaml"
    return yaml.safe_load(preset.read_text(encoding="utf-8"))["train"]


def linear_limits(model: SparcModel, train: FeatureDataset, test: FeatureDataset) -> dict[str, float]:
    """Return what linear maps between the streams reach without any code: regression's nmse and CCA's R@1."""
    imputation = add_imputation(model, train)
    rows = model.normalize({name: torch.from_numpy(test.array(name)) for name in model.config.stream_names})
    errors, hits = [], []
    for source, target in itertools.permutations(rows, 2):
        guessed = imputation.complete({source: rows[source]})[target]
        errors.append(((guessed - rows[target]).square().sum(1) / rows[target].square().sum(1)).mean().item())
    fitted = model.normalize({name: torch.from_numpy(train.array(name)) for name in model.config.stream_names})
    for source, target in itertools.combinations(rows, 2):
        left, right = canonical(fitted[source], fitted[target], rows[source], rows[target])
        hits += [(vector_ranks(a, b) <= 1).mean() for a, b in ((left, right), (right, left))]
    return {"nmse_cross": float(np.mean(errors)), "latent_alignment_r_at_1": float(np.mean(hits))}


def canonical(x: torch.Tensor, y: torch.Tensor, *test: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return test rows of two streams in canonical coordinates, each weighted by its correlation."""
    whiteners = []
    for rows in (x, y):
        covariance = torch.cov(rows.T.double())
        covariance.diagonal().add_(CCA_RIDGE * covariance.diagonal().mean())
        values, vectors = torch.linalg.eigh(covariance)
        whiteners.append(vectors * values.rsqrt() @ vectors.T)
    centered = [rows.double() - rows.double().mean(dim=0) for rows in (x, y)]
    across = whiteners[0] @ (centered[0].T @ centered[1] / (len(x) - 1)) @ whiteners[1]
    left, correlations, right = torch.linalg.svd(across, full_matrices=False)
    maps = [whiteners[0] @ left * correlations, whiteners[1] @ right.T * correlations]
    projected = [
        (rows.double() - own.double().mean(dim=0)) @ to for rows, own, to in zip(test, (x, y), maps, strict=True)
    ]
    return projected[0].float().numpy(), projected[1].float().numpy()


def table_of(title: str, seeds: list[dict[str, dict[str, float]]], limits: dict[str, float]) -> list[str]:
    lines = ["", f"## {title}", "", f"| code | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in seeds[0]:
        cells = []
        for column in COLUMNS:
            values = [seed[name][column] for seed in seeds if column in seed[name]]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    limit = [f"{limits[column]:.3f}" if column in limits else "" for column in COLUMNS]
    return [*lines, f"| linear limits: regression, CCA | {' | '.join(limit)} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caption_streams", type=Path, help="folder of the caption streams; without, the demo only")
    parser.add_argument("--output", type=Path, default=Path("runs/alignment"), help="folder for models and figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="in place of the settings', to try the script out")
    parser.add_argument("--validation", action="store_true", help="measure on 15 %% of the training rows instead")
    args = parser.parse_args()
    text, results = [], {}
    for data, recipe, train, test in data_sets(args):
        if args.validation:
            train, test = random_split(train, 0.15, 16)
        seeds = []
        for seed in args.seeds:
            folder = args.output / ("validation" if args.validation else "held-out") / data / f"seed{seed}"
            settings = {**recipe["train"], "seed": seed}
            seeds.append(lines_of_seed(settings, train, test, folder))
            print(folder, json.dumps(seeds[-1]), flush=True)
        limits = linear_limits(trained(settings, train, folder), train, test)
        results[data] = {"rows": len(test), "seeds": seeds, "limits": limits}
        text += table_of(f"{recipe['title']}, {len(test):,} rows", seeds, limits)
    print("\n".join(text))
    write_text(args.output / "table.md", "\n".join(text) + "\n")
    write_json(args.output / "results.json", results)


if __name__ == "__main__":
    main()
