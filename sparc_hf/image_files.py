"""One way to look at an image: upright and in 8-bit RGB, whatever its file holds."""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

# The tags that exchange width and height.
ON_ITS_SIDE = (5, 6, 7, 8)
SIXTEEN_BITS = 65535
BITS_PER_SAMPLE = 258  # a tag of TIFF


def open_image(file: str | os.PathLike | bytes) -> Image.Image:
    """Return an image file, or the bytes of one, as `upright_rgb` does; of an animation, the first frame.

    Raises:
        ValueError: for a file that is missing, none of the disk (a pipe would be waited for), no image, cut off, or a
            decompression bomb.
    """
    return open_with_tag(file)[0]


def open_with_tag(file: str | os.PathLike | bytes) -> tuple[Image.Image, int]:
    """Return an image file as `open_image` does, and the orientation tag that it had; see `orientation_of`.

    Raises:
        ValueError: as `open_image`.
    """
    with _opened(file) as opened:
        return upright_rgb(opened), orientation_of(opened)


def size_of_file(file: str | os.PathLike | bytes) -> tuple[int, int]:
    """Return the width and height that the header of an image file tells, which are those before it is turned.

    Raises:
        ValueError: as `open_image`, but for what only shows when all of the file is read.
    """
    with _opened(file) as opened:
        return opened.size


def stored_image(stored: Mapping[str, Any] | None) -> Image.Image | None:
    """Return an image as datasets store it, `bytes` or a `path`, as `open_image` does; None where there is none.

    Raises:
        ValueError: as `open_image`.
    """
    if not stored or not (stored.get("bytes") or stored.get("path")):
        return None
    return open_image(stored.get("bytes") or stored["path"])


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image as it is meant to be seen: turned as its orientation tag says, opaque, 8-bit RGB.

    What is transparent lies on white, as on a page, because nobody sees the colours that a file keeps there. Numbers
    of 16 bits are scaled by their depth, so that a dark photograph stays dark; numbers without a depth by the smallest
    usual white point that holds them all (1 for floating ones, 255, 65535), or else from their least to their largest.
    An image that was turned has no tag left, so that nothing is turned twice.
    """
    numeric = image.mode.startswith(("I", "F"))
    black, white = _black_and_white(image) if numeric else (0.0, 1.0)
    if orientation_of(image) != 1:
        image = ImageOps.exif_transpose(image)
    if numeric:
        shares = (np.asarray(image, np.float32) - black) / max(white - black, 1e-12)
        return Image.fromarray((np.nan_to_num(shares).clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    return image.convert("RGB")


def orientation_of(image: Image.Image) -> int:
    """Return the orientation tag, 1 to 8, of an image whose pixels still lie as they are stored; 1 without a tag."""
    image.load()  # TIFF files are turned here
    try:
        tag = image.getexif().get(ExifTags.Base.Orientation, 1)
    # Pixels can be whole where the tags are damaged, which fails in many ways.
    except Exception:
        return 1
    return tag if tag in range(1, 9) else 1


def turned(image: Image.Image, tag: int) -> Image.Image:
    """Return an image as it is meant to be seen that has this orientation tag, whatever its own."""
    copy = image.copy()
    copy.getexif()[ExifTags.Base.Orientation] = tag
    return ImageOps.exif_transpose(copy)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of what `upright_rgb` returns."""
    turned = orientation_of(image) in ON_ITS_SIDE
    return (image.height, image.width) if turned else (image.width, image.height)


@contextmanager
def _opened(file: str | os.PathLike | bytes) -> Iterator[Image.Image]:
    name = "the image" if isinstance(file, bytes) else f"`{file}`"
    if not isinstance(file, bytes) and not os.path.isfile(file):
        state = "is no regular file" if os.path.exists(file) else "does not exist"
        raise ValueError(f"{name} cannot be read as an image: it {state}")
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            yield opened
    # Damaged files fail in as many ways as PIL has decoders.
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def _black_and_white(image: Image.Image) -> tuple[float, float]:
    """Return the numbers that stand for black and white in an image of mode I, I;16 or F."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
        return 0.0, float(2 ** min(bits, 16) - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # PIL brings their greys to 16 bits
        return 0.0, float(SIXTEEN_BITS)
    numbers = np.asarray(image, np.float32)
    numbers = numbers[np.isfinite(numbers)]
    least, largest = float(numbers.min(initial=np.inf)), float(numbers.max(initial=-np.inf))
    usual = (255.0, float(SIXTEEN_BITS)) if image.mode == "I" else (1.0, 255.0, float(SIXTEEN_BITS))
    fitting = [white for white in usual if least >= 0 and largest <= white]
    return (0.0, fitting[0]) if fitting else (least, largest)
