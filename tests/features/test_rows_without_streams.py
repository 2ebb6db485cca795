"""Rows that lack some of their streams: stored as nulls, read as NaN, there and back in every way."""

import json
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from tiny_features import RECORDS, WIDTHS, arrays, assert_same

from sparc_hf.features.batches import FeatureBatches, StreamedBatches
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.parquet import write_parquet_split
from sparc_hf.features.shards import FORMAT_VERSION, MANIFEST_NAME
from sparc_hf.features.statistics import standardization_of
from sparc_hf.features.writer import FeatureWriter
from sparc_hf.files.atomic_files import CHECKSUM_FIELD

ROWS = 25
SHARD = 6


def masks() -> dict[str, np.ndarray]:
    """Which rows have which stream: first and last row of a shard, and all of one shard, lack one."""
    zeta, alpha = np.ones(ROWS, bool), np.ones(ROWS, bool)
    zeta[[0, 5, ROWS - 1]] = False
    alpha[[6, 7, 8, 9, 10, 11, 13]] = False
    return {"zeta": zeta, "alpha": alpha}


def incomplete(dtype: str = "float32") -> FeatureDataset:
    ids, text = [f"id{i}" for i in range(ROWS)], [f"text {i}" for i in range(ROWS)]
    return FeatureDataset.from_arrays(arrays(ROWS, dtype), streams=RECORDS, present=masks(), ids=ids, text=text)


def expected(stream: str, dtype: str = "float32") -> np.ndarray:
    rows = arrays(ROWS, dtype)[stream].astype(np.float32)
    rows[~masks()[stream]] = np.nan
    return rows


def assert_expected(features: FeatureDataset, rows: np.ndarray | slice = slice(None), dtype: str = "float32") -> None:
    for stream, mask in masks().items():
        np.testing.assert_array_equal(features.array(stream), expected(stream, dtype)[rows])
        np.testing.assert_array_equal(features.present(stream), mask[rows])
        assert features.array(stream).dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_in_memory_and_through_a_folder(tmp_path, dtype):
    features = incomplete(dtype)
    assert_expected(features, dtype=dtype)
    features.save(tmp_path / "set", rows_per_shard=SHARD)
    opened = FeatureDataset.load(tmp_path / "set")
    assert_expected(opened, dtype=dtype)
    assert_same(opened, features)
    assert opened.table.schema.field("zeta").type.value_type == getattr(pa, dtype)()
    manifest = json.loads((tmp_path / "set" / MANIFEST_NAME).read_text())
    assert (manifest["format_version"], manifest["rows_without"]) == (FORMAT_VERSION, {"zeta": 3, "alpha": 7})
    assert [shard.get("rows_without") for shard in manifest["shards"]] == [
        {"zeta": 2},
        {"alpha": 6},
        {"alpha": 1},
        None,
        {"zeta": 1},
    ]


def test_plain_datasets_shows_none(tmp_path):
    from datasets import load_dataset, load_from_disk

    incomplete().save(tmp_path / "set", rows_per_shard=SHARD)
    write_parquet_split(FeatureDataset.load(tmp_path / "set"), tmp_path / "pushed", "train")
    file = str(next((tmp_path / "pushed" / "data").glob("*.parquet")))
    for dataset in (
        load_from_disk(str(tmp_path / "set")),
        load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache")),
        FeatureDataset.load(tmp_path / "set").dataset,
    ):
        rows = dataset[:]
        for stream, mask in masks().items():
            assert [row is not None for row in rows[stream]] == mask.tolist()
        assert rows["zeta"][1] == arrays(ROWS)["zeta"][1].tolist()
        assert_expected(FeatureDataset.from_dataset(dataset, streams=RECORDS))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_slices_selections_and_splits(tmp_path, dtype):
    incomplete(dtype).save(tmp_path / "set", rows_per_shard=SHARD)
    features = FeatureDataset.load(tmp_path / "set")
    order = np.random.default_rng(0).permutation(ROWS)[:17]
    assert_expected(features.select(order), order, dtype)
    assert_expected(features.select(slice(3, 15)), slice(3, 15), dtype)
    assert_expected(features.select(order).select([3, -1, 5]), order[[3, -1, 5]], dtype)
    for part, rows in zip(features.split(10), (slice(10), slice(10, None)), strict=True):
        assert_expected(part, rows, dtype)
        part.save(tmp_path / f"part{rows.start}", rows_per_shard=4)
        assert_expected(FeatureDataset.load(tmp_path / f"part{rows.start}"), rows, dtype)
    for table in (features.table.slice(5, 12), pa.concat_tables([features.table.slice(5, 2), features.table[7:17]])):
        assert_expected(FeatureDataset(table, RECORDS), slice(5, 17), dtype)
    features.select(order).save(tmp_path / "set", overwrite=True)
    assert_expected(FeatureDataset.load(tmp_path / "set"), order, dtype)


def test_what_is_known_of_the_rows():
    features = incomplete()
    mask = masks()
    assert features.rows_without == {"zeta": 3, "alpha": 7}
    assert features.is_incomplete
    assert repr(features) == "FeatureDataset(25 rows; zeta 6, alpha 4; 3 lack zeta; 7 lack alpha)"
    np.testing.assert_array_equal(features.complete_rows(), np.flatnonzero(mask["zeta"] & mask["alpha"]))
    np.testing.assert_array_equal(features.complete_rows(["alpha"]), np.flatnonzero(mask["alpha"]))
    assert features.complete_rows([]).tolist() == list(range(ROWS))
    assert features.complete_rows().dtype == np.int64
    assert features.present("alpha", [13, 0, 6]).tolist() == [False, True, False]
    complete = features.select(features.complete_rows())
    assert not complete.is_incomplete
    assert complete.rows_without == {}
    assert not np.isnan(complete.array("zeta")).any()
    alone = features.select(np.flatnonzero(~mask["alpha"]))
    assert alone.rows_without == {"alpha": 7}
    assert len(alone.complete_rows()) == 0
    with pytest.raises(ValueError, match="no stream `beta`"):
        features.present("beta")


def test_complete_folders_stay_as_they_were(tmp_path):
    """Of version 1, and the same bytes whether or not a mask says that every row is there."""
    everywhere = {name: np.ones(ROWS, bool) for name in WIDTHS}
    FeatureDataset.from_arrays(arrays(ROWS), streams=RECORDS).save(tmp_path / "plain", rows_per_shard=SHARD)
    masked = FeatureDataset.from_arrays(arrays(ROWS), streams=RECORDS, present=everywhere)
    masked.save(tmp_path / "masked", rows_per_shard=SHARD)
    some = incomplete()
    some.select(some.complete_rows()).save(tmp_path / "chosen")
    for name in sorted(path.name for path in (tmp_path / "plain").iterdir()):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "masked" / name).read_bytes()
    for folder in ("plain", "chosen"):
        manifest = json.loads((tmp_path / folder / MANIFEST_NAME).read_text())
        assert manifest["format_version"] == 1
        assert "rows_without" not in manifest


def test_what_stood_in_missing_rows_is_not_kept(tmp_path):
    rows = arrays(ROWS)
    rows["alpha"][~masks()["alpha"]] = np.inf
    with np.errstate(all="raise"):
        features = FeatureDataset.from_arrays(rows, streams=RECORDS, present=masks())
    features.check_rows()
    assert np.isinf(rows["alpha"][6]).all()  # the caller's stay
    features.save(tmp_path / "one")
    incomplete().select(slice(None)).save(tmp_path / "two")
    stored = [FeatureDataset.load(tmp_path / name).table.column("alpha").combine_chunks() for name in ("one", "two")]
    assert stored[0].equals(stored[1])
    assert np.isfinite(np.asarray(stored[0].values)).all()


@pytest.mark.parametrize("stream", ["zeta", "alpha"])
def test_a_stream_that_no_row_has(tmp_path, stream):
    features = FeatureDataset.from_arrays(arrays(ROWS), streams=RECORDS, present={stream: np.zeros(ROWS, bool)})
    features.save(tmp_path / "set", rows_per_shard=SHARD)
    write_parquet_split(features, tmp_path / "pushed", "train")
    for opened in (FeatureDataset.load(tmp_path / "set"), FeatureDataset.load(tmp_path / "pushed")):
        assert opened.rows_without == {stream: ROWS}
        assert np.isnan(opened.array(stream)).all()
        assert opened.array(stream, [3, 1]).shape == (2, WIDTHS[stream])
        with pytest.raises(ValueError, match=f"`{stream}` cannot be standardised"):
            standardization_of(opened, stream)


def test_rows_without_any_stream_are_refused(tmp_path):
    nowhere = masks()
    nowhere["zeta"][7] = False
    with pytest.raises(ValueError, match=r"row 7 \(id 'id7'\) has none of the streams .*leave such rows out"):
        FeatureDataset.from_arrays(arrays(ROWS), streams=RECORDS, present=nowhere, ids=[f"id{i}" for i in range(ROWS)])
    with FeatureWriter(tmp_path / "set", RECORDS) as writer:
        writer.append(arrays(3))
        with pytest.raises(ValueError, match="row 10 has none of the streams"):
            writer.append(arrays(ROWS), present=nowhere)
        writer.append(arrays(1))
    assert len(FeatureDataset.load(tmp_path / "set")) == 4


@pytest.mark.parametrize(
    ("present", "words"),
    [
        ({"beta": np.ones(ROWS, bool)}, "names .'beta'., but the streams are"),
        ({"zeta": np.ones(ROWS - 1, bool)}, "`zeta` must be 25 true or false, one a row, but it is bool .24."),
        ({"zeta": np.ones(ROWS)}, "`zeta` must be 25 true or false, one a row, but it is float64 .25."),
    ],
)
def test_unusable_masks(tmp_path, present, words):
    with pytest.raises(ValueError, match=words):
        FeatureDataset.from_arrays(arrays(ROWS), streams=RECORDS, present=present)
    with pytest.raises(ValueError, match=words), FeatureWriter(tmp_path / "set", RECORDS) as writer:
        writer.append(arrays(ROWS), present=present)


def test_rows_that_are_there_are_checked_as_before():
    for value, words in ((np.nan, "a NaN or infinite"), (0, "only zeros")):
        rows = arrays(ROWS)
        rows["zeta"][[5, 9]] = value
        features = FeatureDataset.from_arrays(rows, streams=RECORDS, present=masks())
        with pytest.raises(ValueError, match=f"`zeta` has {words}.* in row 9;"):
            features.check_rows()
        with pytest.raises(ValueError, match=f"`zeta` has {words}.* in row 4;"):
            features.select([0, 6, 7, 8, 9]).check_rows()
    incomplete().check_rows(rows_at_once=4)


def test_null_numbers_in_rows_that_are_there_are_refused():
    from datasets import Dataset

    rows = {"zeta": [None, [1.0] * 6, [1.0] * 6], "alpha": [[1.0] * 4, [1.0, None, 1.0, 1.0], None]}
    with pytest.raises(ValueError, match="1 rows have nulls in place of numbers"):
        FeatureDataset.from_dataset(Dataset.from_dict(rows), streams=["zeta", "alpha"])


@pytest.mark.parametrize("kind", ["float32", "float64", "float16"])
def test_from_dataset_takes_none(kind):
    from datasets import Dataset, Features, List, Value

    rows = {
        name: [row.tolist() if there else None for row, there in zip(arrays(ROWS)[name], masks()[name], strict=True)]
        for name in WIDTHS
    }
    types = Features({name: List(Value(kind), length=width) for name, width in WIDTHS.items()})
    for dataset in (Dataset.from_dict(rows), Dataset.from_dict(rows, features=types)):
        features = FeatureDataset.from_dataset(dataset.select(range(1, ROWS)), streams=list(WIDTHS))
        for name in WIDTHS:
            np.testing.assert_array_equal(features.present(name), masks()[name][1:])
            np.testing.assert_allclose(features.array(name), expected(name)[1:], rtol=2e-3)
    nothing = Dataset.from_dict({"zeta": rows["zeta"][1:5], "alpha": [None] * 4})
    with pytest.raises(ValueError, match="`alpha` needs a column of float lists"):
        FeatureDataset.from_dataset(nothing, streams=list(WIDTHS))
    opened = FeatureDataset.from_dataset(nothing, streams=RECORDS)
    assert opened.rows_without == {"alpha": 4}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_writer_goes_on_where_it_was(tmp_path, dtype):
    with suppress(KeyError), FeatureWriter(tmp_path / "a", RECORDS, dtype=dtype) as writer:
        writer.append(arrays(ROWS), present=masks())
        raise KeyError("stopped")
    with FeatureWriter(tmp_path / "a", RECORDS, dtype=dtype) as writer:
        assert writer.rows_done == ROWS
        writer.append(arrays(ROWS), present={"alpha": masks()["alpha"]})
    features = FeatureDataset.load(tmp_path / "a")
    assert features.rows_without == {"zeta": 3, "alpha": 14}
    assert_expected(features.select(slice(ROWS)), dtype=dtype)
    rows = arrays(ROWS)
    rows["zeta"][9, 2] = np.nan
    with FeatureWriter(tmp_path / "b", RECORDS, rows_per_shard=SHARD) as writer:
        with pytest.raises(ValueError, match="NaN or infinite number in row 9"):
            writer.append(rows, present=masks())
        writer.append(arrays(ROWS), present=masks())
    assert_expected(FeatureDataset.load(tmp_path / "b"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pushed_and_opened_and_streamed(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("sparc_hf.features.parquet.ROWS_PER_GROUP", 5)
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    write_parquet_split(incomplete(dtype), tmp_path / "pushed", "train", file_bytes=1)
    assert len(list((tmp_path / "pushed" / "data").glob("*.parquet"))) == 5
    assert_expected(FeatureDataset.load(tmp_path / "pushed"), dtype=dtype)
    for shuffle_rows in {"float32": (0,), "float16": (10,)}[dtype]:
        batches = StreamedBatches(tmp_path / "pushed", batch_size=4, shuffle_rows=shuffle_rows)
        rows = {name: np.concatenate(parts) for name, parts in _columns(batches).items()}
        side_by_side = np.concatenate([expected("zeta", dtype), expected("alpha", dtype)], axis=1)
        streamed = np.concatenate([rows["zeta"], rows["alpha"]], axis=1)
        if shuffle_rows:
            side_by_side, streamed = (array[np.lexsort(array.T)] for array in (side_by_side, streamed))
        np.testing.assert_array_equal(streamed, side_by_side)


def _columns(batches) -> dict[str, list[np.ndarray]]:
    parts: dict[str, list[np.ndarray]] = {name: [] for name in WIDTHS}
    for batch in batches:
        for name, rows in batch.items():
            parts[name].append(rows.numpy())
    return parts


def test_batches_of_missing_rows_are_nan():
    batches = FeatureBatches(incomplete(), batch_size=8, seed=3)
    for number, batch in enumerate(batches):
        rows = np.random.default_rng([3, 0]).permutation(ROWS)[number * 8 : number * 8 + 8]
        for name in WIDTHS:
            np.testing.assert_array_equal(batch[name].numpy(), expected(name)[rows])


def test_statistics_are_of_rows_that_are_there():
    there = arrays(ROWS)["zeta"][masks()["zeta"]].astype(np.float64)
    figures = standardization_of(incomplete(), "zeta")
    assert figures["mean"] == pytest.approx(there.mean())
    assert figures["std"] == pytest.approx(there.std(ddof=1))
    channels = standardization_of(incomplete(), "zeta", per_channel=True)
    np.testing.assert_allclose(channels["std"], there.std(axis=0, ddof=1))


def test_damage_and_newer_formats(tmp_path):
    incomplete().save(tmp_path / "set", rows_per_shard=SHARD)
    file = tmp_path / "set" / MANIFEST_NAME
    content = json.loads(file.read_text())
    content.pop(CHECKSUM_FIELD)
    for change, words in (
        ({"rows_without": {"zeta": 2}}, "rows that lack a stream should be .'zeta': 2., but they are"),
        ({"rows_without": {"zeta": "some"}}, "whole number"),
        ({"format_version": FORMAT_VERSION + 1}, "upgrade"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=words):
            FeatureDataset.load(tmp_path / "set")


@pytest.mark.parametrize(("version", "rows_without"), [(1, {}), (2, {"zeta": 1, "alpha": 2})])
def test_a_frozen_dataset_of_every_format_opens(version, rows_without):
    features = FeatureDataset.load(ROOT / "tests" / "frozen" / f"features_{version}")
    rng = np.random.default_rng(7)
    rows = {"zeta": rng.standard_normal((5, 3)).astype("f4"), "alpha": rng.standard_normal((5, 2)).astype("f2")}
    if version == 2:
        rows["zeta"][2], rows["alpha"][[0, 4]] = np.nan, np.nan
    assert features.rows_without == rows_without
    for name, expected_rows in rows.items():
        np.testing.assert_array_equal(features.array(name), expected_rows)
    assert (features.ids, features.text) == ([f"id{i}" for i in range(5)], [f"text {i}" for i in range(5)])
    assert features.column("labels") == [[0], [], [1, 0], [1], []]
