"""A stream record that no model could be trained on is refused wherever it comes in, in the same words."""

import json
from pathlib import Path

import numpy as np
import pytest

from sparc_hf import FeatureDataset, FeatureWriter, SparcConfig
from sparc_hf.cli import main
from sparc_hf.features.writer import RowSchema

GOOD = {"name": "dino", "hidden_size": 4}
STANDARDIZED = GOOD | {"normalize": "standardize", "mean": 0.0, "std": 1.0}
BAD_NAMES = ["values", "keys", "train", "type", "training", "a-b", "1st", "a.b", "a b", ""]
BAD_RECORDS = [
    5,
    {"hidden_size": 4},
    GOOD | {"name": 5},
    {"name": "dino"},
    *(GOOD | {"hidden_size": size} for size in (None, 0, -1, 4.0, True, "4", 2**31, np.int64(4))),
    *(GOOD | {"normalize": kind} for kind in (None, "max", "L2", 5, ["l2"], {})),
    *(GOOD | {key: "l2"} for key in ("normalise", "Normalize", "normalization")),
    GOOD | {"normalize": "standardize"},
    *(STANDARDIZED | {"mean": mean} for mean in (None, "0", True, [0.0] * 3, [], float("nan"), 1e39, 10**400)),
    *(STANDARDIZED | {"std": std} for std in (None, 0, [0.0] * 4, -1.0, [1.0, 1.0, -1.0, 1.0], float("inf"))),
    *(GOOD | {key: 5} for key in ("encoder", "revision", "modality", "pooling", "image_backend", "grid")),
    *(GOOD | {key: "x"} for key in ("grid", "image_size", "prefix_tokens")),
    GOOD | {"prefix_tokens": True},
    GOOD | {"source": Path("x")},
    GOOD | {"source": {1, 2}},
]


def config_words(streams) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 what it says is what the others are compared with
        SparcConfig(streams=streams)
    return str(error.value)


def assert_refused_alike(streams, tmp_path: Path) -> None:
    words = config_words(streams)
    makers = (
        lambda: RowSchema(streams, "float32"),
        lambda: FeatureWriter(tmp_path / "set", streams),
        lambda: FeatureDataset(features_table(streams), streams),
    )
    for make in makers:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            make()
        assert str(error.value) == words
    assert not list(tmp_path.glob("*.partial"))


def features_table(streams):
    names = [record.get("name") if isinstance(record, dict) else record for record in streams]
    made = FeatureDataset.from_arrays({f"s{place}": np.ones((2, 4), np.float32) for place in range(len(names))})
    return made.table.rename_columns([str(name) for name in names])


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_no_stream_may_have(tmp_path, name):
    assert_refused_alike([GOOD | {"name": name}], tmp_path)
    assert_refused_alike([GOOD, GOOD | {"name": name}], tmp_path)


@pytest.mark.parametrize("record", BAD_RECORDS)
def test_records_that_no_stream_may_have(tmp_path, record):
    assert_refused_alike([record], tmp_path)


def test_two_streams_of_one_name(tmp_path):
    assert_refused_alike([GOOD, GOOD], tmp_path)
    assert_refused_alike([GOOD, STANDARDIZED | {"name": "clip"}, GOOD], tmp_path)


def test_feature_files_need_a_stream(tmp_path):
    for make in (lambda: RowSchema([], "float32"), lambda: FeatureDataset(features_table([GOOD]), {})):
        with pytest.raises(ValueError, match="at least one stream"):
            make()
    assert SparcConfig(streams=[]).streams == []


def test_what_is_given_is_kept_and_left_as_it_was(tmp_path):
    given = [GOOD | {"grid": (2, 3), "encoder": None, "per_channel": True, "note": {"a": [1]}}]
    plain = [GOOD | {"grid": [2, 3], "encoder": None, "per_channel": True, "note": {"a": [1]}}]
    made = FeatureDataset(features_table(given), given)
    assert (made.streams, RowSchema(given, "float32").streams) == (plain, plain)
    assert SparcConfig(streams=made.streams).streams == [plain[0] | {"normalize": "none"}]
    assert given[0]["grid"] == (2, 3)
    assert given[0] | {"normalize": "none"} != given[0]


class RowsRead(BaseException):
    """Something was read or loaded; no `except Exception` hides it."""


@pytest.fixture
def untouched(monkeypatch):
    """Fail where an encoder is loaded, or a row or a checksum is read."""

    def begun(*_args, **_options):
        raise RowsRead

    monkeypatch.setattr("sparc_hf.encoders.stream_encoder.frozen_model", begun)
    monkeypatch.setattr("sparc_hf.legacy.hdf5_features.sha256_of", begun)
    monkeypatch.setattr("sparc_hf.legacy.hdf5_features.FeatureFiles.blocks", begun)
    monkeypatch.setattr("sparc_hf.legacy.hdf5_features.AnalysisCache.blocks", begun)
    monkeypatch.setattr("sparc_hf.legacy.npz_activations.ActivationTree._statistics", begun)


def refusal(capsys, *flags) -> str:
    """What a command says of flags it cannot use."""
    assert main([*map(str, flags)]) == 2
    return capsys.readouterr().err.splitlines()[-1].split(": ", 1)[1]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_the_extraction_command_refuses_a_name(tmp_path, capsys, untouched, name):
    words = config_words([GOOD | {"name": name}])
    flags = ["--source", tmp_path, "--output", tmp_path / "o", "--encoders"]
    assert refusal(capsys, "extract", *flags, f"{name}=demo:dino:image") == words
    assert refusal(capsys, "extract", *flags, "good=demo:dino:image", f"{name}=demo:dino:image") == words


def test_the_extraction_command_refuses_a_name_twice(tmp_path, capsys, untouched):
    flags = ["--source", tmp_path, "--output", tmp_path / "o", "--encoders", *["dino=demo:dino:image"] * 2]
    assert refusal(capsys, "extract", *flags) == config_words([GOOD, GOOD])


def write_hdf5(file: Path, content: dict) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(file, "w") as made:
        for key, values in content.items():
            made[key] = values
    return file


@pytest.mark.parametrize("name", BAD_NAMES)
def test_import_refuses_a_name(tmp_path, capsys, untouched, name):
    words = config_words([GOOD | {"name": name}])
    rows, numbers = np.ones((2, 4), np.float32), np.arange(2)
    file = write_hdf5(tmp_path / "rows.h5", {"features": rows, "indices": numbers})
    command = ["import", "--output", tmp_path / "o", "--source"]
    assert refusal(capsys, *command, f"good={file}", f"{name}={file}") == words
    (tmp_path / "run.json").write_text(json.dumps({"train_stream_feature_files": {name: str(file)}}))
    assert refusal(capsys, *command, tmp_path / "run.json") == words
    if name.isidentifier():
        assert refusal(capsys, *command, f"{name}={file}") == words
        cache = {"dataset_indices/batch_0": numbers, f"{name}/raw/batch_0": rows}
        assert refusal(capsys, *command, write_hdf5(tmp_path / "cache.h5", cache)) == words
        (tmp_path / "tree" / "class").mkdir(parents=True)
        np.savez(tmp_path / "tree" / "class" / "image_combined.npz", **{name: np.ones((5, 4), np.float32)})
        assert refusal(capsys, *command, tmp_path / "tree") == words


def test_import_refuses_a_name_twice(tmp_path, capsys, untouched):
    file = write_hdf5(tmp_path / "rows.h5", {"features": np.ones((2, 4), np.float32), "indices": np.arange(2)})
    flags = ["import", "--output", tmp_path / "o", "--source", f"dino={file}", f"dino={file}"]
    assert refusal(capsys, *flags) == config_words([GOOD, GOOD])
