"""Panels that show where concepts are in an image and its caption."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from sparc_hf.attribution import (
    MAP_METHODS,
    ConceptTarget,
    SimilarityTarget,
    Target,
    check_map_settings,
    image_maps,
    map_method,
    map_on_image,
    word_scores,
)
from sparc_hf.backbone_trace import visible_box
from sparc_hf.command_arguments import trust_remote_code_flag
from sparc_hf.concept_search import EXACT_NAME, ConceptSearch, LatentMatch
from sparc_hf.concepts import concepts_of
from sparc_hf.encoders import StreamEncoder, check_encoders, load_encoders
from sparc_hf.features import FeatureDataset
from sparc_hf.image_files import open_image, size_of_file, upright_rgb
from sparc_hf.map_plots import ExplainedTarget, explanation_panel
from sparc_hf.modeling_sparc import SparcModel
from sparc_hf.output_folder import check_output_folder
from sparc_hf.picture_folder import picture_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Maps are drawn over a smaller copy of larger images: a photograph of 100 million pixels would need gigabytes.
SHOWN_SIDE = 640


@dataclass
class ExplainArguments:
    """Flags of `sparc explain`."""

    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    output: str = field(metadata={"help": "Folder for the panels, a PNG per sample; those it already has are kept."})
    image: list[str] = field(default_factory=list, metadata={"help": "Image files."})
    text: list[str] = field(default_factory=list, metadata={"help": "Captions: one per image, or one for all."})
    features: str | None = field(
        default=None, metadata={"help": "Feature dataset whose images and captions to explain, in place of files."}
    )
    rows: int | None = field(default=None, metadata={"help": "First rows of the feature dataset (default: all)."})
    latents: list[int] = field(default_factory=list, metadata={"help": "Latents to explain, each by itself."})
    concept: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Concepts to explain: all latents of that name together, or else the latent that goes most surely "
            "with that label or word."
        },
    )
    top: int = field(
        default=3, metadata={"help": "Without latents or concepts: this many of the sample's most active ones."}
    )
    method: str = field(
        default="relevance", metadata={"help": "Kind of maps on images.", "choices": list(MAP_METHODS)}
    )
    shifts: int = field(default=2, metadata={"help": "As of `sparc evaluate`: 1 for plain maps."})
    overwrite: bool = field(default=False, metadata={"help": "Draw panels again that the folder has."})
    trust_remote_code: bool = trust_remote_code_flag()


@dataclass(frozen=True)
class Explanation:
    """What was found of one sample.

    Attributes:
        image: the image, at most 640 pixels wide and high, or None.
        caption: the caption, or "".
        targets: a row of the panel each; their maps are over that image.
    """

    image: Image.Image | None
    caption: str
    targets: Sequence[ExplainedTarget]

    def panel(self) -> "Figure":
        """Return the panel."""
        return explanation_panel(self.image, self.caption, self.targets)


@torch.no_grad()
def sample_codes(
    model: SparcModel, encoders: Mapping[str, StreamEncoder], image: Image.Image | None, caption: str
) -> dict[str, torch.Tensor]:
    """Return stream -> float32 [N], the code of a sample in each stream that can encode it, each alone.

    Of streams of patch tokens it has the largest value of every latent.
    """
    found = {}
    for name, encoder in encoders.items():
        sample = image if encoder.modality == "image" else caption
        if sample is not None and sample != "":
            rows = encoder.rows(encoder.prepare([sample]))  # pyright: ignore[reportArgumentType]
            found[name] = model.encode({name: rows})[name].to_dense().amax(dim=0).float().cpu()
    return found


def active_latents(codes: Mapping[str, torch.Tensor], count: int) -> list[int]:
    """Return the latents most active in a sample: by the mean over streams of its codes [N], each of unit length."""
    values = torch.stack([code / code.norm().clamp(min=1e-8) for code in codes.values()]).sum(dim=0)
    return [int(latent) for latent in values.topk(min(count, len(values))).indices if values[latent] > 0]


def explain_sample(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    image: Image.Image | None,
    caption: str,
    latents: Mapping[str, Sequence[int]],
    *,
    method: str = "relevance",
    shifts: int = 1,
) -> Explanation:
    """Find where sets of latents are in an image and a caption, and, where there are both, where the two agree.

    The baseline, the similarity of embeddings, has a column of its own in the row of the agreement.

    Args:
        model: the model.
        encoders: stream -> its encoder.
        image: the image, or None.
        caption: the caption, or "".
        latents: title -> latents.
        method: see `image_maps`.
        shifts: likewise.

    Raises:
        ValueError: for neither image nor caption, or as `image_maps`.
    """
    if image is None and not caption:
        raise ValueError("give an image, a caption, or both")
    shown = None if image is None else upright_rgb(image)
    if shown is not None:
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    texts = [name for name, encoder in encoders.items() if encoder.modality == "text"] if caption else []
    images = [name for name, encoder in encoders.items() if encoder.modality == "image"] if image is not None else []
    if not texts and not images:
        modalities = sorted({encoder.modality for encoder in encoders.values()})
        raise ValueError(f"this model's streams encode {modalities}, which the sample lacks")
    concepts: dict[str, Target] = {title: ConceptTarget(tuple(chosen)) for title, chosen in latents.items()}
    for_images, for_texts = dict(concepts), dict(concepts)
    if texts and images and image is not None:
        for text in texts:
            for_images[f"similarity with {text}"] = SimilarityTarget(text, caption)
            for_images[f"embeddings of {text}"] = SimilarityTarget(text, caption, embeddings=True)
        for stream in images:
            for_texts[f"similarity with {stream}"] = SimilarityTarget(stream, image)
    used = {name: encoders[name] for name in [*images, *texts]}
    maps: dict[str, dict[str, np.ndarray]] = {}
    if image is not None and shown is not None and images and for_images:
        found = {}
        for stream in images:
            needed = {stream: encoders[stream]} | {text: encoders[text] for text in texts}
            kind = map_method(encoders[stream], method)
            found |= image_maps(model, needed, [image], list(for_images.values()), kind, shifts=shifts)
        for stream, of_stream in found.items():
            box = visible_box(encoders[stream], shown)
            for title, grid in zip(for_images, of_stream[0], strict=True):
                if np.isfinite(grid).all():
                    maps.setdefault(title, {})[stream] = map_on_image(grid, box, shown.size)[0]
    words: dict[str, dict[str, list[Any]]] = {}
    if texts and for_texts:
        for stream, (of_text,) in word_scores(model, used, [caption], list(for_texts.values())).items():
            for title, of_target in zip(for_texts, of_text, strict=True):
                words.setdefault(title, {})[stream] = list(of_target)
    codes = sample_codes(model, encoders, image, caption)
    values = {
        title: {stream: float(code[list(chosen)].sum()) for stream, code in codes.items()}
        for title, chosen in latents.items()
    }
    targets = [_row(title, images, maps.get(title, {}), words.get(title, {}), values[title]) for title in concepts]
    for text in texts if images else ():
        baseline = {
            f"{stream}, embeddings (baseline)": heat for stream, heat in maps.get(f"embeddings of {text}", {}).items()
        }
        marked = {
            f"{text} for {stream}": words[f"similarity with {stream}"][text]
            for stream in images
            if text in words.get(f"similarity with {stream}", {})
        }
        row = _row(f"agreement of image and {text}", images, maps.get(f"similarity with {text}", {}), marked)
        targets.append(replace(row, maps={**row.maps, **baseline}))
    return Explanation(shown, caption, targets)


def _row(
    title: str,
    streams: Sequence[str],
    maps: Mapping[str, np.ndarray],
    words: Mapping[str, Sequence[Any]],
    values: Mapping[str, float] | None = None,
) -> ExplainedTarget:
    notes = {stream: f"{value:.2f}" if value > 0 else "not active" for stream, value in (values or {}).items()}
    inactive = frozenset(stream for stream, value in (values or {}).items() if not value > 0)
    # A map of what is not there shows where it is least absent, which reads as the opposite.
    shown = {stream: None if stream in inactive else maps.get(stream) for stream in streams}
    return ExplainedTarget(title, shown, words, notes, inactive)


def run_explain(args: ExplainArguments) -> dict[str, Any]:
    """Draw a panel for every sample; panels that are there from an earlier run are kept.

    Raises:
        ValueError: for no samples, captions that do not fit the images, files that are no images, or as
            `explain_sample`.
    """
    for name in ("rows", "top"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ValueError(f"`{name}` must be at least 1, but it is {number}")
    check_map_settings(args.method, args.shifts)
    check_output_folder(args.output)
    _check_files(args)
    model = SparcModel.from_pretrained(args.model).eval()
    check_latents(model, args.latents)
    check_encoders(model.config.streams or [])
    concepts = concepts_of(model)
    names = {concept.latent: concept.name for concept in concepts}
    search = ConceptSearch(concepts, model.config.num_latents)
    matches = {word: search.named(word) for word in args.concept}
    chosen: dict[str, Sequence[int]] = {_title(latent, names): (latent,) for latent in args.latents}
    chosen |= {_found_title(word, found): [match.latent for match in found] for word, found in matches.items()}
    samples = _samples(args, {record["modality"] for record in model.config.streams or []})
    encoders = load_encoders(model.config.streams or [], trust_remote_code=args.trust_remote_code)
    drawn_from = ("panel", args.features, args.text, chosen, args.top, args.method, args.shifts)
    told, kept = [], 0
    with picture_folder(args.output, model) as pictures:
        for name, read in tqdm(samples, desc="panels", unit="sample", delay=2, leave=False):
            if pictures.has(f"{name}.png", *drawn_from) and not args.overwrite:
                kept += 1
                continue
            image, caption = read()
            latents = chosen or {
                _title(latent, names): (latent,)
                for latent in active_latents(sample_codes(model, encoders, image, caption), args.top)
            }
            found = explain_sample(model, encoders, image, caption, latents, method=args.method, shifts=args.shifts)
            pictures.save(found.panel(), f"{name}.png", *drawn_from)
            path = Path(args.output) / f"{name}.png"
            told.append({"panel": str(path), "targets": [_told(target) for target in found.targets]})
    facts: dict[str, Any] = {"output": args.output, "drawn": len(told), "kept": kept}
    if matches:
        facts["concepts"] = {
            word: [{"latent": match.latent, "matched_by": match.reason} for match in found]
            for word, found in matches.items()
        }
    return facts | ({} if args.features else {"samples": told})


def _title(latent: int, names: Mapping[int, str | None]) -> str:
    name = names.get(latent)
    return f"latent {latent}" + (f": {name}" if name else "")


def _found_title(word: str, matches: Sequence[LatentMatch]) -> str:
    latents = f"latent{'s' if len(matches) > 1 else ''} {', '.join(str(match.latent) for match in matches)}"
    why = "" if matches[0].rank == EXACT_NAME else f" by its {matches[0].reason}"
    return f"{word} ({latents}{why})"


def _told(target: ExplainedTarget) -> dict[str, Any]:
    marked = {stream: [[word, round(score, 6)] for word, score, *_ in words] for stream, words in target.words.items()}
    streams = [name for name, heat in target.maps.items() if heat is not None]
    facts: dict[str, Any] = {"title": target.title, "maps": streams}
    return facts | ({"values": dict(target.notes)} if target.notes else {}) | ({"words": marked} if marked else {})


def _check_files(args: ExplainArguments) -> None:
    """Raise ValueError for flags that give no samples, and for image files that are none by their headers."""
    if args.features is not None and (args.image or args.text):
        raise ValueError("give a feature dataset or files and captions, not both")
    if args.features is None and not args.image and not any(text.strip() for text in args.text):
        raise ValueError("give images, captions, or a feature dataset to explain")
    if args.image and len(args.text) not in (0, 1, len(args.image)):
        raise ValueError(
            f"there are {len(args.image)} images but {len(args.text)} captions; give one for each, or one"
        )
    for path in args.image:
        size_of_file(path)


def _samples(args: ExplainArguments, modalities: set[str]) -> list[tuple[str, Any]]:
    """Return (name of the panel, what reads image and caption) of every sample.

    Raises:
        ValueError: for a dataset without images and captions, or samples of which no modality is any stream's.
    """
    if args.features is not None:
        features = FeatureDataset.load(args.features)
        texts, has_images = features.text, "image" in features.column_names
        if texts is None and not has_images:
            raise ValueError(f"`{args.features}` has neither images nor captions (columns {features.column_names})")
        _check_modalities(modalities, image=has_images, text=texts is not None)
        ids = features.ids
        rows = range(min(args.rows or len(features), len(features)))

        def of_row(row: int) -> tuple[Image.Image | None, str]:
            return features.image(row), texts[row] if texts is not None else ""

        return [(_file_name(str(row if ids is None else ids[row])), lambda row=row: of_row(row)) for row in rows]
    _check_modalities(modalities, image=bool(args.image), text=bool(args.text))
    if not args.image:
        return [(f"caption-{number}", lambda text=text: (None, text)) for number, text in enumerate(args.text)]
    captions = args.text * len(args.image) if len(args.text) == 1 else args.text or [""] * len(args.image)
    names = [Path(path).stem for path in args.image]
    doubled = {name for name in names if names.count(name) > 1}
    return [
        (f"{name}-{number}" if name in doubled else name, lambda path=path, text=text: (open_image(path), text))
        for number, (name, path, text) in enumerate(zip(names, args.image, captions, strict=True))
    ]


def _check_modalities(modalities: set[str], **given: bool) -> None:
    if not modalities & {name for name, is_given in given.items() if is_given}:
        raise ValueError(f"this model's streams encode {sorted(modalities)}, which the samples lack")


def check_latents(model: SparcModel, latents: Sequence[int]) -> None:
    """Raise ValueError for numbers of latents that a model does not have."""
    if wrong := [latent for latent in latents if not 0 <= latent < model.config.num_latents]:
        raise ValueError(
            f"there are no latents {wrong}; this model has latents from 0 to {model.config.num_latents - 1}"
        )


def _file_name(name: str) -> str:
    """Return a name without what a path could be made of."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).lstrip(".") or "sample"
