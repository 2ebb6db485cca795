"""What a visitor of the Space sends, checked before anything is done with it: images, texts, latent numbers."""

import math
import os
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from sparc_hf.encoders.inputs import upright_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 10 * 1024 * 1024
MAX_PIXELS = 25_000_000
MAX_SIDE = 1024
MIN_SIDE = 8
# An encoder that resizes the shorter side would make an enormous image of a thin strip.
MAX_RATIO = 20
MAX_CHARACTERS = 1000


class InputRefused(ValueError):
    """Something a visitor sent cannot be used; the message tells the visitor why, and what can be."""


def checked_upload(sent: Any, folder: str | Path) -> Path | None:
    """Return where an upload lies, from what a request says of it; None for no upload.

    Of files elsewhere than in `folder` nothing is said, and nothing looked at, not even whether they are there.

    Args:
        sent: what a request holds in the place of a file: {"path": ...}, or None.
        folder: where the server keeps what visitors send.

    Raises:
        InputRefused: for anything but a file in that folder, always in the same words.
    """
    if sent is None:
        return None
    refused = InputRefused("There is no such upload; choose the image again.")
    path = sent.get("path") if isinstance(sent, dict) else None
    if not isinstance(path, str) or "\0" in path or not os.path.isabs(path):
        raise refused
    folders = (os.path.abspath(folder), os.path.realpath(folder))
    if not any(Path(os.path.normpath(path)).is_relative_to(folder) for folder in folders):
        raise refused
    file = Path(os.path.realpath(path))  # a link may lead out again
    if not file.is_relative_to(folders[1]) or not file.is_file():
        raise refused
    return file


def checked_image(path: str | Path) -> tuple[Image.Image, list[str]]:
    """Return an uploaded image as RGB with sides of at most `MAX_SIDE` pixels, and remarks on what was changed.

    The size on disk and the number of pixels are looked at before anything is decoded.

    Raises:
        InputRefused: for a file that is too large, has too many pixels, or is no image of the known formats.
    """
    path = Path(path)
    if not path.is_file():
        raise InputRefused("There is no such upload; choose the image again.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputRefused(
            f"The image is {size / 2**20:.1f} MB large, and at most {MAX_BYTES // 2**20} MB can be used."
        )
    try:
        # The size of a decompression bomb is told by its header; the check below is stricter than PIL's.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS:
                    raise InputRefused(
                        f"The image has {width:,} x {height:,} pixels, and at most {MAX_PIXELS // 1_000_000} million "
                        "can be used."
                    )
                if min(width, height) < MIN_SIDE or max(width, height) > MAX_RATIO * min(width, height):
                    raise InputRefused(
                        f"The image has {width:,} x {height:,} pixels; each side must have at least {MIN_SIDE}, and "
                        f"none be more than {MAX_RATIO} times the other."
                    )
                remarks = _remarks(opened)
                opened.draft("RGB", (MAX_SIDE, MAX_SIDE))
                opened.load()
                image = upright_rgb(opened)
    except Image.DecompressionBombError as error:
        raise InputRefused(
            f"The image has far too many pixels; at most {MAX_PIXELS // 1_000_000} million can be used."
        ) from error
    except InputRefused:
        raise
    # Damaged files fail in as many ways as PIL has decoders.
    except Exception as error:
        known = ", ".join(FORMATS)
        raise InputRefused(f"This file cannot be read as an image. Known formats: {known}.") from error
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image, remarks


def checked_text(text: Any, *, needed: bool = False) -> str:
    """Return a caption without control characters and outer spaces.

    Raises:
        InputRefused: for more than `MAX_CHARACTERS` characters, or where it is empty and `needed`.
    """
    if text is not None and not isinstance(text, str):
        raise InputRefused("The caption must be a text.")
    if text and len(text) > MAX_CHARACTERS:
        raise InputRefused(f"The text has {len(text):,} characters, and at most {MAX_CHARACTERS:,} can be used.")
    # Lone surrogates cannot be written as UTF-8, and tokenizers refuse them.
    text = (text or "").encode("utf-8", "ignore").decode("utf-8")
    text = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    if needed and not text:
        raise InputRefused("Type a caption first.")
    return text


def checked_number(value: Any, count: int, what: str) -> int:
    """Return a number from 0 to `count` - 1, given as a number or in digits.

    Raises:
        InputRefused: for anything else, naming `what` and the numbers there are.
    """
    refused = InputRefused(f"There is no {what} {str(value)[:40]!r}; they are numbered from 0 to {count - 1:,}.")
    if isinstance(value, str):
        if not (value.isascii() and value.strip().isdigit() and len(value) < 20):
            raise refused
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value % 1:
        raise refused
    if not 0 <= value < count:
        raise refused
    return int(value)


def _remarks(image: Image.Image) -> list[str]:
    remarks = []
    if getattr(image, "is_animated", False):
        remarks.append("The image is animated; its first frame is taken.")
    if image.mode == "CMYK":
        remarks.append("The image has print colours (CMYK), which were turned into screen colours.")
    return remarks
