"""`sparc impute`: an existing model gets the statistics of its streams, and loses what they make untrue."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model

from sparc_hf import SparcModel
from sparc_hf.cli import main
from sparc_hf.codes.concepts import Concept, save_concepts
from sparc_hf.features.dataset import FeatureDataset


@pytest.fixture
def model_folder(tmp_path):
    """A model of no imputation, with what a user has beside it."""
    folder = tmp_path / "model"
    model = tiny_model(3)
    for record in model.config.streams:
        record["normalize"] = "l2"
    model.save_pretrained(folder)
    save_concepts([Concept(3, "circle", 5.0, {})], folder)
    (folder / "results.json").write_text("{}")
    (folder / "training_arguments.json").write_text(json.dumps({"epochs": 3}))
    (folder / "notes.txt").write_text("mine")
    return folder


def impute(model, features, output, *flags: str) -> int:
    return main(["impute", "--model", str(model), "--features", str(features), "--output", str(output), *flags])


def test_a_new_folder_has_the_same_joint_codes_and_others_alone(model_folder, planted_folder, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    assert impute(model_folder, planted_folder, tmp_path / "new") == 0
    assert json.loads(capsys.readouterr().out)["streams"] == ["dino", "clip_img", "clip_txt"]
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before
    old, new = SparcModel.from_pretrained(model_folder), SparcModel.from_pretrained(tmp_path / "new")
    features = FeatureDataset.load(planted_folder)
    rows = {name: torch.from_numpy(features.array(name, slice(0, 20))) for name in features.stream_names}
    for name, code in new.encode(rows).items():
        assert torch.equal(code.to_dense(), old.encode(rows)[name].to_dense())
        alone = {name: rows[name]}
        assert torch.equal(new.encode(alone, missing="ignore")[name].to_dense(), old.encode(alone)[name].to_dense())
        assert not torch.equal(new.encode(alone)[name].to_dense(), old.encode(alone)[name].to_dense())
    # What was measured of a stream alone is no longer true.
    assert (tmp_path / "new" / "concepts.json").is_file()
    assert (tmp_path / "new" / "training_arguments.json").is_file()
    assert not (tmp_path / "new" / "results.json").exists()
    assert "imput" in (tmp_path / "new" / "README.md").read_text()


def test_statistics_made_again_are_used_as_before(model_folder, planted_folder, tmp_path, capsys):
    assert impute(model_folder, planted_folder, tmp_path / "new", "--shared", "0.8", "--ridge", "0.5") == 0
    assert impute(tmp_path / "new", planted_folder, tmp_path / "newer", "--fit_steps", "0.5") == 0
    expected = {"ridge": 0.003, "shared": 0.8, "own_weight": 2.0, "fit_steps": 0.5}
    assert SparcModel.from_pretrained(tmp_path / "newer").config.imputation == expected
    assert impute(model_folder, planted_folder, tmp_path / "refused", "--shared", "1.5") == 2
    assert "`shared` of `imputation`" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_in_place_only_when_told(model_folder, planted_folder, capsys):
    before = (model_folder / "model.safetensors").read_bytes()
    assert impute(model_folder, planted_folder, model_folder) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (model_folder / "model.safetensors").read_bytes() == before
    assert impute(model_folder, planted_folder, model_folder, "--overwrite") == 0
    assert SparcModel.from_pretrained(model_folder).config.imputation is not None
    assert (model_folder / "notes.txt").read_text() == "mine"
    assert (model_folder / "concepts.json").is_file()
    assert not (model_folder / "results.json").exists()


def test_features_of_other_streams_leave_everything_as_it_was(model_folder, planted_folder, tmp_path, capsys):
    features = FeatureDataset.load(planted_folder)
    two = FeatureDataset.from_arrays({name: features.array(name) for name in features.stream_names[:2]})
    two.save(tmp_path / "two")
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    assert impute(model_folder, tmp_path / "two", model_folder, "--overwrite") == 2
    assert "clip_txt" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before


def test_training_measures_its_streams_and_says_so(tmp_path, planted_folder):
    """In processes of their own, with defaults; what is measured does not depend on how many there are."""
    command = [*("--features", planted_folder, "--num_latents", "32", "--k", "4", "--auxk", "4", "--epochs", "1")]
    launch = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    models = {}
    for name, launcher in launch.items():
        script = [str(tmp_path / "train.py")]
        (tmp_path / "train.py").write_text(
            "from sparc_hf.cli import main\nraise SystemExit(main(['train', *__import__('sys').argv[1:]]))\n"
        )
        argv = [sys.executable, *launcher, *script, *map(str, command), "--output_dir", str(tmp_path / name), "--cpu"]
        done = subprocess.run(argv, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        models[name] = SparcModel.from_pretrained(tmp_path / name)
    one, two = models["one"].imputation, models["two"].imputation
    torch.testing.assert_close(one.covariance, two.covariance)
    torch.testing.assert_close(one.mean, two.mean)
    off = [*map(str, command), "--output_dir", str(tmp_path / "off"), "--no_impute"]
    assert main(["train", *off]) == 0
    assert SparcModel.from_pretrained(tmp_path / "off").imputation is None
    assert torch.equal(SparcModel.from_pretrained(tmp_path / "off").atoms["dino"], models["one"].atoms["dino"])
