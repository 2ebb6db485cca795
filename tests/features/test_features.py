import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import csr_array
from tiny_features import RECORDS, arrays, assert_same, features

from sparc_hf.features.dataset import FeatureDataset


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    features().save(tmp_path / "set", rows_per_shard=10)
    return tmp_path / "set"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip(tmp_path, dtype):
    made = features(dtype=dtype)
    made.save(tmp_path / "set", rows_per_shard=10)
    loaded = FeatureDataset.load(tmp_path / "set", verify=True)
    assert_same(made, loaded)
    assert loaded.stream_names == ["zeta", "alpha"]
    assert loaded.array("zeta").dtype == np.float32
    assert loaded.table.schema.field("alpha").type == pa.list_(pa.float16() if dtype == "float16" else pa.float32(), 4)
    assert not list(tmp_path.glob("*.saving"))


def test_folder_opens_with_datasets(saved):
    table = datasets.load_from_disk(str(saved))
    assert table.features["zeta"] == datasets.List(datasets.Value("float32"), length=6)
    assert table.features["labels"] == datasets.List(datasets.Value("int32"))
    np.testing.assert_array_equal(np.array(table["zeta"][:]), arrays()["zeta"])
    assert_same(
        FeatureDataset.load(saved),
        FeatureDataset.from_dataset(
            table, streams=RECORDS, **{k: getattr(features(), k) for k in ("label_names", "taxonomy", "source")}
        ),
    )


def test_array_select_split_and_columns():
    made, plain = features(), arrays()["zeta"]
    np.testing.assert_array_equal(made.array("zeta", [3, 0, 3, -1]), plain[[3, 0, 3, -1]])
    part = made.select([5, 2, 9]).select([2, 0])
    np.testing.assert_array_equal(part.array("zeta"), plain[[9, 5]])
    assert (part.ids, part.text, len(part)) == (["id9", "id5"], ["text 9", "text 5"], 2)
    assert part.dataset["id"][:] == ["id9", "id5"]
    train, rest = made.split(0.8)
    assert (len(train), len(rest), rest.ids[0]) == (20, 5, "id20")
    assert len(made.split(7)[0]) == 7
    with pytest.raises(ValueError, match="no stream `beta`"):
        made.array("beta")
    with pytest.raises(ValueError, match="0 to 24"):
        made.select([25])
    with pytest.raises(ValueError, match="both sides"):
        made.split(25)


def test_array_is_writable_and_its_own(saved):
    loaded = FeatureDataset.load(saved)
    loaded.array("zeta")[:] = 0
    loaded.array("zeta", [0])[:] = 0
    np.testing.assert_array_equal(loaded.array("zeta"), arrays()["zeta"])


def test_selected_rows_are_what_is_saved(tmp_path):
    part = features().select([7, 1, 20])
    part.save(tmp_path / "part", rows_per_shard=2)
    assert_same(part, FeatureDataset.load(tmp_path / "part", verify=True))


def test_many_chunks_and_foreign_indices(tmp_path):
    table = pa.concat_tables([features().table.slice(start, 3) for start in range(0, 25, 3)])
    many = datasets.Dataset(table)
    order = [24, 0, 13, 13]
    chunked = FeatureDataset.from_dataset(many, streams=["alpha", "zeta"])
    assert chunked.stream_names == ["alpha", "zeta"]
    np.testing.assert_array_equal(chunked.array("alpha", order), arrays()["alpha"][order])
    picked = FeatureDataset.from_dataset(many.select(order))
    np.testing.assert_array_equal(picked.array("zeta"), arrays()["zeta"][order])


def test_parquet_and_variable_lists_become_fixed(tmp_path):
    rows = arrays()
    plain = datasets.Dataset.from_dict({name: values.tolist() for name, values in rows.items()})
    plain.to_parquet(str(tmp_path / "set.parquet"))
    table = datasets.Dataset.from_parquet(str(tmp_path / "set.parquet"), cache_dir=str(tmp_path / "cache"))
    made = FeatureDataset.from_dataset(table, streams=["zeta", "alpha"])
    np.testing.assert_array_equal(made.array("zeta"), rows["zeta"])
    made.save(tmp_path / "set")
    assert datasets.load_from_disk(str(tmp_path / "set")).features["zeta"].length == 6
    with pytest.raises(ValueError, match="name the columns with `streams`"):
        FeatureDataset.from_dataset(table)
    ragged = datasets.Dataset.from_dict({"x": [[1.0, 2.0], [1.0]]})
    with pytest.raises(ValueError, match="lists of 2 floats in every row"):
        FeatureDataset.from_dataset(ragged, streams=["x"])


def test_labels(tmp_path):
    lists = features().labels_csr()
    assert isinstance(lists, csr_array)
    assert lists.shape == (25, 3)
    assert lists[[5]].toarray().tolist() == [[0, 0, 1]]  # 5 % 3 == 2, given twice, counts once
    dense = lists.toarray()
    again = FeatureDataset.from_arrays(arrays(), labels=dense, label_names=["a", "b", "c"])
    np.testing.assert_array_equal(again.labels_csr().toarray(), dense)
    np.testing.assert_array_equal(again.select([3, 1]).labels_csr().toarray(), dense[[3, 1]])
    with pytest.raises(ValueError, match="no `labels` column"):
        FeatureDataset.from_arrays(arrays()).labels_csr()
    with pytest.raises(ValueError, match="only hold 0 and 1"):
        FeatureDataset.from_arrays(arrays(), labels=dense * 2)
    with pytest.raises(ValueError, match="from 0 to 1"):
        FeatureDataset.from_arrays(arrays(2), labels=[[0], [2]], label_names=["a", "b"]).labels_csr()


@pytest.mark.parametrize(("value", "words"), [(np.nan, "NaN"), (np.inf, "NaN"), (0, "only zeros")])
def test_check_rows_names_stream_and_row(value, words):
    bad = arrays()
    bad["alpha"][17] = value
    ids = [f"id{i}" for i in range(25)]
    with pytest.raises(ValueError, match=rf"`alpha` has .*{words}.* in row 17 \(id 'id17'\)"):
        FeatureDataset.from_arrays(bad, ids=ids).check_rows(rows_at_once=4)


def test_check_rows_accepts_numbers_whose_squares_do_not_fit():
    good = arrays()
    good["zeta"][3], good["zeta"][4] = 1e30, 1e-30
    FeatureDataset.from_arrays(good).check_rows()


def test_bad_arrays_and_records():
    with pytest.raises(ValueError, match="same number of rows"):
        FeatureDataset.from_arrays({"a": np.ones((3, 2)), "b": np.ones((4, 2))})
    with pytest.raises(ValueError, match=r"\[rows, hidden_size\]"):
        FeatureDataset.from_arrays({"a": np.ones(3)})
    with pytest.raises(ValueError, match="identifier"):
        FeatureDataset.from_arrays({"a-b": np.ones((3, 2))})
    with pytest.raises(ValueError, match="`hidden_size` 3"):
        FeatureDataset.from_arrays({"a": np.ones((3, 2))}, streams=[{"name": "a", "hidden_size": 3}])
    with pytest.raises(ValueError, match="records are for"):
        FeatureDataset.from_arrays({"a": np.ones((3, 2))}, streams={"b": {}})


def test_damage_is_found(saved):
    shard = saved / "data-00001.arrow"
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(arrays()["zeta"][10:20].tobytes()) + 5] ^= 1
    shard.write_bytes(flipped)
    FeatureDataset.load(saved, verify=False)  # a flipped bit needs the checksum
    with pytest.raises(ValueError, match=r"data-00001\.arrow.*SHA-256.*--repair"):
        FeatureDataset.load(saved)
    shard.write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=r"data-00001\.arrow.*bytes instead of"):
        FeatureDataset.load(saved)
    shutil.copy(saved / "data-00002.arrow", shard)
    with pytest.raises(ValueError, match=r"data-00001\.arrow.*damaged"):
        FeatureDataset.load(saved)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"data-00001\.arrow"):
        FeatureDataset.load(saved)


def change_manifest(folder: Path, **changes: object) -> None:
    file = folder / "sparc_features.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_unusable_folders(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        FeatureDataset.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="not a feature dataset"):
        FeatureDataset.load(tmp_path)
    change_manifest(saved, rows=26)
    with pytest.raises(ValueError, match="26 rows, but its shards have 25"):
        FeatureDataset.load(saved)
    change_manifest(saved, format_version=3)
    with pytest.raises(ValueError, match=r"format version 3.*upgrade"):
        FeatureDataset.load(saved)
    (saved / "sparc_features.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        FeatureDataset.load(saved)


def test_overwriting_needs_permission_and_spares_other_folders(saved, tmp_path):
    loaded = FeatureDataset.load(saved)
    with pytest.raises(ValueError, match="overwrite"):
        loaded.save(saved)
    loaded.select([1, 2]).save(saved, overwrite=True)  # over the files it is mapped from
    assert FeatureDataset.load(saved, verify=True).ids == ["id1", "id2"]
    assert loaded.ids[24] == "id24"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not a feature dataset"):
        loaded.save(tmp_path / "home", overwrite=True)


def test_buffers_off_their_boundary_are_read(tmp_path):
    values = arrays()["zeta"]
    shifted = pa.py_buffer(b"x" + values.tobytes()).slice(1)
    flat = pa.Array.from_buffers(pa.float32(), values.size, [None, shifted])
    column = pa.chunked_array([pa.FixedSizeListArray.from_arrays(flat, 6), pa.FixedSizeListArray.from_arrays(flat, 6)])
    made = FeatureDataset(pa.table({"zeta": column}), RECORDS[:1])
    np.testing.assert_array_equal(made.array("zeta", [30, 2]), values[[5, 2]])


def test_import_is_light():
    code = "import sys, sparc_hf.features.dataset; assert not {'datasets', 'pandas', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
