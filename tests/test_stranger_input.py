"""What visitors send: every kind of file, text and number is used or refused with a reason."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sparc_hf.stranger_input import (
    MAX_BYTES,
    MAX_CHARACTERS,
    MAX_SIDE,
    InputRefused,
    checked_image,
    checked_number,
    checked_text,
    checked_upload,
)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(picture, mode, tmp_path):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.tiff")
    converted = Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257) if mode == "I;16" else picture
    (converted if mode == "I;16" else picture.convert(mode)).save(path)
    image, remarks = checked_image(path)
    assert (image.mode, image.size) == ("RGB", (90, 60))
    assert bool(remarks) == (mode == "CMYK")


def test_what_is_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert checked_image(tmp_path / "a.png")[0].getpixel((5, 5)) == (255, 255, 255)


def test_sixteen_bits_keep_their_greys(tmp_path):
    Image.fromarray(np.tile(np.arange(0, 65536, 2048, dtype=np.uint16), (32, 1))).save(tmp_path / "a.png")
    greys = np.asarray(checked_image(tmp_path / "a.png")[0])[0, :, 0]
    assert greys[0] == 0
    assert greys[-1] == round(63488 / 65535 * 255)
    assert (np.diff(greys.astype(int)) > 0).all()


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame_is_taken(ending, tmp_path):
    first, second = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=[second], duration=100)
    image, remarks = checked_image(tmp_path / f"a.{ending}")
    assert "first frame" in remarks[0]
    red, _, blue = image.getpixel((10, 10))
    assert red > 200 > 50 > blue


def test_turned_photographs_are_set_upright(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert checked_image(tmp_path / "a.jpg")[0].size == (60, 90)


def test_large_images_are_made_smaller(tmp_path):
    Image.new("RGB", (4000, 3000)).save(tmp_path / "a.jpg")
    assert checked_image(tmp_path / "a.jpg")[0].size == (MAX_SIDE, MAX_SIDE * 3 // 4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read as an image"),
        (b"hello", "cannot be read as an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "cannot be read as an image"),
        (png_that_claims(100_000, 100_000), "too many pixels"),
        (png_that_claims(6000, 6000), "6,000 x 6,000 pixels"),
        (png_that_claims(50, 50), "cannot be read as an image"),
        (png_that_claims(3, 3), "at least 8"),
        (png_that_claims(5000, 9), "20 times the other"),
        (b"\x89PNG" + bytes(MAX_BYTES), "at most 10 MB"),
    ],
    ids=["empty", "text", "svg", "bomb", "36 megapixels", "cut", "tiny", "thin", "large"],
)
def test_refused_files(content, reason, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputRefused, match=reason):
        checked_image(tmp_path / "a.png")


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(InputRefused, match="no such upload"):
            checked_image(path)


def test_uploads_are_files_of_the_upload_folder(tmp_path):
    folder = tmp_path / "uploads"
    (folder / "ab12").mkdir(parents=True)
    (folder / "ab12" / "a.png").write_bytes(b"x")
    (tmp_path / "uploads2").mkdir()
    for other in (tmp_path / "a.png", tmp_path / "uploads2" / "a.png"):
        other.write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    assert checked_upload(None, folder) is None
    assert checked_upload({"path": str(folder / "ab12" / "a.png")}, folder) == folder / "ab12" / "a.png"
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert checked_upload({"path": str(linked / "ab12" / "a.png")}, linked) == folder / "ab12" / "a.png"
    words = set()
    for path in (
        tmp_path / "a.png",
        tmp_path / "none.png",
        tmp_path / "uploads2" / "a.png",
        folder / "link.png",
        folder / "none.png",
        folder / "ab12",
        folder / ".." / "a.png",
        f"{folder}/ab12/a.png\0",
        os.path.relpath(folder / "ab12" / "a.png"),
        f"file://{folder}/ab12/a.png",
        "https://example.com/a.png",
        "",
        None,
        3,
        ["a"],
    ):
        for sent in ({"path": path if not hasattr(path, "parts") else str(path)}, str(path), [str(path)]):
            with pytest.raises(InputRefused) as caught:
                checked_upload(sent, folder)
            words.add(str(caught.value))
    assert len(words) == 1


def test_files_elsewhere_are_not_even_looked_at(tmp_path, monkeypatch):
    looked_at = []

    def watch(name):
        real = getattr(os, name)

        def watched(path, *args, **options):
            looked_at.append(str(path))
            return real(path, *args, **options)

        monkeypatch.setattr(os, name, watched)

    for name in ("stat", "lstat", "open", "readlink", "access"):
        watch(name)
    folder = tmp_path / "uploads"
    for path in ("/etc/passwd", f"{folder}/../secret.png", f"{tmp_path}/secret.png"):
        with pytest.raises(InputRefused):
            checked_upload({"path": path}, folder)
    assert not [path for path in looked_at if "passwd" in path or "secret" in path]


def test_texts():
    assert checked_text("  a red\x00circle\n ") == "a red circle"
    assert checked_text(None) == ""
    assert checked_text("<b>\ud800ü</b>") == "<b>ü</b>"
    assert len(checked_text("x" * MAX_CHARACTERS)) == MAX_CHARACTERS
    with pytest.raises(InputRefused, match="100,000 characters, and at most 1,000"):
        checked_text("x" * 100_000)
    with pytest.raises(InputRefused, match="Type a caption"):
        checked_text("\n", needed=True)
    with pytest.raises(InputRefused, match="must be a text"):
        checked_text(["a"])


def test_numbers():
    for value in (7, 7.0, "7", " 7 "):
        assert checked_number(value, 8, "latent") == 7
    for value in (8, -1, 3.5, True, None, "", "a", "1e3", "٣", "9" * 400, float("nan"), [1], "<script>"):
        with pytest.raises(InputRefused, match="numbered from 0 to 7"):
            checked_number(value, 8, "latent")
