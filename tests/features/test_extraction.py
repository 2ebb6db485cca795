import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import SHARED
from PIL import Image
from tiny_encoders import save_clip, save_dinov2

from sparc_hf.cli.extract import ExtractionArguments, run_extraction
from sparc_hf.encoders.stream_encoder import load_encoders
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.extraction import extract_features
from sparc_hf.features.sources.source import find_column, open_source
from sparc_hf.features.stream_records import parse_streams

PHOTOS = SHARED / "data" / "photos"
MODES = ["RGB", "L", "RGBA", "P"]


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    clip, dino = str(save_clip(root / "clip")), str(save_dinov2(root / "dino"))
    return [f"dino={dino}:image", f"clip_img={clip}:image", f"clip_txt={clip}:text:mean"]


@pytest.fixture(scope="module")
def encoders(streams):
    return load_encoders(parse_streams(streams))


@pytest.fixture
def folder(tmp_path):
    """An imagefolder of 21 images in several modes, with captions."""
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(21):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 255, (30 + number, 40, 3), dtype=np.uint8)
        name = f"{20 - number:02}.png"
        Image.fromarray(pixels).convert(MODES[number % 4]).save(tmp_path / "images" / name)
        lines.append(
            {"file_name": name, "key": f"k{number}", "captions": [f"a cat {number}", "two dogs"], "kind": number % 3}
        )
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path / "images"


def by_hand(dataset, encoders) -> dict[str, np.ndarray]:
    texts = [" ".join(captions) for captions in dataset["captions"]]
    return {
        name: np.stack([encoder.encode([sample])[0] for sample in (texts if name == "clip_txt" else dataset["image"])])
        for name, encoder in encoders.items()
    }


def test_every_stream_of_every_row(folder, encoders, tmp_path):
    dataset = open_source(str(folder))
    made = extract_features(
        dataset,
        encoders,
        tmp_path / "set",
        id_column="key",
        labels_column="kind",
        keep_columns=["image", "captions"],
        label_names=["a", "b", "c"],
        batch_size=4,
        rows_per_shard=8,
        source={"dataset": "test"},
    )
    for name, rows in by_hand(dataset, encoders).items():
        np.testing.assert_allclose(made.array(name), rows, atol=1e-5)
    assert made.stream_names == ["dino", "clip_img", "clip_txt"]
    assert made.streams == [encoder.record for encoder in encoders.values()]
    assert made.ids == dataset["key"][:]
    assert made.text[0] == " ".join(dataset[0]["captions"])
    assert made.column("captions") == dataset["captions"][:]
    assert made.column("labels") == [[kind] for kind in dataset["kind"]]
    assert made.source == {
        "dataset": "test",
        "rows": 21,
        "image_column": "image",
        "text_column": "captions",
        "id_column": "key",
        "labels_column": "kind",
    }
    for file in folder.glob("*.png"):  # the images travel with the features
        file.unlink()
    kept = FeatureDataset.load(tmp_path / "set", verify=True).dataset
    assert kept.features["image"] == datasets.Image()
    assert kept[3]["image"].size == (40, 30 + int(kept[3]["id"][1:]))


def test_stopped_run_goes_on_and_equals_a_straight_one(folder, encoders, tmp_path, monkeypatch):
    dataset = open_source(str(folder))
    clip = encoders["clip_img"]
    calls = []

    def failing(inputs):
        calls.append(len(inputs["pixel_values"]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return type(clip).rows(clip, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(clip, "rows", failing)
        with pytest.raises(KeyboardInterrupt):
            extract_features(dataset, encoders, tmp_path / "set", batch_size=4, rows_per_shard=8)
    encoded = []
    with monkeypatch.context() as patch:
        patch.setattr(clip, "rows", lambda inputs: encoded.append(inputs) or type(clip).rows(clip, inputs))
        resumed = extract_features(dataset, encoders, tmp_path / "set", batch_size=4, rows_per_shard=8)
    assert sum(len(inputs["pixel_values"]) for inputs in encoded) == 21 - 8
    straight = extract_features(dataset, encoders, tmp_path / "straight", batch_size=4, rows_per_shard=8)
    for name in encoders:
        np.testing.assert_array_equal(resumed.array(name), straight.array(name))
    assert resumed.text == straight.text
    # The same again finds it done; anything else is refused.
    with monkeypatch.context() as patch:
        patch.setattr(clip, "rows", None)
        again = extract_features(dataset, encoders, tmp_path / "set", batch_size=4, rows_per_shard=8)
    assert again.text == straight.text
    with pytest.raises(ValueError, match=r"already holds a feature dataset .*`columns` differ"):
        extract_features(dataset, encoders, tmp_path / "set", batch_size=4, rows_per_shard=8, dtype="float16")


def test_bad_rows_are_named(folder, encoders, tmp_path, monkeypatch):
    images = {name: encoders[name] for name in ("dino",)}
    dataset = open_source(str(folder))
    bad = folder / Path(dataset.cast_column("image", datasets.Image(decode=False))[9]["image"]["path"]).name
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"row 9 \(.*{bad.name}\): its image cannot be read"):
        extract_features(dataset, images, tmp_path / "set", batch_size=4)
    with pytest.raises(ValueError, match=r"row 9 \(k\d+\): its image cannot be read"):
        extract_features(dataset, images, tmp_path / "other", batch_size=4, id_column="key")
    bad.write_bytes(whole)
    assert len(extract_features(dataset, images, tmp_path / "set", batch_size=4)) == 21
    texts = datasets.Dataset.from_dict({"id": ["x", "y"], "text": ["cat", "  "]})
    with pytest.raises(ValueError, match=r"row 1 \(y\): its text is empty"):
        extract_features(texts, {"clip_txt": encoders["clip_txt"]}, tmp_path / "texts")
    monkeypatch.setattr(
        encoders["dino"], "rows", lambda inputs: torch.full((len(inputs["pixel_values"]), 16), torch.nan)
    )
    with pytest.raises(ValueError, match=r"row 0 \(k\d+\): encoder `dino` gives a NaN"):
        extract_features(dataset, images, tmp_path / "nan", id_column="key")


def test_labels(encoders, tmp_path):
    kinds = datasets.ClassLabel(names=["cat", "dog"])
    table = datasets.Dataset.from_dict(
        {"text": ["cat", "dog", "cat dog"], "one": [0, 1, 1], "many": [["cat"], [], ["dog", "cat"]]},
        features=datasets.Features(
            {"text": datasets.Value("string"), "one": kinds, "many": datasets.List(datasets.Value("string"))}
        ),
    )
    text = {"clip_txt": encoders["clip_txt"]}
    made = extract_features(table, text, tmp_path / "one", labels_column="one")
    assert (made.label_names, made.column("labels")) == (["cat", "dog"], [[0], [1], [1]])
    made = extract_features(table, text, tmp_path / "many", labels_column="many", label_names=["cat", "dog"])
    assert made.labels_csr().toarray().tolist() == [[1, 0], [0, 0], [1, 1]]
    with pytest.raises(ValueError, match="row 2: its label 'dog' is not among"):
        extract_features(table, text, tmp_path / "few", labels_column="many", label_names=["cat"])


def test_columns_are_found_or_asked_for(encoders, tmp_path):
    table = datasets.Dataset.from_dict({"title": ["a"], "body": ["b"], "number": [1]})
    with pytest.raises(ValueError, match=r"several text columns, \['title', 'body'\].*`text_column`"):
        find_column(table, "text")
    with pytest.raises(ValueError, match=r"no image column among .*`image_column`"):
        find_column(table, "image")
    assert find_column(table.rename_column("body", "text"), "text") == "text"
    assert find_column(table.remove_columns("body"), "text") == "title"
    text = {"clip_txt": encoders["clip_txt"]}
    with pytest.raises(ValueError, match=r"no columns \['nothing'\]"):
        extract_features(table, text, tmp_path / "set", text_column="nothing")
    with pytest.raises(ValueError, match="cannot be kept"):
        extract_features(
            table.rename_column("body", "text"), text, tmp_path / "set", text_column="title", keep_columns=["text"]
        )


def test_image_column_of_paths(folder, encoders, tmp_path):
    paths = sorted(str(file) for file in folder.glob("*.png"))
    table = datasets.Dataset.from_dict({"file": paths})
    made = extract_features(table, {"dino": encoders["dino"]}, tmp_path / "set", image_column="file")
    expected = encoders["dino"].encode([Image.open(path) for path in paths])
    np.testing.assert_allclose(made.array("dino"), expected, atol=1e-5)


def test_sources(folder, tmp_path):
    dataset = open_source(str(folder))
    assert len(open_source(str(folder), "train")) == 21
    dataset.to_parquet(str(tmp_path / "set.parquet"))
    assert len(open_source(str(tmp_path / "set.parquet"))) == 21
    dataset.save_to_disk(str(tmp_path / "one"))
    assert len(open_source(str(tmp_path / "one"))) == 21
    datasets.DatasetDict({"train": dataset, "test": dataset.select(range(2))}).save_to_disk(str(tmp_path / "two"))
    assert len(open_source(str(tmp_path / "two"), "test")) == 2
    with pytest.raises(ValueError, match=r"the splits \['train', 'test'\]; choose one"):
        open_source(str(tmp_path / "two"))
    with pytest.raises(ValueError, match="no split `dev`"):
        open_source(str(tmp_path / "two"), "dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot open"):
        open_source(str(tmp_path / "empty"))


def test_stream_strings():
    assert parse_streams(["a=org/model-1:image", "b=/a:b/c:text:mean"]) == [
        {"name": "a", "encoder": "org/model-1", "modality": "image"},
        {"name": "b", "encoder": "/a:b/c", "modality": "text", "pooling": "mean"},
    ]
    for text in ("a", "a=b", "a=b:audio", "a=:image"):
        with pytest.raises(ValueError, match="cannot read the stream"):
            parse_streams([text])
    assert parse_streams(["dino=demo:dino:image"])[0]["encoder"] == "demo:dino"
    with pytest.raises(ValueError, match="its own name"):
        parse_streams(["a=b:image", "a=c:text"])


def parse(*flags: str) -> ExtractionArguments:
    return transformers.HfArgumentParser(ExtractionArguments).parse_args_into_dataclasses(list(flags))[0]


def test_arguments(folder, streams, tmp_path):
    args = parse(
        *("--source", str(folder), "--output", str(tmp_path / "set"), "--encoders", *streams),
        *("--limit", "5", "--dtype", "float16", "--keep_columns", "captions", "--device", "cpu"),
    )
    made = run_extraction(args)
    assert len(made) == 5
    assert made.table.schema.field("dino").type.value_type == "halffloat"
    assert made.streams[2]["pooling"] == "mean"
    with pytest.raises(ValueError, match="`limit`"):
        run_extraction(parse("--source", str(folder), "--output", "x", "--limit", "0", "--encoders", *streams))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the photographs are not at {PHOTOS}")
def test_real_photographs(streams, tmp_path):
    made = run_extraction(
        ExtractionArguments(
            str(PHOTOS), str(tmp_path / "set"), encoders=streams, limit=12, text_column="captions", device="cpu"
        )
    )
    assert len(made) == 12
    assert made.text[0].count(".") >= 4
    made.check_rows()
