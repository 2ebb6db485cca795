"""HDF5 files of the earlier SPARC project as feature datasets."""

import hashlib
import json

import numpy as np
import pytest

from sparc_hf import FeatureDataset
from sparc_hf.cli.import_files import ImportArguments, run_import
from sparc_hf.legacy.hdf5_features import AnalysisCache, FeatureFiles
from sparc_hf.legacy.importing import import_features

h5py = pytest.importorskip("h5py")
WIDTHS = {"zeta": 6, "alpha": 4}


def write_files(folder, rows=50, **changes):
    """Files as the earlier extractor wrote them; `changes` replaces what one stream's file holds."""
    draws = np.random.default_rng(0)
    files = {}
    for name, width in WIDTHS.items():
        content = {
            "features": draws.standard_normal((rows, width)).astype(np.float32),
            "indices": np.arange(rows, dtype=np.int32),
        } | changes.get(name, {})
        files[name] = folder / f"{name}.h5"
        with h5py.File(files[name], "w", libver="latest") as file:
            for key, values in content.items():
                if values is not None:
                    chunks = (min(32, len(values)), values.shape[1]) if values.ndim == 2 else None
                    file.create_dataset(key, data=values, chunks=chunks, compression="gzip" if chunks else None)
    return files


def run(**settings):
    return run_import(ImportArguments(**settings))


def test_feature_files_of_the_earlier_code(golden, tmp_path):
    folder = golden / "legacy"
    features = run(source=[str(folder / "configs" / "config_tiny.json")], output=str(tmp_path / "made"), split="val")
    assert features.stream_names == ["dino", "clip_img", "clip_txt"]
    assert {record["normalize"] for record in features.streams} == {"l2"}
    names = {"dino": "dino", "clip_img": "clip_image", "clip_txt": "clip_text"}
    for stream, stem in names.items():
        with h5py.File(folder / "features" / f"{stem}_features_tiny.h5") as file:
            np.testing.assert_array_equal(features.array(stream), file["features"][:])
    assert features.ids == [str(number) for number in range(200)]
    FeatureDataset.load(tmp_path / "made", verify=True)


@pytest.mark.parametrize("name", ["analysis_cache_val.h5", "analysis_cache_retrieval_val.h5"])
def test_analysis_caches_hold_the_rows_that_the_model_saw(golden, tmp_path, name):
    folder = golden / "legacy"
    cache = folder / "results" / "msae_tiny_global_cross" / name
    features = run(source=[str(cache)], output=str(tmp_path / "made"))
    assert features.stream_names == ["dino", "clip_img", "clip_txt"]  # the file alone would give alphabetical order
    assert len(features) == 200
    assert features.ids == [str(number) for number in range(200)]
    with h5py.File(folder / "features" / "dino_features_tiny.h5") as file:
        raw = file["features"][:]
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(features.array("dino"), unit, atol=1e-6)


def test_streams_keep_their_order_and_take_what_is_known_of_them(tmp_path):
    files = write_files(tmp_path)
    features = run(
        source=[f"{name}={path}" for name, path in files.items()],
        output=str(tmp_path / "made"),
        encoders=["alpha=some/encoder:image:cls"],
        dtype="float16",
    )
    assert features.stream_names == ["zeta", "alpha"]
    assert features.streams[1] == {
        "name": "alpha",
        "encoder": "some/encoder",
        "modality": "image",
        "pooling": "cls",
        "hidden_size": 4,
        "normalize": "l2",
    }
    assert str(features.table.schema.field("zeta").type.value_type) == "halffloat"
    told = features.source["files"]["zeta"]
    digest = hashlib.sha256(files["zeta"].read_bytes()).hexdigest()
    assert told == {"file": "zeta.h5", "bytes": files["zeta"].stat().st_size, "sha256": digest}


def test_files_of_different_lengths(tmp_path):
    files = write_files(tmp_path, zeta={"features": np.ones((40, 6), np.float32), "indices": np.arange(40)})
    with pytest.raises(ValueError, match=r"zeta.h5` has 40 rows but `.*alpha.h5` has 50"):
        FeatureFiles(files)


def test_files_in_different_orders(tmp_path):
    indices = np.arange(50)
    indices[[30, 31]] = 31, 30
    files = write_files(tmp_path, alpha={"indices": indices})
    with pytest.raises(ValueError, match=r"row 30 has index 30 in `.*zeta.h5` but 31 in `.*alpha.h5`"):
        import_features(FeatureFiles(files), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_orders_are_compared_in_every_block(tmp_path, monkeypatch):
    monkeypatch.setattr("sparc_hf.legacy.hdf5_features.ROWS_AT_ONCE", 16)
    indices = np.arange(50)
    indices[49] = 7
    files = write_files(tmp_path, alpha={"indices": indices})
    with pytest.raises(ValueError, match="row 49 has index 49"):
        import_features(FeatureFiles(files), tmp_path / "made")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"indices": None}, "needs `indices`.*it has none"),
        ({"indices": np.arange(49)}, r"needs `indices`.*an array \[49\]"),
        ({"features": None}, "has no `features`"),
        ({"features": np.ones((50,), np.float32)}, "has no `features`"),
        ({"features": np.ones((50, 4), np.int64)}, "has no `features`"),
    ],
)
def test_files_of_another_layout(tmp_path, changes, words):
    files = write_files(tmp_path, alpha=changes)
    with pytest.raises(ValueError, match=words):
        FeatureFiles(files)


def test_a_row_that_is_not_a_number_is_named(tmp_path):
    rows = np.ones((50, 4), np.float32)
    rows[33, 2] = np.nan
    files = write_files(tmp_path, alpha={"features": rows})
    with pytest.raises(ValueError, match="`alpha` has a NaN or infinite number in row 33"):
        import_features(FeatureFiles(files), tmp_path / "made")
    assert not (tmp_path / "made").exists()


class StoppedError(Exception):
    pass


def test_a_stopped_import_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("sparc_hf.legacy.hdf5_features.ROWS_AT_ONCE", 8)
    files = write_files(tmp_path)
    import_features(FeatureFiles(files), tmp_path / "whole", rows_per_shard=10)
    original, read = FeatureFiles.blocks, []

    def blocks(self, start):
        for number, block in enumerate(original(self, start)):
            if not read and number == 4:
                read.append(start)
                raise StoppedError
            yield block

    monkeypatch.setattr(FeatureFiles, "blocks", blocks)
    with pytest.raises(StoppedError):
        import_features(FeatureFiles(files), tmp_path / "made", rows_per_shard=10)
    starts = []
    monkeypatch.setattr(FeatureFiles, "blocks", lambda self, start: starts.append(start) or original(self, start))
    made = import_features(FeatureFiles(files), tmp_path / "made", rows_per_shard=10)
    assert starts == [32]
    whole = FeatureDataset.load(tmp_path / "whole")
    for name in WIDTHS:
        np.testing.assert_array_equal(made.array(name), whole.array(name))
    assert made.ids == whole.ids


def write_cache(path, batches):
    with h5py.File(path, "w") as file:
        for number, rows in enumerate(batches):
            file[f"dataset_indices/batch_{number}"] = np.arange(rows) + 1000 * number
            for name, width in WIDTHS.items():
                file[f"{name}/raw/batch_{number}"] = np.full((rows, width), number + 1, np.float32)


def test_batches_of_a_cache_are_ordered_by_number(tmp_path):
    write_cache(tmp_path / "cache.h5", [3] * 11 + [2])
    features = run(source=[str(tmp_path / "cache.h5")], output=str(tmp_path / "made"))
    assert features.array("zeta")[:, 0].tolist() == [number + 1 for number in range(11) for _ in range(3)] + [12, 12]
    assert features.ids[-2:] == ["11000", "11001"]
    with AnalysisCache(tmp_path / "cache.h5") as cache:
        rest = list(cache.blocks(31))
    assert [block["id"] for block in rest] == [["10001", "10002"], ["11000", "11001"]]


def test_a_cache_that_lacks_rows(tmp_path):
    write_cache(tmp_path / "cache.h5", [3, 3])
    with h5py.File(tmp_path / "cache.h5", "a") as file:
        del file["alpha/raw/batch_1"]
    with pytest.raises(ValueError, match=r"`dataset_indices/batch_1` has 3 rows but `alpha/raw/batch_1` has 0"):
        AnalysisCache(tmp_path / "cache.h5")


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["nowhere"], "does not exist"),
        (["{here}"], "is none of these"),
        (["{here}/noise.h5"], "cannot read .*noise.h5"),
        (["{here}/zeta.h5"], "feature file of one stream"),
        (["zeta={here}/zeta.h5", "{here}/alpha.h5"], "several sources"),
        (["zeta={here}/zeta.h5", "zeta={here}/alpha.h5"], "its own name.*zeta"),
        (["{here}/config.json"], "train_stream_feature_files"),
        (["{here}/away.json"], "not all there"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path, sources, words):
    write_files(tmp_path)
    (tmp_path / "noise.h5").write_bytes(b"no HDF5 at all")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "away.json").write_text(json.dumps({"train_stream_feature_files": {"zeta": "a.h5"}}))
    with pytest.raises(ValueError, match=words):
        run(source=[source.format(here=tmp_path) for source in sources], output=str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_encoders_of_other_streams(tmp_path):
    sources = [f"{name}={path}" for name, path in write_files(tmp_path).items()]
    with pytest.raises(ValueError, match=r"\['dino'\], but the streams of the source are \['zeta', 'alpha'\]"):
        run(source=sources, output=str(tmp_path / "made"), encoders=["dino=a/b:image"])
