"""Checkpoints of Universal Sparse Autoencoders, imported and used."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sparc_hf import SparcModel
from sparc_hf.cli import main
from sparc_hf.cli.import_files import ImportArguments, run_import
from sparc_hf.features.dataset import FeatureDataset

WIDTHS = {"SigLIP": 24, "ViT": 16, "MAE": 12}


def settings() -> dict:
    return {
        "global": {"loss_criterion": "L1", "lr": 0.0003, "nb_epochs": 3, "batch_size": 8, "standardize": False},
        "viz": {"dataset": "imagenet"},
        "sae_params": {"encoder_module": "mlp_bn_1", "top_k": 8},
        "model_zoo": {name: {"input_shape": width} for name, width in WIDTHS.items()},
    }


@pytest.fixture
def run(golden, tmp_path):
    shutil.copytree(golden / "usae_weights" / "tiny_L1", tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings(), sort_keys=False))
    return tmp_path / "run"


def imported(run, tmp_path, **given):
    return run_import(ImportArguments(source=[str(run)], output=str(tmp_path / "model"), **given))


def test_a_run_becomes_one_model(run, tmp_path, golden):
    model = imported(run, tmp_path)
    assert isinstance(model, SparcModel)
    assert model.config.stream_names == list(WIDTHS)
    told = {name: getattr(model.config, name) for name in ("objective", "selection", "distance", "num_latents", "k")}
    assert told == {"objective": "usae", "selection": "local", "distance": "l1", "num_latents": 64, "k": 8}
    assert (model.config.auxk, model.config.auxk_coef) == (32, 0.1)
    # The files hold the end of the golden 30-step run.
    final = load_file(golden / "usae_train_L1.safetensors")
    for name in WIDTHS:
        assert torch.equal(model.atoms[name], final[f"final.{name}.dictionary._weights"])
        assert torch.equal(
            model.encoder_norm[name].running_var, final[f"final.{name}.encoder.final_block.1.running_var"]
        )
    origin = json.loads((tmp_path / "model" / "imported_from.json").read_text())
    assert origin["checkpoint"].count("_checkpoint_2.pth") == 3


def test_standardised_rows_and_the_newest_epoch(run, tmp_path):
    content = settings()
    content["global"] |= {"standardize": True, "loss_criterion": "MSE"}
    for at, name in enumerate(WIDTHS):
        content["model_zoo"][name] |= {"model_mean": 0.1 * at, "model_std": 2.0}
    (run / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    shutil.copy(run / "ViT" / "uni_ViT_checkpoint_2.pth", run / "ViT" / "uni_ViT_checkpoint_1.pth")
    model = imported(run, tmp_path)
    assert model.config.distance == "l2"
    assert model.config.stream("MAE")["mean"] == pytest.approx(0.2)
    rows = torch.randn(5, 12)
    torch.testing.assert_close(model.normalize({"MAE": rows})["MAE"], (rows - 0.2) / (2.0 + 1e-5))


def test_command_card_and_evaluation(run, tmp_path, capsys):
    assert main(["import", "--source", str(run), "--output", str(tmp_path / "model")]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Universal Sparse Autoencoders" in card
    assert "2502.03714" in card
    draws = torch.Generator().manual_seed(0)
    arrays = {name: torch.randn(50, width, generator=draws).numpy() for name, width in WIDTHS.items()}
    FeatureDataset.from_arrays(arrays).save(tmp_path / "rows")
    capsys.readouterr()
    report = str(tmp_path / "report")
    command = ["evaluate", str(tmp_path / "model"), "--features", str(tmp_path / "rows"), "--output", report]
    assert main([*command, "--no_probes", "--replicates", "5"]) == 0
    headline = next(iter(json.loads(capsys.readouterr().out).values()))
    # Every stream selects alone, so nothing changes when it stands alone.
    assert headline["joint"]["nmse_self"]["value"] == pytest.approx(headline["single"]["nmse_self"]["value"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: (run / "config.yaml").unlink(), "name it with `run_config`"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "no configuration"),
        (lambda run: (run / "config.yaml").write_text("sae_params: {}\nglobal: {}\n"), "top_k"),
        (lambda run: (run / "MAE" / "uni_MAE_checkpoint_2.pth").unlink(), "uni_MAE_checkpoint"),
        (
            lambda run: (run / "MAE" / "uni_MAE_checkpoint_2.pth").rename(run / "MAE" / "uni_MAE_checkpoint_7.pth"),
            "different epochs",
        ),
        (lambda run: torch.save({"model_state_dict": 3}, run / "MAE" / "uni_MAE_checkpoint_2.pth"), "of tensors"),
        (
            lambda run: shutil.copy(
                run / "ViT" / "uni_ViT_checkpoint_2.pth", run / "MAE" / "uni_MAE_checkpoint_2.pth"
            ),
            None,
        ),
    ],
)
def test_what_does_not_fit_is_named(run, tmp_path, change, words):
    change(run)
    if words is None:  # another model's file is whole, so its width is taken
        assert imported(run, tmp_path).config.stream("MAE")["hidden_size"] == 16
        return
    with pytest.raises(ValueError, match=words):
        imported(run, tmp_path)
    assert not (tmp_path / "model").exists()


def test_one_file_of_a_run_says_to_import_the_folder(run, tmp_path):
    file = run / "ViT" / "uni_ViT_checkpoint_2.pth"
    (run / "ViT" / "run_config.json").write_text("{}")
    with pytest.raises(ValueError, match="import the run's folder"):
        run_import(ImportArguments(source=[str(file)], output=str(tmp_path / "model")))
