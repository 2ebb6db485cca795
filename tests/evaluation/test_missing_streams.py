"""A model that imputes missing streams is measured with and without doing so, and its card says both."""

import itertools

import numpy as np
import pytest
import torch
from conftest import planted_features, tiny_model

from sparc_hf.codes.code_table import encode_features
from sparc_hf.evaluation.suite import EvaluationSettings, evaluate_model
from sparc_hf.hub.cards import write_model_card
from sparc_hf.training.imputation import add_imputation

SETTINGS = EvaluationSettings(replicates=0, probes=False)


@pytest.fixture(scope="module")
def features():
    return planted_features(260)


@pytest.fixture(scope="module")
def results(features) -> dict:
    """Results of a model before and after it was given its statistics."""
    model = tiny_model(3)
    before = evaluate_model(model, features, SETTINGS).results
    add_imputation(model, features)
    return {"before": before, "after": evaluate_model(model, features, SETTINGS).results}


def test_what_ignores_the_others_is_what_was_measured_before(results):
    before, after = results["before"], results["after"]
    assert "single_ignoring" not in before
    assert after["joint"] == before["joint"]
    assert after["single_ignoring"]["headline"] == before["single"]["headline"]
    assert after["single_ignoring"]["reconstruction"] == before["single"]["reconstruction"]
    assert after["single"]["headline"]["nmse_cross"]["value"] < before["single"]["headline"]["nmse_cross"]["value"]


def test_another_stream_is_reconstructed_from_its_imputed_code(features, results):
    model = tiny_model(3)
    add_imputation(model, features)
    rows = {name: torch.from_numpy(features.array(name)) for name in features.stream_names}
    for source, target in itertools.permutations(rows, 2):
        code = model.encode({source: rows[source]}, streams=[target])[target]
        original = model.normalize({target: rows[target]})[target]
        error = (model.decode(code, to=target) - original).square().sum(1) / original.square().sum(1)
        assert results["after"]["single"]["reconstruction"]["nmse"][target][source] == pytest.approx(
            error.mean().item(), rel=1e-5
        )


def test_code_tables_of_every_encoding(features, tmp_path):
    model = tiny_model(3)
    plain = encode_features(model, features, encoding="single")
    add_imputation(model, features)
    tables = {name: encode_features(model, features, encoding=name) for name in ("single", "single_ignoring")}
    for stream in plain.streams:
        assert np.array_equal(tables["single_ignoring"].indices(stream), plain.indices(stream))
        assert np.array_equal(tables["single_ignoring"].values(stream), plain.values(stream))
        assert not np.array_equal(tables["single"].indices(stream), plain.indices(stream))
    tables["single_ignoring"].save(tmp_path / "codes")
    assert type(plain).load(tmp_path / "codes").encoding == "single_ignoring"


def test_the_card_has_a_column_for_each(features, results, tmp_path):
    model = tiny_model(3)
    model.save_pretrained(tmp_path)
    before = write_model_card(tmp_path, results=results["before"]).read_text()
    assert "ignoring the others" not in before
    add_imputation(model, features)
    model.save_pretrained(tmp_path)
    card = write_model_card(tmp_path, results=results["after"]).read_text()
    assert "| figure | joint | each stream alone | alone, ignoring the others |" in card
    row = next(line for line in card.splitlines() if line.startswith("| cross-reconstruction nmse"))
    shown = [float(cell.split()[0]) for cell in row.split("|")[2:5]]
    headlines = [results["after"][name]["headline"] for name in ("joint", "single", "single_ignoring")]
    assert shown == pytest.approx([headline["nmse_cross"]["value"] for headline in headlines], abs=6e-4)
