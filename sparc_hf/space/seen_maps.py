"""What the Space shows of samples: explanations of a visitor's, and maps over indexed ones."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from sparc_hf.codes.encoding import sample_codes
from sparc_hf.encoders.views import seen_images
from sparc_hf.maps.explanation import Explanation, active_latents, explain_sample
from sparc_hf.maps.patch_maps import image_maps
from sparc_hf.maps.targets import ConceptTarget
from sparc_hf.space.data import SpaceData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SeenImage:
    """What an encoder sees of an image, after its resizing and cropping, and a map over it.

    Attributes:
        image: RGB.
        heat: float32 [rows, columns], or None.
    """

    image: Image.Image
    heat: np.ndarray | None = None


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
    modalities = {encoder.modality for encoder in data.encoders.values()}
    # Before the lock is taken: these encoders are not the watched ones.
    codes = sample_codes(data.model, data.encoders, image, caption)
    if not codes:
        kinds = " and ".join(sorted(modalities)) or "nothing"
        raise ValueError(f"The encoders of this model take {kinds}; give one of these.")
    remarks: list[str] = []
    latents = [] if latent is None else [latent]
    similarity = latent is None and {data.encoders[stream].modality for stream in codes} == {"image", "text"}
    if latent is None and not similarity:
        latents = active_latents(codes, 1)
        if not latents:
            remarks.append("No latent is active in any stream.")
        elif modalities == {"image", "text"}:
            remarks.append("Give an image and a caption to see where they are alike.")
    concepts = {data.title(latent): (latent,) for latent in latents}
    with data.explaining:
        explanation = explain_sample(
            data.model, data.watched_encoders, image, caption, concepts, agreement=similarity, codes=codes
        )
    return replace(explanation, remarks=[*explanation.remarks, *remarks])


def latent_maps(data: SpaceData, latent: int, rows: Mapping[str, Sequence[int]]) -> dict[str, list[SeenImage | None]]:
    """Return where a latent is in indexed images.

    Args:
        data: model and encoders.
        latent: its number.
        rows: stream -> rows of samples; streams that encode no images are left out.

    Returns:
        image stream -> what its encoder sees of every row, with the map; None for rows without an image.
    """
    seen: dict[str, list[SeenImage | None]] = {}
    for stream, stream_rows in rows.items():
        encoder = data.watched_encoders.get(stream)
        if encoder is None or encoder.modality != "image":
            continue
        images = {row: image for row in stream_rows if (image := data.image(row)) is not None}
        if images:
            try:
                with data.explaining:
                    target = [ConceptTarget((latent,))]
                    maps = image_maps(data.model, {stream: encoder}, list(images.values()), target)
                    views = seen_images(encoder, list(images.values()))
            except ValueError as error:  # a backbone without maps; its samples are shown plain
                logger.warning("%s", error)
                continue
            shown = [SeenImage(view, heat[0]) for view, heat in zip(views, maps[stream], strict=True)]
            by_row = dict(zip(images, shown, strict=True))
            seen[stream] = [by_row.get(row) for row in stream_rows]
    return seen
