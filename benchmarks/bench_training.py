"""A whole training run on the caption streams: the loop of the package, and the plain dense form at the same rows.

    python benchmarks/bench_training.py --caption_streams ../shared/data/caption_streams --output training.json

Both start from the same weights and see the same batches; both models are evaluated on the same held-out rows, so the
table shows what was reached beside the wall time. Re-initialisation is off, because its draws are the package's own.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from dense_baseline import DenseSparc
from results_table import caption_rows

from sparc_hf import SparcModel
from sparc_hf.evaluation.suite import EvaluationSettings, evaluate_model
from sparc_hf.features.batches import FeatureBatches
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.training.arguments import SparcTrainingArguments
from sparc_hf.training.trainer import SparcTrainer

FIGURES = {"joint": ("nmse_self", "nmse_cross", "jaccard"), "single": ("jaccard", "latent_alignment_r_at_1")}


def train_ours(args: SparcTrainingArguments, rows: FeatureDataset) -> tuple[SparcModel, float]:
    trainer = SparcTrainer(args, rows)
    start = time.perf_counter()
    return trainer.train(), time.perf_counter() - start


def train_dense(args: SparcTrainingArguments, rows: FeatureDataset) -> tuple[SparcModel, float]:
    model = SparcTrainer(args, rows).model  # for its seeded initial weights
    dense = DenseSparc(model.config).train()
    dense.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(dense.parameters(), lr=args.learning_rate)
    batches = FeatureBatches(rows, batch_size=args.batch_size, seed=args.seed)
    start = time.perf_counter()
    for _ in range(args.epochs):
        for batch in batches:
            optimizer.zero_grad()
            dense(model.normalize(batch))["loss"].backward()
            dense.prepare_atoms_for_step()
            optimizer.step()
    seconds = time.perf_counter() - start
    model.load_state_dict(dense.state_dict())
    return model.eval(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caption_streams", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    train_rows, test_rows = caption_rows({}, args)
    results = {}
    for name, work in {"dense": train_dense, "torch": train_ours, "compiled": train_ours}.items():
        with TemporaryDirectory() as folder:
            settings = SparcTrainingArguments(
                features="",
                output_dir=f"{folder}/run",
                num_latents=2048,
                k=32,
                auxk=32,
                batch_size=256,
                learning_rate=1e-3,
                epochs=args.epochs,
                reinitialize_every=0,
                checkpoint_every=0,
                impute=False,
                cpu=True,
                step_kernel="on" if name == "compiled" else "off",
            )
            model, seconds = work(settings, train_rows)
        found = evaluate_model(model, test_rows, EvaluationSettings(replicates=0, probes=False)).results
        figures = {
            f"{key}, {kind}": found[kind]["headline"][key]["value"] for kind in FIGURES for key in FIGURES[kind]
        }
        results[name] = {"seconds": seconds, **figures}
        print(name, " | ".join(f"{key} {value:.4g}" for key, value in results[name].items()), flush=True)
    if args.output:
        args.output.write_text(json.dumps({"threads": torch.get_num_threads(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
