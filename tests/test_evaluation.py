"""Code tables, retrieval and alignment: by hand, and against the earlier code's numbers."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import planted_features, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from sparc_hf.codes import CodeTable, encode_features
from sparc_hf.evaluation import evaluate_model, label_jaccard, write_results
from sparc_hf.retrieval import counterpart_ranks, recall_at


def table_of(dense: dict[str, np.ndarray]) -> CodeTable:
    """A code table whose rows hold all latents, zeros included."""
    rows, latents = next(iter(dense.values())).shape
    every = np.tile(np.arange(latents, dtype=np.int32), (rows, 1))
    return CodeTable(
        {name: every.copy() for name in dense}, {name: value.copy() for name, value in dense.items()}, latents, "joint"
    )


def test_encoding_a_dataset_equals_encoding_its_rows():
    features = planted_features(50)
    model = tiny_model(3)
    joint = encode_features(model, features, batch_size=16)
    rows = {name: torch.from_numpy(features.array(name)) for name in features.stream_names}
    for name, code in model.encode(rows).items():
        np.testing.assert_allclose(joint.csr(name).toarray(), code.to_dense().detach().numpy(), rtol=1e-5)
        assert joint.indices[name].dtype == np.int32
        alone = encode_features(model, features, encoding="single").csr(name).toarray()
        np.testing.assert_allclose(
            alone, model.encode({name: rows[name]})[name].to_dense().detach().numpy(), rtol=1e-5
        )


def test_reading_a_table_as_csr_leaves_it_as_it_is():
    table = CodeTable(
        {"a": np.array([[3, 1], [0, 2]], np.int32)}, {"a": np.array([[0.0, 2.0], [1.0, 3.0]], np.float32)}, 4, "joint"
    )
    for _ in range(2):
        assert table.csr("a").toarray().tolist() == [[0, 2, 0, 0], [1, 0, 3, 0]]
    assert table.indices["a"].tolist() == [[3, 1], [0, 2]]
    assert table.values["a"].tolist() == [[0, 2], [1, 3]]


def test_code_tables_round_trip(tmp_path):
    table = encode_features(tiny_model(2), planted_features(50), encoding="single")
    table.save(tmp_path / "codes")
    loaded = CodeTable.load(tmp_path / "codes")
    assert (loaded.streams, loaded.num_latents, loaded.encoding) == (["dino", "clip_img"], 64, "single")
    for name in table.streams:
        assert np.array_equal(loaded.indices[name], table.indices[name])
        assert np.array_equal(loaded.values[name], table.values[name])
    with pytest.raises(ValueError, match="exists already"):
        table.save(tmp_path / "codes")
    with pytest.raises(ValueError, match="not a code table"):
        CodeTable.load(tmp_path)
    from datasets import load_from_disk

    assert load_from_disk(str(tmp_path / "codes")).column_names == [
        "dino_indices",
        "dino_values",
        "clip_img_indices",
        "clip_img_values",
    ]


def test_encoding_errors():
    features = planted_features(50)
    with pytest.raises(ValueError, match="'both'"):
        encode_features(tiny_model(2), features, encoding="both")
    for call in (encode_features, evaluate_model):
        with pytest.raises(ValueError, match=r"needs the streams \['siglip', 'vit'\]"):
            call(tiny_model(5), features)


def test_ranks_by_hand():
    queries = csr_array(np.array([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 0], [1.0, 1.0, 0]]))
    references = csr_array(np.array([[3.0, 0, 0], [1.0, 1.0, 0], [0, 0, 5.0], [1.0, 1.0, 0]]))
    # Row 0 hits; row 1 ties with row 3; row 2 has no active latent, so all four tie at 0; row 3 ties with row 1.
    assert counterpart_ranks(queries, references).tolist() == [1, 2, 4, 2]
    assert counterpart_ranks(queries, references, block=3).tolist() == [1, 2, 4, 2]
    assert recall_at(np.array([1, 2, 4, 2]), 1) == 0.25
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        counterpart_ranks(queries, references[:2])


def test_jaccard_by_hand():
    codes = table_of(
        {
            "a": np.array([[1.0, 0, 1], [1, 0, 0], [0, 0, 0]], np.float32),
            "b": np.array([[1.0, 0, 0], [0, 0, 0], [1, 1, 0]], np.float32),
        }
    )
    labels = csr_array(np.array([[1, 1], [1, 0], [0, 1]]))
    # Latent 0: counts a = (2, 1), b = (1, 2): 2 / 4. Latents 1 and 2 live in one stream only.
    assert label_jaccard(codes, labels).tolist() == [0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="3 rows of codes but 2 rows of labels"):
        label_jaccard(codes, labels[:2])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), rows=st.integers(1, 20), latents=st.integers(1, 8), classes=st.integers(1, 5))
def test_jaccard_properties(seed, rows, latents, classes):
    draws = np.random.default_rng(seed)
    one, other = ((draws.random((rows, latents)) < 0.4).astype(np.float32) for _ in range(2))
    labels = csr_array((draws.random((rows, classes)) < 0.5).astype(np.float32))
    scores = label_jaccard(table_of({"a": one, "b": other}), labels)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert np.array_equal(scores, label_jaccard(table_of({"a": other, "b": one}), labels))
    order = draws.permutation(latents)
    assert np.array_equal(scores[order], label_jaccard(table_of({"a": one[:, order], "b": other[:, order]}), labels))
    copied = label_jaccard(table_of({"a": one, "b": one}), labels)
    assert set(copied.tolist()) <= {0.0, 1.0}


CASES = ["global_cross", "global_no_cross", "local_cross", "local_no_cross"]


@pytest.mark.parametrize("case", CASES)
def test_jaccard_equals_the_earlier_code(golden, case):
    """At the full depth of the taxonomy, where its label pairing (quirk 12) has no effect."""
    latents = np.load(golden / "metrics_latents.npz")
    expected = np.load(golden / "metrics_jaccard.npz")
    labelled = np.load(golden / "legacy" / "labels.npz")
    variant = "local_evaluation" if case.startswith("local") else "as_global"
    rows = labelled["sample_indices"]
    codes = table_of({name: latents[f"{case}.{variant}.{name}"][rows] for name in ("clip_img", "clip_txt", "dino")})
    scores = label_jaccard(codes, csr_array(labelled["labels_labelled_only"].astype(np.float32)))
    np.testing.assert_allclose(scores, expected[f"{case}.column_ordered.depth3"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_retrieval_ranks_equal_the_earlier_code(golden, case):
    """Inside the bracket that ties allow, and equal where there is no tie; a tie never counts as a hit."""
    latents = np.load(golden / "metrics_latents.npz")
    expected = np.load(golden / "metrics_retrieval_ranks.npz")
    metrics = json.loads((golden / "metrics.json").read_text())["retrieval"][case]["local_evaluation"]
    for pair, figures in metrics["LatentAlignment"].items():
        target, source = pair.lower().split("_from_")
        query, reference = (csr_array(latents[f"{case}.local_evaluation.{name}"]) for name in (source, target))
        ranks = counterpart_ranks(query, reference)
        bracket = [
            expected[f"{case}.local_evaluation.LatentAlignment.{pair}.{kind}"] for kind in ("rank_lo", "rank_hi")
        ]
        assert (bracket[0] <= ranks).all()
        assert (ranks <= bracket[1]).all()
        clear = bracket[0] == bracket[1]
        assert clear.mean() > 0.5
        assert np.array_equal(ranks[clear], expected[f"{case}.local_evaluation.LatentAlignment.{pair}.ranks"][clear])
        assert recall_at(ranks, 10) == pytest.approx(figures["R@10"], abs=0.03)


def test_evaluating_a_model_gives_every_figure_and_leaves_it_alone():
    features = planted_features(200)
    model = tiny_model(3).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    results = evaluate_model(model, features, batch_size=64)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    json.dumps(results)
    assert results["rows"] == 200
    rows = {name: torch.from_numpy(features.array(name)) for name in features.stream_names}
    losses = model.eval()(rows).losses
    for key in ("self", "cross", "self/dino", "cross/clip_txt<-dino"):
        assert results["nmse"][key] == pytest.approx(losses[key].item(), rel=1e-4)
    assert len(results["single"]["retrieval"]) == 6
    assert 0 <= results["single"]["jaccard"] <= results["joint"]["jaccard"] <= 1
    assert set(results["joint"]["dead"]) == set(features.stream_names)


def test_one_stream_has_no_pairs():
    features = planted_features(40)
    results = evaluate_model(tiny_model(1), features)
    assert results["joint"]["latent_r_at_1"] is None
    assert results["joint"]["retrieval"] == {}
    assert results["joint"]["jaccard"] == 0


def test_results_are_written_whole(tmp_path):
    write_results({"rows": 3}, tmp_path / "new" / "results.json")
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == {"rows": 3}
    assert os.listdir(tmp_path / "new") == ["results.json"]
