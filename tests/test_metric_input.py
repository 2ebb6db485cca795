"""Metrics given what they cannot take: one sentence, or a right number; never a crash, and never a wrong one."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_array, csr_array

from sparc_hf.metrics.concept_alignment.concept_alignment import ConceptAlignment, concept_alignment, taxonomy_buckets
from sparc_hf.metrics.concept_probe.concept_probe import ConceptProbe, classify, concept_probe
from sparc_hf.metrics.concept_universality.concept_universality import ConceptUniversality, concept_universality
from sparc_hf.metrics.cross_retrieval.cross_retrieval import (
    CrossRetrieval,
    code_ranks,
    retrieval_figures,
    vector_ranks,
)
from sparc_hf.metrics.dictionary_stability.dictionary_stability import (
    DictionaryStability,
    bridge_scores,
    match_atoms,
)
from sparc_hf.metrics.latent_liveness.latent_liveness import LatentLiveness, latent_liveness
from sparc_hf.metrics.monosemanticity.monosemanticity import Monosemanticity, monosemanticity
from sparc_hf.metrics.reconstruction.reconstruction import Reconstruction, reconstruction

NAN, INF = float("nan"), float("inf")
# Numbers as people and broken files have them.
INDICES = st.integers(-2, 6) | st.sampled_from([2**31, -(2**40), None, 1.5, "a"])
VALUES = st.floats(0, 4, width=32) | st.sampled_from([0.0, NAN, INF, -INF, None, -1.0])
SIZES = st.integers(1, 6) | st.sampled_from([0, -3, 5, 6, 10**12, None, 2.5, "5"])


def sparse(*rows) -> csr_array:
    return csr_array(np.array(rows, np.float32))


def lists_of(values, *, rows: int, length: int):
    """Rows that mostly have the same length."""
    row = st.lists(values, min_size=length, max_size=length)
    return st.lists(row | st.lists(values, max_size=length + 1), min_size=rows, max_size=rows)


def outcome(call):
    """What a call returns, or None where it ends in one sentence."""
    try:
        return call()
    except ValueError as error:
        sentence = str(error)
    assert sentence
    assert "\n" not in sentence
    return None


def test_the_checks_are_the_same_file_in_every_folder():
    copies = [path.read_bytes() for path in (ROOT / "sparc_hf" / "metrics").glob("*/checked_input.py")]
    assert len(copies) == 6
    assert len(set(copies)) == 1


def test_numbers_outside_the_sizes_end_in_a_sentence():
    """In a process of its own: written past the end of an array, they used to end it."""
    code = """
import evaluate
from pathlib import Path
METRICS = Path("sparc_hf/metrics")
codes = {"indices": [[[0, 9]], [[1, 4]]], "values": [[[1.0, 2.0]], [[1.0, 2.0]]]}
flat = {"indices": [[0, 9]] * 40, "values": [[1.0, 2.0]] * 40}
pairs = {f"{side}_{part}": flat[part] for side in ("query", "reference") for part in flat}
calls = [
    ("latent_liveness", codes | {"num_latents": 5}),
    ("concept_universality", codes | {"num_latents": 5}),
    ("concept_alignment", codes | {"labels": [[0], [1]], "num_latents": 5, "label_names": ["a", "b"]}),
    ("concept_alignment", codes | {"labels": [[0], [-1]], "num_latents": 10, "label_names": ["a", "b"]}),
    ("cross_retrieval", pairs | {"num_latents": 5}),
    ("concept_probe", flat | {"labels": [[0]] * 40, "num_latents": 5, "num_classes": 1}),
    ("concept_probe", flat | {"labels": [[0], [10**6]] * 20, "num_latents": 10, "num_classes": 2}),
]
for name, inputs in calls:
    try:
        print(evaluate.load(str(METRICS / name)).compute(**inputs))
    except ValueError as error:
        print(name, error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (0, 7), done.stderr[-2000:]
    assert all("sample 0 of" in line and "names latent 9, but there are only 0 to 4" in line for line in lines[:3])
    assert "sample 1 of `labels` names class -1, but there are only 0 to 1" in lines[3]
    assert "sample 0 of the query names latent 9" in lines[4]
    assert "sample 1 of `labels` names class 1000000, but there are only 0 to 1" in lines[6]


def test_sparse_matrices_whose_indices_do_not_fit_are_refused():
    broken = csr_array((np.ones(2, np.float32), np.array([0, 7], np.int32), [0, 1, 2]), shape=(2, 3))
    labels = sparse([1], [1])
    atoms = np.eye(3)
    for call in (
        lambda: latent_liveness({"a": broken}),
        lambda: concept_universality({"a": broken}),
        lambda: concept_alignment({"a": broken}, labels),
        lambda: concept_alignment({"a": sparse([1, 0], [1, 0])}, broken),
        lambda: code_ranks(broken, broken),
        lambda: concept_probe(broken, labels),
        lambda: concept_probe(labels, broken),
        lambda: bridge_scores(broken, broken, atoms, atoms),
    ):
        with pytest.raises(ValueError, match=r"do not fit into \[2, 3\]: indices must be < 3"):
            call()


def test_other_sparse_forms_are_read_for_what_they_are():
    dense = np.array([[0, 1, 0], [2, 1, 0]], np.float32)
    expected = latent_liveness({"a": csr_array(dense)})["frequency"]["a"]
    twice = csr_array((np.ones(4, np.float32), [1, 1, 0, 1], [0, 2, 4]), shape=(2, 3))
    zeros = csr_array((np.float32([0, 1, 2, 1]), [0, 1, 0, 1], [0, 2, 4]), shape=(2, 3))
    for same in (csc_array(dense), dense, twice, zeros):
        assert latent_liveness({"a": same})["frequency"]["a"].tolist() == expected.tolist()
    labels = csr_array((np.float32([1, 0, 1]), [0, 1, 1], [0, 2, 3]), shape=(2, 2))
    assert concept_alignment({"a": dense, "b": dense}, labels)["live"].tolist() == [True, True, False]
    probed = concept_probe(np.tile(dense, (40, 1)), np.tile(labels.toarray(), (40, 1)), min_count=10)
    assert probed["classes"].tolist() == [0, 1]


def test_nothing_undefined_counts_as_a_hit_or_as_unlike():
    rows = np.eye(3, dtype=np.float32)
    spoiled = rows.copy()
    spoiled[1, 1] = NAN
    for queries, references, name in ((spoiled, rows, "queries"), (rows, spoiled, "references")):
        with pytest.raises(ValueError, match=f"row 1 of `{name}` holds NaN or infinite"):
            vector_ranks(queries, references)
    with pytest.raises(ValueError, match="the queries hold NaN or an infinite value in row 1"):
        code_ranks(csr_array(spoiled), csr_array(rows))
    with pytest.raises(ValueError, match="the reconstruction in row 1 holds NaN"):
        reconstruction({"a": rows}, {"a": {"b": spoiled}})
    with pytest.raises(ValueError, match="the original in row 1 holds NaN"):
        reconstruction({"a": spoiled}, {"a": {"b": rows}})
    with pytest.raises(ValueError, match="atom 1 holds NaN"):
        match_atoms(spoiled, rows)
    with pytest.raises(ValueError, match="row 1 of `features` is not finite"):
        monosemanticity(np.array([[0, 2]]), np.ones((1, 2)), spoiled)
    for value in (NAN, INF, -1.0):
        with pytest.raises(ValueError, match="those of latent 0 are not"):
            monosemanticity(np.array([[0, 2]]), np.array([[1.0, value]]), rows)
    with pytest.raises(ValueError, match="ranks from 1"):
        retrieval_figures(np.array([0, 2]))
    # Values whose squares are too large for single precision are values.
    assert vector_ranks(rows * 1e30, rows * 1e30).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: latent_liveness({"a": sparse([1])}, threshold=NAN), "`threshold`"),
        (lambda: concept_universality({"a": sparse([1])}, threshold=NAN), "`threshold`"),
        (lambda: concept_universality({"a": sparse([1])}, atom_norms={"b": np.ones(1)}), r"none of \['a'\]"),
        (lambda: concept_universality({"a": sparse([1])}, atom_norms={"a": np.ones(2)}), "1 finite numbers"),
        (lambda: retrieval_figures(np.array([1]), depths=(0,)), "`depths`"),
        (lambda: retrieval_figures(np.array([1]), depths=(2.5,)), "`depths`"),
        (lambda: concept_probe(sparse([1]), sparse([1]), min_count=1), "`min_count` must be at least 5"),
        (lambda: concept_alignment({"a": sparse([1])}, csr_array((1, 0))), "0 classes"),
        (lambda: concept_alignment({"a": sparse([1])}, sparse([1]), labelled=np.ones(2, bool)), "`labelled`"),
        (lambda: concept_alignment({}, sparse([1])), "at least one of each"),
        (lambda: classify(sparse([1]), sparse([1]), [np.array([0]), np.array([], int), np.array([0])]), "1, 0 and 1"),
        (lambda: taxonomy_buckets([], {"LabelName": "a"}), "no label names"),
        (lambda: taxonomy_buckets(["a"], {"LabelName": "a", "Subcategory": [{"Name": "b"}]}), "every node"),
        (lambda: taxonomy_buckets(["a"], {"LabelName": "a", "Subcategory": {"LabelName": "b"}}), "every node"),
        (lambda: reconstruction({"a": np.ones((0, 2))}, {"a": {"a": np.ones((0, 2))}}), "at least one row"),
        (lambda: code_ranks(csr_array((0, 3)), csr_array((0, 3))), "at least one of each"),
        (lambda: LatentLiveness()._compute([[[0]], [[0]]], [[[1.0]], [[1.0], [1.0]]], 3), "of 1 streams"),
        (lambda: LatentLiveness()._compute([[[0], [1]]], [[[1.0], [1.0]]], 3, streams=["a", "a"]), "each once"),
        (lambda: LatentLiveness()._compute([[[0, 0]]], [[[1.0, 2.0]]], 3), "more than once"),
        (lambda: Reconstruction()._compute([[1.0], [1.0, 2.0]], [[1.0], [1.0]]), "the same number of values"),
        (lambda: DictionaryStability()._compute([[1.0], [1.0, 2.0]], [[1.0], [1.0]]), "the same number of values"),
        (lambda: Monosemanticity()._compute([[0], [0, 1]], [[1.0]], [[1.0]]), "as many rows and values"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_a_deep_taxonomy_is_read():
    taxonomy = {"LabelName": "0"}
    for depth in range(1, 3000):
        taxonomy = {"LabelName": str(depth), "Subcategory": [taxonomy]}
    assert taxonomy_buckets(["2999", "0"], taxonomy).shape == (3000, 2)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_odd_codes_end_in_a_sentence_or_in_the_right_counts(data):
    rows, k = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    if data.draw(st.booleans()):
        indices = data.draw(lists_of(INDICES, rows=rows, length=k))
        values = data.draw(lists_of(VALUES, rows=rows, length=k))
        size = data.draw(SIZES)
    else:
        size = data.draw(st.integers(max(k, 1), 6))
        indices = [data.draw(st.permutations(range(size)))[:k] for _ in range(rows)]
        values = [data.draw(st.lists(st.floats(0, 4, width=32), min_size=k, max_size=k)) for _ in range(rows)]
    streams = [[row] for row in indices], [[row] for row in values]
    sides = {
        f"{side}_{part}": lists
        for side in ("query", "reference")
        for part, lists in zip(("indices", "values"), (indices, values), strict=True)
    }
    found = outcome(
        lambda: (
            LatentLiveness()._compute(*streams, num_latents=size),
            ConceptUniversality()._compute(*streams, num_latents=size, threshold=0.0),
            CrossRetrieval()._compute(**sides, num_latents=size),
        )
    )
    if found is None:
        return
    liveness, universality, _ = found
    dense = np.zeros((rows, size))
    for row, (latents, strengths) in enumerate(zip(indices, values, strict=True)):
        assert len(latents) == len(strengths)
        for latent, strength in zip(latents, strengths, strict=True):
            dense[row, latent] += strength
    assert liveness["frequency"]["0"] == pytest.approx((dense > 0).mean(axis=0).tolist())
    assert universality["energy"] == pytest.approx(dense.mean(axis=0).tolist(), abs=1e-6)
    assert np.isfinite(universality["entropy"]).all()


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_odd_labels_end_in_a_sentence_or_in_the_right_scores(data):
    rows = data.draw(st.integers(1, 3))
    labels = data.draw(lists_of(INDICES, rows=rows, length=2))
    classes = data.draw(st.integers(0, 6))
    indices, values = [[[0, 1], [0, 1]]] * rows, [[[1.0, 0.0], [1.0, 1.0]]] * rows
    flat = [[0, 1]] * rows, [[1.0, 0.0]] * rows
    names = [str(number) for number in range(classes)]
    found = outcome(
        lambda: (
            ConceptAlignment()._compute(indices, values, labels, num_latents=3, label_names=names),
            ConceptProbe()._compute(*flat, labels, num_latents=3, num_classes=classes),
        )
    )
    if found is None:
        return
    alignment, probe = found
    known = any(len(row) for row in labels)
    # Latent 0 fires alike in both streams, latent 1 in the second only.
    assert alignment["per_latent"] == [[float(known), 0.0, 0.0]]
    assert alignment["live"] == [known, False, False]
    assert probe["classes"] == []


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_odd_vectors_end_in_a_sentence_or_in_finite_figures(data):
    rows = data.draw(st.integers(1, 3))
    one, other = (data.draw(lists_of(VALUES, rows=rows, length=2)) for _ in range(2))
    calls = (
        lambda: CrossRetrieval(config_name="vectors")._compute(queries=one, references=other)["mrr"],
        lambda: DictionaryStability()._compute(one, other)["stability"],
        lambda: Reconstruction()._compute(one, other)["cosine"]["target"]["source"],
        lambda: Reconstruction()._compute(one, other)["nmse"]["target"]["source"],
    )
    for call in calls:
        figure = outcome(call)
        if figure is None:
            continue
        assert all(np.isfinite(np.array(side, float)).all() for side in (one, other))
        assert np.isfinite(figure)


@settings(deadline=None, max_examples=60)
@given(positives=st.integers(0, 12), negatives=st.integers(0, 12), min_count=st.integers(-1, 12))
def test_probes_of_few_samples(positives, negatives, min_count):
    labels = csr_array(np.repeat([[1.0], [0.0]], [positives, negatives], axis=0).astype(np.float32))
    codes = csr_array(np.linspace(0, 1, positives + negatives, dtype=np.float32)[:, None].repeat(2, axis=1))
    found = outcome(lambda: concept_probe(codes, labels, min_count=min_count))
    if found is None:
        assert min_count < 5 or positives + negatives == 0
        return
    assert len(found["classes"]) == int(min(positives, negatives) > min_count)
    assert np.isfinite(found["loss"]).all()
