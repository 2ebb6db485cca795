"""Checkpoints of the earlier SPARC project as model folders with the same outputs."""

import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.cli import main
from sparc_hf.legacy.hdf5_features import FeatureFiles, configured_files
from sparc_hf.legacy.sparc_checkpoints import import_checkpoint

CASES = ["global_cross", "global_no_cross", "local_cross", "local_no_cross"]


@pytest.fixture
def run_folder(golden, tmp_path):
    """A copy of one run's folder, to be damaged."""
    folder = tmp_path / "run"
    shutil.copytree(golden / "legacy" / "results" / "msae_tiny_global_cross", folder)
    return folder


def raw_rows(golden) -> dict[str, torch.Tensor]:
    pytest.importorskip("h5py")
    with FeatureFiles(configured_files(golden / "legacy" / "configs" / "config_tiny.json", "val")) as files:
        (block,) = files.blocks(0)
    return {name: torch.from_numpy(block[name]) for name in ("dino", "clip_img", "clip_txt")}


@pytest.mark.parametrize("case", CASES)
def test_codes_equal_the_earlier_ones(golden, tmp_path, case):
    model = import_checkpoint(golden / "legacy" / "results" / f"msae_tiny_{case}", tmp_path / "model")
    assert model.config.selection == case.split("_")[0]
    assert model.config.cross_coef == (0.0 if "no_cross" in case else 1.0)
    assert model.config.stream_names == ["dino", "clip_img", "clip_txt"]
    with np.load(golden / "metrics_latents.npz") as expected:
        for variant, selection in (("local_evaluation", "local"), ("as_global", "global")):
            if f"{case}.{variant}.dino" not in expected:
                continue
            codes = model.encode(raw_rows(golden), selection=selection)
            for name, code in codes.items():
                np.testing.assert_allclose(
                    code.to_dense().detach().numpy(), expected[f"{case}.{variant}.{name}"], rtol=1e-5, atol=1e-6
                )
        assert f"{case}.local_evaluation.dino" in expected or f"{case}.as_global.dino" in expected


@pytest.mark.parametrize(
    ("cache", "selection"), [("analysis_cache_val.h5", "global"), ("analysis_cache_retrieval_val.h5", "local")]
)
def test_reconstructions_equal_those_of_the_analysis_cache(golden, tmp_path, cache, selection):
    h5py = pytest.importorskip("h5py")
    source = golden / "legacy" / "results" / "msae_tiny_global_cross"
    model = import_checkpoint(source / "msae_checkpoint.pth", tmp_path / "model")
    rows = raw_rows(golden)
    with torch.no_grad():
        out = model(rows, selection=selection)
    with h5py.File(source / cache) as file:
        batches = [f"batch_{number}" for number in range(7)]
        for target, by_source in out.reconstructions.items():
            for name, values in by_source.items():
                group = file[f"{target}/recon" if name == target else f"cross_reconstructions/{target}_from_{name}"]
                expected = np.concatenate([group[batch][:] for batch in batches])
                np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_counters_and_atoms_are_those_of_the_file(golden, tmp_path):
    source = golden / "legacy" / "results" / "msae_tiny_local_cross"
    model = import_checkpoint(source, tmp_path / "model")
    tensors = torch.load(source / "msae_checkpoint.pth", weights_only=True)
    for name in model.config.stream_names:
        assert torch.equal(model.atoms[name], tensors[f"decoders.{name}.weight"].T)
        assert torch.equal(getattr(model.steps_since_fired, name), tensors[f"stats_last_nonzero_{name}"])


def test_the_command_makes_a_folder_ready_to_push(golden, tmp_path, capsys):
    source = golden / "legacy" / "results" / "msae_tiny_global_cross"
    encoders = ["dino=facebook/dinov2-base:image:cls", "clip_txt=openai/clip-vit-base-patch16:text"]
    output = tmp_path / "model"
    assert main(["import", "--source", str(source), "--output", str(output), "--encoders", *encoders]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["latents"], printed["selection"]) == (64, "global")
    card = ModelCard.load(output / "README.md")
    assert "## Where it came from" in card.text
    assert "msae_tiny_global_cross" in card.text
    assert "| `learning_rate` | 0.001 |" in card.text
    assert card.data.base_model == ["facebook/dinov2-base", "openai/clip-vit-base-patch16"]
    assert "\n\n\n" not in card.text
    assert str(tmp_path) not in (output / "imported_from.json").read_text()
    config = SparcConfig.from_pretrained(output)
    assert config.stream("dino")["pooling"] == "cls"
    assert config.stream("clip_img") == {"name": "clip_img", "hidden_size": 16, "normalize": "l2"}


class Planted:
    """What unpickling would call; it must never be."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return self.file.write_text, ("unpickled",)


def test_nothing_in_a_checkpoint_runs(run_folder, tmp_path):
    torch.save({"encoders.dino.weight": Planted(tmp_path / "ran")}, run_folder / "msae_checkpoint.pth")
    with pytest.raises(ValueError, match="files that need code to be read are refused"):
        import_checkpoint(run_folder, tmp_path / "model")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "model").exists()


def edited(run_folder, change):
    """Change the checkpoint's state dict in place."""
    file = run_folder / "msae_checkpoint.pth"
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("latent_biases.dino"), "lacks `latent_biases.dino`"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), r"has tensors that no SparcModel has: \['extra'\]"),
        (
            lambda tensors: tensors.update({"decoders.dino.weight": torch.ones(64, 24)}),
            r"`decoders.dino.weight` is \[64, 24\] instead of \[24, 64\]",
        ),
        (lambda tensors: tensors.update({"encoders.vit.weight": torch.ones(64, 3)}), "the two are not of one run"),
        (lambda tensors: tensors.update({"encoders.dino.weight": torch.ones(32, 24)}), "32 latents but .* says 64"),
        (lambda tensors: tensors.clear(), "has no `encoders.<stream>.weight`"),
        (lambda tensors: tensors.update(number=3), "not a state dict of tensors"),
    ],
)
def test_checkpoints_that_do_not_fit(run_folder, tmp_path, change, words):
    edited(run_folder, change)
    with pytest.raises(ValueError, match=words):
        import_checkpoint(run_folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "run_config.json").unlink(), "there is no `.*run_config.json`"),
        (lambda folder: (folder / "run_config.json").write_text("{}"), "is no run_config.json"),
        (lambda folder: (folder / "run_config.json").write_text('{"args": {"k": 8}}'), "lacks the settings"),
        (lambda folder: (folder / "msae_checkpoint.pth").write_bytes(b"noise"), "msae_checkpoint.pth"),
        (
            lambda folder: (folder / "msae_checkpoint.pth").write_bytes(
                (folder / "msae_checkpoint.pth").read_bytes()[:9000]
            ),
            "no readable checkpoint",
        ),
        (lambda folder: (folder / "msae_checkpoint.pth").unlink(), "there is no checkpoint"),
    ],
)
def test_files_that_are_missing_or_damaged(run_folder, tmp_path, damage, words):
    damage(run_folder)
    with pytest.raises(ValueError, match=words):
        import_checkpoint(run_folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_run_config_from_elsewhere(run_folder, tmp_path):
    shutil.move(run_folder / "run_config.json", tmp_path / "settings.json")
    model = import_checkpoint(run_folder, tmp_path / "model", run_config=tmp_path / "settings.json")
    assert model.config.k == 8


def test_outputs_are_replaced_only_when_asked(run_folder, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and is not a model folder"):
        import_checkpoint(run_folder, tmp_path / "notes", overwrite=True)
    import_checkpoint(run_folder, tmp_path / "model")
    with pytest.raises(ValueError, match="already holds a model"):
        import_checkpoint(run_folder, tmp_path / "model")
    import_checkpoint(run_folder, tmp_path / "model", overwrite=True)
    SparcModel.from_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir() if "." in path.name] == []


def test_records_of_other_streams(run_folder, tmp_path):
    with pytest.raises(ValueError, match=r"encoders are given for \['vit'\]"):
        import_checkpoint(run_folder, tmp_path / "model", records=[{"name": "vit", "encoder": "a/b"}])
