"""One photograph in every form that files of it have, for tests."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

# How a stored picture has to be transposed to be seen upright, by its orientation tag.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BACK = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}
TAG = 0x0112


def photograph(width: int = 60, height: int = 42) -> Image.Image:
    """Return a colourful picture without any symmetry."""
    rows, columns = np.mgrid[0:height, 0:width] / max(width, height)
    noise = np.random.default_rng(0).uniform(0, 12, (height, width, 3))
    colours = np.stack([columns, rows, (columns - rows) % 0.5], axis=-1) * 240 + noise
    return Image.fromarray(colours.astype(np.uint8))


def tagged(upright: Image.Image, tag: int, path: Path) -> Path:
    """Write a picture as a camera does that was held another way: the pixels turned back, and a tag that says so."""
    turn = TURNS.get(tag)
    stored = upright if turn is None else upright.transpose(BACK.get(turn, turn))
    exif = Image.Exif()
    exif[TAG] = tag
    stored.save(path, exif=exif)
    return path


def odd_files(folder: Path) -> Iterator[tuple[str, Path, Image.Image]]:
    """Write a picture in every odd form; yield its name, its file, and the same picture in plain 8-bit RGB."""
    upright = photograph()
    grey = upright.convert("L")
    for tag in range(1, 9):
        yield f"tag {tag}", tagged(upright, tag, folder / f"tag-{tag}.png"), upright
    sixteen = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    behind = upright.convert("RGBA")
    behind.putalpha(Image.fromarray((np.asarray(grey) > 99).astype(np.uint8) * 255))
    on_white = Image.composite(upright, Image.new("RGB", upright.size, "white"), behind.getchannel("A"))
    few = upright.quantize(16)
    opaque = few.copy()
    few.info["transparency"] = bytes([255] * 8 + [0] * 8)
    seen = Image.composite(
        opaque.convert("RGB"),
        Image.new("RGB", few.size, "white"),
        Image.fromarray((np.asarray(few) < 8).astype(np.uint8) * 255),
    )
    floats = np.asarray(grey, np.float32)
    forms = {
        "16-bit.png": (sixteen, grey),
        "16-bit.tiff": (sixteen, grey),
        "16-bit tagged 6.png": (sixteen, grey),
        "32-bit.tiff": (Image.fromarray(np.asarray(grey, np.int32)), grey),
        "32-bit of 16.tiff": (Image.fromarray(np.asarray(grey, np.int32) * 257), grey),
        "greys.pgm": (sixteen, grey),
        "floats to 1.tiff": (Image.fromarray(floats / 255), grey),
        "floats to 255.tiff": (Image.fromarray(floats), grey),
        "grey.png": (grey, grey),
        "palette.png": (opaque, opaque),
        "palette, transparent.png": (few, seen),
        "transparent.png": (behind, on_white),
        "grey, transparent.png": (behind.convert("LA"), on_white.convert("L")),
        "transparent.webp": (behind, on_white),
        "bits.png": (grey.convert("1"), grey.convert("1")),
    }
    for name, (image, plain) in forms.items():
        path = folder / name
        if "tagged" in name:
            tagged(image, 6, path)
        else:
            image.save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
        yield name, path, plain.convert("RGB")
    red, blue = upright, Image.new("RGB", upright.size, "blue")
    red.save(folder / "moving.png", save_all=True, append_images=[blue], duration=100)
    yield "moving.png", folder / "moving.png", upright
