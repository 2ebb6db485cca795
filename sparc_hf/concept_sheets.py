"""Pictures of concepts over a dataset: contact sheets of top samples with maps, and heatmaps of the strongest."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sparc_hf.attribution import ConceptTarget, check_map_settings, image_maps, map_method, map_on_image
from sparc_hf.backbone_trace import visible_box
from sparc_hf.codes import CodeTable, check_streams, encode_features
from sparc_hf.command_arguments import ConceptsArguments
from sparc_hf.concept_search import ConceptSearch
from sparc_hf.concepts import (
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
from sparc_hf.encoders import StreamEncoder, check_encoders, load_encoders
from sparc_hf.explain import SHOWN_SIDE, check_latents, sample_codes
from sparc_hf.features import FeatureDataset
from sparc_hf.image_files import open_image, size_of_file, upright_rgb
from sparc_hf.map_plots import SheetCell, contact_sheet, heatmap_grid
from sparc_hf.maximisation import MaximisationSettings, maximise_latent
from sparc_hf.modeling_sparc import SparcModel
from sparc_hf.output_folder import check_output_folder
from sparc_hf.picture_folder import PictureFolder, picture_folder
from sparc_hf.plain_files import read_text
from sparc_hf.top_samples import TopSamples, top_samples
from sparc_hf.universality import latent_universality

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHEET_SAMPLES = 8


def latent_sheet(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    features: FeatureDataset,
    best: Mapping[str, TopSamples],
    latent: int,
    *,
    title: str = "",
    samples: int = 8,
    method: str | None = "relevance",
    shifts: int = 1,
) -> "Figure":
    """Return a latent's top samples in every stream side by side, with maps in streams that encode images.

    Args:
        model: the model.
        encoders: stream -> its encoder; streams without one are shown without maps.
        features: the rows of `best`, with images, captions or both.
        best: stream -> top samples, see `top_samples`.
        latent: the latent.
        title: heading; its number by default.
        samples: most samples a stream.
        method: of the maps, see `image_maps`; None for none.
        shifts: likewise.
    """
    texts = features.text
    rows: dict[str, list[SheetCell]] = {}
    for stream, top in best.items():
        chosen = [int(row) for row in top.rows[latent] if row >= 0][:samples]
        encoder = encoders.get(stream)
        records = {record["name"]: record for record in features.streams}
        is_text = (encoder.modality if encoder else records.get(stream, {}).get("modality")) == "text"
        images = {row: None if is_text else _shown(features.image(row)) for row in chosen}
        heats = _maps_of(model, encoder, images, latent, method, shifts)
        rows[stream] = [
            SheetCell(
                images[row],
                heats.get(row),
                texts[row] if texts is not None else f"row {row}",
                f"{float(value):.3f}",
            )
            for row, value in zip(chosen, top.values[latent], strict=False)
        ]
    return contact_sheet(title or f"latent {latent}", rows)


def _shown(image: Image.Image | None) -> Image.Image | None:
    """Make an image no larger than a figure needs, so that a sheet of photographs stays small."""
    if image is not None:
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return image


def _maps_of(
    model: SparcModel,
    encoder: StreamEncoder | None,
    images: Mapping[int, Image.Image | None],
    latent: int,
    method: str | None,
    shifts: int,
) -> dict[int, np.ndarray]:
    """Return row -> map [height, width] of the images there are."""
    shown = {row: image for row, image in images.items() if image is not None}
    if encoder is None or method is None or not shown:
        return {}
    kind = map_method(encoder, method)
    target = [ConceptTarget((latent,))]
    maps = image_maps(model, {encoder.name: encoder}, list(shown.values()), target, kind, shifts=shifts)[encoder.name]
    return {
        row: map_on_image(grid[0], visible_box(encoder, image), image.size)[0]
        for (row, image), grid in zip(shown.items(), maps, strict=True)
    }


def write_latent_sheets(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    features: FeatureDataset,
    best: Mapping[str, TopSamples],
    latents: Sequence[int],
    pictures: PictureFolder,
    *,
    names: Mapping[int, str],
    method: str | None = "relevance",
    shifts: int = 1,
) -> list[str]:
    """Write `latent-<number>.png` for each latent, those that are there excepted, and return the files' names.

    Raises:
        ValueError: for latents the model does not have.
    """
    check_latents(model, latents)
    files = []
    for latent in tqdm(latents, desc="contact sheets", unit="latent", delay=2, leave=False):
        title = f"latent {latent}" + (f": {names[latent]}" if latent in names else "")
        rows = [[stream, *top.rows[latent].tolist()] for stream, top in best.items()]
        facts = ("sheet", title, rows, len(features), method, shifts)
        files.append(f"latent-{latent:05d}.png")
        if pictures.has(files[-1], *facts):
            continue
        sheet = latent_sheet(model, encoders, features, best, latent, title=title, method=method, shifts=shifts)
        pictures.save(sheet, files[-1], *facts)
    return files


def strongest_latents(model: SparcModel, codes: CodeTable, count: int) -> list[int]:
    """Return the latents of largest energy, summed over streams: the importance ranking of USAE (arXiv 2502.03714)."""
    energy = latent_universality(model, {name: codes.csr(name) for name in codes.streams})["energy"]
    return [int(latent) for latent in np.argsort(-energy, kind="stable")[:count] if energy[latent] > 0]


def concept_heatmaps(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    images: Sequence[Image.Image],
    latents: Sequence[int],
    *,
    names: Mapping[int, str],
    method: str = "relevance",
    shifts: int = 1,
) -> "Figure":
    """Return maps of several latents over one set of images, in all image streams, in one figure.

    Images in which a latent is not active, each stream alone, are pale and have no map.
    """
    rows: dict[tuple[str, str], np.ndarray] = {}
    values: dict[tuple[str, str], list[float]] = {}
    images = [upright_rgb(image) for image in images]
    targets = [ConceptTarget((latent,)) for latent in latents]
    found: dict[str, np.ndarray] = {}
    for name, encoder in encoders.items():
        if encoder.modality == "image":
            kind = map_method(encoder, method)
            found |= image_maps(model, {name: encoder}, images, targets, kind, shifts=shifts)
    codes = [sample_codes(model, {name: encoders[name] for name in found}, image, "") for image in images]
    side = 64
    for at, latent in enumerate(latents):
        title = f"latent {latent}" + (f"\n{names[latent]}" if latent in names else "")
        for name, maps in found.items():
            placed = []
            for image, grid in zip(images, maps[:, at], strict=True):
                heat, _ = map_on_image(grid, visible_box(encoders[name], image), image.size)
                placed.append(np.asarray(Image.fromarray(heat).resize((side, side), Image.Resampling.BILINEAR)))
            rows[title, name] = np.stack(placed)
            values[title, name] = [float(of_image[name][latent]) for of_image in codes]
    return heatmap_grid(images, rows, values)


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
    told: dict[str, Any] = {}
    with nullcontext() if args.output is None else picture_folder(args.output, model) as folder:
        if features is not None:
            told |= _run_on_features(args, model, features, encoders, words, folder)
        if args.maximise and folder is not None:
            names = concept_names(model)
            told["maximised"] = [
                _write_maximised(args, model, encoders, latent, names, folder) for latent in args.maximise
            ]
    return told


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
    told: dict[str, Any] = {}
    if _names_latents(args, features, words):
        vocabulary = None if words is None else _vocabulary(args, model, encoders, words)
        concepts = name_concepts(codes, features, samples=args.samples, vocabulary=vocabulary)
        path = save_concepts(concepts, args.model, features=Path(args.features or "").name, rows=len(features))
        told = {"concepts": str(path), "latents_that_fire": len(concepts)}
        told["named"] = sum(concept.name is not None for concept in concepts)
    else:
        concepts = concepts_of(model)
    if pictures is not None:
        told |= _draw(args, model, encoders, features, codes, concepts, pictures)
    return told


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
    told: dict[str, Any] = {}
    names = {concept.latent: concept.name for concept in concepts if concept.name is not None}
    options = {"names": names, "method": args.method, "shifts": args.shifts}
    search = ConceptSearch(concepts, model.config.num_latents)
    named = [match.latent for word in args.concept for match in search.named(word)]
    surest = [concept.latent for concept in surest_concepts(concepts, args.top)]
    latents = list(dict.fromkeys([*args.latents, *named, *surest]))
    if latents:
        best = top_samples(codes, SHEET_SAMPLES)
        files = write_latent_sheets(model, encoders, features, best, latents, pictures, **options)
        told["sheets"] = [_shown_path(args, file) for file in files]
    if args.heatmaps:
        rows = range(min(args.heatmap_images, len(features)))
        found = [open_image(path) for path in args.images] or [features.image(row) for row in rows]
        images = [image for one in found if (image := _shown(one)) is not None]
        if not images:
            raise ValueError(f"`{args.features}` has no images to draw heatmaps on; name files as `images`")
        strongest = strongest_latents(model, codes, args.heatmaps)
        pictures.save(concept_heatmaps(model, encoders, images, strongest, **options), "heatmaps.png")
        told["heatmaps"] = {"file": _shown_path(args, "heatmaps.png"), "latents": strongest}
    return told


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
    found = maximise_latent(model, encoders, latent, MaximisationSettings(steps=args.steps, seed=args.seed))
    rows = {
        name: [
            SheetCell(image, note=f"{value:.3f}")
            for image, value in zip(stream.images, stream.activations, strict=True)
        ]
        for name, stream in found.items()
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
        for name, stream in found.items()
    }
    return {"latent": latent, "file": _shown_path(args, file), "streams": streams}
