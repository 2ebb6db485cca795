"""Probes, classifiers, monosemanticity, bridges and stability of whole models."""

import json

import numpy as np
import pytest
import torch
from conftest import planted_features, tiny_model

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.codes.code_table import decoded_rows, encode_features, normalized_rows
from sparc_hf.codes.top_samples import top_samples
from sparc_hf.evaluation.probes import bridge_figures, monosemanticity_figures, stability_figures
from sparc_hf.evaluation.report import report_html
from sparc_hf.evaluation.suite import EvaluationSettings, evaluate_models
from sparc_hf.metrics.concept_probe import concept_probe
from sparc_hf.metrics.monosemanticity.monosemanticity import monosemanticity


def test_decoding_a_table_equals_the_model():
    model, features = tiny_model(2), planted_features(50)
    table = encode_features(model, features, encoding="single")
    alone = model.encode({"dino": torch.from_numpy(features.array("dino"))})["dino"]
    expected = model.decode(alone, to="clip_img").detach().numpy()
    np.testing.assert_allclose(decoded_rows(model, table, "dino", "clip_img", batch_size=16), expected, rtol=1e-5)
    rows = model.normalize({"dino": torch.from_numpy(features.array("dino"))})["dino"].numpy()
    np.testing.assert_array_equal(normalized_rows(model, features, "dino"), rows)


def test_an_evaluation_with_probes(monkeypatch):
    """On labels that are the planted causes, codes tell the classes nearly as well as the rows they were made of."""
    monkeypatch.setattr(concept_probe.classify, "__kwdefaults__", {"steps": 60, "seed": 0})
    settings = EvaluationSettings(replicates=0, retrieval_rows=50)
    found = evaluate_models({"a": tiny_model(3)}, planted_features(330), settings)
    results = found["a"].results
    json.dumps(results, allow_nan=False)
    for encoding in ("joint", "single"):
        probes = results[encoding]["probes"]["dino"]
        assert probes["classes"] >= 3
        assert 0.5 < probes["ap"] <= 1
        classifiers = results[encoding]["classifiers"]
        sizes = {kind: len(inputs) for kind, inputs in classifiers.items()}
        assert sizes == {"raw": 3, "codes": 3, "reconstructions": 3, "cross_reconstructions": 6}
        assert 0.2 < classifiers["codes"]["dino"] <= 1
    assert results["joint"]["classifiers"]["raw"] == results["single"]["classifiers"]["raw"]
    assert "monosemanticity" not in results["joint"]
    page = report_html(found)
    assert f"{results['single']['classifiers']['codes']['dino']:.3f}" in page
    assert "Monosemanticity of dino" in page


def test_monosemanticity_uses_the_other_streams_centred_rows():
    model, features = tiny_model(2), planted_features(80)
    table = encode_features(model, features, encoding="single")
    found = monosemanticity_figures(model, features, table)
    rows = normalized_rows(model, features, "clip_img")
    top = top_samples(table, 16)["dino"]
    expected = monosemanticity(top.rows, top.values, rows - rows.mean(axis=0))["mean"]
    assert found["dino"]["clip_img"]["mean"] == pytest.approx(expected)
    assert set(found["clip_img"]) == {"dino"}


def test_models_of_one_shape_are_matched():
    models = {"a": tiny_model(3), "b": tiny_model(3, seed=1), "narrow": tiny_model(3, num_latents=32)}
    planted = planted_features(60)
    bare = type(planted).from_arrays({name: planted.array(name) for name in planted.stream_names})
    found = evaluate_models(models, bare, EvaluationSettings(replicates=0))
    assert set(found["a"].results["stability"]) == {"b"}
    assert 0 < found["b"].results["stability"]["a"]["dino"] < 0.9
    assert "stability" not in found["narrow"].results
    assert "atoms with those of b" in report_html(found)


def test_a_model_is_stable_beside_its_copy():
    found = stability_figures({"one": tiny_model(2), "copy": tiny_model(2)})
    assert found["one"]["copy"]["dino"] == pytest.approx(1)
    assert found["copy"] == {"one": found["one"]["copy"]}


def test_bridges_need_one_space():
    features = planted_features(50)
    assert bridge_figures(tiny_model(2), {}) == {}
    records = {
        "img": {"hidden_size": 16, "encoder": "clip"},
        "txt": {"hidden_size": 16, "encoder": "clip"},
        "dino": {"hidden_size": 24, "encoder": "dino"},
    }
    model = SparcModel(SparcConfig(streams=records, num_latents=32, k=4, auxk=4)).eval()
    arrays = {"img": features.array("clip_img"), "txt": features.array("clip_img"), "dino": features.array("dino")}
    copied = type(features).from_arrays(arrays, streams=records)
    with torch.no_grad():
        model.encoders["txt"].load_state_dict(model.encoders["img"].state_dict())
        model.atoms["txt"].copy_(model.atoms["img"])
    table = encode_features(model, copied, encoding="single")
    found = bridge_figures(model, {name: table.csr(name) for name in records})
    assert set(found) == {"img<->txt"}
    assert 0.3 < found["img<->txt"] <= 1
