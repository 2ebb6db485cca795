"""The main job on the embedded world: make scenes, extract three streams, train, evaluate, save, report."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from sparc_hf.codes import encode_features
from sparc_hf.command_arguments import DemoArguments
from sparc_hf.concepts import name_concepts, save_concepts
from sparc_hf.demo import ENCODERS_PATH
from sparc_hf.demo.scenes import CLASS_NAMES, TAXONOMY, make_scenes_dataset
from sparc_hf.encoders import load_encoders
from sparc_hf.evaluation import EvaluationSettings, evaluate_model
from sparc_hf.extraction import extract_features
from sparc_hf.feature_files import sha256_of
from sparc_hf.features import FeatureDataset
from sparc_hf.hub import write_model_card
from sparc_hf.output_folder import check_output_folder
from sparc_hf.report import write_report
from sparc_hf.sources import parse_streams
from sparc_hf.training import SparcTrainer
from sparc_hf.training_arguments import SparcTrainingArguments

STREAMS = ("dino=demo:dino:image", "clip_img=demo:clip:image", "clip_txt=demo:clip:text")


def run_demo(args: DemoArguments) -> str:
    """Run the whole way from scenes to an evaluated model and return the report that is printed.

    Features of an earlier run with the same number of scenes and the same encoders are used again; the model is made
    anew.

    Raises:
        ValueError: for impossible sizes.
    """
    if not args.num_latents >= args.k >= 1:
        raise ValueError(f"`k` is {args.k} but `num_latents` is {args.num_latents}; choose 1 <= `k` <= `num_latents`")
    if min(args.train_rows, args.test_rows) < 1:
        raise ValueError(f"a demo needs scenes, but there are {args.train_rows} to train and {args.test_rows} to test")
    started = time.monotonic()
    output = Path(args.output)
    check_output_folder(output)
    settings = _training_settings(args, output)
    output.mkdir(parents=True, exist_ok=True)
    train_rows = world_features(output, "train", args.train_rows, args.seed)
    test_rows = world_features(output, "test", args.test_rows, args.seed)
    extracted = time.monotonic()
    model = SparcTrainer(settings, train_rows).train()
    trained = time.monotonic()
    evaluation = evaluate_model(
        model, test_rows, EvaluationSettings(dataset="the embedded world, test scenes", probes=False)
    )
    results = evaluation.results
    write_report({"demo": evaluation}, output / "evaluation")
    alone = encode_features(model, test_rows, encoding="single")
    save_concepts(name_concepts(alone, test_rows), output / "model", features="test", rows=len(test_rows))
    card = write_model_card(
        output / "model", results=results, settings=settings.to_dict(), title="SPARC on the embedded world"
    )
    seconds = {
        "scenes and features": extracted - started,
        "training": trained - extracted,
        "evaluation": time.monotonic() - trained,
    }
    return _report(args, output, card, results, seconds)


def _training_settings(args: DemoArguments, output: Path) -> SparcTrainingArguments:
    """Return the settings of the training, which are refused before the scenes are made."""
    return SparcTrainingArguments(
        features=str(output / "features" / "train"),
        output_dir=str(output / "model"),
        num_latents=args.num_latents,
        k=args.k,
        auxk=min(32, args.num_latents),
        dead_after_steps=200,
        batch_size=min(256, args.train_rows),
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        center=True,
        checkpoint_every=0,
        seed=args.seed,
        overwrite=True,
    )


def encoders_checksum() -> str:
    """Return 16 hex digits of the files of both embedded encoders: features of other encoders mean something else."""
    files = sorted(path for path in ENCODERS_PATH.glob("*/*") if path.is_file())
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()[:16]


def world_features(output: Path, split: str, rows: int, seed: int) -> FeatureDataset:
    """Return the features of a split of the embedded world, those of an earlier run in `output` where they fit."""
    folder = output / "features" / split
    wanted = {"world": "sparc_hf.demo", "split": split, "seed": seed, "scenes": rows}
    wanted["encoders"] = encoders_checksum()
    if folder.exists():
        features = FeatureDataset.load(folder)
        if {key: (features.source or {}).get(key) for key in wanted} == wanted:
            return features
        shutil.rmtree(folder)
    # What a run with other sizes left half-way is no use to this one.
    shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
    return extract_features(
        make_scenes_dataset(split, rows, seed),
        load_encoders(parse_streams(STREAMS)),
        folder,
        image_column="image",
        text_column="text",
        labels_column="labels",
        keep_columns=("image",),
        label_names=CLASS_NAMES,
        taxonomy=TAXONOMY,
        source=wanted,
    )


def _report(args: DemoArguments, output: Path, card: Path, results: dict[str, Any], seconds: dict[str, float]) -> str:
    joint, single = results["joint"]["headline"], results["single"]["headline"]
    shown = (
        ("dead latents, mean over streams", "dead_share", ".1%"),
        ("label Jaccard between streams", "jaccard", ".3f"),
        ("counterpart retrieval by codes, R@1", "latent_alignment_r_at_1", ".3f"),
        ("self-reconstruction, nmse", "nmse_self", ".3f"),
        ("cross-reconstruction, nmse", "nmse_cross", ".3f"),
    )
    lines = [
        "",
        f"SPARC on {args.train_rows:,} scenes, measured on {args.test_rows:,} held-out scenes",
        f"three streams, {args.num_latents:,} latents, {args.k} active",
        "",
        f"{'':44}{'joint':>10}{'single':>10}",
        *(
            f"{words:44}{joint[name]['value']:>10{form}}{single[name]['value']:>10{form}}"
            for words, name, form in shown
        ),
        "",
        "joint: all streams of a sample choose its latents together, which gives the counterpart partly away;",
        "single: each stream alone.",
        "",
        "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
        f"model:    {output / 'model'}",
        f"card:     {card}",
        f"results:  {output / 'evaluation' / 'results.json'}",
        f"report:   {output / 'evaluation' / 'report.html'}",
        f"features: {output / 'features'}",
        "",
        "load it:  from sparc_hf import SparcModel",
        f"          model = SparcModel.from_pretrained({json.dumps(os.fspath(output / 'model'))})",
        "",
    ]
    return "\n".join(lines)
