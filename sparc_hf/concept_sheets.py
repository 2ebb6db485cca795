"""Pictures of concepts over a dataset: contact sheets of top samples with maps, and heatmaps of the strongest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sparc_hf.attribution import ConceptTarget, image_maps, map_method, map_on_image
from sparc_hf.backbone_trace import visible_box
from sparc_hf.codes import CodeTable, encode_features
from sparc_hf.command_arguments import ConceptsArguments
from sparc_hf.concepts import (
    Concept,
    SimilarWord,
    concept_names,
    concepts_of,
    name_concepts,
    save_concepts,
    vocabulary_evidence,
)
from sparc_hf.encoders import StreamEncoder, load_encoders
from sparc_hf.explain import SHOWN_SIDE, save_figure
from sparc_hf.features import FeatureDataset
from sparc_hf.image_files import open_image
from sparc_hf.map_plots import SheetCell, contact_sheet, heatmap_grid
from sparc_hf.maximisation import MaximisationSettings, maximise_latent
from sparc_hf.metrics.concept_universality.concept_universality import concept_universality
from sparc_hf.modeling_sparc import SparcModel
from sparc_hf.top_samples import TopSamples, top_samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHEET_SAMPLES = 8


def latents_to_show(concepts: Sequence[Concept], count: int) -> list[int]:
    """Return the latents that go most surely with a label, or else a word: by lift, among those sure enough of it."""
    sure = [concept for concept in concepts if concept.name is not None]

    def lift(concept: Concept) -> float:
        return (concept.labels or concept.words)[0].lift

    return [concept.latent for concept in sorted(sure, key=lambda concept: -lift(concept))[:count]]


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
    folder: Path,
    *,
    names: Mapping[int, str],
    method: str | None = "relevance",
    shifts: int = 1,
) -> list[str]:
    """Write `latent-<number>.png` for each latent, those that are there excepted, and return the files.

    Raises:
        ValueError: for latents the model does not have.
    """
    if wrong := [latent for latent in latents if not 0 <= latent < model.config.num_latents]:
        raise ValueError(f"there are no latents {wrong}; this model has 0 to {model.config.num_latents - 1}")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for latent in tqdm(latents, desc="contact sheets", unit="latent", delay=2, leave=False):
        path = folder / f"latent-{latent:05d}.png"
        files.append(str(path))
        if path.exists():
            continue
        title = f"latent {latent}" + (f": {names[latent]}" if latent in names else "")
        save_figure(
            latent_sheet(model, encoders, features, best, latent, title=title, method=method, shifts=shifts), path
        )
    return files


def strongest_latents(model: SparcModel, codes: CodeTable, count: int) -> list[int]:
    """Return the latents of largest energy, summed over streams: the importance ranking of USAE (arXiv 2502.03714).

    A stream's energy is the latent's mean value times the norm of its atom.
    """
    # The USAE objective brings its atoms to unit norm at every use.
    usae = model.config.objective == "usae"
    norms = None if usae else {name: model.atoms[name].detach().norm(dim=1).cpu().numpy() for name in codes.streams}
    energy = concept_universality({name: codes.csr(name) for name in codes.streams}, atom_norms=norms)["energy"]
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
    """Return maps of several latents over one set of images, in all image streams, in one figure."""
    rows: dict[tuple[str, str], np.ndarray] = {}
    targets = [ConceptTarget((latent,)) for latent in latents]
    found: dict[str, np.ndarray] = {}
    for name, encoder in encoders.items():
        if encoder.modality == "image":
            kind = map_method(encoder, method)
            found |= image_maps(model, {name: encoder}, images, targets, kind, shifts=shifts)
    side = 64
    for at, latent in enumerate(latents):
        title = f"latent {latent}" + (f"\n{names[latent]}" if latent in names else "")
        for name, maps in found.items():
            placed = []
            for image, grid in zip(images, maps[:, at], strict=True):
                heat, _ = map_on_image(grid, visible_box(encoders[name], image), image.size)
                placed.append(np.asarray(Image.fromarray(heat).resize((side, side), Image.Resampling.BILINEAR)))
            rows[title, name] = np.stack(placed)
    return heatmap_grid(images, rows)


def run_concepts(args: ConceptsArguments) -> dict[str, Any]:
    """Name the latents of a model, and draw what is asked for.

    Raises:
        ValueError: for pictures without a folder or the dataset they need, latents the model does not have, or as
            `name_concepts`.
    """
    for name, least in (("samples", 1), ("top", 0), ("heatmaps", 0), ("heatmap_images", 1), ("shifts", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"`{name}` must be at least {least}, but it is {getattr(args, name)}")
    pictures = bool(args.latents or args.top or args.heatmaps)
    if (pictures or args.maximise) and args.output is None:
        raise ValueError("give the folder for the pictures as `output`")
    if args.features is None and (pictures or args.vocabulary or not args.maximise):
        raise ValueError("give a feature dataset to name latents by and to draw samples of, as `features`")
    words = None if args.vocabulary is None else Path(args.vocabulary).read_text(encoding="utf-8").split("\n")
    model = SparcModel.from_pretrained(args.model).eval()
    if wrong := [one for one in [*args.latents, *args.maximise] if not 0 <= one < model.config.num_latents]:
        raise ValueError(f"there are no latents {wrong}; this model has 0 to {model.config.num_latents - 1}")
    streams = model.config.streams or [] if pictures or args.maximise or words else []
    encoders = load_encoders(streams, trust_remote_code=args.trust_remote_code)
    told: dict[str, Any] = {}
    if args.features is not None:
        told |= _run_on_features(args, model, encoders, words)
    names = concept_names(model)
    if args.maximise:
        told["maximised"] = [_write_maximised(args, model, encoders, latent, names) for latent in args.maximise]
    return told


def _run_on_features(
    args: ConceptsArguments,
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    words: Sequence[str] | None,
) -> dict[str, Any]:
    features = FeatureDataset.load(args.features or "")
    codes = encode_features(model, features, encoding="single", batch_size=args.batch_size)
    told: dict[str, Any] = {}
    # Rows of patch tokens have nothing to name latents by, but show which are strong.
    if features.label_names is not None or features.text is not None or words is not None or args.output is None:
        vocabulary = None if words is None else _vocabulary(args, model, encoders, words)
        concepts = name_concepts(codes, features, samples=args.samples, vocabulary=vocabulary)
        path = save_concepts(concepts, args.model, features=Path(args.features or "").name, rows=len(features))
        told = {"concepts": str(path), "latents_that_fire": len(concepts)}
        told["named"] = sum(concept.name is not None for concept in concepts)
    else:
        concepts = concepts_of(model)
    return told | (_draw(args, model, encoders, features, codes, concepts) if args.output is not None else {})


def _vocabulary(
    args: ConceptsArguments, model: SparcModel, encoders: Mapping[str, StreamEncoder], words: Sequence[str]
) -> dict[int, list[SimilarWord]]:
    texts = [encoder for encoder in encoders.values() if encoder.modality == "text"]
    if not texts:
        raise ValueError(f"a vocabulary needs a text stream, and this model has {list(encoders)}")
    return vocabulary_evidence(model, texts[0], [word.strip() for word in words if word.strip()], prompt=args.prompt)


def _draw(
    args: ConceptsArguments,
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    features: FeatureDataset,
    codes: CodeTable,
    concepts: Sequence[Concept],
) -> dict[str, Any]:
    """Draw contact sheets and heatmaps."""
    told: dict[str, Any] = {}
    names = {concept.latent: concept.name for concept in concepts if concept.name is not None}
    folder, options = Path(args.output or ""), {"names": names, "method": args.method, "shifts": args.shifts}
    latents = list(dict.fromkeys([*args.latents, *latents_to_show(concepts, args.top)]))
    if latents:
        best = top_samples(codes, SHEET_SAMPLES)
        told["sheets"] = write_latent_sheets(model, encoders, features, best, latents, folder, **options)
    if args.heatmaps:
        rows = range(min(args.heatmap_images, len(features)))
        found = [open_image(path) for path in args.images] or [features.image(row) for row in rows]
        images = [image for one in found if (image := _shown(one)) is not None]
        if not images:
            raise ValueError(f"`{args.features}` has no images to draw heatmaps on; name files as `images`")
        strongest = strongest_latents(model, codes, args.heatmaps)
        folder.mkdir(parents=True, exist_ok=True)
        save_figure(concept_heatmaps(model, encoders, images, strongest, **options), folder / "heatmaps.png")
        told["heatmaps"] = {"file": str(folder / "heatmaps.png"), "latents": strongest}
    return told


def _write_maximised(
    args: ConceptsArguments,
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    latent: int,
    names: Mapping[int, str],
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
    path = Path(args.output or "") / f"maximised-{latent:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(contact_sheet(title, rows), path)
    streams = {
        name: {
            "activation": round(stream.activations[0], 5),
            "random_mean": round(float(stream.random.mean()), 5),
            "random_max": round(float(stream.random.max()), 5),
        }
        for name, stream in found.items()
    }
    return {"latent": latent, "file": str(path), "streams": streams}
