"""What an encoder sees of an image: the part that its processor keeps, in the size and colours that it makes."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sparc_hf.encoders.inputs import upright_size
from sparc_hf.encoders.stream_encoder import StreamEncoder


def visible_box(encoder: StreamEncoder, image: Image.Image) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom, in pixels of the upright image, of the part that the encoder sees.

    Image processors resize and then cut out the centre; where they pad, the box is larger than the image.
    """
    processor = encoder.inputs_of.processor
    width, height = upright_size(image)
    resized = [float(width), float(height)]
    size = dict(processor.size or {}) if getattr(processor, "do_resize", False) else {}
    if size.get("shortest_edge"):
        resized = [side * size["shortest_edge"] / min(width, height) for side in (width, height)]
    elif size.get("height") and size.get("width"):
        resized = [float(size["width"]), float(size["height"])]
    box = [0.0, 0.0, *resized]
    if getattr(processor, "do_center_crop", False):
        crop = dict(processor.crop_size)
        margins = [(side - crop[name]) / 2 for side, name in zip(resized, ("width", "height"), strict=True)]
        box = [*margins, *(side - margin for side, margin in zip(resized, margins, strict=True))]
    scale = (width / resized[0], height / resized[1])
    return box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1]


def pixel_statistics(encoder: StreamEncoder) -> tuple[list[float], list[float]]:
    """Return mean and deviation of the three colours, from 0 to 1, that the image processor normalises with."""
    processor = encoder.inputs_of.processor
    if not getattr(processor, "do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return list(processor.image_mean or [0.0] * 3), list(processor.image_std or [1.0] * 3)


def seen_images(encoder: StreamEncoder, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Return images as an encoder sees them: resized, cropped, and back in colours."""
    pixels = encoder.prepare(list(images))["pixel_values"].float().numpy()
    mean, deviation = (np.array(colours, np.float32)[:, None, None] for colours in pixel_statistics(encoder))
    views = np.clip((pixels * deviation + mean) * 255, 0, 255).round().astype(np.uint8)
    return [Image.fromarray(view) for view in views.transpose(0, 2, 3, 1)]
