"""Whatever made a model, its config.json names its code, and a pushed one runs where the package is absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import planted_features, random_features, tiny_model
from library_folder import link_libraries
from test_layering import PACKAGE, REMOTE_CODE
from test_push import hub, push  # noqa: F401 a fixture

from sparc_hf import SparcModel
from sparc_hf.cli import main
from sparc_hf.concepts import Concept, save_concepts
from sparc_hf.demo_run import DemoArguments, run_demo
from sparc_hf.training import SparcTrainer
from sparc_hf.training_arguments import SparcTrainingArguments

AUTO_MAP = {"AutoConfig": "configuration_sparc.SparcConfig", "AutoModel": "modeling_sparc.SparcModel"}
LOAD = """
import sys
import torch
from transformers import AutoConfig, AutoModel
try:
    import sparc_hf
    sys.exit("sparc_hf must not be importable here")
except ImportError:
    pass
model, rows, codes = sys.argv[1:]
config = AutoConfig.from_pretrained(model, trust_remote_code=True)
assert config.stream_names == ["dino", "clip_img"], config
model = AutoModel.from_pretrained(model, trust_remote_code=True)
torch.save({name: code.to_dense() for name, code in model.encode(torch.load(rows)).items()}, codes)
"""
HOSTILE = "raise SystemExit('this code came from the model folder')\n"


def _trained(folder: Path) -> Path:
    args = SparcTrainingArguments(features="", output_dir=str(folder), num_latents=32, k=4, auxk=4, epochs=1, cpu=True)
    SparcTrainer(args, planted_features(80)).train()
    return folder


def _demo(folder: Path) -> Path:
    run_demo(DemoArguments(output=str(folder), train_rows=64, test_rows=40, num_latents=16, k=2, epochs=1))
    return folder / "model"


def _saved(folder: Path) -> Path:
    tiny_model(2).save_pretrained(folder)
    return folder


def _imported(folder: Path, golden: Path) -> Path:
    source = golden / "legacy" / "results" / "msae_tiny_global_cross"
    assert main(["import", "--source", str(source), "--output", str(folder)]) in (0, None)
    return folder


def assert_is_the_packages_code(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    files = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    assert files == {f"{room}.py": (PACKAGE / f"{room}.py").read_bytes() for room in REMOTE_CODE}


@pytest.mark.parametrize("way", ["saved", "trained", "imported", "demo"])
def test_every_way_to_a_model_names_its_code(tmp_path, way, request, capsys):
    if way == "imported":
        folder = _imported(tmp_path / "model", request.getfixturevalue("golden"))
    else:
        folder = {"saved": _saved, "trained": _trained, "demo": _demo}[way](tmp_path / "model")
    assert_is_the_packages_code(folder)
    push(repo="me/model", model=str(folder), dry_run=str(tmp_path / "pushed"))
    assert_is_the_packages_code(tmp_path / "pushed")


@pytest.fixture
def planted_with_code(tmp_path) -> Path:
    """A model in shards, beside files that its own code must not be taken from."""
    folder = tmp_path / "model"
    tiny_model(2).save_pretrained(folder, max_shard_size="5KB")
    for name in ("modeling_sparc.py", "sparse_ops.py", "helpers.py"):
        (folder / name).write_text(HOSTILE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "builtins.type", "AutoTokenizer": "helpers.Tokenizer"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_pushed_model_runs_the_packages_code_where_the_package_is_absent(hub, tmp_path, planted_with_code, place):  # noqa: F811
    if place == "hub":
        push(repo="me/model", model=str(planted_with_code))
        model = "me/model"
        assert "model.safetensors.index.json" in hub.repos["model", "me/model"].files
    else:
        model = str(tmp_path / "pushed")
        push(repo="me/model", model=str(planted_with_code), dry_run=model)
        assert_is_the_packages_code(Path(model))
    rows = random_features(tiny_model(2))
    torch.save(rows, tmp_path / "rows.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "PYTHONPATH": str(link_libraries(tmp_path / "site", ["torch", "transformers", "safetensors", "numpy"])),
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": str(int(place == "folder")),
    }
    command = [sys.executable, "-S", "-c", LOAD, model, str(tmp_path / "rows.pt"), str(tmp_path / "codes.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    mine = SparcModel.from_pretrained(planted_with_code).encode(rows)
    for name, code in torch.load(tmp_path / "codes.pt").items():
        torch.testing.assert_close(code, mine[name].to_dense())


def test_a_second_push_leaves_no_weights_or_findings_of_the_first(hub, tmp_path):  # noqa: F811
    _saved(tmp_path / "one")
    save_concepts([Concept(3, "circle", 5.0, {"dino": 0.1})], tmp_path / "one")
    push(repo="me/model", model=str(tmp_path / "one"))
    tiny_model(2, seed=1).save_pretrained(tmp_path / "two", max_shard_size="5KB")
    push(repo="me/model", model=str(tmp_path / "two"))
    files = set(hub.repos["model", "me/model"].files)
    assert not files & {"model.safetensors", "concepts.json"}
    assert {"model.safetensors.index.json", "README.md", "modeling_sparc.py"} <= files
