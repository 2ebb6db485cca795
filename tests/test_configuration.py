"""What a config takes and what it refuses, from Python and from a file."""

import contextlib
import json

import pytest
import torch
from transformers import AutoConfig, AutoModel

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.cli import main


def test_streams_keep_their_order_through_json(tmp_path):
    config = SparcConfig(streams={"zeta": {"hidden_size": 4}, "alpha": {"hidden_size": 6, "normalize": "l2"}})
    config.save_pretrained(tmp_path)
    for loaded in (SparcConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, SparcConfig)
        assert loaded.streams == config.streams
        assert loaded.stream_names == ["zeta", "alpha"]
        assert loaded.hidden_sizes == {"zeta": 4, "alpha": 6}


def test_paper_settings_are_the_defaults():
    config = SparcConfig()
    assert (config.num_latents, config.k, config.auxk, config.dead_after_steps) == (8192, 64, 64, 1000)
    assert (config.auxk_coef, config.cross_coef, config.dead_threshold) == (1 / 32, 1.0, 1e-3)
    assert (config.selection, config.objective) == ("global", "sparc")


def test_records_and_dict_are_the_same_and_left_untouched():
    records = [{"name": "dino", "hidden_size": 4}]
    config = SparcConfig(streams=records)
    assert config.streams == SparcConfig(streams={"dino": {"hidden_size": 4}}).streams
    assert records == [{"name": "dino", "hidden_size": 4}]


def test_unknown_keys_of_a_record_are_kept():
    config = SparcConfig(streams={"dino": {"hidden_size": 4, "encoder": "facebook/dinov2-base", "grid": [16, 16]}})
    assert config.stream("dino")["grid"] == [16, 16]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": 100, "num_latents": 64}, ["`k` is 100", "`num_latents` is 64"]),
        ({"auxk": 100, "num_latents": 64}, ["`auxk` is 100", "64"]),
        ({"k": 0}, ["`k`", "0"]),
        ({"num_latents": 0, "k": 0, "auxk": 0}, ["`num_latents`", "0"]),
        ({"cross_coef": -1.0}, ["`cross_coef`", "-1.0"]),
        ({"format_version": 99}, ["format_version", "99", "upgrade"]),
        ({"streams": {"a.b": {"hidden_size": 4}}}, ["a.b", "identifier"]),
        ({"streams": {"train": {"hidden_size": 4}}}, ["train"]),
        ({"streams": {"keys": {"hidden_size": 4}}}, ["keys"]),
        ({"streams": {"dino": {}}}, ["dino", "hidden_size"]),
        ({"streams": {"dino": {"hidden_size": 0}}}, ["dino", "0"]),
        ({"streams": {"dino": {"hidden_size": 4, "normalize": "max"}}}, ["dino", "max", "standardize"]),
        ({"streams": {"dino": {"hidden_size": 4, "normalize": "standardize"}}}, ["dino", "mean"]),
        (
            {"streams": {"dino": {"hidden_size": 4, "normalize": "standardize", "mean": [0.0] * 3, "std": 1.0}}},
            ["dino", "4 numbers", "3 values"],
        ),
        ({"streams": [{"name": "dino", "hidden_size": 4}] * 2}, ["dino", "more than once"]),
    ],
)
def test_contradictions_are_value_errors_that_name_them(settings, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the words are checked below
        SparcConfig(**settings)
    for word in words:
        assert word in str(error.value)


def test_a_wrong_type_is_refused():
    with pytest.raises(Exception, match="num_latents"):
        SparcConfig(num_latents="many")


def test_unknown_stream():
    with pytest.raises(ValueError, match=r"no stream `clip`; the streams are \['dino'\]"):
        SparcConfig(streams={"dino": {"hidden_size": 4}}).stream("clip")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_latents": 10**12}, ["`num_latents`", "2147483647"]),
        ({"dead_after_steps": 2**63}, ["`dead_after_steps`"]),
        ({"format_version": 0}, ["`format_version`"]),
        ({"auxk_coef": float("nan")}, ["`auxk_coef`", "finite", "nan"]),
        ({"cross_coef": float("inf")}, ["`cross_coef`", "inf"]),
        ({"dead_threshold": -1e-3}, ["`dead_threshold`", "-0.001"]),
        ({"streams": [5]}, ["stream record", "5"]),
        ({"streams": {"dino": 5}}, ["stream record", "5"]),
        ({"streams": {"dino": {"hidden_size": 2**40}}}, ["dino", "2147483647"]),
        ({"streams": {"dino": {"hidden_size": 4, "normalise": "l2"}}}, ["dino", "`normalise`", "`normalize`"]),
        ({"streams": {"dino": {"hidden_size": 4, "Normalization": "l2"}}}, ["`Normalization`"]),
        ({"streams": {"dino": {"hidden_size": 4, "encoder": 5}}}, ["dino", "`encoder`", "text"]),
        ({"streams": {"dino": {"hidden_size": 4, "grid": 14}}}, ["dino", "`grid`", "list"]),
    ],
)
def test_impossible_values_are_value_errors_that_name_them(settings, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the words are checked below
        SparcConfig(**settings)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("std", 0, "`std` of stream `dino` is 0"),
        ("std", [0.0] * 4, "`std` of stream `dino` is 0"),
        ("std", -1.0, "not negative, but it holds -1.0"),
        ("std", [1.0, 1.0, -0.5, 1.0], "not negative, but it holds -0.5"),
        ("std", float("nan"), "finite.*nan"),
        ("mean", [0.0, float("inf"), 0.0, 0.0], "`mean` of stream `dino` must be finite, but it holds inf"),
        ("mean", 1e39, "finite"),
        ("mean", 10**400, "finite"),
        ("mean", True, "another type"),
    ],
)
def test_statistics_that_nothing_can_be_divided_by(field, value, words):
    record = {"hidden_size": 4, "normalize": "standardize", "mean": 0.0, "std": 1.0} | {field: value}
    with pytest.raises(ValueError, match=words):
        SparcConfig(streams={"dino": record})


def test_a_channel_that_did_not_vary_becomes_zero_in_every_row():
    record = {"hidden_size": 3, "normalize": "standardize", "mean": [1.0, 2.0, 3.0], "std": [2.0, 0.0, 1.0]}
    model = SparcModel(SparcConfig(streams={"dino": record}, num_latents=8, k=2, auxk=2))
    rows = model.normalize({"dino": torch.tensor([[1.0, 2.0, 3.0], [5.0, 7.0, 3.0]])})["dino"]
    torch.testing.assert_close(rows, torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]), rtol=1e-4, atol=1e-6)


ODD = [None, True, -1, 1.5, float("nan"), float("inf"), "64", "", [], [1], [None], {}, {"a": 1}, 10**12, 2**63, 10**30]
OWN_KEYS = ["auxk", "auxk_coef", "cross_coef", "dead_after_steps", "dead_threshold", "distance", "format_version", "k"]
OWN_KEYS += ["num_latents", "objective", "selection", "streams", "model_type", "dtype", "auto_map"]
LOADERS_KEYS = ["attn_implementation", "fusion_config", "id2label", "num_labels", "quantization_config"]
LOADERS_KEYS += ["sub_configs", "transformers_weights"]
RECORD_KEYS = ["name", "hidden_size", "normalize", "mean", "std", "encoder", "revision", "modality", "pooling", "grid"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model, its config.json, and rows with their codes."""
    folder = tmp_path_factory.mktemp("odd")
    record = {"hidden_size": 6, "normalize": "standardize", "mean": 0.5, "std": 2.0}
    config = SparcConfig(streams={"dino": record}, num_latents=16, k=3, auxk=3)
    torch.manual_seed(0)
    model = SparcModel(config).eval()
    model.save_pretrained(folder)
    rows = {"dino": torch.randn(5, 6)}
    return folder, json.loads((folder / "config.json").read_text()), rows, model.encode(rows)["dino"].to_dense()


def assert_refused_or_the_same(saved, content, may_differ=()) -> None:
    folder, _, rows, codes = saved
    (folder / "config.json").write_text(content)
    found = codes
    with contextlib.suppress(ValueError, OSError):
        found = SparcModel.from_pretrained(folder).encode(rows)["dino"].to_dense()
    assert may_differ or torch.equal(found, codes)


@pytest.mark.parametrize("key", [*OWN_KEYS, *LOADERS_KEYS])
def test_odd_values_in_a_config_file_are_refused_or_change_nothing(saved, key):
    for value in ODD:
        content = json.dumps(saved[1] | {key: value})
        assert_refused_or_the_same(saved, content)


@pytest.mark.parametrize("key", RECORD_KEYS)
def test_odd_values_in_a_stream_record_are_refused_or_change_nothing(saved, key):
    for value in ODD:
        content = json.dumps(saved[1] | {"streams": [saved[1]["streams"][0] | {key: value}]})
        # Another mean or deviation is another model.
        assert_refused_or_the_same(saved, content, may_differ=key in ("mean", "std"))


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "5", "", "{", "\0", "[" * 100_000, '\ufeff{"k": 3}'])
def test_a_config_file_that_holds_no_settings(saved, content):
    (saved[0] / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=r"JSON"):
        SparcModel.from_pretrained(saved[0])


@pytest.mark.parametrize("change", [{"normalize": None}, {"normalize": "l2 "}, {"normalise": "l2"}])
def test_a_stream_record_that_lost_its_normalize_is_refused(saved, change):
    record = {key: value for key, value in saved[1]["streams"][0].items() if key != "normalize"} | change
    record = {key: value for key, value in record.items() if value is not None}
    (saved[0] / "config.json").write_text(json.dumps(saved[1] | {"streams": [record]}))
    for load in (SparcModel, AutoModel, SparcConfig, AutoConfig):
        with pytest.raises(ValueError, match=r"stream `dino`.*normali"):
            load.from_pretrained(saved[0])


def test_a_config_goes_through_a_dict(saved):
    config = SparcConfig(streams={"dino": {"hidden_size": 4}}, num_latents=16, k=3, auxk=3)
    assert SparcConfig.from_dict(config.to_dict()).streams == config.streams


@pytest.mark.parametrize("latents", [10**12, 2 * 10**9])
def test_more_latents_than_any_machine_has(tmp_path, planted_folder, capsys, latents):
    flags = ["train", "--features", str(planted_folder), "--output_dir", str(tmp_path / "run"), "--cpu"]
    assert main([*flags, "--num_latents", str(latents)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "num_latents" in message
    assert not (tmp_path / "run").exists()
