"""Patch tokens, streams of rows, shared images, statistics, and whole sources through the real command."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import save_clip, save_dinov2, save_siglip, save_vit

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.cli import main
from sparc_hf.encoders.stream_encoder import load_encoders
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.extraction import extract_features
from sparc_hf.features.sources.source import open_source
from sparc_hf.features.statistics import standardization_of
from sparc_hf.features.stream_records import parse_streams


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    savers = {"clip": save_clip, "dino": save_dinov2, "siglip": save_siglip, "vit": save_vit}
    return {name: str(save(root / name)) for name, save in savers.items()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """An ImageNet-like folder tree of 11 images of two classes."""
    root = tmp_path_factory.mktemp("tree")
    for number in range(11):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        file = root / "train" / f"n0{number % 2}" / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return root


def test_the_usae_preset_on_small_encoders(checkpoints, tree, tmp_path):
    """The preset's settings, with other checkpoints and a smaller grid."""
    streams = [f"{name}={checkpoints[name]}:image:tokens" for name in ("siglip", "dino", "vit")]
    flags = ["--source", str(tree), "--split", "train", "--output", str(tmp_path / "set"), "--grid", "3", "3"]
    flags += ["--encoders", *streams, "--batch_size", "4", "--rows_per_shard", "40", "--device", "cpu"]
    assert main(["extract", "--preset", "usae-imagenet", *flags]) == 0
    made = FeatureDataset.load(tmp_path / "set")
    assert len(made) == 11 * 9
    assert made.table.schema.field("dino").type.value_type == "halffloat"
    assert made.column("sample") == [sample for sample in range(11) for _ in range(9)]
    assert made.column("token") == [*range(9)] * 11
    assert made.ids[:10] == ["n00/00"] * 9 + ["n00/02"]
    assert (made.label_names, made.column("labels", [0, 98])) == (["n00", "n01"], [[0], [1]])
    encoders = load_encoders(made.streams)
    images = [Image.open(file) for file in sorted((tree / "train").rglob("*.png"))]
    for record in made.streams:
        assert (record["grid"], record["pooling"], record["normalize"]) == ([3, 3], "tokens", "standardize")
        rows = encoders[record["name"]].encode(images)
        np.testing.assert_allclose(made.array(record["name"]), rows, atol=2e-3)
        assert record["mean"] == pytest.approx(rows.mean(), abs=1e-3)
        assert record["std"] == pytest.approx(rows.std(ddof=1), abs=1e-3)
    # The same again, statistics and all, is finished; a damaged shard is made again without new statistics.
    assert main(["extract", "--preset", "usae-imagenet", *flags]) == 0
    shard = tmp_path / "set" / "data-00001.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert main(["extract", "--preset", "usae-imagenet", *flags]) == 2
    assert main(["extract", "--preset", "usae-imagenet", *flags, "--repair"]) == 0
    assert shard.read_bytes() == whole
    assert FeatureDataset.load(tmp_path / "set").streams == made.streams


def test_streams_of_different_kinds_are_refused(checkpoints, tree, tmp_path):
    data = open_source(str(tree / "train"))
    mixed = load_encoders(parse_streams([f"a={checkpoints['vit']}:image:tokens", f"b={checkpoints['vit']}:image"]))
    with pytest.raises(ValueError, match="rows of one kind"):
        extract_features(data, mixed, tmp_path / "set")
    with pytest.raises(ValueError, match="would be stored 16 times"):
        extract_features(data, {"a": mixed["a"]}, tmp_path / "set", keep_columns=["image"])


def test_a_stream_of_rows_equals_the_stored_rows(checkpoints, tree, tmp_path):
    encoders = load_encoders(parse_streams([f"dino={checkpoints['dino']}:image"]))
    settings = {"batch_size": 2, "rows_per_shard": 4, "labels_column": "label"}
    stored = extract_features(open_source(str(tree), "train"), encoders, tmp_path / "stored", **settings)
    stream = open_source(str(tree), "train", streaming=True)
    calls = []
    rows = type(encoders["dino"]).rows

    def failing(inputs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return rows(encoders["dino"], inputs)

    encoders["dino"].rows = failing
    with pytest.raises(KeyboardInterrupt):
        extract_features(stream, encoders, tmp_path / "streamed", **settings)
    calls.clear()
    calls += [1] * 10
    streamed = extract_features(stream, encoders, tmp_path / "streamed", **settings)
    assert len(calls) == 10 + 4  # the first shard was done, seven rows in batches of two were left
    np.testing.assert_array_equal(streamed.array("dino"), stored.array("dino"))
    assert streamed.column("labels") == stored.column("labels")
    shards = [json.loads((tmp_path / n / "sparc_features.json").read_text())["shards"] for n in ("stored", "streamed")]
    assert shards[0] == shards[1]


def test_parquet_with_the_images_inside(checkpoints, tree, tmp_path):
    data = open_source(str(tree), "train")
    data.map(lambda row: row).to_parquet(str(tmp_path / "set.parquet"))
    encoders = load_encoders(parse_streams([f"dino={checkpoints['dino']}:image"]))
    expected = encoders["dino"].encode([row["image"] for row in data])
    for name, streaming in (("stored", False), ("streamed", True)):
        source = open_source(str(tmp_path / "set.parquet"), "train", streaming)
        made = extract_features(source, encoders, tmp_path / name, keep_columns=["image"], batch_size=4)
        np.testing.assert_allclose(made.array("dino"), expected, atol=1e-5)
        assert made.column("image", [0])[0]["bytes"][:4] == b"\x89PNG"


def test_an_image_with_several_captions_is_encoded_once(checkpoints, tree, tmp_path, monkeypatch):
    files = sorted(map(str, (tree / "train").rglob("*.png")))[:3]
    columns = {"image": [files[0], files[0], files[1], files[2], files[2]], "text": ["a", "b", "c", "d", "e"]}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    streams = [f"dino={checkpoints['dino']}:image", f"txt={checkpoints['clip']}:text"]
    encoders = load_encoders(parse_streams(streams))
    seen = []
    rows = type(encoders["dino"]).rows
    monkeypatch.setattr(encoders["dino"], "rows", lambda inputs: seen.append(inputs) or rows(encoders["dino"], inputs))
    made = extract_features(data, encoders, tmp_path / "set")
    assert [len(inputs["pixel_values"]) for inputs in seen] == [3]
    expected = rows(encoders["dino"], encoders["dino"].prepare([Image.open(file) for file in files])).numpy()
    np.testing.assert_allclose(made.array("dino"), expected[[0, 0, 1, 2, 2]], atol=1e-5)
    assert made.text == ["a", "b", "c", "d", "e"]


def test_statistics():
    draws = np.random.default_rng(0)
    rows = (1000 + draws.normal(size=(9000, 4)) * [1, 2, 3, 4]).astype(np.float32)
    made = FeatureDataset.from_arrays({"x": rows, "flat": np.ones((9000, 2))})
    found = standardization_of(made, "x")
    assert found["mean"] == pytest.approx(rows.mean(dtype=np.float64), rel=1e-12)
    assert found["std"] == pytest.approx(rows.std(ddof=1, dtype=np.float64), rel=1e-9)
    sample = rows[np.linspace(0, 8999, 10).round().astype(int)]
    assert standardization_of(made, "x", sample_rows=10)["mean"] == pytest.approx(sample.mean(dtype=np.float64))
    with pytest.raises(ValueError, match="do not vary"):
        standardization_of(made, "flat")
    rows[:, 2] = 7
    found = standardization_of(FeatureDataset.from_arrays({"x": rows}), "x", per_channel=True)
    np.testing.assert_allclose(found["mean"], rows.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found["std"], rows.std(axis=0, ddof=1, dtype=np.float64), rtol=1e-9)
    assert found["std"][2] == 0
    with pytest.raises(ValueError, match="do not vary"):
        standardization_of(made, "flat", per_channel=True)


def test_every_channel_by_its_own_statistics(checkpoints, tree, tmp_path):
    """Extraction stores both kinds, and a model standardises by the one it finds."""
    flags = ["--source", str(tree), "--source_format", "imagenet", "--split", "train", "--device", "cpu"]
    flags += ["--encoders", f"vit={checkpoints['vit']}:image:tokens", "--normalize", "standardize"]
    made = {}
    for kind in ([], ["--per_channel"]):
        folder = tmp_path / f"set{len(kind)}"
        assert main(["extract", *flags, *kind, "--output", str(folder)]) == 0
        made[bool(kind)] = FeatureDataset.load(folder)
        # Another kind of statistics is another dataset.
        assert main(["extract", *flags, *([] if kind else ["--per_channel"]), "--output", str(folder)]) == 2
    rows = torch.from_numpy(made[True].array("vit"))
    assert torch.equal(rows, torch.from_numpy(made[False].array("vit")))
    for per_channel, features in made.items():
        record = features.streams[0]
        assert isinstance(record["mean"], list) == per_channel
        standard = SparcModel(SparcConfig(streams=features.streams, num_latents=8, k=2, auxk=0)).normalize(
            {"vit": rows}
        )["vit"]
        spread = standard.std(dim=0) if per_channel else standard.std()
        torch.testing.assert_close(spread, torch.ones_like(spread), rtol=1e-3, atol=1e-3)
        assert (standard.mean(dim=0).abs().max() < 1e-4) == per_channel
    wrong = ["extract", *flags, "--normalize", "l2", "--per_channel", "--output", str(tmp_path / "none")]
    assert main(wrong) == 2


def test_statistics_equal_the_earlier_projects(golden):
    """USAE's standardised activations: (x - mean) / (std + 1e-5), with one mean and one std a model."""
    from safetensors.torch import load_file

    tensors = load_file(golden / "usae_activation_dataset_expected.safetensors")
    models = sorted({name.rsplit(".", 1)[1] for name in tensors if name.startswith("plain.")})
    for model in models:
        plain = [tensors[f"plain.{i}.{model}"] for i in range(6)]
        rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in plain]).numpy()
        found = standardization_of(FeatureDataset.from_arrays({"x": rows}), "x")
        for i, one in enumerate(plain):
            mine = (one - found["mean"]) / (found["std"] + 1e-5)
            torch.testing.assert_close(mine, tensors[f"standardize.{i}.{model}"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_thousand_photographs(shared_data, tmp_path):
    source = ["--source", str(shared_data / "photos"), "--split", "train", "--text_column", "captions"]
    flags = ["--preset", "demo", "--output", str(tmp_path / "set"), "--dtype", "float16", "--device", "cpu"]
    assert main(["extract", *source, *flags]) == 0
    made = FeatureDataset.load(tmp_path / "set")
    made.check_rows()
    assert len(made) == 1000
    data = open_source(str(shared_data / "photos"), "train")
    assert made.text == [" ".join(captions) for captions in data["captions"]]
    encoders = load_encoders(made.streams)
    rows = [0, 500, 999]
    for name, encoder in encoders.items():
        samples = [made.text[row] if encoder.modality == "text" else data[row]["image"] for row in rows]
        np.testing.assert_allclose(made.array(name, rows), encoder.encode(samples), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(("rows", "count"), [("image", 78), ("caption", None)])
def test_the_coco_photographs(shared_data, tmp_path, rows, count):
    coco = shared_data / "coco_val"
    captions = json.loads((coco / "captions.json").read_text())
    source = ["--source_format", "coco", "--source", str(coco / "captions.json"), "--images", str(coco / "images")]
    source += ["--instances", str(coco / "instances.json"), "--rows", rows]
    assert main(["extract", *source, "--preset", "demo", "--output", str(tmp_path / "set"), "--device", "cpu"]) == 0
    made = FeatureDataset.load(tmp_path / "set")
    made.check_rows()
    assert len(made) == (count or len(captions["annotations"]))
    assert made.labels_csr().shape == (len(made), 80)
    assert made.label_names is not None
    assert made.label_names[:2] == ["person", "bicycle"]
    first = captions["images"][0]["id"]
    said = [one["caption"].strip() for one in captions["annotations"] if one["image_id"] == first]
    assert made.text[0] == (" ".join(said) if rows == "image" else said[0])
    encoder = load_encoders(made.streams)["dino"]
    image = Image.open(coco / "images" / captions["images"][0]["file_name"])
    np.testing.assert_allclose(made.array("dino", [0]), encoder.encode([image]), rtol=1e-3, atol=1e-4)
