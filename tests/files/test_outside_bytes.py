"""Files from elsewhere: odd values are refused in one sentence, at once, and nothing else happens."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import ROOT, planted_features, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_features import features

from sparc_hf import SparcModel
from sparc_hf.cli.import_files import ImportArguments, run_import
from sparc_hf.cli.user_errors import is_users
from sparc_hf.codes.code_table import CodeTable, encode_features
from sparc_hf.codes.concepts import concepts_of, load_concepts
from sparc_hf.evaluation.masked_images import open_masked_images
from sparc_hf.evaluation.results import results_of_model
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.parquet import _facts as parquet_facts
from sparc_hf.features.sources.coco import open_coco
from sparc_hf.features.sources.hierarchy import hierarchy_of_codes
from sparc_hf.features.sources.open_images import _narratives as narratives
from sparc_hf.files.checked_reading import Taxonomy, checked, read_json, read_text, read_yaml
from sparc_hf.legacy.hdf5_features import configured_files, stream_order
from sparc_hf.legacy.sparc_checkpoints import _read_run_config as read_run_config
from sparc_hf.legacy.usae_checkpoints import _read_settings as read_usae_settings

ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([10**12, 2 * 10**9, -1, 0, 1, 2**31, 2**63])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../../etc/passwd", "data-00000.arrow", "/", "", "\0", "zeta", "joint"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, place: tuple = ()) -> list[tuple]:
    """Every place in nested lists and dicts, the whole first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(deeper for key, part in inner for deeper in places(part, (*place, key)))]


def changed(value: Any, place: tuple, odd: Any, remove: bool) -> Any:
    """A copy with one place replaced or removed."""
    if not place:
        return odd
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = odd
    return copy


def raised(function) -> BaseException | None:
    try:
        function()
    except Exception as error:
        return error
    return None


def use_features(folder) -> None:
    made = FeatureDataset.load(folder)
    made.check_rows()
    assert made.text is None or all(isinstance(text, str) for text in made.text)
    if "labels" in made.column_names:
        made.labels_csr()


def use_codes(folder) -> None:
    codes = CodeTable.load(folder)
    for stream in codes.streams:
        assert codes.indices(stream).shape == codes.values(stream).shape


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    features().save(folder / "features", rows_per_shard=10)
    encode_features(tiny_model(), planted_features(30), output=folder / "codes")
    return folder


@pytest.mark.parametrize(
    ("name", "manifest", "use"),
    [("features", "sparc_features.json", use_features), ("codes", "sparc_codes.json", use_codes)],
)
@settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_odd_manifests_are_refused_or_harmless(saved, name, manifest, use, data):
    file = saved / name / manifest
    whole = json.loads(file.read_text())
    place = data.draw(st.sampled_from(places(whole)))
    file.write_text(json.dumps(changed(whole, place, data.draw(ODD), data.draw(st.booleans()))))
    error = raised(lambda: use(saved / name))
    file.write_text(json.dumps(whole))
    assert error is None or is_users(error), f"{place}: {error!r}"
    assert "\n" not in str(error or "").strip()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"shards": {"data-00000.arrow": 25}},
            "`shards` of `sparc_features.json` must be a list, but it is",
        ),
        ({"shards": ["data-00000.arrow"]}, r"`shards\[0\]` .* must be an object"),
        ({"shards": []}, "at least one shard"),
        ({"rows": 10**30}, "`rows` .* must be a whole number of 0 or more"),
        ({"format_version": "new"}, "`format_version` must be a whole number"),
        ({"format_version": 99}, "upgrade with"),
        ({"streams": {"zeta": 6}}, "`streams` .* must be a list"),
        ({"streams": [{"name": "zeta", "hidden_size": 10**12}]}, "`hidden_size`"),
        ({"streams": [{"name": "zeta", "hidden_size": 2**31 - 1}]}, "needs lists of 2147483647 floats"),
        ({"label_names": [["a"]]}, r"`label_names\[0\]` .* must be a text"),
        ({"taxonomy": {"LabelName": 3}}, r"`taxonomy\.LabelName` .* must be a text"),
    ],
)
def test_odd_manifests_are_named(saved, changes, message):
    file = saved / "features" / "sparc_features.json"
    whole = json.loads(file.read_text())
    try:
        file.write_text(json.dumps(whole | changes))
        with pytest.raises(ValueError, match=message):
            FeatureDataset.load(saved / "features")
    finally:
        file.write_text(json.dumps(whole))


def test_a_manifest_names_no_file_of_another_folder(saved):
    file = saved / "features" / "sparc_features.json"
    whole = json.loads(file.read_text())
    stolen = {**whole, "shards": [{**whole["shards"][0], "file": "../codes/data-00000.arrow"}]}
    try:
        file.write_text(json.dumps(stolen))
        with pytest.raises(ValueError, match="must be the name of a file"):
            FeatureDataset.load(saved / "features")
    finally:
        file.write_text(json.dumps(whole))


def test_shards_of_other_columns_are_refused(tmp_path):
    features().save(tmp_path / "a", rows_per_shard=10)
    made = features()
    FeatureDataset(made.table.drop_columns(["text"]), made.streams).save(tmp_path / "b", rows_per_shard=10)
    one, other = (json.loads((tmp_path / name / "sparc_features.json").read_text()) for name in "ab")
    (tmp_path / "b" / "data-00000.arrow").rename(tmp_path / "a" / "stranger.arrow")
    one["shards"][0] = {**other["shards"][0], "file": "stranger.arrow"}
    (tmp_path / "a" / "sparc_features.json").write_text(json.dumps(one))
    with pytest.raises(ValueError, match="do not have the same columns"):
        FeatureDataset.load(tmp_path / "a")


def test_codes_beyond_the_latents_are_refused(tmp_path):
    indices, values = np.array([[0, 9]], np.int32), np.ones((1, 2), np.float32)
    for latents, wrong in ((8, True), (10, False)):
        codes = CodeTable.from_arrays({"a": indices}, {"a": values}, latents, "joint")
        if wrong:
            with pytest.raises(ValueError, match="from 0 to 9 in stream `a`, but only 8 latents"):
                codes.csr("a")
        else:
            assert codes.csr("a").shape == (1, 10)


@pytest.mark.parametrize("largest", [2 * 10**9, 3 * 10**7])
def test_large_class_ids_cost_what_there_are_classes(largest):
    made = features()
    ids = [[row % 3 * (largest // 2), largest] if row % 2 else [] for row in range(25)]
    table = made.table.set_column(made.column_names.index("labels"), "labels", pa.array(ids, pa.list_(pa.int64())))
    labels = FeatureDataset(table, made.streams).labels_csr()
    assert labels.shape == (25, 3)
    rows = [row for row in range(25) if row % 2]
    expected = [[row % 3 == 0, row % 3 == 1, True] for row in rows]
    np.testing.assert_array_equal(labels[rows].toarray(), expected)
    with pytest.raises(ValueError, match="class ids must be from 0 to 2, but they reach"):
        FeatureDataset(table, made.streams, label_names=["a", "b", "c"]).labels_csr()


def test_small_class_ids_stay_what_they_are():
    made = features()
    labels = FeatureDataset(made.table, made.streams).labels_csr()
    assert labels.shape == (25, 3)
    np.testing.assert_array_equal(labels.toarray(), made.labels_csr().toarray())


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("text", [["one", "two"]] * 25),
        ("text", list(range(25))),
        ("labels", ["a"] * 25),
        ("labels", [[[1]]] * 25),
        ("labels", [0.5] * 25),
    ],
)
def test_columns_of_another_kind_are_named_when_they_are_used(column, values):
    made = features()
    table = made.table.set_column(made.column_names.index(column), column, pa.array(values))
    odd = FeatureDataset(table, made.streams)
    with pytest.raises(ValueError, match=column):
        odd.text if column == "text" else odd.labels_csr()


def test_a_row_without_a_text_has_an_empty_one():
    made = features()
    texts = pa.array([None, "two", *["x"] * 23])
    table = made.table.set_column(made.column_names.index("text"), "text", texts)
    assert FeatureDataset(table, made.streams).text[:2] == ["", "two"]


BOMBS = {
    "lists": "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(9)),
    "merges": "a: &a {x: 1}\n"
    + "".join(f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{','.join(['*' + chr(97 + n)] * 10)}]}}\n" for n in range(9)),
    "itself": "epochs: &a [*a]\n",
    "deep": "epochs: " + "[" * 3000 + "]" * 3000,
    "nested": "epochs: {a: 1}\n",
    "nested list": "epochs: [[1]]\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_settings_that_are_bombs_are_refused_at_once(name, tmp_path):
    (tmp_path / "settings.yaml").write_text(BOMBS[name])
    command = ["train", "--features", "a", "--output_dir", "b", "--config", str(tmp_path / "settings.yaml")]
    code = f"import sys; from sparc_hf.cli import main; sys.exit(main({command!r}))"
    started = time.monotonic()
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert time.monotonic() - started < 100
    assert told.returncode == 2
    assert "Traceback" not in told.stderr
    assert "settings.yaml" in told.stderr


def test_aliases_of_ordinary_settings_are_followed(tmp_path):
    (tmp_path / "a.yaml").write_text("base: &base {x: 1}\nmore: {<<: *base, y: [&n 2, *n]}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"base": {"x": 1}, "more": {"x": 1, "y": [2, 2]}}


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"", b"\xff\xfe", b"9" * 5000, b"[1] 2", b'["\\ud800"]'])
def test_what_is_no_json_is_refused_in_a_sentence(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json") as caught:
        read_json(tmp_path / "a.json")
    assert is_users(caught.value)
    with pytest.raises(ValueError, match="cannot read"):
        read_text(tmp_path / "none")


def test_deep_hierarchies_are_refused_before_anything_walks_them():
    tree: dict[str, Any] = {"LabelName": "x"}
    for _ in range(90):
        tree = {"LabelName": "x", "Subcategory": [tree]}
    checked(tree, Taxonomy, "tree")
    for _ in range(300):
        tree = {"LabelName": "x", "Subcategory": [tree]}
    with pytest.raises(ValueError, match="nested at most 200 deep"):
        checked(tree, Taxonomy, "tree")


def test_errors_of_libraries_are_not_taken_for_the_users():
    made = features()
    ours = raised(lambda: made.array("ears"))
    assert is_users(ours)
    assert is_users(raised(lambda: read_json("/no/file")))
    assert is_users(raised(lambda: Path("/no/file").read_text()))
    assert is_users(raised(lambda: __import__("no_such_library")))
    for function in (
        lambda: np.zeros(3).reshape(2, 2),
        lambda: int("x"),
        lambda: np.concatenate([]),
        lambda: pa.array([1]).cast(pa.list_(pa.int32())),
        lambda: random.sample([1], 2),
        lambda: json.loads("{"),
        lambda: (_ for _ in ()).throw(TypeError("ours?")),
        lambda: {}["x"],
    ):
        assert not is_users(raised(function) or ValueError())


def test_numpys_error_inside_this_package_keeps_its_traceback(monkeypatch, capsys):
    """Where the last frame is ours but the error comes from C code, it is a fault of this package."""
    from sparc_hf import cli
    from sparc_hf.features.columns import class_ids_per_row

    wrong = cli.Command("", "sparc_hf.cli.card:CardArguments", lambda _: class_ids_per_row([["x"]]))
    monkeypatch.setitem(cli.COMMANDS, "card", wrong)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["card", "--model", "x"])
    ours = cli.Command("", "sparc_hf.cli.card:CardArguments", lambda _: features().array("ears"))
    monkeypatch.setitem(cli.COMMANDS, "card", ours)
    assert cli.main(["card", "--model", "x"]) == 2
    assert "there is no stream `ears`" in capsys.readouterr().err


def with_labels(text: str) -> dict[str, Any]:
    return {"name": text, "lift": 2.0, "count": 3, "z": 4.5}


CONCEPTS = {
    "format_version": 1,
    "concepts": {
        "3": {
            "latent": 3,
            "name": "circle",
            "score": 4.5,
            "fires": {"dino": 0.25},
            "labels": [with_labels("circle")],
            "words": [with_labels("round")],
            "samples": {"dino": ["a", "b"]},
            "vocabulary": [{"name": "disc", "value": 1.0, "z": 3.0}],
        }
    },
}
FIGURES = {
    "headline": {
        "dead_share": {"value": 0.1, "low": 0.0, "high": 0.2},
        "nmse_self": dict.fromkeys(("value", "low", "high")),
    },
    "reconstruction": {"nmse": {"dino": {"dino": 0.5}}},
}
RESULTS = {"models": {"model": {"dataset": "rows", "rows": 9, "model": {}, "joint": FIGURES, "single": FIGURES}}}
RUN = {
    "args": {
        "n_latents": 64,
        "k": 4,
        "auxk": 4,
        "auxk_coef": 0.03,
        "cross_loss_coef": 1.0,
        "dead_steps_threshold": 10,
        "auxk_threshold": 0.001,
        "topk_type": "global",
        "lr": 0.1,
    },
    "config_file_content": {"train_stream_feature_files": {"dino": "a.h5"}, "dataset": "coco"},
}
USAE_RUN = {
    "sae_params": {"top_k": 4},
    "global": {"lr": 0.1, "standardize": True},
    "model_zoo": {"dino": {"model_mean": 0.0, "model_std": 1.0}},
    "viz": {"dataset": "coco"},
}
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 7, "caption": "a cat", "segmentation": [[0, 0, 4, 0, 4, 4]]},
        {
            "id": 2,
            "image_id": 1,
            "category_id": 7,
            "caption": "it",
            "segmentation": {"size": [8, 8], "counts": [9, 55]},
        },
    ],
    "categories": [{"id": 7, "name": "cat", "supercategory": "animal"}],
}
FACTS = {
    "format_version": 1,
    "rows": 25,
    "streams": [{"name": "zeta", "hidden_size": 6}],
    "label_names": ["a"],
    "taxonomy": {"LabelName": "x", "Subcategory": [{"LabelName": "a"}]},
    "source": {"made": "here"},
}
TREE = {"LabelName": "/m/0", "Subcategory": [{"LabelName": "/m/1", "Subcategory": [{"LabelName": "/m/2"}]}]}


def use_concepts(file: Path) -> None:
    file.rename(file.with_name("concepts.json"))
    for concept in load_concepts(file.parent):
        f"{concept.score:.1f} {concept.latent + 1} {(concept.name or '').lower()}"
        f"{min(concept.fires.values(), default=0):.1f}"
        [f"{one.lift:.1f}" + one.name for one in (*concept.labels, *concept.words)]


def use_results(file: Path) -> None:
    from sparc_hf.evaluation.results import eval_results, figure_text

    results = results_of_model(file, "model")
    eval_results(results)
    [figure_text(figure) for part in ("joint", "single") for figure in results[part]["headline"].values()]


def use_coco(file: Path) -> None:
    Image.new("RGB", (8, 8)).save(file.parent / "a.png")
    open_coco(file, file.parent, instances=file)
    images = open_masked_images(str(file), str(file.parent))
    [images.read(number) for number in range(len(images))]


def use_facts(file: Path) -> None:
    parquet_facts(pa.schema([]).with_metadata({b"sparc_features": file.read_bytes()}), "a.parquet")


PARSERS = {
    "concepts": (CONCEPTS, use_concepts),
    "results": (RESULTS, use_results),
    "run_config": (
        RUN,
        lambda file: (read_run_config(file), stream_order(read_run_config(file).get("config_file_content"))),
    ),
    "usae run": (USAE_RUN, lambda file: read_usae_settings(file.parent, file)),
    "coco": (COCO, use_coco),
    "parquet": (FACTS, use_facts),
    "narratives": ({"a": ["one", {"caption": "two"}]}, narratives),
    "hierarchy": (TREE, lambda file: hierarchy_of_codes(read_json(file), {"/m/1": "one", "/m/2": "two"})),
    "feature files": (RUN["config_file_content"], lambda file: configured_files(file, "train")),
}


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_odd_values_in_files_are_refused_or_harmless(name, data):
    whole, use = PARSERS[name]
    place = data.draw(st.sampled_from(places(whole)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.json"
        file.write_text(json.dumps(changed(whole, place, data.draw(ODD), data.draw(st.booleans()))))
        error = raised(lambda: use(file))
    assert error is None or is_users(error), f"{place}: {error!r}"


@pytest.mark.parametrize("name", [name for name in PARSERS if name != "feature files"])
def test_the_files_of_these_tests_are_usable(name, tmp_path):
    whole, use = PARSERS[name]
    (tmp_path / "file.json").write_text(json.dumps(whole))
    use(tmp_path / "file.json")


def test_names_of_latents_that_the_model_lacks_are_refused(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    changed_concepts = json.loads(json.dumps(CONCEPTS).replace('"latent": 3', '"latent": 64'))
    (tmp_path / "concepts.json").write_text(json.dumps(changed_concepts))
    with pytest.raises(ValueError, match="names latents up to 64, but the model has 64"):
        concepts_of(SparcModel.from_pretrained(tmp_path))


def import_in_a_minute(source: str, output: Path) -> str:
    """Import in another process, which is killed after a minute: a bomb would keep it busy for hours."""
    command = ["import", "--source", source, "--output", str(output)]
    code = f"import sys; from sparc_hf.cli import main; sys.exit(main({command!r}))"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=90
    )
    assert told.returncode == 2
    assert "Traceback" not in told.stderr
    assert not output.exists()
    return told.stderr


def test_an_hdf5_file_of_rows_that_were_never_written_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    for name, options in {
        "chunks": {"chunks": (1000, 1024), "compression": "gzip"},
        "plain": {},
        "part": {"chunks": (1000, 1024)},
    }.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            made = file.create_dataset("features", (10**9, 1024), "f4", **options)
            file.create_dataset("indices", (10**9,), "i4", chunks=(10**6,))
            if name == "part":
                made[:1000] = 1
        if name != "part":
            assert (tmp_path / f"{name}.h5").stat().st_size < 5000
        assert "bytes of them were written" in import_in_a_minute(f"a={tmp_path}/{name}.h5", tmp_path / "made")


def test_an_analysis_cache_that_was_never_written_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "cache.h5", "w") as file:
        file.create_dataset("a/raw/batch_0", (10**9, 1024), "f4", chunks=(1000, 1024))
        file.create_dataset("dataset_indices/batch_0", (10**9,), "i4", chunks=(10**6,))
    assert "bytes of them were written" in import_in_a_minute(f"{tmp_path}/cache.h5", tmp_path / "made")


@pytest.mark.parametrize(
    "made",
    [
        {"features": np.ones((5, 4), np.float32), "indices": np.array(["a"] * 5, "S1")},
        {"features/inner": np.ones(3), "indices": np.arange(5)},
        {"features": np.ones((5, 4), np.float32), "indices/inner": np.arange(5)},
        {"dataset_indices/one": np.arange(5), "a/raw/one": np.ones((5, 4))},
        {"dataset_indices": np.arange(5), "a/raw/batch_0": np.ones((5, 4))},
        {"dataset_indices/batch_0": np.arange(5), "a/raw": np.ones((5, 4))},
        {"dataset_indices/batch_0": np.arange(5), "a": np.ones((5, 4))},
        {"dataset_indices/batch_0": np.arange(5), "a/raw/batch_0": np.ones(5)},
        {"dataset_indices/batch_0": np.arange(5), "a/raw/batch_0/inner": np.ones(5)},
        {
            "dataset_indices/batch_0": np.arange(5),
            "dataset_indices/batch_1": np.arange(5),
            "a/raw/batch_0": np.ones((5, 4)),
        }
        | {"a/raw/batch_1": np.ones((5, 3))},
    ],
    ids=lambda made: ",".join(made),
)
def test_hdf5_files_of_another_build_are_refused(made, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, values in made.items():
            file[name] = values
    source = f"{tmp_path}/a.h5" if any(name.startswith("dataset_indices") for name in made) else f"a={tmp_path}/a.h5"
    error = raised(lambda: run_import(ImportArguments(source=[source], output=str(tmp_path / "made"))))
    assert isinstance(error, ValueError)
    assert is_users(error), repr(error)


def npz_tree(folder: Path) -> Path:
    (folder / "cat").mkdir(parents=True)
    return folder / "cat" / "image_dino.npz"


def test_npz_bombs_are_refused(tmp_path):
    packed = npz_tree(tmp_path / "zeros")
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("activation.npy", "w") as entry:
        np.lib.format.write_array_header_1_0(entry, {"descr": "<f4", "fortran_order": False, "shape": (100_000, 1024)})
        for _ in range(100):
            entry.write(bytes(4_096_000))
    assert packed.stat().st_size < 1 << 20
    assert "packing bomb" in import_in_a_minute(str(tmp_path / "zeros"), tmp_path / "made")
    claims = npz_tree(tmp_path / "claims")
    with zipfile.ZipFile(claims, "w") as archive, archive.open("activation.npy", "w") as entry:
        np.lib.format.write_array_header_1_0(entry, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 1024)})
        entry.write(bytes(4096))
    assert "cannot read" in import_in_a_minute(str(tmp_path / "claims"), tmp_path / "made")


@pytest.mark.parametrize("content", ["pipe", b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_files_that_are_no_npz_are_refused(content, tmp_path):
    file = npz_tree(tmp_path / "tree")
    os.mkfifo(file) if content == "pipe" else file.write_bytes(content)
    assert "image_dino.npz" in import_in_a_minute(str(tmp_path / "tree"), tmp_path / "made")


@pytest.mark.parametrize(
    "state",
    [
        [1, 2],
        {1: torch.ones(2)},
        {"a": 3},
        {"encoders.a.weight": torch.full((4, 3), float("nan"))},
        {"encoders.a.weight": torch.ones(4, 3).to_sparse()},
        {"encoders.a.weight": torch.ones(4, 3, dtype=torch.complex64)},
        {"encoders.a.weight": torch.ones(4)},
        {"encoders..weight": torch.ones(64, 3)},
        {"encoders.a.weight": torch.ones(64, 0)},
        {"model_state_dict": 3},
    ],
    ids=lambda state: str(state)[:40],
)
def test_checkpoints_with_odd_fields_are_refused(state, tmp_path):
    torch.save(state, tmp_path / "msae_checkpoint.pth")
    (tmp_path / "run_config.json").write_text(json.dumps(RUN | {"config_file_content": None}))
    error = raised(lambda: run_import(ImportArguments(source=[str(tmp_path)], output=str(tmp_path / "made"))))
    assert isinstance(error, ValueError)
    assert is_users(error), repr(error)
    assert not (tmp_path / "made").exists()
