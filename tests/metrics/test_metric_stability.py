"""Dictionary stability, bridge scores and monosemanticity: by hand and in general."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from sparc_hf.metrics.dictionary_stability import dictionary_stability
from sparc_hf.metrics.dictionary_stability.dictionary_stability import bridge_scores, match_atoms
from sparc_hf.metrics.monosemanticity.monosemanticity import monosemanticity


def test_matching_by_hand():
    atoms = np.array([[1.0, 0.0], [0.0, 2.0]])
    found = match_atoms(atoms, np.array([[0.0, 1.0], [3.0, 4.0]]))
    # Both want the other's place: 0 with (3, 4) costs nothing of 1 with (0, 1).
    assert found["match"].tolist() == [1, 0]
    np.testing.assert_allclose(found["cosines"], [0.6, 1.0])
    assert found["stability"] == pytest.approx(0.8)
    assert found["same_place"] == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"\[2, 2\], \[1, 2\]"):
        match_atoms(atoms, atoms[:1])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31 - 1), latents=st.integers(1, 12), width=st.integers(2, 6))
def test_a_shuffled_copy_is_the_same_dictionary(seed, latents, width):
    draws = np.random.default_rng(seed)
    atoms = draws.normal(size=(latents, width))
    order = draws.permutation(latents)
    found = match_atoms(atoms, 3 * atoms[order])
    assert found["stability"] == pytest.approx(1)
    assert order[found["match"]].tolist() == list(range(latents))
    other = draws.normal(size=(latents, width))
    assert match_atoms(atoms, other)["stability"] == pytest.approx(match_atoms(other, atoms)["stability"])
    assert match_atoms(atoms, other)["stability"] >= match_atoms(atoms, other)["same_place"] - 1e-12


@pytest.mark.parametrize("at_once", [1, 512])
def test_bridges_by_hand(monkeypatch, at_once):
    monkeypatch.setattr(dictionary_stability, "LATENTS_AT_ONCE", at_once)
    one = csr_array(np.array([[1.0, 0.0], [2.0, 1.0]]))
    other = csr_array(np.array([[3.0, 0.0], [0.0, 4.0]]))
    atoms, others = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 0.0], [0.6, 0.8]])
    found = bridge_scores(one, other, atoms, others)
    # Co-activation [[3, 8], [0, 4]] / 2, cosines [[1, 0.6], [0, 0.8]].
    np.testing.assert_allclose(found["bridge"], [1.5 + 4 * 0.6, 2 * 0.8])
    np.testing.assert_allclose(found["own"], [1.5, 1.6])
    assert found["own_share"] == pytest.approx(3.1 / 5.5)
    assert np.isnan(bridge_scores(one * 0, other, atoms, others)["own_share"])
    with pytest.raises(ValueError, match="same samples"):
        bridge_scores(one[:1], other, atoms, others)
    with pytest.raises(ValueError, match="one space"):
        bridge_scores(one, other, atoms, np.ones((2, 3)))


def test_monosemanticity_by_hand():
    features = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 4.0], [0.0, 0.0]])
    rows = np.array([[0, 1, 2], [0, 0, -1], [2, -1, -1], [0, 3, -1]])
    values = np.array([[1.0, 2.0, 3.0], [1.0, 5.0, 9.0], [4.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    found = monosemanticity(rows, values, features)
    # Pairs (0, 1): 0 with weight 2; (0, 2): 0.6 with weight 3; (1, 2): 0.8 with weight 6.
    np.testing.assert_allclose(found["per_latent"], [(1.8 + 4.8) / 11, 1.0, np.nan, 0.0], atol=1e-12)
    assert found["latents"] == 3
    assert found["mean"] == pytest.approx((6.6 / 11 + 1) / 3)
    assert np.isnan(monosemanticity(rows[2:3], values[2:3], features)["mean"])
    with pytest.raises(ValueError, match="row 2 is named, but `features` has 2 rows"):
        monosemanticity(rows[:1], values[:1], features[:2])
    with pytest.raises(ValueError, match=r"\[latents, m\]"):
        monosemanticity(rows, values[:1], features)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31 - 1), samples=st.integers(2, 8))
def test_monosemanticity_is_the_weighted_mean_over_pairs(seed, samples):
    draws = np.random.default_rng(seed)
    features, values = draws.normal(size=(samples, 4)), draws.random((1, samples)) + 0.01
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    weights = np.triu(values.T @ values, 1)
    expected = (weights * (units @ units.T)).sum() / weights.sum()
    rows = np.arange(samples)[None]
    assert monosemanticity(rows, values, features)["mean"] == pytest.approx(expected)
    assert monosemanticity(rows, 7 * values, features)["mean"] == pytest.approx(expected)
