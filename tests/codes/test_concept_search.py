"""Search for latents: exact name, then name, label, word; and why."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparc_hf.codes.concept_search import ConceptSearch
from sparc_hf.codes.concepts import Concept, Evidence, SimilarWord, surest_concepts

WORDS = st.text("abc -1ß中", min_size=1, max_size=6)


def concept(latent, name, score=5.0, *, labels=(), words=(), vocabulary=()):
    """A concept whose labels and words are (name, z)."""
    evidence = [[Evidence(text, 2.0, 3, z) for text, z in texts] for texts in (labels, words)]
    return Concept(
        latent, name, score, {}, *evidence, vocabulary=[SimilarWord(text, 1.0, z) for text, z in vocabulary]
    )


CONCEPTS = [
    concept(0, "dark background", 14.0, labels=[("dark background", 14.0), ("circle", 2.0)]),
    concept(1, "circle", 3.5, labels=[("circle", 3.5)]),
    concept(2, "Circle", 9.0, labels=[("circle", 9.0)]),
    concept(3, "half circle", 20.0),
    concept(4, "semicircle", 30.0, labels=[("semicircle", 30.0)]),
    concept(5, "grey", 8.0, labels=[("grey", 8.0), ("circle", 4.0)], words=[("circle", 9.0)]),
    concept(6, "red", 7.0, words=[("circles", 4.0)]),
    concept(7, None, 0.0, words=[("circle", 5.0)]),
    concept(8, "circus", 6.0, vocabulary=[("circle", 7.0)]),
    concept(9, "tent", 6.0),
]


def test_exact_names_come_first_then_names_labels_words_and_parts():
    found = ConceptSearch(CONCEPTS).search("CIRCLE ")
    assert [(match.latent, match.reason) for match in found] == [
        (2, 'name "Circle"'),
        (1, 'name "circle"'),
        (3, 'name "half circle"'),
        (5, 'label "circle"'),
        (0, 'label "circle"'),
        (7, 'word "circle"'),
        (8, 'vocabulary word "circle"'),
        (6, 'word "circles"'),
        (4, 'name "semicircle"'),
    ]
    assert [match.latent for match in found if match.holds_whole_words] == [2, 1, 3, 5, 0, 7, 8]
    assert found[3].z == 4.0


def test_several_words_may_match_in_several_places_but_one_text_is_better():
    concepts = [
        concept(0, "red", labels=[("red", 9.0), ("background", 8.0), ("dark", 7.0)]),
        concept(1, "blue", labels=[("dark background", 3.0)]),
        concept(2, "dark background"),
        concept(3, "dark"),
    ]
    found = ConceptSearch(concepts).search("dark background")
    assert [match.latent for match in found] == [2, 1, 0]
    assert found[2].reason == 'label "background" and label "dark"'
    assert [match.latent for match in ConceptSearch(concepts).search("background dark")][:2] == [2, 0]


def test_a_number_means_that_latent():
    concepts = [concept(3, "9"), concept(9, "cat"), concept(4, "catch 9")]
    found = ConceptSearch(concepts, num_latents=12).search("9")
    assert [(match.latent, match.reason) for match in found] == [(9, "number"), (3, 'name "9"')]
    assert [match.latent for match in ConceptSearch(concepts, num_latents=5).search("9")] == [3, 4]
    assert ConceptSearch(concepts, num_latents=12).search("11")[0].latent == 11


def test_what_is_meant_by_a_name():
    search = ConceptSearch(CONCEPTS, num_latents=10)
    assert [match.latent for match in search.named("circle")] == [2, 1]
    assert [match.latent for match in search.named("half")] == [3]
    assert [(match.latent, match.reason) for match in search.named("grey circle")] == [
        (5, 'name "grey" and label "circle"')
    ]
    with pytest.raises(ValueError, match="no concept named `circ`; it has half circle, Circle, circle"):
        ConceptSearch(CONCEPTS[1:4]).named("circ")
    with pytest.raises(ValueError, match=r"no concept named `zebra`; it has Circle, circle \(see"):
        ConceptSearch(CONCEPTS[1:3]).named("zebra")
    with pytest.raises(ValueError, match="it has no names"):
        ConceptSearch([concept(7, None)]).named("zebra")


@example(names=["1", "1-"], labels=[], query="1")
@given(names=st.lists(st.none() | WORDS, min_size=1, max_size=6), labels=st.lists(WORDS, max_size=3), query=WORDS)
def test_every_match_holds_every_word_and_every_name_finds_itself(names, labels, query):
    concepts = [concept(at, name, labels=[(label, 1.0) for label in labels]) for at, name in enumerate(names)]
    search = ConceptSearch(concepts)
    found = search.search(query)
    assert [match.rank for match in found] == sorted(match.rank for match in found)
    holding = set()
    for one in concepts:
        texts = [text.casefold() for text in [one.name or "", *(label.name for label in one.labels)]]
        if all(any(word in text for text in texts) for word in query.casefold().replace("-", " ").split()):
            holding.add(one.latent)
    if query.casefold().replace("-", " ").split():
        assert {match.latent for match in found} == holding
    for name in filter(None, names):
        if name.split():
            first = concepts[search.search(name)[0].latent].name
            assert " ".join((first or "").casefold().split()) == " ".join(name.casefold().split())


def test_the_surest_concepts_are_one_of_each_name():
    found = surest_concepts(CONCEPTS, 3)
    assert [(one.latent, one.score) for one in found] == [(4, 30.0), (3, 20.0), (0, 14.0)]
    twice = surest_concepts([concept(0, "a", 4.0), concept(1, "a", 5.0), concept(2, None, 9.0)], 3)
    assert [one.latent for one in twice] == [1]
