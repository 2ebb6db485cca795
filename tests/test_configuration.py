import pytest
from transformers import AutoConfig

from sparc_hf import SparcConfig


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
