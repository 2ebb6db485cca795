"""`sparc demo` and the README's examples, on a small world."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from sparc_hf.cli import main
from sparc_hf.demo import ENCODERS_PATH
from sparc_hf.demo import run as demo_run
from sparc_hf.demo.encoder_training.code_queries import code_queries
from sparc_hf.training.arguments import SparcTrainingArguments


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished small demo, in the folder in which the README's examples would find it."""
    folder = tmp_path_factory.mktemp("demo")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["demo", "--train_rows", "1500", "--test_rows", "300", "--epochs", "15"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.mark.slow
def test_the_demo_reaches_what_it_should(demo):
    results = json.loads((demo / "runs/demo/evaluation/results.json").read_text())["models"]["demo"]
    assert results["rows"] == 300
    joint, single = results["joint"]["headline"], results["single"]["headline"]
    assert joint["nmse_self"]["value"] < 0.8
    assert joint["jaccard"]["value"] > single["jaccard"]["value"] > 0.05
    pair = results["single"]["retrieval"]["latent_alignment"]["clip_txt->clip_img"]
    assert pair["R@1"] > 5 / 300
    assert "data:image/png" in (demo / "runs/demo/evaluation/report.html").read_text()
    card = (demo / "runs/demo/model/README.md").read_text()
    assert "`demo:clip`" in card
    assert f"{single['jaccard']['value']:.3f}" in card


def test_the_preset_has_the_settings_of_the_demo(tmp_path):
    preset = yaml.safe_load((ROOT / "sparc_hf/cli/presets/demo.yaml").read_text())["train"]
    settings = demo_run._training_settings(demo_run.DemoArguments(), tmp_path).to_dict()
    assert {name: settings[name] for name in preset} == preset
    paper = SparcTrainingArguments(features="", output_dir="").to_dict()
    own = {name for name, value in settings.items() if value != paper[name]}
    assert own == {*preset, "features", "output_dir", "checkpoint_every"} - {"batch_size"}


@pytest.mark.slow
def test_codes_find_the_shape_of_an_object(demo):
    """Chance is 0.12, and the whole demo reaches more (docs/demo.md)."""
    for figures in code_queries(demo / "runs/demo")["colour"].values():
        assert figures["shape"] > 0.4


@pytest.mark.slow
def test_a_second_demo_uses_the_features_again(demo, capsys, monkeypatch):
    monkeypatch.chdir(demo)
    stamp = (demo / "runs/demo/features/train/sparc_features.json").stat().st_mtime_ns
    assert main(["demo", "--train_rows", "1500", "--test_rows", "300", "--epochs", "1", "--k", "8"]) == 0
    assert (demo / "runs/demo/features/train/sparc_features.json").stat().st_mtime_ns == stamp
    out = capsys.readouterr().out
    assert "8 active" in out
    assert "SparcModel.from_pretrained" in out


def test_features_of_other_encoders_are_made_again(tmp_path, monkeypatch):
    first = demo_run.world_features(tmp_path, "test", 6, 0).source
    stamp = (tmp_path / "features/test/sparc_features.json").stat().st_mtime_ns
    assert demo_run.world_features(tmp_path, "test", 6, 0).source == first
    assert (tmp_path / "features/test/sparc_features.json").stat().st_mtime_ns == stamp
    shutil.copytree(ENCODERS_PATH, tmp_path / "encoders")
    with (tmp_path / "encoders/clip/config.json").open("a") as config:
        config.write(" ")
    monkeypatch.setattr(demo_run, "ENCODERS_PATH", tmp_path / "encoders")
    assert demo_run.world_features(tmp_path, "test", 6, 0).source != first
    assert (tmp_path / "features/test/sparc_features.json").stat().st_mtime_ns != stamp


@pytest.mark.slow
def test_readme_python_examples_run(demo):
    """Word for word, one after the other, in the folder of the demo; those of the Hub run in tests/test_push.py."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    blocks = [block for block in blocks if "hf://" not in block]
    assert len(blocks) >= 4
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=demo, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (demo / "features/mine/sparc_features.json").exists()


def test_impossible_demo_settings(capsys):
    assert main(["demo", "--num_latents", "8", "--k", "16"]) == 2
    assert "`k` is 16 but `num_latents` is 8" in capsys.readouterr().err
