"""Concept universality: by hand and against the Universal SAE code's numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy.sparse import csr_array

from sparc_hf.metrics.concept_universality.concept_universality import concept_universality


def sparse(*rows) -> csr_array:
    return csr_array(np.array(rows, np.float32))


def test_universality_by_hand():
    codes = {"a": sparse([1, 0.05, 0], [2, 0.5, 0], [3, 0, 0]), "b": sparse([1, 0, 0], [0.1, 0.5, 0], [0, 0, 0])}
    found = concept_universality(codes, atom_norms={"a": np.array([1, 1, 1]), "b": np.array([2, 1, 1])})
    # Latent 0 fires on 3 rows and on 1 (0.1 is not above 0.1), once together; latent 1 once each; latent 2 never.
    assert {name: count.tolist() for name, count in found["fires"].items()} == {"a": [3, 1, 0], "b": [1, 1, 0]}
    assert found["cofires"].tolist() == [1, 1, 0]
    entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    np.testing.assert_allclose(found["entropy"], [entropy, 1, 0], atol=1e-8)
    np.testing.assert_allclose(found["cofire_iou"], [1 / 4, 1 / 2, 0])
    np.testing.assert_allclose(found["cofire_jaccard"], [1 / 3, 1, 0])
    np.testing.assert_allclose(found["cofire_proportion"]["a"], [1 / 3, 1, 0])
    np.testing.assert_allclose(found["energies"]["b"], [2 * 1.1 / 3, 0.5 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(found["energy"], [6 / 3 + 2.2 / 3, 0.55 / 3 + 0.5 / 3, 0], rtol=1e-6)


def test_unusual_input():
    alone = concept_universality({"a": sparse([1, 0])})
    assert alone["entropy"].tolist() == [0, 0]
    np.testing.assert_allclose(alone["cofire_jaccard"], [1, 0])
    with pytest.raises(ValueError, match="same rows"):
        concept_universality({"a": sparse([1, 0]), "b": sparse([1, 0], [1, 0])})
    with pytest.raises(ValueError, match="negative"):
        concept_universality({"a": sparse([1, 0])}, threshold=-1)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), streams=st.integers(1, 4), rows=st.integers(1, 20), latents=st.integers(1, 8))
def test_universality_properties(seed, streams, rows, latents):
    draws = np.random.default_rng(seed)
    dense = {str(n): draws.random((rows, latents)) * (draws.random((rows, latents)) < 0.5) for n in range(streams)}
    found = concept_universality({name: csr_array(value) for name, value in dense.items()}, threshold=0.2)
    firing = np.stack([value > 0.2 for value in dense.values()])
    assert found["cofires"].tolist() == firing.all(axis=0).sum(axis=0).tolist()
    np.testing.assert_allclose(
        found["cofire_jaccard"], firing.all(axis=0).sum(axis=0) / np.maximum(firing.any(axis=0).sum(axis=0), 1)
    )
    for name in ("entropy", "cofire_iou", "cofire_jaccard"):
        assert ((found[name] >= 0) & (found[name] <= 1)).all()
    order = draws.permutation(latents)
    permuted = concept_universality({name: csr_array(value[:, order]) for name, value in dense.items()}, threshold=0.2)
    np.testing.assert_allclose(permuted["entropy"], found["entropy"][order])
    copies = concept_universality({name: csr_array(dense["0"]) for name in "abc"}, threshold=0.2)
    fired = copies["fires"]["a"] > 0
    np.testing.assert_allclose(copies["entropy"][fired], 1)
    np.testing.assert_allclose(copies["cofire_jaccard"][fired], 1)


def test_universality_equals_the_universal_sae_code(golden):
    tensors = load_file(golden / "usae_analysis.safetensors")
    names = ["SigLIP", "ViT", "MAE"]
    found = concept_universality({name: csr_array(tensors[f"sae.{name}.z_activations"]) for name in names})
    for name in names:
        assert np.array_equal(found["fires"][name], tensors[f"sums_thresh.{name}"])
        np.testing.assert_allclose(
            found["cofire_proportion"][name], tensors[f"unsorted.cofire_proportions.{name}"], atol=1e-6
        )
        np.testing.assert_allclose(found["energies"][name], tensors[f"sae.{name}.energies"], atol=1e-6)
    np.testing.assert_allclose(found["entropy"], tensors["unsorted.firing_entropy"], atol=1e-6)
    np.testing.assert_allclose(found["cofire_iou"], tensors["unsorted.cofire_iou"], atol=1e-6)
    np.testing.assert_allclose(found["energy"], tensors["energies_agg"], atol=1e-6)
    order = np.argsort(-found["energy"], kind="stable")
    np.testing.assert_allclose(found["entropy"][order], tensors["sorted.firing_entropy"], atol=1e-6)
