"""What a model finds in one image and its caption: where concepts are, where the two agree, and panels of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from sparc_hf.codes.encoding import sample_codes
from sparc_hf.encoders.inputs import upright_rgb
from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.encoders.views import seen_images, visible_box
from sparc_hf.maps.methods import check_map_settings, map_method
from sparc_hf.maps.patch_maps import image_maps, map_on_image
from sparc_hf.maps.plots import ExplainedTarget, explanation_panel
from sparc_hf.maps.scored_words import WordScore, word_scores
from sparc_hf.maps.targets import ConceptTarget, SimilarityTarget, Target, check_concept, one_space
from sparc_hf.model.modeling_sparc import SparcModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Maps are drawn over a smaller copy of larger images: a photograph of 100 million pixels would need gigabytes.
SHOWN_SIDE = 640
# A grid of at most so many patches a side is too coarse to be read; its maps are made finer by shifts.
COARSE_GRID = 10


@dataclass(frozen=True)
class Explanation:
    """What was found of one sample.

    Attributes:
        image: the image, at most 640 pixels wide and high, or None.
        caption: the caption, or "".
        targets: the concepts, then the agreement of the image with each text stream; a row of the panel each, whose
            maps are over that image.
        codes: stream -> float32 [N], the sample's code in that stream alone.
        views: image stream -> what its encoder sees of the image, which the targets' grids cover.
        baselines: image stream -> float32 [rows, columns], the map of the similarity of embeddings; of the streams
            whose encoder encodes the caption too.
        remarks: what whoever looks at it should know: streams without maps, words that were not read.
    """

    image: Image.Image | None
    caption: str
    targets: Sequence[ExplainedTarget]
    codes: Mapping[str, torch.Tensor]
    views: Mapping[str, Image.Image]
    baselines: Mapping[str, np.ndarray]
    remarks: Sequence[str] = ()

    def panel(self) -> "Figure":
        """Return the panel."""
        return explanation_panel(self.image, self.caption, self.targets, self.remarks)


def active_latents(codes: Mapping[str, torch.Tensor], count: int) -> list[int]:
    """Return the latents most active in a sample: by the mean over streams of its codes [N], each of unit length."""
    if not codes:
        return []
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
    shifts: int | None = None,
    agreement: bool = True,
    codes: Mapping[str, torch.Tensor] | None = None,
) -> Explanation:
    """Find where sets of latents are in an image and a caption, and, where there are both, where the two agree.

    The baseline, the similarity of embeddings, has a column of its own in the row of the agreement. A stream whose
    backbone has no maps is a remark, and streams in which a concept is not active have no map of it.

    Args:
        model: the model.
        encoders: stream -> its encoder.
        image: the image, or None.
        caption: the caption, or "".
        latents: title -> latents.
        method: see `image_maps`.
        shifts: likewise; by default 2 for grids of at most 10 patches a side, and 1 for others.
        agreement: whether to find where image and caption agree.
        codes: `sample_codes` of the sample, where they are known.

    Raises:
        ValueError: for neither image nor caption, latents that do not exist, or a method that does not.
    """
    if image is None and not caption:
        raise ValueError("give an image, a caption, or both")
    check_map_settings(method, 1 if shifts is None else shifts)
    concepts = {title: ConceptTarget(tuple(numbers)) for title, numbers in latents.items()}
    for concept in concepts.values():
        check_concept(model, concept)
    codes = sample_codes(model, encoders, image, caption) if codes is None else codes
    if not codes:
        modalities = sorted({encoder.modality for encoder in encoders.values()})
        raise ValueError(f"this model's streams encode {modalities}, which the sample lacks")
    sample = _Sample(model, {name: encoders[name] for name in codes}, image, caption)
    for stream in sample.images:
        active = [concept for concept in concepts.values() if _value(codes[stream], concept) > 0]
        sample.add_maps(stream, [*active, *sample.others(stream, agreement)], method, shifts)
    for stream in sample.texts:
        sample.add_words(stream, [*concepts.values(), *sample.others(stream, agreement)])
    rows = [sample.concept_row(title, concept, codes) for title, concept in concepts.items()]
    rows += [sample.agreement_row(text) for text in sample.texts if agreement and sample.images]
    baselines = {
        stream: grid
        for stream, grids in sample.grids.items()
        for target, grid in grids.items()
        if isinstance(target, SimilarityTarget) and target.embeddings
    }
    return Explanation(sample.shown, caption, rows, codes, sample.views, baselines, sample.remarks)


def unread_remarks(stream: str, encoder: StreamEncoder, text: str) -> list[str]:
    """Return one remark where an encoder reads only the beginning of a text, and none where it reads all."""
    unread = encoder.inputs_of.unread(text)
    return [f"{stream} reads only the beginning of a text this long, and not: {unread}"] if unread else []


def check_latents(model: SparcModel, latents: Sequence[int]) -> None:
    """Raise ValueError for numbers of latents that a model does not have."""
    if wrong := [latent for latent in latents if not 0 <= latent < model.config.num_latents]:
        raise ValueError(
            f"there are no latents {wrong}; this model has latents from 0 to {model.config.num_latents - 1}"
        )


class _Sample:
    """An image, a caption or both, and the maps and words of their targets as they are found.

    Attributes:
        grids: image stream -> target -> float32 [rows, columns], where there is such a map.
        words: text stream -> target -> the caption's words.
    """

    def __init__(
        self, model: SparcModel, encoders: Mapping[str, StreamEncoder], image: Image.Image | None, caption: str
    ):
        self.model, self.encoders, self.image, self.caption = model, encoders, image, caption
        self.texts = [name for name, encoder in encoders.items() if encoder.modality == "text"]
        self.images = [] if image is None else [name for name in encoders if name not in self.texts]
        self.shown = None if image is None else upright_rgb(image)
        if self.shown is not None:
            self.shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        self.views = {} if image is None else {name: seen_images(encoders[name], [image])[0] for name in self.images}
        self.alike = {text: SimilarityTarget(text, caption) for text in self.texts}
        if image is not None:
            self.alike |= {stream: SimilarityTarget(stream, image) for stream in self.images}
        self.baselines = {text: SimilarityTarget(text, caption, embeddings=True) for text in self.texts}
        self.grids: dict[str, dict[Target, np.ndarray]] = {}
        self.words: dict[str, dict[Target, list[WordScore]]] = {}
        self.remarks = [remark for text in self.texts for remark in unread_remarks(text, encoders[text], caption)]

    def others(self, stream: str, agreement: bool) -> list[Target]:
        """Return the targets of a stream that compare it with those of the other modality."""
        opposite = self.texts if stream in self.images else self.images
        encoder = self.encoders[stream]
        baselines = [self.baselines[text] for text in self.texts if one_space(self.encoders[text], encoder)]
        similarities = [self.alike[name] for name in opposite if agreement]
        return [*similarities, *(baselines if stream in self.images else [])]

    def add_maps(self, stream: str, targets: Sequence[Target], method: str, shifts: int | None) -> None:
        """Find where targets are for an image stream; a backbone that has no maps is a remark."""
        self.grids[stream] = {}
        encoder, view = self.encoders[stream], self.views[stream]
        if not targets or self.image is None:
            return
        used = {name: self.encoders[name] for name in [stream, *self.texts]}
        try:
            if shifts is None:
                # Patch codes are of tokens as the stream has them, so theirs stay on the stream's own grid.
                coarse = min(view.size) <= COARSE_GRID * min(encoder.patch_size)
                shifts = 2 if coarse and map_method(encoder, method) != "patch_codes" else 1
            grids = image_maps(self.model, used, [self.image], targets, method, shifts=shifts)[stream][0]
        except ValueError as error:
            self.remarks.append(f"{stream} has no map: {error}")
            return
        self.grids[stream] = {
            target: grid for target, grid in zip(targets, grids, strict=True) if np.isfinite(grid).all()
        }

    def add_words(self, stream: str, targets: Sequence[Target]) -> None:
        """Score the caption's words for a text stream; likewise."""
        self.words[stream] = {}
        if not targets:
            return
        used = {name: self.encoders[name] for name in [stream, *self.images]}
        try:
            words = word_scores(self.model, used, [self.caption], targets)[stream][0]
        except ValueError as error:
            self.remarks.append(f"{stream} has no scores of words: {error}")
            return
        self.words[stream] = dict(zip(targets, words, strict=True))

    def concept_row(self, title: str, concept: ConceptTarget, codes: Mapping[str, torch.Tensor]) -> ExplainedTarget:
        """Return what is told of a concept."""
        values = {stream: _value(code, concept) for stream, code in codes.items()}
        grids = self._grids_of(concept)
        return ExplainedTarget(
            title,
            # A map of what is not there shows where it is least absent, which reads as the opposite.
            {stream: self._over_image(stream, grids.get(stream)) for stream in self.images},
            {stream: words[concept] for stream, words in self.words.items() if concept in words},
            {stream: f"{value:.2f}" if value > 0 else "not active" for stream, value in values.items()},
            frozenset(stream for stream, value in values.items() if not value > 0),
            concept.latents,
            grids,
        )

    def agreement_row(self, text: str) -> ExplainedTarget:
        """Return where the image streams and a text stream agree, the baseline's maps among theirs."""
        grids = self._grids_of(self.alike[text])
        maps = {stream: self._over_image(stream, grids.get(stream)) for stream in self.images}
        baselines = self._grids_of(self.baselines[text])
        maps |= {f"{name}, embeddings (baseline)": self._over_image(name, grid) for name, grid in baselines.items()}
        words = {f"{text} for {stream}": self.words[text].get(self.alike[stream]) for stream in self.images}
        marked = {title: scores for title, scores in words.items() if scores is not None}
        return ExplainedTarget(f"agreement of image and {text}", maps, marked, grids=grids)

    def _grids_of(self, target: Target) -> dict[str, np.ndarray]:
        return {stream: grids[target] for stream, grids in self.grids.items() if target in grids}

    def _over_image(self, stream: str, grid: np.ndarray | None) -> np.ndarray | None:
        if grid is None or self.shown is None:
            return None
        return map_on_image(grid, visible_box(self.encoders[stream], self.shown), self.shown.size)[0]


def _value(code: torch.Tensor, concept: ConceptTarget) -> float:
    return float(code[list(concept.latents)].sum())
