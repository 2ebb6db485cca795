"""Evaluating models: every figure agrees with its metric, intervals are what they say, the report shows it all."""

import csv
import json
import os
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from conftest import planted_features, tiny_model

from sparc_hf.codes.code_table import encode_features
from sparc_hf.evaluation.report import model_names, report_html, write_report
from sparc_hf.evaluation.results import results_of_model
from sparc_hf.evaluation.retrieval import model_ranks
from sparc_hf.evaluation.suite import EvaluationSettings, evaluate_model, evaluate_models
from sparc_hf.features.columns import fixed_size_lists
from sparc_hf.features.dataset import FeatureDataset

QUICK = EvaluationSettings(batch_size=64, replicates=20, probes=False)


@pytest.fixture(scope="module")
def pair():
    """Two evaluations on the same rows: global and local selection."""
    models = {"global": tiny_model(3), "local": tiny_model(3, seed=1, selection="local")}
    return evaluate_models(models, planted_features(200), QUICK)


def test_evaluating_a_model_gives_every_figure_and_leaves_it_alone():
    features = planted_features(200)
    model = tiny_model(3).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    results = evaluate_model(model, features, QUICK).results
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    json.dumps(results, allow_nan=False)
    assert results["rows"] == 200
    rows = {name: torch.from_numpy(features.array(name)) for name in features.stream_names}
    losses = model.eval()(rows).losses
    joint, single = results["joint"], results["single"]
    assert joint["headline"]["nmse_self"]["value"] == pytest.approx(losses["self"].item(), rel=1e-4)
    assert joint["headline"]["nmse_cross"]["value"] == pytest.approx(losses["cross"].item(), rel=1e-4)
    nmse = joint["reconstruction"]["nmse"]
    assert nmse["dino"]["dino"] == pytest.approx(losses["self/dino"].item(), rel=1e-4)
    assert nmse["clip_txt"]["dino"] == pytest.approx(losses["cross/clip_txt<-dino"].item(), rel=1e-4)
    alone = model.encode({"dino": rows["dino"]})["dino"]
    error = (model.decode(alone, to="clip_txt") - model.normalize(rows)["clip_txt"]).square().sum(dim=1)
    expected = (error / model.normalize(rows)["clip_txt"].square().sum(dim=1)).mean().item()
    assert single["reconstruction"]["nmse"]["clip_txt"]["dino"] == pytest.approx(expected, rel=1e-4)
    assert {family: len(pairs) for family, pairs in single["retrieval"].items()} == {
        "self_reconstruction": 3,
        "latent_alignment": 6,
        "cross_reconstruction": 6,
    }
    assert 0 <= single["headline"]["jaccard"]["value"] <= joint["headline"]["jaccard"]["value"] <= 1
    assert joint["headline"]["jaccard"]["value"] == pytest.approx(joint["alignment"]["mean"][-1])
    dead = np.mean([count / 64 for count in joint["liveness"]["dead_in"].values()])
    assert joint["headline"]["dead_share"]["value"] == pytest.approx(dead)
    ranks = single["retrieval"]["latent_alignment"].values()
    r_at_1 = single["headline"]["latent_alignment_r_at_1"]
    assert r_at_1["value"] == pytest.approx(np.mean([figures["R@1"] for figures in ranks]))
    assert r_at_1["low"] < r_at_1["value"] < r_at_1["high"]


def test_local_selection_encodes_alike_either_way(pair):
    results = pair["local"].results
    assert results["joint"] == results["single"]
    assert pair["global"].results["joint"] != pair["global"].results["single"]


def test_a_taxonomy_gives_every_depth():
    features = planted_features(60)
    leaves = [{"LabelName": name} for name in features.label_names]
    taxonomy = {
        "LabelName": "cause",
        "Subcategory": [
            {"LabelName": "early", "Subcategory": leaves[:10]},
            {"LabelName": "late", "Subcategory": leaves[10:]},
        ],
    }
    features.taxonomy = taxonomy
    found = evaluate_model(tiny_model(3), features, QUICK)
    alignment = found.results["single"]["alignment"]
    assert alignment["depths"] == [0, 1, 2]
    assert alignment["mean"][0] >= alignment["mean"][1] >= alignment["mean"][2]
    np.testing.assert_allclose(found.latents["single"]["jaccard/depth2"].mean(), alignment["mean"][2])
    features.taxonomy = {"LabelName": "cause", "Subcategory": leaves[:10]}
    with pytest.raises(ValueError, match="10 of 20 classes are not in the taxonomy"):
        evaluate_model(tiny_model(3), features, QUICK)
    features.taxonomy = ["cause"]
    with pytest.raises(ValueError, match="`taxonomy` must be an object"):
        evaluate_model(tiny_model(3), features, QUICK)


def test_unusual_features():
    features = planted_features(40)
    one = evaluate_model(tiny_model(1), features, QUICK).results
    assert "nmse_cross" not in one["joint"]["headline"]
    assert one["joint"]["retrieval"]["latent_alignment"] == {}
    assert one["joint"]["headline"]["jaccard"]["value"] == 0
    assert one["joint"]["alignment"]["mean_live"] == [None]
    single_row = evaluate_model(tiny_model(3), features.select([3]), QUICK).results
    assert single_row["joint"]["headline"]["latent_alignment_r_at_1"]["value"] == 1
    assert single_row["joint"]["reconstruction"]["fvu"]["dino"]["dino"] is None
    json.dumps(single_row, allow_nan=False)
    bare = FeatureDataset.from_arrays({name: features.array(name) for name in features.stream_names})
    unlabelled = evaluate_model(tiny_model(3), bare, QUICK).results
    assert "alignment" not in unlabelled["joint"]
    assert "jaccard" not in unlabelled["joint"]["headline"]
    assert unlabelled["joint"]["headline"]["dead_share"]["low"] is not None
    with pytest.raises(ValueError, match=r"needs the streams \['siglip', 'vit'\]"):
        evaluate_models({"a": tiny_model(3), "b": tiny_model(5)}, features, QUICK)
    broken = {name: features.array(name) for name in features.stream_names}
    broken["clip_img"][7] = 0
    with pytest.raises(ValueError, match="stream `clip_img` holds only zeros in row 7"):
        evaluate_model(tiny_model(3), FeatureDataset.from_arrays(broken), QUICK)
    with pytest.raises(ValueError, match="`retrieval_rows`"):
        EvaluationSettings(retrieval_rows=0)
    with pytest.raises(ValueError, match="`replicates` must be 0, or 2 or more"):
        EvaluationSettings(replicates=1)


def test_labels_that_say_nothing_and_rows_without_labels(caplog):
    features, model = planted_features(40), tiny_model(2)
    arrays = {name: features.array(name) for name in ("dino", "clip_img")}
    nothing = FeatureDataset.from_arrays(arrays, labels=[[] for _ in range(40)])
    found = evaluate_model(model, nothing, QUICK).results["joint"]
    assert "alignment" not in found
    assert "no row of held-out rows has a label" in caplog.text
    # Of single class ids, some unknown: as if these rows were not there.
    ids = pa.array([None if row % 4 == 0 else row % 3 for row in range(40)], pa.int32())
    table = pa.table(dict(zip(arrays, map(fixed_size_lists, arrays.values()), strict=True)) | {"labels": ids})
    partly = FeatureDataset(table, [{"name": name, "hidden_size": rows.shape[1]} for name, rows in arrays.items()])
    found = evaluate_model(model, partly, QUICK).results["single"]["alignment"]
    known = np.flatnonzero(np.arange(40) % 4)
    alone = evaluate_model(model, partly.select(known), QUICK).results["single"]["alignment"]
    assert found == alone
    for wrong in (pa.array([[1, None]] * 40), pa.array(["a"] * 40), pa.array([["a"]] * 40), pa.array([0.5] * 40)):
        odd = FeatureDataset(table.set_column(2, "labels", wrong), partly.streams)
        with pytest.raises(ValueError, match="`labels` must hold class ids"):
            evaluate_model(model, odd, QUICK)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_probes_of_a_few_rows(rows):
    features, model = planted_features(10).select(range(rows)), tiny_model(1)
    settings = EvaluationSettings(replicates=0)
    if rows < 4:
        with pytest.raises(ValueError, match=f"need 4 rows or more, but there are {rows}; .* `--no_probes`"):
            evaluate_model(model, features, settings)
    else:
        assert set(evaluate_model(model, features, settings).results["single"]["classifiers"]) >= {"raw", "codes"}


def test_a_stream_whose_latents_are_all_dead():
    model = tiny_model(3)
    with torch.no_grad():
        model.encoders["dino"].weight.zero_()
        model.encoders["dino"].bias.fill_(-1.0)
    results = evaluate_model(model, planted_features(60), QUICK).results
    assert results["single"]["liveness"]["dead_in"]["dino"] == 64
    assert results["single"]["retrieval"]["latent_alignment"]["dino->clip_img"]["median_rank"] == 60
    assert 0 < results["single"]["headline"]["dead_share"]["value"] < 1


def test_retrieval_on_some_rows():
    features, model = planted_features(100), tiny_model(3)
    few = evaluate_model(model, features, EvaluationSettings(replicates=0, probes=False, retrieval_rows=10))
    part = features.select(np.linspace(0, 99, 10, dtype=int))
    ranks = model_ranks(model, part, encode_features(model, part, encoding="single"))
    found = few.results["single"]["retrieval"]["cross_reconstruction"]["dino->clip_txt"]
    assert found["rows"] == 10
    assert found["R@1"] == (ranks["cross_reconstruction"]["dino", "clip_txt"] == 1).mean()
    assert few.results["single"]["headline"]["nmse_self"]["low"] is None
    with pytest.raises(ValueError, match="the codes have 100 rows"):
        model_ranks(model, part, encode_features(model, features))


def test_the_files_of_a_report(pair, tmp_path):
    path = write_report(pair, tmp_path / "new" / "report")
    folder = path.parent
    assert sorted(os.listdir(folder)) == [
        *("latents-global.csv", "latents-local.csv", "model-index.yaml", "report.html", "results.json")
    ]
    stored = json.loads((folder / "results.json").read_text())["models"]
    assert stored == {name: evaluation.results for name, evaluation in pair.items()}
    index = yaml.safe_load((folder / "model-index.yaml").read_text())["model-index"]
    assert [entry["name"] for entry in index] == ["global", "local"]
    metrics = {metric["type"] for result in index[0]["results"] for metric in result["metrics"]}
    assert {"nmse_self", "jaccard", "latent_alignment_r_at_1"} <= metrics
    with open(folder / "latents-global.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 64
    column = [float(line["joint/jaccard/depth0"]) for line in lines]
    np.testing.assert_allclose(column, pair["global"].latents["joint"]["jaccard/depth0"], rtol=1e-5)
    named = write_report(pair, tmp_path / "named", names={"local": {3: 'a "cat", sitting'}}).parent
    with open(named / "latents-local.csv") as file:
        assert [line["name"] for line in csv.DictReader(file)][2:5] == ["", 'a "cat", sitting', ""]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        write_report(pair, tmp_path / "file")


def test_the_page_shows_every_figure_and_needs_nothing_else(pair):
    page = report_html(pair)
    for name, evaluation in pair.items():
        assert f"<h2>{name}</h2>" in page
        for encoding in ("joint", "single"):
            for figure in evaluation.results[encoding]["headline"].values():
                assert f"{figure['value']:.3f}" in page or f"{figure['value']:.1%}" in page
            ranks = evaluation.results[encoding]["retrieval"]["latent_alignment"]["dino->clip_img"]
            assert f"{ranks['mrr']:.3f}" in page
    # Of every picture a narrow one too, for phones.
    assert page.count("data:image/png;base64,") == 2 * page.count("<figure>") >= 20
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)  # letters of pictures may spell anything
    assert "http" not in words.replace("http-equiv", "")
    assert "None" not in words
    strange = report_html({"<b>&": pair["global"]})
    assert "&lt;b&gt;&amp;" in strange


def test_names_and_results_of_models(pair, tmp_path):
    assert model_names(["runs/a/model", "runs/b"]) == {"model": "runs/a/model", "b": "runs/b"}
    assert model_names(["runs/a/model", "runs/b/model"]) == {"a/model": "runs/a/model", "b/model": "runs/b/model"}
    with pytest.raises(ValueError, match="once"):
        model_names(["a", "a"])
    write_report(pair, tmp_path)
    path = tmp_path / "results.json"
    assert results_of_model(path, "runs/local") == pair["local"].results
    with pytest.raises(ValueError, match="none or several"):
        results_of_model(path, "runs/other")
    for content in ("{}", "[1]", '{"models": {}}', '{"models": {"local": 3}}', '{"models": ["local"]}', "\udcff"):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"not a results\.json"):
            results_of_model(path, "runs/local")
