"""Extraction that keeps samples of which some streams cannot be made: unpaired, unreadable, or not finite."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from kill_points import files_of
from PIL import Image
from tiny_encoders import save_clip, save_dinov2

from sparc_hf.encoders.stream_encoder import load_encoders
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.extraction import extract_features
from sparc_hf.features.stream_records import parse_streams

ROWS = 22
SETTINGS = {"batch_size": 3, "rows_per_shard": 6, "workers": 0}
NO_IMAGE = [0, 5, *range(12, 18)]  # the first and the last of a shard, and all of one
NO_TEXT = [3, 9, 21]
NOTHING = [7]
BROKEN = [4, 19]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    clip, dino = str(save_clip(root / "clip")), str(save_dinov2(root / "dino"))
    return load_encoders(
        parse_streams([f"dino={dino}:image", f"clip_img={clip}:image", f"clip_txt={clip}:text"]), device="cpu"
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(ROWS):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.jpg")
    for number in BROKEN:
        (folder / f"{number:02}.jpg").write_text("no image")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def unpaired(files):
    columns = {
        "id": [file.stem for file in files],
        "image": [None if row in [*NO_IMAGE, *NOTHING] else str(file) for row, file in enumerate(files)],
        "text": [None if row in NO_TEXT else " " if row in NOTHING else f"cat {row}" for row in range(len(files))],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def lacking(features: FeatureDataset, stream: str) -> list[str]:
    return [features.ids[row] for row in np.flatnonzero(~features.present(stream))]


def named(rows: list[int]) -> list[str]:
    return [f"{row:02}" for row in sorted(rows)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_unpaired_samples_are_kept(unpaired, encoders, tmp_path, dtype):
    made = extract_features(
        unpaired, encoders, tmp_path / "set", **SETTINGS, dtype=dtype, on_error="keep", keep_columns=["image"]
    )
    assert made.ids == named([row for row in range(ROWS) if row not in NOTHING])
    assert lacking(made, "dino") == lacking(made, "clip_img") == named([*NO_IMAGE, *BROKEN])
    assert lacking(made, "clip_txt") == named(NO_TEXT)
    assert made.rows_without == {"dino": 10, "clip_img": 10, "clip_txt": 3}
    assert made.rows_skipped == 1
    made.check_rows()
    listed = lines(tmp_path / "set" / "incomplete.jsonl")
    assert [line["id"] for line in listed] == named([*NO_IMAGE, *BROKEN, *NO_TEXT])
    assert listed[0] | {"reason": ""} == {"row": 0, "id": "00", "reason": "", "streams": ["dino", "clip_img"]}
    assert "no image" in listed[0]["reason"]
    assert "its text is empty" in listed[1]["reason"]
    assert listed[1]["streams"] == ["clip_txt"]
    assert "cannot be read" in listed[2]["reason"]
    (left_out,) = lines(tmp_path / "set" / "skipped.jsonl")
    assert (left_out["row"], left_out["id"]) == (7, "07")
    assert "its text is empty" in left_out["reason"]
    assert "no image" in left_out["reason"]
    whole = [row for row in range(ROWS) if row not in [*NO_IMAGE, *NO_TEXT, *NOTHING, *BROKEN]]
    alone = extract_features(unpaired.select(whole), encoders, tmp_path / "alone", **SETTINGS, dtype=dtype)
    complete = made.select(made.complete_rows())
    assert complete.ids == named(whole)
    for name in encoders:
        np.testing.assert_allclose(complete.array(name), alone.array(name), atol=1e-5 if dtype == "float32" else 2e-3)
    captions = unpaired.select(NO_IMAGE).remove_columns("image")
    texts = extract_features(captions, {"clip_txt": encoders["clip_txt"]}, tmp_path / "texts", **SETTINGS)
    rows = [made.ids.index(name) for name in named(NO_IMAGE)]
    np.testing.assert_allclose(made.array("clip_txt", rows), texts.array("clip_txt"), atol=2e-3)
    assert [made.image(made.ids.index(name)) for name in named(BROKEN)] == [None, None]
    assert made.column("text", [made.ids.index("03")]) == [None]
    # Nothing is read twice.
    assert extract_features(
        unpaired, encoders, tmp_path / "set", **SETTINGS, dtype=dtype, on_error="keep", keep_columns=["image"]
    ).rows_without


def test_rows_that_come_one_by_one(unpaired, encoders, tmp_path):
    extract_features(unpaired, encoders, tmp_path / "stored", **SETTINGS, on_error="keep")
    made = extract_features(
        unpaired.to_iterable_dataset(), encoders, tmp_path / "set", **{**SETTINGS, "workers": 2}, on_error="keep"
    )
    assert made.rows_without == {"dino": 10, "clip_img": 10, "clip_txt": 3}
    for shard in (tmp_path / "stored").glob("data-*.arrow"):
        assert (tmp_path / "set" / shard.name).read_bytes() == shard.read_bytes()
    # A shard of which nothing can be made, and one that lacks a stream in all rows.
    nothing = datasets.concatenate_datasets([unpaired.select(NOTHING * 6), unpaired.select(NO_IMAGE)])
    made = extract_features(nothing, encoders, tmp_path / "empty", **SETTINGS, on_error="keep")
    assert (len(made), made.rows_skipped) == (len(NO_IMAGE), 6)
    assert np.isnan(made.array("dino")).all()


def test_one_modality_alone(unpaired, encoders, tmp_path):
    """What no stream can be made of is left out."""
    images = {name: encoders[name] for name in ("dino", "clip_img")}
    made = extract_features(unpaired, images, tmp_path / "set", **SETTINGS, on_error="keep", text_column="text")
    assert made.ids == named([row for row in range(ROWS) if row not in [*NO_IMAGE, *NOTHING, *BROKEN]])
    assert not made.is_incomplete
    assert [line["streams"] for line in lines(tmp_path / "set" / "incomplete.jsonl")] == [[]] * len(NO_TEXT)
    assert json.loads((tmp_path / "set" / "sparc_features.json").read_text())["format_version"] == 1


@pytest.mark.parametrize("before", ["stop", "skip", "keep"])
@pytest.mark.parametrize("after", ["skip", "keep"])
def test_going_on_equals_a_run_without_a_stop(unpaired, encoders, tmp_path, monkeypatch, before, after):
    straight = tmp_path / "straight"
    extract_features(unpaired, encoders, straight, **SETTINGS, on_error=after)
    clip, calls = encoders["clip_txt"], []

    def failing(inputs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return type(clip).rows(clip, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(clip, "rows", failing)
        error, words = (ValueError, "row 0 .*keep") if before == "stop" else (KeyboardInterrupt, None)
        with pytest.raises(error, match=words):
            extract_features(unpaired, encoders, tmp_path / "set", **SETTINGS, on_error=before)
    assert list((tmp_path / "set.partial").glob("data-*.arrow")) or before == "stop"
    extract_features(unpaired, encoders, tmp_path / "set", **SETTINGS, on_error=after)
    assert files_of(tmp_path / "set") == files_of(straight)


def test_repair(unpaired, encoders, tmp_path):
    made = tmp_path / "set"
    extract_features(unpaired, encoders, made, **SETTINGS, on_error="keep")
    before = files_of(made)
    for shard in (0, 2):
        (made / f"data-0000{shard}.arrow").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="--repair"):
        FeatureDataset.load(made)
    extract_features(unpaired, encoders, made, **SETTINGS, on_error="keep", repair=True)
    assert files_of(made) == before
    # Of what was made otherwise, it makes what this command would have.
    shutil.copytree(made, tmp_path / "skipped")
    with pytest.raises(ValueError, match="finished with another `on_error` than skip; make it again with `repair`"):
        extract_features(unpaired, encoders, tmp_path / "skipped", **SETTINGS, on_error="skip")
    extract_features(unpaired, encoders, tmp_path / "skipped", **SETTINGS)  # it has no rows at which to stop
    skipped = extract_features(unpaired, encoders, tmp_path / "skipped", **SETTINGS, on_error="skip", repair=True)
    assert not skipped.is_incomplete
    assert not (tmp_path / "skipped" / "incomplete.jsonl").exists()
    with pytest.raises(ValueError, match="finished with another `on_error` than keep"):
        extract_features(unpaired, encoders, tmp_path / "skipped", **SETTINGS, on_error="keep")
    extract_features(unpaired, encoders, tmp_path / "skipped", **SETTINGS, on_error="keep", repair=True)
    assert files_of(tmp_path / "skipped") == before


def test_numbers_that_are_not_finite(unpaired, encoders, tmp_path, monkeypatch):
    dino = encoders["dino"]

    def some_nan(inputs):
        rows = type(dino).rows(dino, inputs).clone()
        rows[0, 0] = torch.inf
        return rows

    monkeypatch.setattr(dino, "rows", some_nan)
    source = unpaired.select(range(8, 12))
    made = extract_features(source, encoders, tmp_path / "set", **SETTINGS, on_error="keep")
    assert made.rows_without == {"dino": 2, "clip_txt": 1}
    assert lacking(made, "dino") == ["08", "11"]
    assert [line["streams"] for line in lines(tmp_path / "set" / "incomplete.jsonl")] == [
        ["dino"],
        ["clip_txt"],
        ["dino"],
    ]
    both = extract_features(source.select([1]), encoders, tmp_path / "both", **SETTINGS, on_error="keep")
    assert both.rows_without == {"dino": 1, "clip_txt": 1}
    (line,) = lines(tmp_path / "both" / "incomplete.jsonl")
    assert line["streams"] == ["dino", "clip_txt"]
    assert "its text is empty" in line["reason"]
    assert "encoder `dino` gives a NaN" in line["reason"]


def test_patch_tokens(unpaired, encoders, tmp_path, tmp_path_factory, monkeypatch):
    dino = str(save_dinov2(tmp_path_factory.mktemp("tokens") / "dino"))
    tokens = load_encoders(parse_streams([f"a={dino}:image:tokens", f"b={dino}:image:tokens"]), device="cpu")
    count = np.prod(tokens["a"].record["grid"])
    second = tokens["b"]

    def some_nan(inputs):
        rows = type(second).rows(second, inputs).clone()
        rows[1] = torch.nan
        return rows

    monkeypatch.setattr(second, "rows", some_nan)
    made = extract_features(unpaired.select([0, 1, 2]), tokens, tmp_path / "set", **SETTINGS, on_error="keep")
    assert len(made) == 2 * count
    assert made.rows_without == {"b": count}
    assert np.array(made.column("sample"))[~made.present("b")].tolist() == [1] * count


def test_a_label_that_is_unknown_is_no_stream(unpaired, encoders, tmp_path):
    labelled = unpaired.select([1, 2, 3]).add_column("label", ["a", "b", "a"])
    made = extract_features(
        labelled, encoders, tmp_path / "set", **SETTINGS, on_error="keep", labels_column="label", label_names=["a"]
    )
    assert made.ids == ["01", "03"]
    assert lines(tmp_path / "set" / "skipped.jsonl")[0]["id"] == "02"
