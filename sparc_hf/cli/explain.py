"""`sparc explain`: draw where concepts are in images and captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from sparc_hf.cli.parser import trust_remote_code_flag
from sparc_hf.codes.concept_search import EXACT_NAME, ConceptSearch, LatentMatch
from sparc_hf.codes.concepts import concepts_of
from sparc_hf.codes.encoding import sample_codes
from sparc_hf.encoders.inputs import open_image, size_of_file
from sparc_hf.encoders.stream_encoder import check_encoders, load_encoders
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.files.output_folder import check_output_folder
from sparc_hf.maps.explanation import Explanation, active_latents, check_latents, explain_sample
from sparc_hf.maps.methods import MAP_METHODS, check_map_settings
from sparc_hf.maps.picture_folder import picture_folder
from sparc_hf.maps.plots import ExplainedTarget
from sparc_hf.model.modeling_sparc import SparcModel


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


def run_explain(args: ExplainArguments) -> dict[str, Any]:
    """Draw a panel for every sample; panels that are there from an earlier run are kept.

    Raises:
        ValueError: for no samples, captions that do not fit the images, files that are no images, or as
            `explain_sample`.
    """
    for name in ("rows", "top"):
        if (count := getattr(args, name)) is not None and count < 1:
            raise ValueError(f"`{name}` must be at least 1, but it is {count}")
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
    asked_for: dict[str, Sequence[int]] = {_title(latent, names): (latent,) for latent in args.latents}
    asked_for |= {
        _concept_title(word, word_matches): [match.latent for match in word_matches]
        for word, word_matches in matches.items()
    }
    samples = _samples(args, {record["modality"] for record in model.config.streams or []})
    encoders = load_encoders(model.config.streams or [], trust_remote_code=args.trust_remote_code)
    drawn_from = ("panel", args.features, args.text, asked_for, args.top, args.method, args.shifts)
    drawn, kept_count = [], 0
    with picture_folder(args.output, model) as pictures:
        for name, read in tqdm(samples, desc="panels", unit="sample", delay=2, leave=False):
            if pictures.has(f"{name}.png", *drawn_from) and not args.overwrite:
                kept_count += 1
                continue
            image, caption = read()
            codes = sample_codes(model, encoders, image, caption)
            latents = asked_for or {_title(latent, names): (latent,) for latent in active_latents(codes, args.top)}
            explanation = explain_sample(
                model, encoders, image, caption, latents, method=args.method, shifts=args.shifts, codes=codes
            )
            pictures.save(explanation.panel(), f"{name}.png", *drawn_from)
            drawn.append({"panel": str(Path(args.output) / f"{name}.png")} | _facts(explanation))
    facts: dict[str, Any] = {"output": args.output, "drawn": len(drawn), "kept": kept_count}
    if matches:
        facts["concepts"] = {
            word: [{"latent": match.latent, "matched_by": match.reason} for match in word_matches]
            for word, word_matches in matches.items()
        }
    return facts | ({} if args.features else {"samples": drawn})


def _title(latent: int, names: Mapping[int, str | None]) -> str:
    name = names.get(latent)
    return f"latent {latent}" + (f": {name}" if name else "")


def _concept_title(word: str, matches: Sequence[LatentMatch]) -> str:
    latents = f"latent{'s' if len(matches) > 1 else ''} {', '.join(str(match.latent) for match in matches)}"
    why = "" if matches[0].rank == EXACT_NAME else f" by its {matches[0].reason}"
    return f"{word} ({latents}{why})"


def _facts(explanation: Explanation) -> dict[str, Any]:
    facts: dict[str, Any] = {"targets": [_target_facts(target) for target in explanation.targets]}
    return facts | ({"remarks": list(explanation.remarks)} if explanation.remarks else {})


def _target_facts(target: ExplainedTarget) -> dict[str, Any]:
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

        def read_row(row: int) -> tuple[Image.Image | None, str]:
            return features.image(row), texts[row] if texts is not None else ""

        return [(_file_name(str(row if ids is None else ids[row])), lambda row=row: read_row(row)) for row in rows]
    _check_modalities(modalities, image=bool(args.image), text=bool(args.text))
    if not args.image:
        return [(f"caption-{at}", lambda text=text: (None, text)) for at, text in enumerate(args.text)]
    captions = args.text * len(args.image) if len(args.text) == 1 else args.text or [""] * len(args.image)
    names = [Path(path).stem for path in args.image]
    doubled = {name for name in names if names.count(name) > 1}
    return [
        (f"{name}-{at}" if name in doubled else name, lambda path=path, text=text: (open_image(path), text))
        for at, (name, path, text) in enumerate(zip(names, args.image, captions, strict=True))
    ]


def _check_modalities(modalities: set[str], **given: bool) -> None:
    if not modalities & {name for name, is_given in given.items() if is_given}:
        raise ValueError(f"this model's streams encode {sorted(modalities)}, which the samples lack")


def _file_name(name: str) -> str:
    """Return a name without what a path could be made of."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).lstrip(".") or "sample"
