"""Files from elsewhere: odd values are refused in one sentence, at once, and nothing else happens."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT, planted_features, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_features import features

from sparc_hf.codes import CodeTable, encode_features
from sparc_hf.features import FeatureDataset
from sparc_hf.plain_files import Taxonomy, checked, read_json, read_text, read_yaml
from sparc_hf.user_errors import is_users

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
    from sparc_hf.feature_columns import class_ids_per_row

    wrong = cli.Command("", "sparc_hf.command_arguments:CardArguments", lambda _: class_ids_per_row([["x"]]))
    monkeypatch.setitem(cli.COMMANDS, "card", wrong)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["card", "--model", "x"])
    ours = cli.Command("", "sparc_hf.command_arguments:CardArguments", lambda _: features().array("ears"))
    monkeypatch.setitem(cli.COMMANDS, "card", ours)
    assert cli.main(["card", "--model", "x"]) == 2
    assert "there is no stream `ears`" in capsys.readouterr().err
