"""Wrong flags are told before any row is read for its checksum, any encoder loaded, or anything encoded."""

import importlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.cli import main
from sparc_hf.codes.concepts import Concept, save_concepts
from sparc_hf.features.dataset import FeatureDataset

RECORDS = [
    {"name": "dino", "hidden_size": 8, "encoder": "demo:dino", "modality": "image", "pooling": "cls"},
    {"name": "clip_img", "hidden_size": 6, "encoder": "demo:clip", "modality": "image"},
    {"name": "clip_txt", "hidden_size": 6, "encoder": "demo:clip", "modality": "text"},
]
# What costs minutes on real data, by where it is looked up.
EXPENSIVE = (
    "sparc_hf.codes.code_table.encode_features",
    "sparc_hf.cli.concepts.encode_features",
    "sparc_hf.cli.retrieve.encode_features",
    "sparc_hf.evaluation.suite._encoded",
    "sparc_hf.encoders.stream_encoder.frozen_model",
    "sparc_hf.training.trainer.SparcTrainer.train",
    "sparc_hf.cli.extract.extract_features",
    "sparc_hf.demo.run.extract_features",
    "sparc_hf.space.data.open_space",
    "sparc_hf.hub.push.write_parquet_split",
    "sparc_hf.cli.push.prepare_model",
    "sparc_hf.cli.import_files.import_features",
)
# A module that is imported while another is patched would keep what it found there.
MODULES = [importlib.import_module(".".join(name.split(".")[:3])) for name in (*EXPENSIVE, "sparc_hf.cli.explain")]


class Expensive(BaseException):
    """Something that takes long was begun; no `except Exception` hides it."""


def begun(*_args, **_options):
    raise Expensive


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, features, a picture, masks and results, none of which fit each other's typos."""
    folder = tmp_path_factory.mktemp("typos")
    torch.manual_seed(0)
    SparcModel(SparcConfig(streams=RECORDS, num_latents=32, k=4, auxk=4)).save_pretrained(folder / "model")
    save_concepts([Concept(3, "circle", 5.0, {})], folder / "model")
    SparcModel(SparcConfig(streams=RECORDS[2:], num_latents=32, k=4, auxk=4)).save_pretrained(folder / "texts")
    nameless = [{key: record[key] for key in ("name", "hidden_size")} for record in RECORDS]
    SparcModel(SparcConfig(streams=nameless, num_latents=32, k=4, auxk=4)).save_pretrained(folder / "nameless")
    rng = np.random.default_rng(0)
    arrays = {record["name"]: rng.normal(size=(40, record["hidden_size"])).astype(np.float32) for record in RECORDS}
    labels = {"labels": [[row % 2] for row in range(40)], "label_names": ["cat", "dog"]}
    FeatureDataset.from_arrays(arrays, streams=RECORDS, text=["a cat"] * 40, **labels).save(folder / "features")
    FeatureDataset.from_arrays(arrays, streams=RECORDS).save(folder / "bare")
    FeatureDataset.from_arrays({"other": arrays["dino"]}, **labels).save(folder / "others")
    tree = {"LabelName": "all", "Subcategory": [{"LabelName": "cat"}]}
    FeatureDataset.from_arrays(arrays, streams=RECORDS, taxonomy=tree, **labels).save(folder / "lost")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "words.txt").write_text("cat\ndog\n")
    (folder / "one.txt").write_text("cat\n")
    (folder / "latin.txt").write_bytes("Käse\nBrot\n".encode("latin-1"))
    (folder / "file").write_text("no folder")
    (folder / "odd.json").write_text("[]")
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 4]]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "masks.json").write_text(json.dumps(coco))
    coco["images"][0]["width"] = 20
    (folder / "wide.json").write_text(json.dumps(coco))
    (folder / "table.csv").write_text("photo,caption,score\na.png,a cat,3\n")
    return folder


MASKED = "evaluate {w}/model --features {w}/features --masks {w}/masks.json --mask_images {w}"
TYPOS = [
    # retrieve
    ("retrieve --model {w}/model --features {w}/features --row 99", "numbered from 0 to 39"),
    ("retrieve --model {w}/model --features {w}/features --row -1", "numbered from 0 to 39"),
    ("retrieve --model {w}/model --features {w}/features --image {w}/none.png", "does not exist"),
    ("retrieve --model {w}/model --features {w}/features --image {w}/words.txt", "cannot be read as an image"),
    ("retrieve --model {w}/model --features {w}/features --text a --source dino", "encodes text"),
    ("retrieve --model {w}/model --features {w}/features --text a --target ears", "no streams ['ears']"),
    ("retrieve --model {w}/model --features {w}/features --row 1 --batch_size 0", "`batch_size` at least 1"),
    ("retrieve --model {w}/model --features {w}/others --row 1", "needs the streams"),
    ("retrieve --model {w}/nameless --features {w}/features --text a", "no stream"),
    # concepts
    ("concepts --model owner/name --features {w}/features", "give its folder as `model`"),
    ("concepts --model {w}/none --features {w}/features", "give its folder as `model`"),
    ("concepts --model {w}/model --features {w}/bare", "naming needs features with"),
    ("concepts --model {w}/model --features {w}/others", "needs the streams"),
    ("concepts --model {w}/model --features {w}/features --vocabulary {w}/none.txt", "none.txt"),
    ("concepts --model {w}/model --features {w}/features --vocabulary {w}/one.txt", "two words or more"),
    ("concepts --model {w}/model --features {w}/features --vocabulary {w}/latin.txt", "not UTF-8"),
    ("concepts --model {w}/model --features {w}/features --vocabulary {w}/words.txt --prompt a", "prompt with {}"),
    ("concepts --model {w}/texts --features {w}/features --maximise 3 --output {o}", "a stream that encodes image"),
    ("concepts --model {w}/nameless --features {w}/features --top 3 --output {o}", "which encoder made it"),
    ("concepts --model {w}/model --maximise 3 --steps 0 --output {o}", "`steps` must be at least 1"),
    ("concepts --model {w}/model --features {w}/features --latents 99 --output {o}", "no latents [99]"),
    ("concepts --model {w}/model --features {w}/features --latents 3 --output {w}/file", "must be a folder"),
    ("concepts --model {w}/model --features {w}/features --latents 3 --output {w}/file/x", "is a file"),
    ("concepts --model {w}/model --features {w}/features --heatmaps 3 --output {o}", "has no images"),
    ("concepts --model {w}/model --features {w}/features --heatmaps 3 --output {o} --images {w}/none.png", "none.png"),
    ("concepts --model {w}/model --features {w}/features --latents 3 --output {o} --shifts 0", "`shifts`"),
    # explain
    ("explain --model {w}/model --output {o} --image {w}/a.png {w}/none.png", "none.png"),
    ("explain --model {w}/model --output {w}/file --image {w}/a.png", "must be a folder"),
    ("explain --model {w}/model --output {o} --image {w}/a.png --latents 99", "no latents [99]"),
    ("explain --model {w}/model --output {o} --image {w}/a.png --concept zebra", "no concept named `zebra`"),
    ("explain --model {w}/model --output {o} --image {w}/a.png --shifts 0", "`shifts` must be at least 1"),
    ("explain --model {w}/texts --output {o} --image {w}/a.png", "which the samples lack"),
    ("explain --model {w}/model --output {o} --features {w}/bare", "neither images nor captions"),
    ("explain --model {w}/nameless --output {o} --image {w}/a.png", "which encoder made it"),
    ("explain --model {w}/model --output {o} --text  ", "expected at least one argument"),
    # evaluate
    ("evaluate {w}/model {w}/none --features {w}/features", "there is no folder"),
    ("evaluate {w}/model --features {w}/others", "needs the streams"),
    ("evaluate {w}/model --features {w}/lost", "not in the taxonomy"),
    ("evaluate {w}/model --features {w}/features --output {w}/file", "must be a folder"),
    ("evaluate {w}/model --features {w}/features --masks {w}/none.json --mask_images {w}", "none.json"),
    ("evaluate {w}/model --features {w}/features --masks {w}/odd.json --mask_images {w}", "COCO's format"),
    ("evaluate {w}/model --features {w}/features --masks {w}/wide.json --mask_images {w}", "other proportions"),
    ("evaluate {w}/model --features {w}/features --masks {w}/masks.json", "folder of the images"),
    (
        "evaluate {w}/model --features {w}/features --masks {w}/masks.json --mask_images {w} --map_methods x",
        "`method`",
    ),
    (
        "evaluate {w}/model --features {w}/features --masks {w}/masks.json --mask_images {w} --prompt a",
        "`prompt` needs",
    ),
    (
        MASKED + " --concept_features {w}/bare",
        "needs features with `labels`",
    ),
    (
        MASKED + " --concept_features {w}/others",
        "needs the streams",
    ),
    (
        "evaluate {w}/nameless --features {w}/features --masks {w}/masks.json --mask_images {w}",
        "which encoder made it",
    ),
    # encode
    ("encode --model {w}/model --features {w}/features --output {w}/file", "must be a folder"),
    ("encode --model {w}/model --features {w}/features --output {w}/model", "is not a code table"),
    ("encode --model {w}/model --features {w}/features --output {o} --batch_size 0", "`batch_size` at least 1"),
    # train
    ("train --features {w}/features --output_dir {o} --k 9 --num_latents 8", "choose `k` <= `num_latents`"),
    ("train --features {w}/features --output_dir {w}/file", "must be a folder"),
    ("train --features {w}/features --output_dir {o} --eval_features {w}/none", "there is no folder"),
    ("train --features {w}/features --output_dir {o} --streams ears", "names ['ears']"),
    # extract
    (
        "extract --source {w}/table.csv --output {o} --encoders t=demo:clip:text --text_column none",
        "no columns ['none']",
    ),
    ("extract --source {w}/table.csv --output {o} --encoders t=demo:clip:text --text_column score", "must hold texts"),
    (
        "extract --source {w}/table.csv --output {o} --encoders i=demo:clip:image --image_column score",
        "must hold images",
    ),
    ("extract --source {w}/table.csv --output {o} --encoders t=demo:clip:text --device nope", "`device`"),
    ("extract --source {w}/table.csv --output {o} --encoders t=demo:clip:text --device meta", "`device`"),
    ("extract --source {w}/table.csv --output {o} --encoders t=demo:clip:text --device cuda:99", "`device`"),
    ("extract --source {w}/table.csv --output {w}/model --encoders t=demo:clip:text", "is not a feature dataset"),
    ("extract --source {w}/table.csv --output {o} --encoders t=demo:clip:text --batch_size 0", "`batch_size`"),
    ("extract --source {w}/table.csv --output {o} --encoders t=demo:clip:text --limit 0", "`limit`"),
    ("extract --source {w}/table.csv --output {o} --encoders t=demo:clip:text i=./none:text", "neither a folder nor"),
    ("extract --source {w}/table.csv --output {o} --encoders t=demo:clip:text:clss", "the pooling 'clss'"),
    # card, push, import, demo, space
    ("card --model {w}/model --results {w}/odd.json", "not a results.json"),
    ("push --repo me/x --model {w}/none --dry_run {o}", "holds no model"),
    ("push --repo me/x --features {w}/features train={w}/others --dry_run {o}", "have the same streams"),
    ("push --repo me/x --features a-b={w}/features --dry_run {o}", "letters, digits and underscores"),
    ("import --source a={w}/none.h5 --output {w}/model", "is not a feature dataset"),
    ("import --source a={w}/none.h5 --output {w}/file", "must be a folder"),
    ("demo --output {o} --epochs 0", "`epochs` must be at least 1"),
    ("demo --output {o} --learning_rate -1", "`final_learning_rate`"),
    ("demo --output {o} --train_rows 0", "needs scenes"),
    ("demo --output {w}/file", "must be a folder"),
    ("space --port 99999", "`port` must be from 1 to 65535"),
    ("space --port -1", "`port` must be from 1 to 65535"),
    ("space --host 256.0.0.1", "nothing can listen on"),
]


@pytest.mark.parametrize(("command", "message"), TYPOS, ids=[command[:70] for command, _ in TYPOS])
def test_wrong_flags_are_told_before_anything_expensive(world, tmp_path, monkeypatch, capsys, command, message):
    for name in EXPENSIVE:
        if not (name.endswith("prepare_model") and "push" in command):
            monkeypatch.setattr(name, begun)
    before = sorted(path.relative_to(world) for path in world.rglob("*"))
    try:
        status = main(command.format(w=world, o=tmp_path / "made").split())
    except SystemExit as stop:
        status = stop.code
    told = capsys.readouterr()
    assert status == 2
    assert told.out == ""
    last = told.err.strip().splitlines()[-1]
    assert last.startswith(f"sparc {command.split()[0]}: ")
    assert message in last
    assert not (tmp_path / "made").exists()
    assert sorted(path.relative_to(world) for path in world.rglob("*")) == before


def test_checksums_are_compared_after_the_model_is_found(world, monkeypatch, capsys):
    """Reading all rows takes minutes, looking for a model takes none."""
    monkeypatch.setattr(FeatureDataset, "load", begun)
    for command in ("encode --output x", "retrieve --row 1", "explain --output x", "concepts --output x --top 1"):
        name, *flags = command.split()
        flags = [flag.replace("x", str(world / "out")) if flag == "x" else flag for flag in flags]
        assert main([name, "--model", "/no/such/model", "--features", str(world / "features"), *flags]) == 2
        assert "there is no folder" in capsys.readouterr().err


def test_nobody_signed_in_is_told_before_rows_are_written(world, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sparc_hf.hub.push.write_parquet_split", begun)
    monkeypatch.setattr("sparc_hf.cli.push.prepare_model", begun)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for what in ("--features {w}/features", "--model {w}/model"):
        assert main(f"push --repo me/x {what}".format(w=world).split()) == 2
        assert "Hub" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_the_demo_is_prepared(monkeypatch, capsys):
    monkeypatch.setattr("sparc_hf.space.data.open_space", begun)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["space", "--port", str(taken.getsockname()[1])]) == 2
    assert "nothing can listen on" in capsys.readouterr().err


def test_a_pipe_among_images_is_told_and_not_waited_for(tmp_path):
    """In every way that images come in by: an image folder, class folders, COCO, a column of paths."""
    import os

    for folder in ("images", "classes/cat"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "a.png")
        os.mkfifo(tmp_path / folder / "pipe.png")
    captions = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(("a.png", "pipe.png"))],
        "annotations": [{"id": n, "image_id": n, "caption": "a cat"} for n in range(2)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    lines = [f"{tmp_path}/images/{name}" for name in ("a.png", "pipe.png")]
    (tmp_path / "paths.csv").write_text("image\n" + "\n".join(lines) + "\n")
    common = "--encoders i=demo:dino:image --workers 0"
    for number, source in enumerate(
        (
            f"--source {tmp_path}/classes --source_format imagenet",
            f"--source {tmp_path}/captions.json --images {tmp_path}/images --source_format coco",
            f"--source {tmp_path}/paths.csv --image_column image",
            f"--source {tmp_path}/images",
        )
    ):
        command = f"extract {source} {common} --output {tmp_path}/made-{number}".split()
        code = f"import sys; from sparc_hf.cli import main; sys.exit(main({command!r}))"
        told = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
        )
        assert "Traceback" not in told.stderr, told.stderr
        if told.returncode == 0:  # datasets leaves pipes in an image folder out
            assert json.loads(told.stdout)["rows"] == 1
        else:
            assert told.returncode == 2
            assert "pipe.png" in told.stderr
            assert "no regular file" in told.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", ""),
        ("metadata.csv", "file_name,text\n"),
        ("metadata.csv", "text\nhello\n"),
        ("metadata.jsonl", ""),
        ("metadata.jsonl", "[]\n"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": [["nested"]]}\n'),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}\n'),
        ("metadata.jsonl", '{"file_name": "a.png", "text": {"a": 1}}\n'),
        ("metadata.jsonl", '{"file_name": null, "text": "a"}\n'),
        ("metadata.jsonl", "{\n"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_odd_metadata_of_an_image_folder(name, content, streaming, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / name).write_text(content)
    command = f"extract --source {tmp_path}/images --encoders t=demo:clip:text --workers 0 --output {tmp_path}/made"
    command += " --streaming true --split train" if streaming else ""
    assert main(command.split()) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("sparc extract: ")
    assert len(last) < 1200
    assert not (tmp_path / "made").exists()


def test_captions_that_are_none_are_told_with_their_row(tmp_path, capsys):
    lines = [{"text": "a cat"}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = f"extract --source {tmp_path}/a.jsonl --encoders t=demo:clip:text --workers 0 --output {tmp_path}/made"
    assert main(command.split()) == 2
    assert "row 1: its text is empty" in capsys.readouterr().err


@pytest.mark.parametrize("label", [-1, 2**31, 2 * 10**9])
def test_class_ids_beyond_what_is_stored_are_told_with_their_row(label, tmp_path, capsys):
    lines = [{"text": "a cat", "label": 1}, {"text": "a dog", "label": label}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = f"extract --source {tmp_path}/a.jsonl --encoders t=demo:clip:text --workers 0 --output {tmp_path}/made"
    status = main([*command.split(), "--labels_column", "label"])
    if label == 2 * 10**9:
        assert status == 0
        assert FeatureDataset.load(tmp_path / "made").labels_csr().shape == (2, 2)
    else:
        assert status == 2
        assert f"row 1: its label {label} is no class id" in capsys.readouterr().err


def test_large_class_ids_are_evaluated(world, tmp_path, capsys):
    made = FeatureDataset.load(world / "features")
    arrays = {name: made.array(name) for name in made.stream_names}
    labels = [[2 * 10**9 + row % 2, 3 * 10**7] for row in range(40)]
    FeatureDataset.from_arrays(arrays, streams=RECORDS, labels=labels).save(tmp_path / "features")
    command = f"evaluate {world}/model --features {tmp_path}/features --replicates 2"
    assert main(command.split()) == 0
    told = json.loads(capsys.readouterr().out)["model"]["joint"]
    labels = [[1 + row % 2, 0] for row in range(40)]
    FeatureDataset.from_arrays(arrays, streams=RECORDS, labels=labels).save(tmp_path / "small")
    assert main(f"evaluate {world}/model --features {tmp_path}/small --replicates 2".split()) == 0
    assert json.loads(capsys.readouterr().out)["model"]["joint"] == told


def test_every_expensive_name_is_there():
    """The test above would pass for names that are looked up elsewhere."""
    for name in EXPENSIVE:
        parts = name.split(".")
        thing = importlib.import_module(".".join(parts[:3]))
        for part in parts[3:]:
            thing = getattr(thing, part)
        assert callable(thing)
    assert Path(ROOT, "sparc_hf").is_dir()
