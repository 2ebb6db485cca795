"""Model cards."""

import json
import os
import shutil
from itertools import pairwise

import pytest
from conftest import planted_features, tiny_model
from huggingface_hub import ModelCard

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.evaluation import EvaluationSettings, evaluate_model, evaluate_models
from sparc_hf.hub import write_model_card
from sparc_hf.push import prepare_model
from sparc_hf.report import write_report

QUICK = EvaluationSettings(replicates=10, probes=False, dataset="planted rows")


@pytest.fixture
def folder(tmp_path):
    tiny_model(3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_card_says_what_is_known(folder):
    results = evaluate_model(tiny_model(3), planted_features(60), QUICK).results
    path = write_model_card(
        folder, results=results, settings={"learning_rate": 0.001, "output_dir": "/home/me/secret"}
    )
    text = path.read_text()
    for words in (
        "8 active",
        "64",
        "`dino`",
        "`clip_txt`",
        "arXiv preprint arXiv:2507.06265",
        "trust_remote_code=True",
    ):
        assert words in text
    jaccard = results["single"]["headline"]["jaccard"]
    assert f"{jaccard['value']:.3f} ({jaccard['low']:.3f} to {jaccard['high']:.3f})" in text
    assert f"{results['joint']['reconstruction']['nmse']['dino']['clip_txt']:.3f}" in text
    assert "| `learning_rate` | 0.001 |" in text
    assert "secret" not in text
    assert "\n\n\n" not in text
    assert "None" not in text
    card = ModelCard.load(path)
    assert card.data.library_name == "sparc-hf"
    assert {"sparse-autoencoder", "interpretability", "dino"} <= set(card.data.tags)
    indexed = {entry.metric_name: entry for entry in card.data.eval_results}
    entry = indexed["Label Jaccard between streams, mean over all latents (single encoding)"]
    assert entry.metric_value == pytest.approx(jaccard["value"], abs=1e-6)
    assert (entry.dataset_name, entry.dataset_type) == ("planted rows", "planted-rows")


def test_tables_have_no_gaps(folder):
    text = write_model_card(
        folder, results=evaluate_model(tiny_model(3), planted_features(60), QUICK).results
    ).read_text()
    lines = text.splitlines()
    for line, following in pairwise(lines):
        assert not line.startswith("|") or not following or following.startswith("|"), line
    for number, line in enumerate(lines):
        if line.startswith("|--"):
            assert lines[number - 1].count("|") == line.count("|")
            assert lines[number + 1].startswith("|")
            assert lines[number + 1].count("|") == line.count("|")


def test_a_card_without_results_or_settings(folder):
    text = write_model_card(folder).read_text()
    assert "## Results" not in text
    assert "## Training" not in text
    assert "\n\n\n" not in text


def test_a_card_shows_its_own_models_figures_of_several(tmp_path):
    """The file of several models, in the folder of the second."""
    models = {"first": tiny_model(3), "second": tiny_model(3, seed=1)}
    evaluations = evaluate_models(models, planted_features(60), QUICK)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    write_report(evaluations, tmp_path / "report")
    shutil.copy(tmp_path / "report" / "results.json", tmp_path / "second")
    first, second = (
        f"{evaluations[name].results['joint']['reconstruction']['nmse']['dino']['clip_txt']:.3f}" for name in models
    )
    text = write_model_card(tmp_path / "second").read_text()
    assert second in text
    assert first not in text
    os.symlink(tmp_path / "second", tmp_path / "link")
    prepare_model(tmp_path / "link", tmp_path / "first", repo="me/second")
    assert second in (tmp_path / "first" / "README.md").read_text()
    assert list(json.loads((tmp_path / "first" / "results.json").read_text())["models"]) == ["second"]
    (tmp_path / "second").rename(tmp_path / "third")
    with pytest.raises(ValueError, match=r"holds the models \['first', 'second'\], none or several of which are"):
        write_model_card(tmp_path / "third")


def test_a_card_refuses_the_figures_of_a_model_of_other_settings(folder):
    results = evaluate_model(tiny_model(3, k=4), planted_features(60), QUICK).results
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ValueError, match=r"of a model with `k` 4, but .* has 8"):
        write_model_card(folder, results=results)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_one_stream_with_a_hub_encoder(tmp_path):
    record = {"hidden_size": 4, "encoder": "facebook/dinov2-base", "revision": "a" * 40, "modality": "image"}
    model = SparcModel(SparcConfig(streams={"dino": record}, num_latents=8, k=2, auxk=2))
    model.save_pretrained(tmp_path)
    features = planted_features(30)
    one = type(features).from_arrays(
        {"dino": features.array("dino")[:, :4]}, streams={"dino": record | {"name": "dino"}}
    )
    text = write_model_card(tmp_path, results=evaluate_model(model, one, QUICK).results).read_text()
    assert "[facebook/dinov2-base](https://huggingface.co/facebook/dinov2-base) @ `aaaaaaaaaaaa`" in text
    assert ModelCard.load(tmp_path / "README.md").data.base_model == ["facebook/dinov2-base"]


@pytest.mark.parametrize("content", [None, {"model_type": "clip"}])
def test_a_folder_without_a_model(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="holds"):
        write_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
