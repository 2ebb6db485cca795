"""Where a target is in an image and a caption, as the Space shows it: maps over what each encoder sees, and words."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.encoders.trace import pixel_statistics
from sparc_hf.maps.methods import map_method
from sparc_hf.maps.patch_maps import image_maps
from sparc_hf.maps.scored_words import WordScore, word_scores
from sparc_hf.maps.targets import ConceptTarget, SimilarityTarget, Target
from sparc_hf.space.data import SpaceData

logger = logging.getLogger(__name__)

# Encoders with at most so many patches a side get maps finer than their grid.
COARSE_GRID = 10


@dataclass(frozen=True)
class SeenImage:
    """What an encoder sees of an image, after its resizing and cropping, and a map over it.

    Attributes:
        image: RGB.
        heat: float32 [rows, columns], or None.
    """

    image: Image.Image
    heat: np.ndarray | None = None


@dataclass
class Explanation:
    """What the Explain tab shows.

    Attributes:
        title: what was looked for.
        latent: its number, where that is a single latent.
        maps: title -> map, one an image stream.
        baselines: title -> map of the similarity of the encoders' own embeddings.
        caption: the text the words are of.
        words: text stream -> its words with their scores, in order.
        active: stream -> (latent, value), the strongest of the stream alone.
        remarks: what the visitor should know.
    """

    title: str = ""
    latent: int | None = None
    maps: dict[str, SeenImage] = field(default_factory=dict)
    baselines: dict[str, SeenImage] = field(default_factory=dict)
    caption: str = ""
    words: dict[str, list[WordScore]] = field(default_factory=dict)
    active: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def explain(
    data: SpaceData, image: Image.Image | None, caption: str = "", *, latent: int | None = None
) -> Explanation:
    """Explain an image, a caption or both.

    Args:
        data: model and encoders.
        image: RGB.
        caption: may be empty.
        latent: the latent to look for. Without it, the similarity of image and caption, or where only one of them is
            given, the latent that is strongest in it.

    Raises:
        ValueError: where nothing is given that the model's encoders take.
    """
    samples = {
        stream: image if encoder.modality == "image" else caption
        for stream, encoder in data.encoders.items()
        if (image is not None if encoder.modality == "image" else caption)
    }
    if not samples:
        kinds = sorted({encoder.modality for encoder in data.encoders.values()})
        raise ValueError(f"The encoders of this model take {' and '.join(kinds) or 'nothing'}; give one of these.")
    found = Explanation(caption=caption)
    for stream, sample in samples.items():
        if isinstance(sample, str):
            found.remarks += unread_remark(data, stream, sample)
        found.active[stream] = data.strongest(data.code(stream, sample))  # pyright: ignore[reportArgumentType]
    kinds = {encoder.modality for stream, encoder in data.encoders.items() if stream in samples}
    if latent is None and kinds != {"image", "text"}:
        latent = next((strongest[0][0] for strongest in found.active.values() if strongest), None)
        if latent is None:
            found.remarks.append("No latent is active in any stream.")
            return found
        if {encoder.modality for encoder in data.encoders.values()} == {"image", "text"}:
            found.remarks.append("Give an image and a caption to see where they are alike.")
    found.latent = latent
    if latent is not None:
        found.title = f"Where {data.title(latent)} is"
    else:
        found.title = "Where image and caption are alike"
    with data.explaining:
        if "image" in kinds and image is not None:
            _add_maps(data, found, image, caption)
        if "text" in kinds:
            _add_words(data, found, image, caption)
    return found


def unread_remark(data: SpaceData, stream: str, text: str) -> list[str]:
    """Return one remark where a stream's encoder reads only the beginning of a text, and none where it reads all."""
    unread = data.unread(stream, text)
    return [f"{stream} reads only the beginning of a text this long, and not: {unread}"] if unread else []


def latent_maps(data: SpaceData, latent: int, rows: Mapping[str, Sequence[int]]) -> dict[str, list[SeenImage | None]]:
    """Return where a latent is in indexed images.

    Args:
        data: model and encoders.
        latent: its number.
        rows: stream -> rows of samples; streams that encode no images are left out.

    Returns:
        image stream -> what its encoder sees of every row, with the map; None for rows without an image.
    """
    found: dict[str, list[SeenImage | None]] = {}
    for stream, of_stream in rows.items():
        encoder = data.watched_encoders.get(stream)
        if encoder is None or encoder.modality != "image":
            continue
        images = {row: image for row in of_stream if (image := data.image(row)) is not None}
        if images:
            try:
                with data.explaining:
                    target = [ConceptTarget((latent,))]
                    maps = image_maps(data.model, {stream: encoder}, list(images.values()), target)
                    views = seen_images(encoder, list(images.values()))
            except ValueError as error:  # a backbone without maps; its samples are shown plain
                logger.warning("%s", error)
                continue
            seen = {row: SeenImage(view, heat[0]) for row, view, heat in zip(images, views, maps[stream], strict=True)}
            found[stream] = [seen.get(row) for row in of_stream]
    return found


def _add_maps(data: SpaceData, found: Explanation, image: Image.Image, caption: str) -> None:
    """Add what each image stream sees with the target's map, and the similarity by embeddings where there is one."""
    texts = [stream for stream, encoder in data.watched_encoders.items() if encoder.modality == "text"]
    for stream in data.streams_of("image"):
        encoder = data.watched_encoders.get(stream)
        if encoder is None:
            continue
        targets: list[Target] = []
        if found.latent is not None:
            targets.append(ConceptTarget((found.latent,)))
        elif texts:
            targets.append(SimilarityTarget(texts[0], caption))
        baseline = [
            SimilarityTarget(text, caption, embeddings=True)
            for text in texts
            if caption and data.watched_encoders[text].encoder == encoder.encoder and encoder.pooling != "tokens"
        ]
        targets += baseline[:1]
        involved = {name: data.watched_encoders[name] for name in [stream, *texts]}
        view = seen_images(encoder, [image])[0]
        maps = []
        if targets:
            coarse = min(view.size) <= COARSE_GRID * min(encoder.patch_size)
            shifts = 2 if coarse and map_method(encoder) == "relevance" else 1
            try:
                maps = image_maps(data.model, involved, [image], targets, shifts=shifts)[stream][0]
            except ValueError as error:
                found.remarks.append(f"{stream} has no map: {error}")
                targets = baseline = []
        heats: list[np.ndarray | None] = [heat if np.isfinite(heat).all() else None for heat in maps]
        found.maps[stream] = SeenImage(view, heats[0] if heats else None)
        if baseline and heats[-1] is not None:
            found.baselines[f"{stream}: similarity of embeddings (baseline)"] = SeenImage(view, heats[-1])


def _add_words(data: SpaceData, found: Explanation, image: Image.Image | None, caption: str) -> None:
    images = [stream for stream, encoder in data.watched_encoders.items() if encoder.modality == "image"]
    target: Target
    if found.latent is not None:
        target = ConceptTarget((found.latent,))
    elif image is not None and images:
        target = SimilarityTarget(images[0], image)
    else:
        return
    texts = {stream: encoder for stream, encoder in data.watched_encoders.items() if encoder.modality == "text"}
    if not texts:
        return
    involved = texts | {name: data.watched_encoders[name] for name in images}
    for stream, scores in word_scores(data.model, involved, [caption], [target]).items():
        found.words[stream] = scores[0][0]


@torch.no_grad()
def seen_images(encoder: StreamEncoder, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Return images as an encoder sees them: resized, cropped, and back in colours."""
    pixels = encoder.prepare(list(images))["pixel_values"].float().numpy()
    mean, deviation = (np.array(one, np.float32)[None, :, None, None] for one in pixel_statistics(encoder))
    colours = np.clip((pixels * deviation + mean) * 255, 0, 255).round().astype(np.uint8)
    return [Image.fromarray(colour) for colour in colours.transpose(0, 2, 3, 1)]
