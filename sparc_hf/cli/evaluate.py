"""`sparc evaluate`: measure models on a feature dataset, side by side."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc_hf.cli.parser import trust_remote_code_flag

if TYPE_CHECKING:
    from sparc_hf.evaluation.masked_images import MaskedImages


@dataclass
class EvaluateArguments:
    """Flags of `sparc evaluate`."""

    models: list[str] = field(
        metadata={"help": "Folders or Hub ids of the models; `sparc evaluate A B C` names them without the flag."}
    )
    features: str = field(
        metadata={
            "help": "Folder of the feature dataset, rows the models were not trained on; those that lack a stream are "
            "left out and counted."
        }
    )
    output: str | None = field(
        default=None,
        metadata={"help": "Folder for results.json, report.html, model-index.yaml and a CSV of latents per model."},
    )
    batch_size: int = field(default=1024, metadata={"help": "Rows at a time."})
    replicates: int = field(
        default=200,
        metadata={
            "help": "How often figures made from counts are measured again for their 95 %% intervals, each time "
            "without another part of the rows; 0 leaves all intervals out."
        },
    )
    retrieval_rows: int | None = field(
        default=None, metadata={"help": "Samples to measure retrieval on, spread evenly (default: all)."}
    )
    no_probes: bool = field(
        default=False,
        metadata={"help": "Leave out the slowest parts: probes, classifiers and the matching of atoms."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of these parts and of the probes' splits."})
    masks: str | None = field(
        default=None,
        metadata={
            "help": "Also measure how well maps find classes, against these masks: a COCO instances JSON, a saved "
            "Dataset with `image`, `masks` and `mask_labels`, or demo:test."
        },
    )
    mask_images: str | None = field(default=None, metadata={"help": "Folder of the JSON's images."})
    mask_rows: int | None = field(
        default=None, metadata={"help": "Most images with masks to use (default: all, or 500 scenes)."}
    )
    concept_features: str | None = field(
        default=None,
        metadata={
            "help": "Feature dataset with labels, other rows than the masks', to choose each class's latent on."
        },
    )
    map_methods: list[str] = field(
        default_factory=lambda: ["relevance"], metadata={"help": "Kinds of maps: relevance, grad_cam, patch_codes."}
    )
    shifts: int = field(
        default=2,
        metadata={"help": "Maps of the image shifted this many times along each axis are averaged; 1 for plain maps."},
    )
    prompt: str = field(default="a photo of a {}", metadata={"help": "Text for a class, which stands in place of {}."})
    no_verify: bool = field(default=False, metadata={"help": "Do not compare features with their checksums."})
    trust_remote_code: bool = trust_remote_code_flag()


def run_evaluate(args: Any) -> dict[str, Any]:
    from sparc_hf.codes.code_table import ENCODINGS
    from sparc_hf.codes.concepts import concept_names
    from sparc_hf.evaluation.report import check_report_folder, model_names, write_report
    from sparc_hf.evaluation.suite import EvaluationSettings, evaluate_models
    from sparc_hf.features.dataset import FeatureDataset
    from sparc_hf.model.modeling_sparc import SparcModel

    settings = EvaluationSettings(
        batch_size=args.batch_size,
        replicates=args.replicates,
        retrieval_rows=args.retrieval_rows,
        probes=not args.no_probes,
        seed=args.seed,
        dataset=Path(args.features).name,
    )
    if args.output is not None:
        check_report_folder(Path(args.output))
    models = {name: SparcModel.from_pretrained(path) for name, path in model_names(args.models).items()}
    localize = _localizer(args, models.values()) if args.masks else None
    # Last, because all rows are compared with their checksums.
    features = FeatureDataset.load(args.features, verify=not args.no_verify)
    evaluations = evaluate_models(models, features, settings)
    if localize is not None:
        for name, evaluation in evaluations.items():
            evaluation.results["localization"] = localize(models[name])
    if args.output is not None:
        write_report(evaluations, args.output, names={name: concept_names(model) for name, model in models.items()})
    sections = ("localization",) if localize else ()
    return {
        name: {
            encoding: evaluation.results[encoding]["headline"]
            for encoding in ENCODINGS
            if encoding in evaluation.results
        }
        | {key: evaluation.results[key] for key in ("rows_left_out",) if key in evaluation.results}
        | {section: evaluation.results[section] for section in sections}
        for name, evaluation in evaluations.items()
    }


def _localizer(args: Any, models: Iterable[Any]) -> Callable[[Any], dict[str, Any]]:
    """Return what measures the maps of a model, after looking at what it and the models are given."""
    from sparc_hf.codes.code_table import check_streams, encode_features
    from sparc_hf.codes.incomplete import with_complete_rows
    from sparc_hf.encoders.stream_encoder import check_encoders, load_encoders
    from sparc_hf.evaluation.localization import LocalizationSettings, check_labelled, latents_of_classes, localize
    from sparc_hf.features.dataset import FeatureDataset

    settings = LocalizationSettings(
        methods=tuple(args.map_methods),
        shifts=args.shifts,
        prompt=args.prompt,
        intervals=args.replicates > 0,
    )
    for model in models:
        check_encoders(model.config.streams)
    images = _masked_images(args)
    rows = None if args.concept_features is None else FeatureDataset.load(args.concept_features)
    if rows is not None:
        check_labelled(rows)
        for model in models:
            check_streams(model, rows)
        streams = dict.fromkeys(name for model in models for name in model.config.stream_names)
        rows = with_complete_rows(rows, streams, "choosing the classes' latents")
    classes = sorted({name for classes_of_image in images.classes for name in classes_of_image})

    def measure(model: Any) -> dict[str, Any]:
        latents = {}
        if rows is not None:
            latents = latents_of_classes(encode_features(model, rows, encoding="single"), rows, classes)
        return localize(
            model,
            load_encoders(model.config.streams, trust_remote_code=args.trust_remote_code),
            images,
            latents,
            settings,
        )

    return measure


def _masked_images(args: Any) -> "MaskedImages":
    """Open what `--masks` names; by default 500 images of the embedded world, and all of anything else."""
    from sparc_hf.encoders.pretrained import DEMO_PREFIX
    from sparc_hf.evaluation.masked_images import open_masked_images

    if args.masks.startswith(DEMO_PREFIX):
        from sparc_hf.demo.scenes import make_scenes_dataset

        scenes = make_scenes_dataset(args.masks.removeprefix(DEMO_PREFIX), args.mask_rows or 500)
        return open_masked_images(scenes)
    return open_masked_images(args.masks, args.mask_images, args.mask_rows)
