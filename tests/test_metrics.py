"""Alignment, liveness, reconstruction and retrieval: by hand, in general; and loading."""

import os
import shutil
import subprocess
import sys

import evaluate
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from sparc_hf.metrics.concept_alignment.concept_alignment import concept_alignment, label_counts, taxonomy_buckets
from sparc_hf.metrics.cross_retrieval.cross_retrieval import code_ranks, retrieval_figures, vector_ranks
from sparc_hf.metrics.latent_liveness.latent_liveness import latent_liveness
from sparc_hf.metrics.reconstruction.reconstruction import figures_of_terms, reconstruction, row_terms

TAXONOMY = {
    "LabelName": "all",
    "Subcategory": [
        {"LabelName": "animal", "Subcategory": [{"LabelName": "cat"}, {"LabelName": "dog"}, {"LabelName": "toy"}]},
        {"LabelName": "thing", "Subcategory": [{"LabelName": "soft", "Subcategory": [{"LabelName": "toy"}]}]},
    ],
}


def sparse(*rows) -> csr_array:
    return csr_array(np.array(rows, np.float32))


def load_metric(name: str, *config: str):
    return evaluate.load(str(ROOT / "sparc_hf" / "metrics" / name), *config)


def topk_rows(dense: np.ndarray) -> tuple[list, list]:
    """Every latent of every row, as indices and values [rows][latents]."""
    return np.tile(np.arange(dense.shape[1]), (len(dense), 1)).tolist(), dense.tolist()


def test_alignment_by_hand():
    codes = {"a": sparse([1, 0, 1], [1, 0, 0], [0, 0, 0]), "b": sparse([1, 0, 0], [0, 0, 0], [1, 1, 0])}
    found = concept_alignment(codes, sparse([1, 1], [1, 0], [0, 1]))
    # Latent 0: counts a = (2, 1), b = (1, 2): 2 / 4. Latents 1 and 2 live in one stream only.
    assert found["per_latent"].tolist() == [[0.5, 0.0, 0.0]]
    assert found["live"].tolist() == [True, False, False]
    assert found["mean"].tolist() == [pytest.approx(1 / 6)]
    assert found["mean_live"].tolist() == [0.5]


def test_alignment_at_every_depth_by_hand():
    names = ["cat", "dog", "toy", "thing"]
    buckets = taxonomy_buckets(names, TAXONOMY)
    depths = [[len({buckets[depth][i] for i in pair}) == 1 for pair in ((0, 1), (2, 3), (0, 3))] for depth in range(4)]
    # `toy` counts at its deeper place, under `thing`; `thing` is its own ancestor from depth 1 on.
    assert depths == [[True] * 3, [True, True, False], [False] * 3, [False] * 3]
    codes = {"a": sparse([1], [0]), "b": sparse([0], [1])}
    labels = sparse([1, 0, 0, 0], [0, 1, 0, 0])
    assert concept_alignment(codes, labels, buckets)["mean"].tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="1 of 2 classes are not in the taxonomy, the first is 'bird'"):
        taxonomy_buckets(["cat", "bird"], TAXONOMY)


def test_alignment_of_unusual_input():
    codes = {"a": sparse([1, 0]), "b": sparse([0, 0])}
    found = concept_alignment(codes, sparse([1, 0]))
    assert found["mean"].tolist() == [0]
    assert np.isnan(found["mean_live"]).all()
    with pytest.raises(ValueError, match="may only hold 0 and 1"):
        concept_alignment(codes, sparse([2, 0]))
    with pytest.raises(ValueError, match="1 rows of codes but 2 rows of labels"):
        concept_alignment(codes, sparse([1, 0], [1, 0]))
    with pytest.raises(ValueError, match="same rows and latents"):
        concept_alignment(codes | {"c": sparse([1, 0], [1, 0])}, sparse([1, 0]))
    with pytest.raises(ValueError, match="for 2 classes"):
        concept_alignment(codes, sparse([1, 0]), np.zeros((2, 3), int))


def test_samples_without_a_label_do_not_make_a_latent_active():
    """Latent 0 fires in `b` on the unlabelled row only, latent 1 everywhere."""
    codes = {"a": sparse([1, 1], [0, 1], [0, 1]), "b": sparse([0, 1], [0, 1], [1, 1])}
    labels = sparse([1, 0], [0, 1], [0, 0])
    found = concept_alignment(codes, labels)
    assert found["live"].tolist() == [False, True]
    assert found["mean_live"].tolist() == [1]
    # The same as if the row were not there.
    without = concept_alignment({name: matrix[:2] for name, matrix in codes.items()}, labels[:2])
    assert without["live"].tolist() == found["live"].tolist()
    # As the earlier code, where someone looked and found none of the classes.
    looked_at = concept_alignment(codes, labels, labelled=np.ones(3, bool))
    assert looked_at["live"].tolist() == [True, True]
    assert looked_at["mean_live"].tolist() == [0.5]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), rows=st.integers(1, 20), latents=st.integers(1, 8), classes=st.integers(1, 5))
def test_alignment_properties(seed, rows, latents, classes):
    draws = np.random.default_rng(seed)
    one, other = (sparse(*(draws.random((rows, latents)) < 0.4)) for _ in range(2))
    labels = sparse(*(draws.random((rows, classes)) < 0.5))
    buckets = np.stack([np.zeros(classes, int), draws.integers(0, 2, classes), np.arange(classes)])

    def scores(one, other):
        return concept_alignment({"a": one, "b": other}, labels, buckets)["per_latent"]

    found = scores(one, other)
    assert ((found >= 0) & (found <= 1)).all()
    assert np.array_equal(found, scores(other, one))
    order = draws.permutation(latents)
    assert np.array_equal(found[:, order], scores(one[:, order], other[:, order]))
    labelled = ((one.T @ labels).sum(axis=1) > 0).astype(float)
    assert np.array_equal(scores(one, one), np.tile(labelled, (3, 1)))
    # Counting a row twice is weighing it twice.
    weights = draws.integers(0, 3, rows)
    counts, fired = label_counts(one, labels, weights)
    repeated = np.repeat(np.arange(rows), weights)
    assert np.array_equal(counts, (one[repeated].T @ labels[repeated]).toarray())
    assert np.array_equal(fired, one[repeated].sum(axis=0) > 0)


def test_liveness_by_hand():
    codes = {"a": sparse([1, 0, 2, 0], [1, 0, 0, 0]), "b": sparse([1, 3, 0, 0], [0, 3, 0, 0])}
    found = latent_liveness(codes)
    assert (found["dead"], found["alive_in_all"], found["alive_in"]) == (1, 1, [1, 2, 1])
    assert found["patterns"] == {"a": 1, "b": 1}
    assert found["dead_in"] == {"a": 2, "b": 2}
    assert found["frequency"]["a"].tolist() == [1, 0, 0.5, 0]
    assert found["histogram"]["counts"]["b"].sum() == 2
    assert found["histogram"]["counts"]["a"][-1] == 1
    assert latent_liveness(codes, threshold=2.5)["alive_in"] == [3, 1, 0]
    silent = latent_liveness({"a": sparse([0, 0])})
    assert (silent["dead"], silent["alive_in_all"]) == (2, 0)
    with pytest.raises(ValueError, match="at least one"):
        latent_liveness({"a": csr_array((0, 4))})
    with pytest.raises(ValueError, match="same rows"):
        latent_liveness({"a": csr_array((1, 4)), "b": csr_array((2, 4))})


def test_reconstruction_by_hand():
    x = np.array([[1.0, 0.0], [0.0, 2.0]])
    found = reconstruction({"a": x}, {"a": {"a": x, "b": np.array([[0.0, 0.0], [0.0, 1.0]])}})
    assert [found[name]["a"]["a"] for name in ("nmse", "fvu", "r2", "cosine")] == pytest.approx([0, 0, 1, 1])
    assert found["nmse"]["a"]["b"] == pytest.approx((1 + 1 / 4) / 2)
    assert found["fvu"]["a"]["b"] == pytest.approx(2 / 2.5)  # the rows deviate from (0.5, 1) by 1.25 each
    assert found["r2"]["a"]["b"] == pytest.approx(1 - 0.5 / 0.6875, rel=1e-5)  # mean 0.75, mean square 1.25
    assert found["cosine"]["a"]["b"] == pytest.approx(0.5)
    one = reconstruction({"a": x[:1]}, {"a": {"a": x[:1]}})
    assert np.isnan(one["fvu"]["a"]["a"])
    assert one["nmse"]["a"]["a"] == 0
    with pytest.raises(ValueError, match="row 1 holds only zeros"):
        reconstruction({"a": x * [1, 0]}, {"a": {"a": x}})
    with pytest.raises(ValueError, match=r"reconstructions of \['b'\]"):
        reconstruction({"a": x}, {"b": {"a": x}})
    with pytest.raises(ValueError, match=r"\[2, 2\] and \[2, 1\]"):
        reconstruction({"a": x}, {"a": {"a": x[:, :1]}})


def test_reconstruction_in_pieces_is_the_same():
    draws = np.random.default_rng(0)
    x, y = draws.normal(1, 1, (50, 6)), draws.normal(1, 1, (50, 6))
    pieces = np.concatenate([row_terms(x[start : start + 16], y[start : start + 16]) for start in range(0, 50, 16)])
    whole = reconstruction({"a": x}, {"a": {"b": y}})
    for name, value in figures_of_terms(pieces, x.mean(axis=0)).items():
        assert value == pytest.approx(whole[name]["a"]["b"], rel=1e-12)
    assert whole["fvu"]["a"]["b"] == pytest.approx(((y - x) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum())


def test_ranks_by_hand():
    queries = sparse([1, 0, 0], [0, 2, 0], [0, 0, 0], [1, 1, 0])
    references = sparse([3, 0, 0], [1, 1, 0], [0, 0, 5], [1, 1, 0])
    # Row 0 hits; row 1 ties with row 3; row 2 has no active latent, so all four tie at 0; row 3 ties with row 1.
    ranks = code_ranks(queries, references)
    assert ranks.tolist() == [1, 2, 4, 2]
    assert vector_ranks(queries.toarray(), references.toarray()).tolist() == [1, 2, 4, 2]
    figures = retrieval_figures(ranks)
    assert figures == {"R@1": 0.25, "R@5": 1, "R@10": 1, "median_rank": 2, "mrr": 2.25 / 4, "rows": 4}
    assert code_ranks(queries[:1], references[:1]).tolist() == [1]
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        code_ranks(queries, references[:2])
    with pytest.raises(ValueError, match="at least one row"):
        retrieval_figures(np.array([], int))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), rows=st.integers(1, 60), latents=st.integers(1, 40))
def test_rank_properties(seed, rows, latents):
    """Common latents and rare ones, in one block or several, give the ranks of the plain dense product."""
    draws = np.random.default_rng(seed)
    share = draws.choice([0.01, 0.05, 0.5], latents)
    one, other = ((draws.random((rows, latents)) < share) * draws.integers(1, 4, (rows, latents)) for _ in range(2))
    ranks = code_ranks(csr_array(one), csr_array(other))
    left, right = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8) for x in (one, other))
    similarity = left @ right.T
    assert np.array_equal(ranks, (similarity >= similarity.diagonal()[:, None] - 1e-6).sum(axis=1))
    assert np.array_equal(ranks, vector_ranks(one, other))
    order = draws.permutation(latents)
    assert np.array_equal(ranks, code_ranks(csr_array(one[:, order]), csr_array(other[:, order])))
    # A copy is found at once, unless it has a twin.
    distinct = np.eye(rows, dtype=np.float32)
    assert (code_ranks(csr_array(distinct), csr_array(distinct)) == 1).all()


def test_metrics_load_offline_and_say_what_they_are():
    """`evaluate.load` of the folder gives what the plain function gives."""
    draws = np.random.default_rng(0)
    dense = {name: np.round(np.maximum(draws.normal(size=(12, 6)), 0), 3) for name in ("a", "b")}
    labels = draws.random((12, 4)) < 0.4
    rows = {name: topk_rows(value) for name, value in dense.items()}
    samples = {
        "indices": [list(pair) for pair in zip(rows["a"][0], rows["b"][0], strict=True)],
        "values": [list(pair) for pair in zip(rows["a"][1], rows["b"][1], strict=True)],
    }
    codes = {name: csr_array(value.astype(np.float32)) for name, value in dense.items()}
    names = ["cat", "dog", "toy", "thing"]

    alignment = load_metric("concept_alignment")
    found = alignment.compute(
        **samples,
        labels=[np.flatnonzero(row).tolist() for row in labels],
        num_latents=6,
        label_names=names,
        taxonomy=TAXONOMY,
        streams=["a", "b"],
    )
    plain = concept_alignment(codes, csr_array(labels.astype(np.float32)), taxonomy_buckets(names, TAXONOMY))
    np.testing.assert_allclose(found["per_latent"], plain["per_latent"])

    liveness = load_metric("latent_liveness")
    found = liveness.compute(**samples, num_latents=6, streams=["a", "b"])
    assert found["patterns"] == latent_liveness(codes)["patterns"]

    retrieval = load_metric("cross_retrieval")
    found = retrieval.compute(
        query_indices=rows["a"][0],
        query_values=rows["a"][1],
        reference_indices=rows["b"][0],
        reference_values=rows["b"][1],
        num_latents=6,
    )
    assert found == retrieval_figures(code_ranks(codes["a"], codes["b"]))
    vectors = load_metric("cross_retrieval", "vectors")
    assert vectors.compute(queries=dense["a"].tolist(), references=dense["b"].tolist()) == found

    pairs = load_metric("reconstruction")
    found = pairs.compute(
        predictions=[*dense["a"].tolist(), *dense["b"].tolist()],
        references=[*dense["b"].tolist(), *dense["b"].tolist()],
        targets=["b"] * 24,
        sources=["a"] * 12 + ["b"] * 12,
    )
    plain = reconstruction({"b": dense["b"]}, {"b": dense})
    assert found["nmse"]["b"]["a"] == pytest.approx(plain["nmse"]["b"]["a"], rel=1e-5)
    for metric in (alignment, liveness, retrieval, vectors, pairs):
        assert len(metric.description) > 100
        assert "arXiv" in metric.citation
        assert "Returns" in metric.inputs_description


def test_every_metric_loads_from_its_folder_alone(tmp_path):
    """As from a Hub repository: copied elsewhere, in a process that cannot import the package."""
    modules = (ROOT / "sparc_hf" / "metrics").glob("*/*.py")
    names = sorted(path.stem for path in modules if path.stem == path.parent.name)
    assert len(names) == 8
    for name in names:
        shutil.copytree(ROOT / "sparc_hf" / "metrics" / name, tmp_path / "copied" / name)
    code = f"""
import sys
sys.path = [path for path in sys.path if path != {str(ROOT)!r}]
sys.modules["sparc_hf"] = None
import evaluate
for name in {names!r}:
    metric = evaluate.load("copied/" + name)
    assert len(metric.description) > 100 and "title=" in metric.citation and metric.features, name
    print(name)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == names, done.stderr[-2000:]
