"""Image files that users name."""

import os

from PIL import Image


def open_image(path: str | os.PathLike) -> Image.Image:
    """Return an image file as RGB.

    Raises:
        ValueError: for a file that is missing, no image, cut off, or a decompression bomb.
    """
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"`{path}` cannot be read as an image: {error}") from error
