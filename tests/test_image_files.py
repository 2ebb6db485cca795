"""Images of every form are opened in one way."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from photographs import odd_files, photograph, tagged
from PIL import Image

from sparc_hf.image_files import open_image, open_with_tag, orientation_of, turned, upright_rgb, upright_size


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return list(odd_files(tmp_path_factory.mktemp("forms")))


def test_every_form_is_the_plain_picture(forms):
    assert len(forms) == 24
    for name, path, plain in forms:
        for file in (path, path.read_bytes()):
            image = open_image(file)
            assert image.mode == "RGB", name
            np.testing.assert_array_equal(np.asarray(image), np.asarray(plain), err_msg=name)
        with Image.open(path) as opened:
            assert upright_size(opened) == plain.size, name


def test_what_was_turned_is_not_turned_again(forms):
    for name, path, plain in forms:
        with Image.open(path) as opened:
            once = upright_rgb(opened)
        np.testing.assert_array_equal(np.asarray(upright_rgb(once)), np.asarray(plain), err_msg=name)
        # As people do before they hand an image over; the tag stays with it.
        with Image.open(path) as opened:
            converted = opened.convert("RGB") if name.startswith("tag") else once
        np.testing.assert_array_equal(np.asarray(upright_rgb(converted)), np.asarray(plain), err_msg=name)


def test_tags_of_tiff_and_jpeg(tmp_path):
    upright = np.asarray(photograph(), float)
    for tag in range(1, 9):
        image = open_image(tagged(photograph(), tag, tmp_path / f"{tag}.tiff"))
        np.testing.assert_array_equal(np.asarray(image), upright)
        lossy = np.asarray(open_image(tagged(photograph(), tag, tmp_path / f"{tag}.jpg")), float)
        assert np.corrcoef(lossy.ravel(), upright.ravel())[0, 1] > 0.98  # 0.9 and less where it is turned otherwise


def test_a_tag_is_told_and_can_be_given(tmp_path):
    upright = photograph()
    for tag in range(1, 9):
        path = tagged(upright, tag, tmp_path / f"{tag}.png")
        image, told = open_with_tag(path)
        assert told == tag
        with Image.open(path) as stored:
            bare = Image.fromarray(np.asarray(stored))
        assert orientation_of(bare) == 1
        np.testing.assert_array_equal(np.asarray(turned(bare, tag)), np.asarray(image))


def test_dark_pictures_of_16_bits_stay_dark(tmp_path):
    dark = Image.fromarray((np.asarray(photograph().convert("L"), np.uint16) * 257) // 8)
    dark.save(tmp_path / "dark.png")
    assert np.asarray(open_image(tmp_path / "dark.png")).max() <= 255 // 8 + 1


def test_numbers_beyond_every_white_point_are_stretched(tmp_path):
    numbers = np.linspace(-1000, 3000, 64 * 64, dtype=np.float32).reshape(64, 64)
    numbers[0, 0] = np.nan
    Image.fromarray(numbers).save(tmp_path / "a.tiff")
    greys = np.asarray(open_image(tmp_path / "a.tiff"))[..., 0]
    assert (greys.min(), greys.max()) == (0, 255)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\x00\x00", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"nonsense", b""])
def test_damaged_tags_do_not_spoil_the_pixels(exif, tmp_path):
    photograph().save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == photograph().size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\x00\x08\x00\x00\x00"])
def test_what_is_no_image_is_refused_in_a_sentence(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        open_image(tmp_path / "a.png")


def test_pipes_folders_and_nothing_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    code = f"""
from sparc_hf.image_files import open_image
for name in ("pipe.png", "", "none.png"):
    try:
        open_image({str(tmp_path)!r} + "/" + name)
    except ValueError as error:
        print(str(error).split(": ")[-1])
"""
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert told.stdout.splitlines() == ["it is no regular file", "it is no regular file", "it does not exist"]
