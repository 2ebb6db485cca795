"""Code tables in memory and on disk, and the top samples of their latents."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import planted_features, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_hf.codes import CodeTable, encode_features
from sparc_hf.top_samples import top_samples, write_top_samples


def small_table() -> CodeTable:
    return CodeTable.from_arrays(
        {"a": np.array([[3, 1], [0, 2]])}, {"a": np.array([[0.0, 2.0], [1.0, 3.0]])}, 4, "joint"
    )


def test_encoding_a_dataset_equals_encoding_its_rows():
    features = planted_features(50)
    model = tiny_model(3)
    joint = encode_features(model, features, batch_size=16)
    single = encode_features(model, features, encoding="single")
    rows = {name: torch.from_numpy(features.array(name)) for name in features.stream_names}
    for name, code in model.encode(rows).items():
        np.testing.assert_allclose(joint.csr(name).toarray(), code.to_dense().detach().numpy(), rtol=1e-5)
        assert joint.indices(name).dtype == np.int32
        alone = model.encode({name: rows[name]})[name].to_dense().detach().numpy()
        np.testing.assert_allclose(single.csr(name).toarray(), alone, rtol=1e-5)


def test_reading_a_table_as_csr_leaves_it_as_it_is():
    table = small_table()
    for _ in range(2):
        assert table.csr("a").toarray().tolist() == [[0, 2, 0, 0], [1, 0, 3, 0]]
    assert table.indices("a").tolist() == [[3, 1], [0, 2]]
    assert table.values("a").tolist() == [[0, 2], [1, 3]]
    assert table.rows(1, 9).csr("a").toarray().tolist() == [[1, 0, 3, 0]]
    assert table.rows(2, 2).csr("a").shape == (0, 4)
    with pytest.raises(ValueError, match="no stream `b`"):
        table.csr("b")


def test_streaming_to_disk_gives_the_same_table(tmp_path):
    model, features = tiny_model(2), planted_features(50)
    memory = encode_features(model, features, encoding="single", batch_size=16)
    memory.save(tmp_path / "saved", rows_per_shard=20)
    encode_features(model, features, encoding="single", batch_size=16, output=tmp_path / "streamed")
    for folder, shards in (("saved", 3), ("streamed", 1)):
        loaded = CodeTable.load(tmp_path / folder, verify=True)
        assert (loaded.streams, loaded.num_latents, loaded.encoding) == (["dino", "clip_img"], 64, "single")
        assert len(loaded) == 50
        assert len(list((tmp_path / folder).glob("data-*.arrow"))) == shards
        for name in loaded.streams:
            assert np.array_equal(loaded.indices(name), memory.indices(name))
            assert np.array_equal(loaded.values(name), memory.values(name))
    assert sorted(os.listdir(tmp_path)) == ["saved", "streamed"]

    from datasets import load_from_disk

    names = [f"{stream}_{kind}" for stream in ("dino", "clip_img") for kind in ("indices", "values")]
    assert load_from_disk(str(tmp_path / "saved")).column_names == names


def test_bad_input_never_touches_what_is_there(tmp_path):
    model, features = tiny_model(2), planted_features(50)
    small_table().save(tmp_path / "codes")
    with pytest.raises(ValueError, match="already holds a code table"):
        encode_features(model, features, output=tmp_path / "codes")
    broken = features.array("dino")
    broken[40] = np.nan
    broken = type(features).from_arrays({"dino": broken, "clip_img": features.array("clip_img")})
    with pytest.raises(ValueError, match="NaN"):
        encode_features(model, broken, batch_size=16, output=tmp_path / "codes", overwrite=True)
    assert os.listdir(tmp_path) == ["codes"]
    assert len(CodeTable.load(tmp_path / "codes")) == 2
    encode_features(model, features, output=tmp_path / "codes", overwrite=True)
    assert len(CodeTable.load(tmp_path / "codes")) == 50
    with pytest.raises(FileNotFoundError, match="is not a code table"):
        CodeTable.load(tmp_path)
    (tmp_path / "codes" / "data-00000.arrow").write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged"):
        CodeTable.load(tmp_path / "codes")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not a code table"):
        encode_features(model, features, output=tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


def test_encoding_errors():
    features = planted_features(50)
    with pytest.raises(ValueError, match="'both'"):
        encode_features(tiny_model(2), features, encoding="both")
    with pytest.raises(ValueError, match=r"needs the streams \['siglip', 'vit'\]"):
        encode_features(tiny_model(5), features)
    with pytest.raises(ValueError, match="must have the same streams"):
        CodeTable.from_arrays({"a": np.zeros((2, 1))}, {"b": np.zeros((2, 1))}, 4, "joint")
    with pytest.raises(ValueError, match=r"\(2, 1\) but values \(2, 2\)"):
        CodeTable.from_arrays({"a": np.zeros((2, 1))}, {"a": np.zeros((2, 2))}, 4, "joint")


def test_top_samples_by_hand():
    table = CodeTable.from_arrays(
        {"a": np.array([[0, 1], [0, 1], [0, 1], [0, 2]])},
        {"a": np.array([[1.0, 0.0], [2.0, 5.0], [2.0, 0.0], [2.0, 1.0]])},
        4,
        "joint",
    )
    for rows_at_once in (1, 3, 100):
        top = top_samples(table, 3, rows_at_once=rows_at_once)["a"]
        assert top.rows.tolist() == [[1, 2, 3], [1, -1, -1], [3, -1, -1], [-1, -1, -1]]
        assert top.values.tolist() == [[2, 2, 2], [5, 0, 0], [1, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="at least 1"):
        top_samples(table, 0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), rows=st.integers(1, 60), count=st.integers(1, 5), block=st.integers(1, 70))
def test_top_samples_equal_a_full_sort(seed, rows, count, block):
    draws = np.random.default_rng(seed)
    indices = np.stack([draws.permutation(8)[:3] for _ in range(rows)])
    values = draws.integers(0, 4, (rows, 3)).astype(np.float32)  # zeros and many ties
    table = CodeTable.from_arrays({"a": indices}, {"a": values}, 8, "single")
    top = top_samples(table, count, rows_at_once=block)["a"]
    dense = table.csr("a").toarray()
    for latent in range(8):
        order = np.argsort(-dense[:, latent], kind="stable")
        wanted = [row for row in order if dense[row, latent] > 0][:count]
        assert top.rows[latent].tolist() == wanted + [-1] * (count - len(wanted))
        assert top.values[latent, : len(wanted)].tolist() == dense[wanted, latent].tolist()


def test_top_samples_become_a_table(tmp_path):
    from pyarrow.parquet import read_table

    write_top_samples(top_samples(small_table(), 2), tmp_path / "top.parquet")
    found = read_table(tmp_path / "top.parquet").to_pylist()
    assert found[0] == {"stream": "a", "latent": 0, "rank": 1, "row": 1, "value": 1.0}
    assert [line["latent"] for line in found] == [0, 1, 2]
    assert os.listdir(tmp_path) == ["top.parquet"]


def test_top_samples_equal_the_earlier_cache(golden):
    """The label counts of the five strongest samples, where no tie decides which five."""
    latents, expected = np.load(golden / "metrics_latents.npz"), np.load(golden / "metrics_jaccard.npz")
    labelled = np.load(golden / "legacy" / "labels.npz")
    rows, labels = labelled["sample_indices"], labelled["labels_labelled_only"]
    for position, name in enumerate(("clip_img", "clip_txt", "dino")):
        dense = latents[f"global_cross.as_global.{name}"][rows]
        every = np.tile(np.arange(64), (len(dense), 1))
        top = top_samples(CodeTable.from_arrays({name: every}, {name: dense}, 64, "joint"), 5)[name]
        for latent in range(64):
            found = labels[top.rows[latent][top.rows[latent] >= 0]].sum(axis=0)
            assert np.array_equal(found, expected["global_cross.counts_top5"][latent, position]), latent


def test_the_manifest_says_what_the_table_is(tmp_path):
    small_table().save(tmp_path / "codes")
    facts = json.loads((tmp_path / "codes" / "sparc_codes.json").read_text())
    assert (facts["rows"], facts["streams"], facts["num_latents"], facts["encoding"]) == (2, ["a"], 4, "joint")


def test_codes_that_name_no_latent_of_the_model_are_refused():
    """Written past the end of an array, they would end the process."""
    for latents, values, words in (
        ([0, 9], [1, 1], "latents from 0 to 9 in stream `a`, but only 5"),
        ([0, 1], [1, np.nan], "codes of `a` .*NaN .* in row 0"),
    ):
        arrays = {"a": np.array([latents], np.int32)}, {"a": np.array([values], np.float32)}
        with pytest.raises(ValueError, match=words):
            CodeTable.from_arrays(*arrays, num_latents=5, encoding="single").csr("a")
