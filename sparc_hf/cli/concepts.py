"""`sparc concepts`: name latents, and draw their top samples, their maps, and images made to fire them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparc_hf.cli.parser import trust_remote_code_flag
from sparc_hf.codes.code_table import CodeTable, check_streams, encode_features
from sparc_hf.codes.concept_search import ConceptSearch
from sparc_hf.codes.concepts import (
    Concept,
    SimilarWord,
    check_nameable,
    concept_names,
    concepts_of,
    name_concepts,
    save_concepts,
    surest_concepts,
    vocabulary_evidence,
    vocabulary_words,
)
from sparc_hf.codes.incomplete import with_complete_rows
from sparc_hf.codes.top_samples import top_samples
from sparc_hf.encoders.inputs import open_image, size_of_file
from sparc_hf.encoders.stream_encoder import StreamEncoder, check_encoders, load_encoders
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.files.checked_reading import read_text
from sparc_hf.files.output_folder import check_output_folder
from sparc_hf.maps.contact_sheets import (
    SHEET_SAMPLES,
    concept_heatmaps,
    shown_image,
    strongest_latents,
    write_latent_sheets,
)
from sparc_hf.maps.explanation import check_latents
from sparc_hf.maps.maximisation import MaximisationSettings, maximise_latent
from sparc_hf.maps.methods import MAP_METHODS, check_map_settings
from sparc_hf.maps.picture_folder import PictureFolder, picture_folder
from sparc_hf.maps.plots import SheetCell, contact_sheet
from sparc_hf.model.modeling_sparc import SparcModel


@dataclass
class ConceptsArguments:
    """Flags of `sparc concepts`."""

    model: str = field(metadata={"help": "Folder of the model; gets concepts.json."})
    features: str | None = field(
        default=None,
        metadata={
            "help": "Feature dataset with labels, captions, or both, to name latents by and to take top samples from; "
            "rows that lack a stream of the model are left out; without it, nothing is named anew."
        },
    )
    samples: int = field(default=20, metadata={"help": "Top samples of a latent in a stream that names come from."})
    vocabulary: str | None = field(
        default=None,
        metadata={"help": "Text file with a word a line: latents are also named by the words that raise them."},
    )
    prompt: str = field(default="{}", metadata={"help": "Text for a word of the vocabulary, which replaces {}."})
    output: str | None = field(default=None, metadata={"help": "Folder for pictures; those it has are kept."})
    latents: list[int] = field(
        default_factory=list, metadata={"help": "Draw contact sheets of these latents: top samples with maps."}
    )
    concept: list[str] = field(
        default_factory=list, metadata={"help": "Draw contact sheets of these concepts, found as by `sparc explain`."}
    )
    top: int = field(
        default=0, metadata={"help": "Draw contact sheets of this many latents, the most surely named, one a name."}
    )
    heatmaps: int = field(
        default=0,
        metadata={"help": "Draw maps of this many latents, by energy, over the same images in one figure."},
    )
    heatmap_images: int = field(default=8, metadata={"help": "Images in that figure, the first of the dataset."})
    images: list[str] = field(
        default_factory=list, metadata={"help": "Image files for that figure, in place of the dataset's."}
    )
    maximise: list[int] = field(
        default_factory=list, metadata={"help": "Make an image per stream that fires each of these latents."}
    )
    method: str = field(
        default="relevance",
        metadata={"help": "Kind of maps.", "choices": list(MAP_METHODS)},
    )
    shifts: int = field(default=2, metadata={"help": "As of `sparc evaluate`: 1 for plain maps."})
    steps: int = field(default=256, metadata={"help": "Steps of maximisation."})
    seed: int = field(default=0, metadata={"help": "Seed of maximisation."})
    batch_size: int = field(default=1024, metadata={"help": "Rows at a time."})
    no_verify: bool = field(default=False, metadata={"help": "Do not compare features with their checksums."})
    trust_remote_code: bool = trust_remote_code_flag()


def run_concepts(args: ConceptsArguments) -> dict[str, Any]:
    """Name the latents of a model, and draw what is asked for.

    Raises:
        ValueError: for pictures without a folder or the dataset they need, latents the model does not have, or as
            `name_concepts`.
    """
    for name, least in (("samples", 1), ("top", 0), ("heatmaps", 0), ("heatmap_images", 1), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"`{name}` must be at least {least}, but it is {getattr(args, name)}")
    pictures = bool(args.latents or args.concept or args.top or args.heatmaps)
    _check_flags(args, pictures)
    words = None if args.vocabulary is None else vocabulary_words(read_text(args.vocabulary), args.prompt)
    model = SparcModel.from_pretrained(args.model).eval()
    check_latents(model, [*args.latents, *args.maximise])
    needed = {"text": words, "image": args.maximise}
    _check_streams_for(model, [modality for modality, use in needed.items() if use], pictures)
    # What takes long comes last: reading all rows for their checksums, loading encoders, encoding.
    features = None if args.features is None else _checked_features(args, model, words)
    streams = model.config.streams or [] if pictures or args.maximise or words else []
    encoders = load_encoders(streams, trust_remote_code=args.trust_remote_code)
    facts: dict[str, Any] = {}
    with nullcontext() if args.output is None else picture_folder(args.output, model) as folder:
        if features is not None:
            facts |= _run_on_features(args, model, features, encoders, words, folder)
        if args.maximise and folder is not None:
            names = concept_names(model)
            facts["maximised"] = [
                _write_maximised(args, model, encoders, latent, names, folder) for latent in args.maximise
            ]
    return facts


def _check_flags(args: ConceptsArguments, pictures: bool) -> None:
    """Raise ValueError for flags that contradict each other, and for files and folders that cannot be used."""
    if (pictures or args.maximise) and args.output is None:
        raise ValueError("give the folder for the pictures as `output`")
    if args.features is None and (pictures or args.vocabulary or not args.maximise):
        raise ValueError("give a feature dataset to name latents by and to draw samples of, as `features`")
    check_map_settings(args.method, args.shifts)
    MaximisationSettings(steps=args.steps, seed=args.seed)
    if args.output is not None:
        check_output_folder(args.output)
    elif args.features is not None:
        _check_named_model(args.model)
    for path in args.images:
        size_of_file(path)


def _check_named_model(model: str) -> None:
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"names are written beside the model, so give its folder as `model`, which {model} is not")
    check_output_folder(model, "model")


def _check_streams_for(model: SparcModel, modalities: Sequence[str], encoded: bool) -> None:
    """Raise ValueError where no stream encodes what is needed, or an encoder that is cannot be reached."""
    records = model.config.streams or []
    for modality in modalities:
        if not any(record.get("modality") == modality for record in records):
            use = {"text": "a vocabulary", "image": "maximisation"}[modality]
            raise ValueError(f"{use} needs a stream that encodes {modality}, and this model has none")
    if modalities or encoded:
        check_encoders(records)


def _names_latents(args: ConceptsArguments, features: FeatureDataset, words: Sequence[str] | None) -> bool:
    # Rows of patch tokens have nothing to name latents by, but show which are strong.
    return features.label_names is not None or features.text is not None or words is not None or args.output is None


def _checked_features(args: ConceptsArguments, model: SparcModel, words: Sequence[str] | None) -> FeatureDataset:
    """Open the dataset; ValueError where it lacks a stream, or what latents are named by or maps are drawn on."""
    features = FeatureDataset.load(args.features or "", verify=not args.no_verify)
    check_streams(model, features)
    features = with_complete_rows(features, model.config.stream_names, "finding concepts")
    if _names_latents(args, features, words):
        _check_named_model(args.model)
        check_nameable(features, words is not None)
    if args.heatmaps and not args.images and "image" not in features.column_names:
        raise ValueError(f"`{args.features}` has no images to draw heatmaps on; name files as `images`")
    return features


def _run_on_features(
    args: ConceptsArguments,
    model: SparcModel,
    features: FeatureDataset,
    encoders: Mapping[str, StreamEncoder],
    words: Sequence[str] | None,
    pictures: PictureFolder | None,
) -> dict[str, Any]:
    codes = encode_features(model, features, encoding="single", batch_size=args.batch_size)
    facts: dict[str, Any] = {}
    if _names_latents(args, features, words):
        vocabulary = None if words is None else _vocabulary(args, model, encoders, words)
        concepts = name_concepts(codes, features, samples=args.samples, vocabulary=vocabulary)
        left_out = {"rows_left_out": features.rows_left_out} if features.rows_left_out else {}
        measured = {"features": Path(args.features or "").name, "rows": len(features), **left_out}
        path = save_concepts(concepts, args.model, **measured)
        facts = {"concepts": str(path), "latents_that_fire": len(concepts), **left_out}
        facts["named"] = sum(concept.name is not None for concept in concepts)
    else:
        concepts = concepts_of(model)
    if pictures is not None:
        facts |= _draw(args, model, encoders, features, codes, concepts, pictures)
    return facts


def _vocabulary(
    args: ConceptsArguments, model: SparcModel, encoders: Mapping[str, StreamEncoder], words: Sequence[str]
) -> dict[int, list[SimilarWord]]:
    encoder = next(encoder for encoder in encoders.values() if encoder.modality == "text")
    return vocabulary_evidence(model, encoder, words, prompt=args.prompt)


def _draw(
    args: ConceptsArguments,
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    features: FeatureDataset,
    codes: CodeTable,
    concepts: Sequence[Concept],
    pictures: PictureFolder,
) -> dict[str, Any]:
    """Draw contact sheets and heatmaps."""
    facts: dict[str, Any] = {}
    names = {concept.latent: concept.name for concept in concepts if concept.name is not None}
    options = {"names": names, "method": args.method, "shifts": args.shifts}
    search = ConceptSearch(concepts, model.config.num_latents)
    named = [match.latent for word in args.concept for match in search.named(word)]
    surest = [concept.latent for concept in surest_concepts(concepts, args.top)]
    latents = list(dict.fromkeys([*args.latents, *named, *surest]))
    if latents:
        best = top_samples(codes, SHEET_SAMPLES)
        files = write_latent_sheets(model, encoders, features, best, latents, pictures, **options)
        facts["sheets"] = [_shown_path(args, file) for file in files]
    if args.heatmaps:
        rows = range(min(args.heatmap_images, len(features)))
        originals = [open_image(path) for path in args.images] or [features.image(row) for row in rows]
        images = [image for original in originals if (image := shown_image(original)) is not None]
        if not images:
            raise ValueError(f"`{args.features}` has no images to draw heatmaps on; name files as `images`")
        strongest = strongest_latents(model, codes, args.heatmaps)
        pictures.save(concept_heatmaps(model, encoders, images, strongest, **options), "heatmaps.png")
        facts["heatmaps"] = {"file": _shown_path(args, "heatmaps.png"), "latents": strongest}
    return facts


def _shown_path(args: ConceptsArguments, file: str) -> str:
    """Return where a picture is when all is done."""
    return str(Path(args.output or "") / file)


def _write_maximised(
    args: ConceptsArguments,
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    latent: int,
    names: Mapping[int, str],
    pictures: PictureFolder,
) -> dict[str, Any]:
    maximised = maximise_latent(model, encoders, latent, MaximisationSettings(steps=args.steps, seed=args.seed))
    rows = {
        name: [
            SheetCell(image, note=f"{value:.3f}")
            for image, value in zip(stream.images, stream.activations, strict=True)
        ]
        for name, stream in maximised.items()
    }
    title = f"images that fire latent {latent}" + (f": {names[latent]}" if latent in names else "")
    file = f"maximised-{latent:05d}.png"
    pictures.save(contact_sheet(title, rows), file)
    streams = {
        name: {
            "activation": round(stream.activations[0], 5),
            "random_mean": round(float(stream.random.mean()), 5),
            "random_max": round(float(stream.random.max()), 5),
        }
        for name, stream in maximised.items()
    }
    return {"latent": latent, "file": _shown_path(args, file), "streams": streams}
