"""Panels that show where concepts are in an image and its caption."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from sparc_hf.codes.encoding import sample_codes
from sparc_hf.encoders.inputs import upright_rgb
from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.encoders.trace import visible_box
from sparc_hf.maps.patch_maps import image_maps, map_on_image
from sparc_hf.maps.plots import ExplainedTarget, explanation_panel
from sparc_hf.maps.scored_words import word_scores
from sparc_hf.maps.targets import ConceptTarget, SimilarityTarget, Target
from sparc_hf.model.modeling_sparc import SparcModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Maps are drawn over a smaller copy of larger images: a photograph of 100 million pixels would need gigabytes.
SHOWN_SIDE = 640


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
        found = image_maps(model, used, [image], list(for_images.values()), method, shifts=shifts)
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
    targets += [_agreement(text, images, maps, words) for text in texts if images]
    return Explanation(shown, caption, targets)


def _agreement(
    text: str,
    images: Sequence[str],
    maps: Mapping[str, Mapping[str, np.ndarray]],
    words: Mapping[str, Mapping[str, list[Any]]],
) -> ExplainedTarget:
    """Return the row of where the image streams and a text stream agree, the baseline's maps in it."""
    baseline = {
        f"{stream}, embeddings (baseline)": heat for stream, heat in maps.get(f"embeddings of {text}", {}).items()
    }
    marked = {
        f"{text} for {stream}": words[f"similarity with {stream}"][text]
        for stream in images
        if text in words.get(f"similarity with {stream}", {})
    }
    row = _row(f"agreement of image and {text}", images, maps.get(f"similarity with {text}", {}), marked)
    return replace(row, maps={**row.maps, **baseline})


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


def check_latents(model: SparcModel, latents: Sequence[int]) -> None:
    """Raise ValueError for numbers of latents that a model does not have."""
    if wrong := [latent for latent in latents if not 0 <= latent < model.config.num_latents]:
        raise ValueError(
            f"there are no latents {wrong}; this model has latents from 0 to {model.config.num_latents - 1}"
        )
