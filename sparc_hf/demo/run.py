"""The main job on the embedded world: make scenes, extract three streams, train, evaluate, save, report."""

import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparc_hf.codes.code_table import encode_features
from sparc_hf.codes.concepts import name_concepts, save_concepts
from sparc_hf.demo import ENCODERS_PATH
from sparc_hf.demo.scenes import CLASS_NAMES, TAXONOMY, make_scenes_dataset
from sparc_hf.encoders.stream_encoder import load_encoders
from sparc_hf.evaluation.report import REPORT_FILES, write_report
from sparc_hf.evaluation.results import headline_encodings
from sparc_hf.evaluation.suite import EvaluationSettings, evaluate_model
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.extraction import extract_features
from sparc_hf.features.shards import FEATURE_FOLDER, sha256_of
from sparc_hf.features.stream_records import parse_streams
from sparc_hf.files.atomic_files import write_json
from sparc_hf.files.atomic_folders import (
    carry_over,
    named,
    new_folder,
    place,
    recover,
    refuse_fixed_place,
    remove_tree,
)
from sparc_hf.files.folder_lock import locked_folder
from sparc_hf.files.output_folder import check_output_folder
from sparc_hf.hub.cards import write_model_card
from sparc_hf.model_folder import SETTINGS_FILE, is_ours, read_settings
from sparc_hf.training.arguments import SparcTrainingArguments
from sparc_hf.training.trainer import SparcTrainer

logger = logging.getLogger(__name__)
# The folders of a demo, and what in them is the demo's own.
DEMO_FOLDERS = {
    "features": named("train", "test"),
    "features/train": FEATURE_FOLDER.owns,
    "features/test": FEATURE_FOLDER.owns,
    "model": is_ours,
    "evaluation": REPORT_FILES,
}
STREAMS = ("dino=demo:dino:image", "clip_img=demo:clip:image", "clip_txt=demo:clip:text")


@dataclass
class DemoArguments:
    """Flags of `sparc demo`."""

    output: str = field(default="runs/demo", metadata={"help": "Folder for features, model and results."})
    train_rows: int = field(default=8000, metadata={"help": "Scenes to train on."})
    test_rows: int = field(default=1000, metadata={"help": "Held-out scenes to evaluate on."})
    num_latents: int = field(default=256, metadata={"help": "Latents in the shared code space (N)."})
    k: int = field(default=16, metadata={"help": "Active latents per code."})
    epochs: int = field(default=30, metadata={"help": "Passes over the training scenes."})
    learning_rate: float = field(
        default=3e-3, metadata={"help": "Adam's learning rate at the start, from which it falls to 0."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the scenes, the weights and the row order."})


def run_demo(args: DemoArguments) -> str:
    """Run the whole way from scenes to an evaluated model and return the report that is printed.

    All is made in `<output>.partial`, which takes the place of `output` in one step when it is done; after a kill, the
    next run goes on behind the features that are there. Features of an earlier run with the same scenes and the same
    encoders are used again; the model is made anew.

    Raises:
        ValueError: for impossible sizes, or an output folder that another process uses or that cannot be replaced.
    """
    if not args.num_latents >= args.k >= 1:
        raise ValueError(f"`k` is {args.k} but `num_latents` is {args.num_latents}; choose 1 <= `k` <= `num_latents`")
    if min(args.train_rows, args.test_rows) < 1:
        raise ValueError(f"a demo needs scenes, but there are {args.train_rows} to train and {args.test_rows} to test")
    output = Path(args.output).resolve()
    check_output_folder(output)
    partial = output.with_name(output.name + ".partial")
    settings = _training_settings(args, partial / "model")
    with locked_folder(output):
        refuse_fixed_place(output)
        recover(output)
        report = _make(args, settings, output, partial)
        for lock in partial.rglob(".*.lock"):  # of a run that was killed
            lock.unlink()
        place(partial, output, named(*{name.split("/")[0] for name in DEMO_FOLDERS}))
    return report


def _make(args: DemoArguments, settings: SparcTrainingArguments, output: Path, partial: Path) -> str:
    """Make features, model and evaluation in `partial`, and return the report."""
    started = time.monotonic()
    train_rows = world_features(partial, "train", args.train_rows, args.seed, earlier=output)
    test_rows = world_features(partial, "test", args.test_rows, args.seed, earlier=output)
    for name in ("model", "evaluation"):  # of a run that was killed
        remove_tree(partial / name)
    for name, ours in DEMO_FOLDERS.items():
        if (output / name).is_dir():
            (partial / name).mkdir(exist_ok=True)
            carry_over(output / name, partial / name, ours)
    extracted = time.monotonic()
    model = SparcTrainer(settings, train_rows).train()
    trained = time.monotonic()
    evaluation = evaluate_model(
        model, test_rows, EvaluationSettings(dataset="the embedded world, test scenes", probes=False)
    )
    results = evaluation.results
    write_report({"demo": evaluation}, partial / "evaluation")
    alone = encode_features(model, test_rows, encoding="single")
    save_concepts(name_concepts(alone, test_rows), partial / "model", features="test", rows=len(test_rows))
    home = str(Path(args.output) / "model")
    write_json(partial / "model" / SETTINGS_FILE, {**(read_settings(partial / "model") or {}), "output_dir": home})
    write_model_card(
        partial / "model",
        results=results,
        settings=settings.to_dict(),
        title="SPARC on the embedded world",
        repo=home,
    )
    seconds = {
        "scenes and features": extracted - started,
        "training": trained - extracted,
        "evaluation": time.monotonic() - trained,
    }
    return _report(args, results, seconds)


def _training_settings(args: DemoArguments, folder: Path) -> SparcTrainingArguments:
    """Return the settings of the training, which are refused before the scenes are made."""
    return SparcTrainingArguments(
        features=str(Path(args.output) / "features" / "train"),
        output_dir=str(folder),
        num_latents=args.num_latents,
        k=args.k,
        auxk=min(32, args.num_latents),
        dead_after_steps=200,
        batch_size=min(256, args.train_rows),
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        lr_schedule="linear",
        adam_beta2=0.95,
        rare_latent_push=0.003,
        center=True,
        checkpoint_every=0,
        seed=args.seed,
    )


def encoders_checksum() -> str:
    """Return 16 hex digits of the files of both embedded encoders: features of other encoders mean something else."""
    files = sorted(path for path in ENCODERS_PATH.glob("*/*") if path.is_file())
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()[:16]


def world_features(output: Path, split: str, rows: int, seed: int, earlier: Path | None = None) -> FeatureDataset:
    """Return the features of a split of the embedded world, made in `output` where it does not have them.

    Args:
        output: the folder that gets `features/<split>`.
        split: train or test.
        rows: number of scenes.
        seed: of the scenes.
        earlier: the folder of an earlier run, whose features are used again where they are of the same scenes.
    """
    source = {"world": "sparc_hf.demo", "split": split, "seed": seed, "scenes": rows}
    source["encoders"] = encoders_checksum()
    folder = output / "features" / split
    if (features := _features_of(folder, source)) is not None:
        return features
    remove_tree(folder)
    # What a run with other sizes left half-way is no use to this one.
    remove_tree(folder.with_name(folder.name + ".partial"))
    if earlier is not None and _features_of(earlier / "features" / split, source) is not None:
        with new_folder(folder, named()) as copied:
            carry_over(earlier / "features" / split, copied, named())
        return FeatureDataset.load(folder)
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
        source=source,
    )


def _features_of(folder: Path, source: dict[str, Any]) -> FeatureDataset | None:
    """Return the features in a folder if they are whole and of these scenes."""
    if not folder.exists():
        return None
    try:
        features = FeatureDataset.load(folder)
    except (ValueError, OSError) as error:
        logger.warning("%s; they are made again", error)
        return None
    return features if {key: (features.source or {}).get(key) for key in source} == source else None


def _report(args: DemoArguments, results: dict[str, Any], seconds: dict[str, float]) -> str:
    output = Path(args.output)
    headlines = [results[encoding]["headline"] for encoding in headline_encodings(results)]
    table = (
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
        f"{'':44}{'joint':>10}{'single':>10}{'ignoring':>10}",
        *(
            f"{words:44}" + "".join(f"{headline[name]['value']:>10{form}}" for headline in headlines)
            for words, name, form in table
        ),
        "",
        "joint: all streams of a sample choose its latents together, which gives the counterpart partly away;",
        "single: each stream alone, the others imputed from it; ignoring: alone, as if there were no others.",
        "",
        "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
        f"model:    {output / 'model'}",
        f"card:     {output / 'model' / 'README.md'}",
        f"results:  {output / 'evaluation' / 'results.json'}",
        f"report:   {output / 'evaluation' / 'report.html'}",
        f"features: {output / 'features'}",
        "",
        "load it:  from sparc_hf import SparcModel",
        f"          model = SparcModel.from_pretrained({json.dumps(os.fspath(output / 'model'))})",
        "",
    ]
    return "\n".join(lines)
