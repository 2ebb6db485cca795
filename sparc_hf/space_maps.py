"""Where a target is in an image and in a caption, as the Space shows it: maps over what each encoder sees, and words."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from sparc_hf.encoders import StreamEncoder
from sparc_hf.space_data import SpaceData


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
        words: text stream -> (word, score) in order.
        active: stream -> (latent, value), the strongest of the stream alone.
        remarks: what the visitor should know.
    """

    title: str = ""
    latent: int | None = None
    maps: dict[str, SeenImage] = field(default_factory=dict)
    baselines: dict[str, SeenImage] = field(default_factory=dict)
    words: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    active: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def explain(
    data: SpaceData, image: Image.Image | None, caption: str, *, latent: int | None = None
) -> Explanation:
    """Explain an image, a caption or both.

    Args:
        data: model and encoders.
        image: RGB.
        caption: may be empty.
        latent: the latent to look for; without it, the similarity of image and caption.
    """
    found = Explanation(latent=latent)
    for stream in data.encoders:
        sample = image if data.modality(stream) == "image" else caption
        if sample is not None and sample != "":
            found.active[stream] = data.strongest(data.code(stream, sample))
    return found


@torch.no_grad()
def seen_images(encoder: StreamEncoder, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Return images as an encoder sees them: resized, cropped, and back in colours."""
    pixels = encoder.prepare(list(images))["pixel_values"].float().numpy()
    processor = encoder.inputs_of.processor
    mean, deviation = (
        np.asarray(getattr(processor, name, None) or default, np.float32)[None, :, None, None]
        for name, default in (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3))
    )
    colours = np.clip((pixels * deviation + mean) * 255, 0, 255).round().astype(np.uint8)
    return [Image.fromarray(colour) for colour in colours.transpose(0, 2, 3, 1)]
