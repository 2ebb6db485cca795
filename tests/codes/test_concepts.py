"""Names of latents."""

import numpy as np
import pytest

from sparc_hf.cli import main
from sparc_hf.codes.code_table import CodeTable
from sparc_hf.codes.concepts import Concept, SimilarWord, load_concepts, log_odds_z, name_concepts, save_concepts
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.hub.cards import write_model_card
from sparc_hf.model_folder import save_model

ROWS = 200


@pytest.fixture(scope="module")
def planted():
    """Latent 0 fires on dogs in both streams, latent 1 on every second row whatever it shows, latent 2 never."""
    draws = np.random.default_rng(0)
    dog = draws.random(ROWS) < 0.3
    every_second = np.arange(ROWS) % 2 == 0
    latents = np.tile(np.array([0, 1], np.int32), (ROWS, 1))
    values = np.stack([dog * draws.uniform(1, 2, ROWS), every_second * 1.0], axis=1).astype(np.float32)
    labels = np.stack([dog, draws.random(ROWS) < 0.5], axis=1).astype(np.uint8)
    features = FeatureDataset.from_arrays(
        {"a": draws.normal(size=(ROWS, 4)), "b": draws.normal(size=(ROWS, 3))},
        ids=[f"image-{row}" for row in range(ROWS)],
        text=[f"A {'puppy' if one else 'house'} in the garden" for one in dog],
        labels=labels,
        label_names=["dog", "noise"],
    )
    both = {"a": latents, "b": latents}, {"a": values, "b": values}
    codes = CodeTable.from_arrays(*both, num_latents=3, encoding="single")
    return features, codes, dog


def test_a_planted_concept_gets_its_label_and_its_word(planted):
    features, codes, dog = planted
    concepts = {concept.latent: concept for concept in name_concepts(codes, features)}
    assert set(concepts) == {0, 1}
    found = concepts[0]
    assert found.name == "dog"
    assert found.labels[0].count == 2 * dog.sum()
    assert found.labels[0].lift == pytest.approx(1 / dog.mean(), abs=1e-3)
    assert found.words[0].name == "puppy"
    assert found.fires == {"a": pytest.approx(dog.mean()), "b": pytest.approx(dog.mean())}
    strongest = int(np.argmax(codes.csr("a").toarray()[:, 0]))
    assert found.samples["a"][0] == f"image-{strongest}"
    assert concepts[1].name is None
    assert "garden" not in {word.name for concept in concepts.values() for word in concept.words[:1]}


def test_captions_alone_name_by_words(planted):
    features, codes, _ = planted
    bare = FeatureDataset.from_arrays({name: features.array(name) for name in ("a", "b")}, text=features.text)
    concepts = {concept.latent: concept for concept in name_concepts(codes, bare)}
    assert concepts[0].name == "puppy"
    assert concepts[0].samples["a"][0].isdigit()


def test_log_odds_by_hand():
    """Counts 3 of 4 inside, 2 of 12 outside; the prior is everything, scaled to 4, and a hundredth."""
    prior, rest = 5 / 16 * 4 + 0.01, 4.01
    inside = np.log((3 + prior) / (4 + rest - 3 - prior))
    outside = np.log((2 + prior) / (12 + rest - 2 - prior))
    expected = (inside - outside) / np.sqrt(1 / (3 + prior) + 1 / (2 + prior))
    assert log_odds_z(np.array([3.0]), 4, np.array([5.0]), 16) == pytest.approx([expected])


def test_concepts_are_saved_and_loaded(planted, tmp_path):
    features, codes, _ = planted
    concepts = name_concepts(codes, features)
    save_concepts(concepts, tmp_path, rows=ROWS)
    assert load_concepts(tmp_path) == concepts
    assert isinstance(concepts[0], Concept)
    (tmp_path / "concepts.json").write_text('{"format_version": 9, "concepts": {}}')
    with pytest.raises(ValueError, match="format version 9"):
        load_concepts(tmp_path)
    assert load_concepts(tmp_path / "nothing") == []


def test_wrong_inputs(planted):
    features, codes, _ = planted
    with pytest.raises(ValueError, match="codes of 200 rows but features of 10"):
        name_concepts(codes, features.select(slice(0, 10)))
    bare = FeatureDataset.from_arrays({name: features.array(name) for name in ("a", "b")})
    with pytest.raises(ValueError, match="labels"):
        name_concepts(codes, bare)
    joint = CodeTable.from_arrays({"a": codes.indices("a")}, {"a": codes.values("a")}, num_latents=3, encoding="joint")
    with pytest.raises(ValueError, match="single-stream"):
        name_concepts(joint, features)


def test_the_command_and_the_card(planted_folder, tmp_path, capsys):
    from conftest import tiny_model

    save_model(tiny_model(3), tmp_path / "model")
    assert main(["concepts", "--model", str(tmp_path / "model"), "--features", str(planted_folder)]) == 0
    assert '"named"' in capsys.readouterr().out
    concepts = [concept for concept in load_concepts(tmp_path / "model") if concept.name]
    assert concepts
    card = write_model_card(tmp_path / "model").read_text()
    surest = max(concepts, key=lambda concept: concept.score)
    assert f"| {surest.latent} | {surest.name} |" in card


def test_a_vocabulary_names_what_nothing_else_names(planted):
    features, codes, _ = planted
    words = {latent: [SimilarWord("meadow", 0.4, 5.0), SimilarWord("sky", 0.1, 1.0)] for latent in (0, 1)}
    concepts = {concept.latent: concept for concept in name_concepts(codes, features, vocabulary=words)}
    assert concepts[0].name == "dog"
    assert (concepts[1].name, concepts[1].score) == ("meadow", 5.0)
    unsure = {1: [SimilarWord("meadow", 0.4, 2.9)]}
    assert {one.latent: one.name for one in name_concepts(codes, features, vocabulary=unsure)}[1] is None
    bare = FeatureDataset.from_arrays({name: features.array(name) for name in ("a", "b")})
    assert [one.name for one in name_concepts(codes, bare, vocabulary=words)] == ["meadow", "meadow"]
