"""A saved model loads through `trust_remote_code=True` where sparc_hf cannot be imported."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_features, tiny_model
from library_folder import link_libraries
from safetensors.torch import load_file, save_file

from sparc_hf import SparcModel
from sparc_hf.model.configuration_sparc import FORMAT_VERSION

CODE = """
import sys
import torch
from transformers import AutoConfig, AutoModel
for absent in ("sparc_hf", "datasets", "accelerate", "evaluate", "scipy"):
    try:
        __import__(absent)
        sys.exit(f"{absent} must not be importable here")
    except ImportError:
        pass
folder, inputs, outputs = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
features = torch.load(inputs)
out = model(features)
codes = model.encode({"dino": features["dino"]})["dino"]
torch.save(
    {
        "loss": out.loss.detach(),
        "alone": codes.to_dense().detach(),
        "decoded": model.decode(codes, to="clip_img").detach(),
        "streams": config.stream_names,
    },
    outputs,
)
model.save_pretrained(folder + "-again")
fresh = type(model)(config)
assert fresh.atoms["dino"].norm(dim=1).allclose(torch.ones(64)), "a fresh model must be initialised"
"""


@pytest.fixture
def clean_environment(tmp_path):
    """A folder of libraries with torch, transformers, safetensors and what these need, and nothing else."""
    return link_libraries(tmp_path / "site", ["torch", "transformers", "safetensors", "numpy"])


@pytest.mark.parametrize("imputes", [False, True])
def test_remote_code_gives_the_packages_numbers(tmp_path, clean_environment, imputes):
    model = tiny_model(3)
    if imputes:
        rows = torch.cat(list(random_features(model, 100).values()), dim=1)
        model.set_imputation(rows.mean(dim=0), rows.T.cov())
    model.save_pretrained(tmp_path / "model")
    features = random_features(model)
    torch.save(features, tmp_path / "inputs.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(clean_environment)
    for folder in ("model", "model-again"):  # what remote code saves must load as well
        command = [
            sys.executable,
            "-S",  # leaves the installed libraries out
            "-c",
            CODE,
            *(str(tmp_path / name) for name in (folder, "inputs.pt", "outputs.pt")),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        theirs = torch.load(tmp_path / "outputs.pt")
        mine = model.encode({"dino": features["dino"]})["dino"]
        assert theirs["streams"] == ["dino", "clip_img", "clip_txt"]
        torch.testing.assert_close(theirs["loss"], model(features).loss.detach())
        torch.testing.assert_close(theirs["alone"], mine.to_dense().detach())
        torch.testing.assert_close(theirs["decoded"], model.decode(mine, to="clip_img").detach())


def _spoil(folder, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("atoms.dino"), ["missing", "atoms.dino"]),
        (lambda state: state.update(extra=torch.zeros(2)), ["unexpected", "extra"]),
        (
            lambda state: state.update({"pre_bias.dino": torch.zeros(7)}),
            ["mis-shaped", "pre_bias.dino", "[7]", "[24]"],
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path, change, words):
    tiny_model(2).save_pretrained(tmp_path)
    _spoil(tmp_path, change)
    with pytest.raises(ValueError, match="do not fit its config") as error:
        SparcModel.from_pretrained(tmp_path)
    for word in words:
        assert word in str(error.value)


def test_a_newer_format_is_refused_and_an_unknown_key_is_not(tmp_path):
    tiny_model(1).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"a_later_field": 3}))
    assert SparcModel.from_pretrained(tmp_path).config.a_later_field == 3
    (tmp_path / "config.json").write_text(json.dumps(content | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ValueError, match=f"`format_version` {FORMAT_VERSION + 1}"):
        SparcModel.from_pretrained(tmp_path)


def test_loading_info_can_still_be_asked_for(tmp_path):
    tiny_model(1).save_pretrained(tmp_path)
    model, info = SparcModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, SparcModel)
    assert not info["missing_keys"]
    assert SparcModel.from_pretrained(tmp_path, dtype=torch.bfloat16).atoms["dino"].dtype == torch.bfloat16


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_frozen_checkpoint_of_every_format_keeps_its_outputs(version):
    """Files written by the first code of a format version, with what that code made of some rows."""
    folder = ROOT / "tests" / "frozen" / f"format_{version}"
    assert json.loads((folder / "config.json").read_text())["format_version"] == version
    frozen = load_file(folder / "outputs.safetensors")
    model = SparcModel.from_pretrained(folder)
    features = {name: frozen[f"features.{name}"] for name in model.config.stream_names}
    out = model(features)
    found = {f"joint.{name}": code.to_dense() for name, code in out.codes.items()}
    found |= {f"single.{name}": model.encode({name: features[name]})[name].to_dense() for name in features}
    found |= {f"decoded.{one}.{to}": model.decode(out.codes[one], to=to) for one in features for to in features}
    found |= {f"loss.{name}": value for name, value in out.losses.items()} | {"loss": out.loss}
    assert {f"features.{name}" for name in features} | set(found) == set(frozen)
    for name, value in found.items():
        torch.testing.assert_close(value, frozen[name])
