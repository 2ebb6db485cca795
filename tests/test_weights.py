"""Weights that are not those a model was saved with are refused, on disk, in the Hub's cache and as remote code."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, planted_features, random_features, tiny_model
from library_folder import link_libraries
from safetensors.torch import load_file, save_file
from test_push import hub, push, user_environment  # noqa: F401 a fixture
from transformers import AutoModel

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.cli import main
from sparc_hf.run_folder import save_model
from sparc_hf.training import SparcTrainer
from sparc_hf.training_arguments import SparcTrainingArguments

REFUSED = "not the file that config.json was saved with"


def trained(folder: Path, golden) -> None:
    args = SparcTrainingArguments(features="", output_dir=str(folder), num_latents=32, k=4, auxk=4, epochs=1, cpu=True)
    SparcTrainer(args, planted_features(80)).train()


def imported(folder: Path, golden) -> None:
    source = golden / "legacy" / "results" / "msae_tiny_global_cross"
    assert main(["import", "--source", str(source), "--output", str(folder)]) in (0, None)


WAYS = {
    "saved": lambda folder, golden: tiny_model(2).save_pretrained(folder),
    "shards": lambda folder, golden: tiny_model(2).save_pretrained(folder, max_shard_size="5KB"),
    "variant": lambda folder, golden: tiny_model(2).save_pretrained(folder, variant="best"),
    "into a used folder": lambda folder, golden: [save_model(tiny_model(2, seed=seed), folder) for seed in (1, 0)],
    "saved anew": lambda folder, golden: resaved(folder),
    "trained": trained,
    "imported": imported,
}


def resaved(folder: Path) -> None:
    tiny_model(2).save_pretrained(folder.with_name("first"))
    SparcModel.from_pretrained(folder.with_name("first")).save_pretrained(folder)


def flip_a_bit(file: Path, seed: int) -> None:
    content, draws = bytearray(file.read_bytes()), random.Random(seed)
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    file.write_bytes(content)


@pytest.mark.parametrize("way", WAYS)
def test_forty_flipped_bits_are_noticed(tmp_path, way, request, capsys):
    golden = request.getfixturevalue("golden") if way == "imported" else None
    WAYS[way](tmp_path / "model", golden)
    options = {"variant": "best"} if way == "variant" else {}
    SparcModel.from_pretrained(tmp_path / "model", **options)
    files = sorted((tmp_path / "model").glob("model*.safetensors"))
    assert len(files) == (5 if way == "shards" else 1)
    for seed in range(40):
        file = files[seed % len(files)]
        whole = file.read_bytes()
        flip_a_bit(file, seed)
        for load in (SparcModel, AutoModel):
            with pytest.raises(ValueError, match=rf"{REFUSED}|cannot be read|do not fit its config"):
                load.from_pretrained(tmp_path / "model", **options)
        file.write_bytes(whole)
    SparcModel.from_pretrained(tmp_path / "model", **options)


def test_a_flipped_bit_can_be_loaded_on_purpose(tmp_path):
    tiny_model(2).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # in the last number
    file.write_bytes(content)
    with pytest.raises(ValueError, match=REFUSED):
        SparcModel.from_pretrained(tmp_path)
    for load in (SparcModel, AutoModel):
        loaded = load.from_pretrained(tmp_path, verify=False)
        assert isinstance(loaded, SparcModel)
    # What is saved of it has checksums of its own.
    loaded.save_pretrained(tmp_path / "again")
    SparcModel.from_pretrained(tmp_path / "again")


def test_weights_of_another_save_are_noticed(tmp_path):
    for seed in (0, 1):
        tiny_model(2, seed=seed).save_pretrained(tmp_path / str(seed))
    shutil.copyfile(tmp_path / "1" / "model.safetensors", tmp_path / "0" / "model.safetensors")
    with pytest.raises(ValueError, match=REFUSED):
        SparcModel.from_pretrained(tmp_path / "0")


def test_a_save_that_was_stopped_is_noticed(tmp_path, monkeypatch):
    tiny_model(2).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_model(2, seed=1, k=4).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=REFUSED):
        SparcModel.from_pretrained(tmp_path)


def test_shards_replace_weights_in_one_file_and_back(tmp_path):
    rows = random_features(tiny_model(2))
    for seed, options in enumerate(({}, {"max_shard_size": "5KB"}, {}, {"max_shard_size": "9KB"})):
        model = tiny_model(2, seed=seed)
        model.save_pretrained(tmp_path, **options)
        assert torch.equal(SparcModel.from_pretrained(tmp_path)(rows).loss, model(rows).loss)


def test_a_model_without_checksums_loads(tmp_path):
    tiny_model(2).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert list(content.pop("weights_sha256")) == ["model.safetensors"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert SparcModel.from_pretrained(tmp_path).config.weights_sha256 is None


def test_a_config_saved_alone_takes_no_checksums_along(tmp_path):
    tiny_model(2).save_pretrained(tmp_path / "model")
    SparcModel.from_pretrained(tmp_path / "model").config.save_pretrained(tmp_path / "config")
    assert json.loads((tmp_path / "config" / "config.json").read_text())["weights_sha256"] is None


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"dtype": "float16"}, {"device_map": "cpu"}, {"config": True}, {"subfolder": "model"}],
    ids=lambda options: next(iter(options)),
)
def test_every_way_to_load_compares(tmp_path, options):
    tiny_model(2).save_pretrained(tmp_path / "model")
    options = (
        {**options, "config": SparcConfig.from_pretrained(tmp_path / "model")} if "config" in options else options
    )
    folder = tmp_path if "subfolder" in options else tmp_path / "model"
    SparcModel.from_pretrained(folder, **options)
    content = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=REFUSED):
        SparcModel.from_pretrained(folder, **options)


def test_a_state_dict_in_place_of_files_loads():
    model = tiny_model(2)
    loaded = SparcModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(loaded.atoms["dino"], model.atoms["dino"])


LOAD = """
import sys
from transformers import AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
except ValueError as error:
    print(error)
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, verify=False)
"""


@pytest.mark.parametrize("package", [True, False], ids=["package", "remote code"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "5KB"}], ids=["one file", "shards"])
def test_a_flipped_bit_in_the_hubs_cache_is_noticed(hub, tmp_path, package, options):  # noqa: F811
    tiny_model(2).save_pretrained(tmp_path / "run", **options)
    push(repo="me/concepts", model=str(tmp_path / "run"))
    libraries = ["torch", "transformers", "safetensors", "numpy"]
    path = str(ROOT) if package else str(link_libraries(tmp_path / "site", libraries))
    environment = user_environment(hub, tmp_path, PYTHONPATH=path)
    command = [sys.executable, *([] if package else ["-S"]), "-c", LOAD, "me/concepts"]

    def load() -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert load() == ""
    cached = sorted((tmp_path / "home").rglob("snapshots/*/model*.safetensors"))
    assert len(cached) == (5 if options else 1)
    blob = cached[-1].resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)
    assert REFUSED in load()


def spoil(folder: Path, change) -> None:
    """Change the weights of a model, and take the checksums from its config.json, as an older model has none."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content.pop("weights_sha256")
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8, torch.float16, torch.float64])
@pytest.mark.parametrize("tensors", ["one", "all"])
def test_another_number_type_is_refused_by_name(tmp_path, dtype, tensors):
    tiny_model(2).save_pretrained(tmp_path)
    names = ["encoders.dino.weight"] if tensors == "one" else list(load_file(tmp_path / "model.safetensors"))
    spoil(tmp_path, lambda state: state.update({name: state[name].to(dtype) for name in names}))
    with pytest.raises(ValueError, match=r"of another number type: .* is \w+ instead of (F32|I64)"):
        SparcModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["encoders.dino.weight", "atoms.clip_img", "pre_bias.dino", "encoders.dino.bias"])
def test_nan_and_infinite_weights_are_refused_by_name(tmp_path, name, value):
    tiny_model(2).save_pretrained(tmp_path)
    spoil(tmp_path, lambda state: state[name].view(-1).__setitem__(3, value))
    with pytest.raises(ValueError, match=f"NaN or infinite numbers, in `{name}`"):
        SparcModel.from_pretrained(tmp_path)
    assert not SparcModel.from_pretrained(tmp_path, verify=False).state_dict()[name].isfinite().all()


def test_a_negative_variance_is_refused(tmp_path):
    tiny_model(2, objective="usae", selection="local").save_pretrained(tmp_path)
    spoil(tmp_path, lambda state: state["encoder_norm.dino.running_var"].__setitem__(0, -1.0))
    with pytest.raises(ValueError, match=r"variance below 0, in `encoder_norm\.dino\.running_var`"):
        SparcModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("objective", ["sparc", "usae"])
def test_a_model_saved_on_purpose_in_another_number_type_loads_and_encodes(tmp_path, dtype, objective):
    selection = "local" if objective == "usae" else "global"
    torch.manual_seed(0)
    streams = {
        "dino": {"hidden_size": 24, "normalize": "standardize", "mean": 0.5, "std": 2.0},
        "clip": {"hidden_size": 16, "normalize": "l2"},
    }
    config = SparcConfig(streams=streams, num_latents=64, k=8, auxk=8, objective=objective, selection=selection)
    model = SparcModel(config).eval().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = SparcModel.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    rows = random_features(model)
    for name, code in loaded.encode(rows).items():
        assert code.values.dtype == dtype
        assert torch.equal(code.to_dense(), model.encode(rows)[name].to_dense())
    loaded.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_weights_of_two_number_types_are_not_saved(tmp_path):
    model = tiny_model(2)
    model.encoders["dino"].half()
    with pytest.raises(ValueError, match=r"one number type, but it has \['torch\.float16', 'torch\.float32'\]"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_small_file_that_promises_billions_of_latents_costs_nothing(tmp_path):
    tiny_model(1).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"num_latents": 2 * 10**9}))
    with pytest.raises(ValueError, match=r"mis-shaped.*\[64, 24\] instead of \[2000000000, 24\]"):
        SparcModel.from_pretrained(tmp_path)


def test_the_command_tells_damaged_weights_in_a_sentence(tmp_path, planted_folder, capsys):
    save_model(tiny_model(3), tmp_path / "model")
    flip_a_bit(tmp_path / "model" / "model.safetensors", 1)
    flags = [
        "--model",
        str(tmp_path / "model"),
        "--features",
        str(planted_folder),
        "--output",
        str(tmp_path / "codes"),
    ]
    assert main(["encode", *flags]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "codes")
