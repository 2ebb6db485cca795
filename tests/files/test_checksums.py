"""A flipped bit in any file that the package reads again is noticed when the folder is opened."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import planted_features, tiny_model
from test_training import arguments, assert_same_weights

from sparc_hf.codes.code_table import CodeTable, encode_features
from sparc_hf.codes.concepts import Concept, load_concepts, save_concepts
from sparc_hf.codes.top_samples import TOP_SAMPLES_FILE, top_samples, write_top_samples
from sparc_hf.evaluation.results import results_of_model
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.parquet import write_parquet_split
from sparc_hf.files.atomic_files import write_json
from sparc_hf.files.checked_reading import read_json
from sparc_hf.space.index import (
    CODES_FOLDER,
    COMPARED_FILES,
    FACTS_FILE,
    STATISTICS_FILE,
    SpaceIndex,
    open_index,
)
from sparc_hf.training.trainer import train

FLIPS = 40
pytestmark = pytest.mark.usefixtures("one_thread")


def flipped(path: Path, seed: int) -> None:
    whole = bytearray(path.read_bytes())
    bit = random.Random(seed).randrange(8 * len(whole))
    whole[bit // 8] ^= 1 << bit % 8
    path.write_bytes(whole)


def assert_noticed(path: Path, open_it, flips: int = FLIPS) -> None:
    """Flip one bit of a file, anywhere, and open what it belongs to; `flips` times with other bits."""
    whole = path.read_bytes()
    open_it()
    for seed in range(flips):
        flipped(path, seed)
        with pytest.raises(ValueError, match=r"damaged|version|cannot be read"):
            open_it()
    path.write_bytes(whole)
    open_it()


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "codes"
    made = encode_features(
        tiny_model(2),
        planted_features(50),
        output=folder,
        complete=lambda table, place: write_top_samples(top_samples(table, 3), place / TOP_SAMPLES_FILE),
    )
    assert len(made) == 50
    return folder


@pytest.mark.parametrize("file", ["data-00000.arrow", "sparc_codes.json", TOP_SAMPLES_FILE])
def test_code_tables(codes, file):
    assert_noticed(codes / file, lambda: CodeTable.load(codes))


def test_code_tables_unverified(codes, tmp_path):
    shutil.copytree(codes, tmp_path / "codes")
    whole = (codes / "data-00000.arrow").read_bytes()
    (tmp_path / "codes" / "data-00000.arrow").write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    CodeTable.load(tmp_path / "codes", verify=False)
    with pytest.raises(ValueError, match=r"data-00000\.arrow.*sparc encode --overwrite"):
        CodeTable.load(tmp_path / "codes")


@pytest.mark.parametrize("file", ["data-00000.arrow", "sparc_features.json"])
def test_feature_datasets(tmp_path, file):
    planted_features(50).save(tmp_path / "set")
    assert_noticed(tmp_path / "set" / file, lambda: FeatureDataset.load(tmp_path / "set"))


def test_parquet_features(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet_split(planted_features(50), tmp_path, "train")
    parquet, sums = tmp_path / "data/train-00000-of-00001.parquet", tmp_path / "data/train-checksums.json"
    assert_noticed(parquet, lambda: FeatureDataset.load(tmp_path))
    assert_noticed(sums, lambda: FeatureDataset.load(tmp_path))
    sums.unlink()  # as of a dataset that was pushed without: its pages have checksums
    whole = parquet.read_bytes()
    parquet.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    with pytest.raises(ValueError, match="damaged"):
        FeatureDataset.load(tmp_path)


def test_streamed_parquet(tmp_path):
    from sparc_hf.features.batches import StreamedBatches

    write_parquet_split(planted_features(50), tmp_path, "train")
    parquet = tmp_path / "data/train-00000-of-00001.parquet"
    assert sum(len(batch["dino"]) for batch in StreamedBatches(tmp_path, batch_size=20)) == 50
    whole = parquet.read_bytes()
    parquet.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    with pytest.raises(OSError, match="checksum"):
        list(StreamedBatches(tmp_path, batch_size=20))


def test_results_and_concepts(tmp_path):
    figures = {"headline": {"r1": {"value": 0.25, "low": 0, "high": 1}}, "reconstruction": {"nmse": {"a": {"a": 0.5}}}}
    results = {"dataset": "d", "rows": 7, "joint": figures, "single": figures}
    write_json(tmp_path / "results.json", {"models": {"run": results}})
    assert_noticed(tmp_path / "results.json", lambda: results_of_model(tmp_path / "results.json", "run"))
    save_concepts([Concept(3, "cat", 4.5, {"dino": 0.25})], tmp_path)
    assert_noticed(tmp_path / "concepts.json", lambda: load_concepts(tmp_path))


def test_the_index_of_the_space(tmp_path, caplog):
    """A damaged one is noticed, and made again where it is only a cache."""
    model, features = tiny_model(2), planted_features(100)
    whole = open_index(model, features, tmp_path)
    folder = whole.folder
    assert {path.name for path in folder.iterdir()} == {*COMPARED_FILES, CODES_FOLDER, FACTS_FILE}
    for name in (*COMPARED_FILES, FACTS_FILE, f"{CODES_FOLDER}/data-00000.arrow"):
        assert_noticed(folder / name, lambda: SpaceIndex(folder), flips=10)
    flipped(folder / STATISTICS_FILE, seed=1)
    again = open_index(model, features, tmp_path)
    assert all(np.array_equal(again.statistics[name], column, True) for name, column in whole.statistics.items())
    assert caplog.text.count("is damaged, and made again") == 1


def test_files_written_by_hand_have_no_checksum(tmp_path):
    (tmp_path / "mine.json").write_text('{"models": {"a": {"rows": 1}}}')
    assert read_json(tmp_path / "mine.json") == {"models": {"a": {"rows": 1}}}
    write_json(tmp_path / "ours.json", {"rows": 1})
    text = (tmp_path / "ours.json").read_text()
    assert json.loads(text)["rows"] == 1
    (tmp_path / "ours.json").write_text(text.replace('"rows": 1', '"rows": 2'))
    with pytest.raises(ValueError, match="if you changed it by hand, take out its last field, `file_sha256`"):
        read_json(tmp_path / "ours.json")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, planted_folder) -> Path:
    """A run with two checkpoints and no model, as after a kill."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(arguments(folder, planted_folder, checkpoint_every=10, eval_fraction=0.2))
    (folder / "model.safetensors").unlink()
    assert len(list((folder / "checkpoints").iterdir())) == 2
    return folder


CHECKPOINT_FILES = (
    *("model.safetensors", "optimizer.bin", "random_states_0.pkl"),
    *("schedule.pt", "loss_sums_0.pt", "trainer_state.json"),
)


def test_a_checkpoint_has_no_other_files(stopped):
    files = {file.name for file in (stopped / "checkpoints" / "step-00000020").iterdir()}
    assert files == set(CHECKPOINT_FILES)


@pytest.mark.parametrize("file", CHECKPOINT_FILES)
def test_checkpoints(stopped, file, caplog):
    from accelerate import Accelerator

    from sparc_hf.training.checkpoints import Checkpoints

    found = Checkpoints(stopped, Accelerator(cpu=True))
    path = stopped / "checkpoints" / "step-00000020" / file
    whole = path.read_bytes()
    for seed in range(FLIPS):
        flipped(path, seed)
        newest = found.newest_whole()
        assert newest is not None
        assert newest[0].name == "step-00000010"
        assert newest[1]["step"] == 10
        assert "step-00000020 is damaged" in caplog.text
        caplog.clear()
        path.write_bytes(whole)
    newest = found.newest_whole()
    assert newest is not None
    assert newest[1]["step"] == 20


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(stopped, tmp_path, planted_folder, caplog):
    shutil.copytree(stopped, tmp_path / "run")
    settings = {"checkpoint_every": 10, "eval_fraction": 0.2}
    flipped(tmp_path / "run/checkpoints/step-00000020/optimizer.bin", 1)
    train(arguments(tmp_path / "run", planted_folder, resume=True, **settings))
    assert "the one before it is taken" in caplog.text
    train(arguments(tmp_path / "whole", planted_folder, **settings))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2


def test_a_run_whose_checkpoints_are_all_damaged_says_so(stopped, tmp_path, planted_folder):
    shutil.copytree(stopped, tmp_path / "run")
    for folder in (tmp_path / "run/checkpoints").iterdir():
        flipped(folder / "model.safetensors", 1)
    settings = {"checkpoint_every": 10, "eval_fraction": 0.2, "resume": True}
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged \(the SHA-256 of .*--overwrite"):
        train(arguments(tmp_path / "run", planted_folder, **settings))
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000010")
    (tmp_path / "run/checkpoints/step-00000020/optimizer.bin").write_bytes(b"x" * 10)
    with pytest.raises(ValueError, match=r"optimizer\.bin` has 10 bytes instead of"):
        train(arguments(tmp_path / "run", planted_folder, no_verify=True, **settings))
