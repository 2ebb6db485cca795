from pathlib import Path

import datasets
import numpy as np
import pytest
from tiny_features import RECORDS, WIDTHS, arrays, assert_same, features

from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.writer import FeatureWriter


def batch(start: int, stop: int, rows: int = 25) -> dict:
    made = features(rows)
    numbers = slice(start, stop)
    return {
        **{name: made.array(name, numbers) for name in WIDTHS},
        "id": made.column("id", numbers),
        "labels": made.column("labels", numbers),
    }


def writer(path: Path, **changes) -> FeatureWriter:
    return FeatureWriter(path, RECORDS, rows_per_shard=6, extra_columns=["id", "labels"], **changes)


def test_writer_equals_from_arrays(tmp_path):
    with writer(tmp_path / "set", label_names=["a", "b", "c"], source={"x": 1}) as out:
        for start in range(0, 25, 4):
            out.append(batch(start, min(start + 4, 25)))
        assert (out.rows_done, len(out)) == (24, 25)
    loaded = FeatureDataset.load(tmp_path / "set", verify=True)
    assert sorted(p.name for p in (tmp_path / "set").glob("*.arrow")) == [f"data-0000{i}.arrow" for i in range(5)]
    np.testing.assert_array_equal(loaded.array("alpha"), arrays()["alpha"])
    assert loaded.column("labels") == features().column("labels")
    assert (loaded.label_names, loaded.source) == (["a", "b", "c"], {"x": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert datasets.load_from_disk(str(tmp_path / "set")).num_rows == 25


def test_interrupted_writer_resumes(tmp_path):
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "set") as out:  # noqa: PT012
        out.append(batch(0, 14))
        raise KeyboardInterrupt
    assert not (tmp_path / "set").exists()
    with pytest.raises(ValueError, match=r"`source` differ.*delete"):
        writer(tmp_path / "set", source={"other": 1})
    # A killed process leaves half a shard under a temporary name, and a shard may be lost.
    (tmp_path / "set.partial" / "data-00003.arrow.tmp").write_bytes(b"half")
    last = tmp_path / "set.partial" / "data-00002.arrow"
    last.write_bytes(last.read_bytes()[:-9])
    with writer(tmp_path / "set") as out:
        assert out.rows_done == 12
        out.append(batch(12, 25))
    with writer(tmp_path / "straight") as out:
        out.append(batch(0, 25))
    resumed, straight = (FeatureDataset.load(tmp_path / name, verify=True) for name in ("set", "straight"))
    assert_same(resumed, straight)


def test_writer_refuses_bad_batches_and_keeps_the_rest(tmp_path):
    out = writer(tmp_path / "set")
    out.append(batch(0, 3))
    good = batch(3, 6)
    nan = good["zeta"].copy()
    nan[1, 2] = np.nan
    for change, words in [
        ({"zeta": good["zeta"][:, :5]}, r"\[rows, 6\]"),
        ({"zeta": nan}, "NaN or infinite number in row 4"),
        ({"zeta": good["zeta"][:2]}, "same number of rows"),
        ({"labels": [["x"], [], []]}, "column `labels`"),
        ({"extra": [1, 2, 3]}, r"not expected are \['extra'\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            out.append({**good, **change})
    assert len(out) == 3
    out.append(good)
    out.close()
    np.testing.assert_array_equal(FeatureDataset.load(tmp_path / "set").array("zeta"), arrays()["zeta"][:6])
    with pytest.raises(ValueError, match="already holds"):
        writer(tmp_path / "set")


def test_writer_settings(tmp_path):
    with pytest.raises(ValueError, match="need a type"):
        FeatureWriter(tmp_path / "set", RECORDS, extra_columns=["colour"])
    with pytest.raises(ValueError, match="name of a stream"):
        FeatureWriter(tmp_path / "set", RECORDS, extra_columns={"zeta": datasets.Value("int32")})
    half = FeatureWriter(tmp_path / "half", {"a": {"hidden_size": 2}}, dtype="float16")
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        half.append({"a": np.full((1, 2), 1e6)})
    with pytest.raises(ValueError, match="no rows"):
        half.close()
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "foreign.txt").write_text("x")
    with pytest.raises(ValueError, match="in the way"):
        FeatureWriter(tmp_path / "x", RECORDS)
