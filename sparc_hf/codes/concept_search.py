"""Search for latents by what they are called and go with: exact name first, then name, label and word."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sparc_hf.codes.concepts import Concept

_WORD = re.compile(r"\w+")
# What of a latent is searched, the most telling first.
FIELDS = ("name", "label", "word", "vocabulary word")
NUMBER = "number"
# Ranks of a match, the smaller the more directly meant: in each field the whole text before a word of it, then in each
# field the beginning of a word, then the inside of one.
EXACT_NAME = 0
BEGINNING = 2 * len(FIELDS)
INSIDE = BEGINNING + len(FIELDS)
NOWHERE = INSIDE + len(FIELDS)


class _Folded(NamedTuple):
    """A text without case, spaces made one, and its words; where it has only signs, these."""

    text: str
    words: tuple[str, ...]


class _Entry(NamedTuple):
    """A text a latent can be found by: its field (position in FIELDS), as written, folded, and its z."""

    field: int
    written: str
    folded: _Folded
    z: float


@dataclass(frozen=True)
class LatentMatch:
    """A latent that a query means.

    Attributes:
        latent: its number.
        rank: 0 for a latent of exactly that number or name; else the larger the less directly it is meant: by its
            name, a label, a word of captions or of a vocabulary, then by the beginning of such words, then by their
            inside.
        reason: why it matched, such as `name "circle"` or `label "circle"`; "" where nothing was searched for.
        z: how surely the latent goes with what matched, in standard deviations; 0 for a number.
    """

    latent: int
    rank: int = EXACT_NAME
    reason: str = ""
    z: float = 0.0

    @property
    def is_by_name(self) -> bool:
        """Whether number or name matched, not what the latent goes with."""
        return self.rank in (EXACT_NAME, EXACT_NAME + 1, BEGINNING, INSIDE)

    @property
    def holds_whole_words(self) -> bool:
        """Whether every word of the query was found as a word, not as a part of one."""
        return self.rank < BEGINNING


class ConceptSearch:
    """Concepts of a model, ready to be searched.

    Args:
        concepts: what `name_concepts` or `load_concepts` returned.
        num_latents: of the model; with it, a number finds the latent of that number, named or not.
    """

    def __init__(self, concepts: Sequence[Concept], num_latents: int = 0):
        self.num_latents = num_latents
        self._entries = {concept.latent: _entries_of(concept) for concept in concepts}
        # Most latents hold no word of a query at all, which one look at all of their texts tells.
        self._joined = {
            latent: "\n".join(entry.folded.text for entry in entries) for latent, entries in self._entries.items()
        }

    def search(self, query: str) -> list[LatentMatch]:
        """Return the latents that hold every word of a query, the most directly meant first, then the surest.

        A number means the latent of that number, and those of that very name. Case does not matter.
        """
        folded = _folded(query)
        if not folded.words:
            return []
        by_number = self._numbered(folded.text)
        matches = [
            match
            for latent, entries in self._entries.items()
            if all(word in self._joined[latent] for word in folded.words)
            and (match := _match(latent, entries, folded)) is not None
            and not (by_number and (match.rank > EXACT_NAME or latent == by_number[0].latent))
        ]
        return by_number + sorted(matches, key=lambda match: (match.rank, -match.z, match.latent))

    def named(self, query: str) -> list[LatentMatch]:
        """Return every latent of exactly that name, the surest first, or else the one that is meant most directly.

        Parts of words are not enough: "cat" does not mean "cathedral".

        Raises:
            ValueError: where there is none, with names like the query, or else names there are.
        """
        matches = self.search(query)
        if exact := [match for match in matches if match.rank == EXACT_NAME]:
            return exact
        if matches and matches[0].holds_whole_words:
            return matches[:1]
        raise ValueError(f"this model has no concept named `{query}`; {self._names_like(matches)}")

    def _numbered(self, query: str) -> list[LatentMatch]:
        is_number = query.isascii() and query.isdigit() and len(query) < 12
        return [LatentMatch(int(query), reason=NUMBER)] if is_number and int(query) < self.num_latents else []

    def _names_like(self, matches: Sequence[LatentMatch]) -> str:
        like = [match.latent for match in matches]
        names = [
            entry.written for latent in like or self._entries for entry in self._entries[latent][:1] if not entry.field
        ]
        distinct = list(dict.fromkeys(names)) if like else sorted(set(names))
        if not distinct:
            return "it has no names (see `sparc concepts`)"
        more = " ..." if len(distinct) > 20 else ""
        return f"it has {', '.join(distinct[:20])}{more} (see `sparc concepts`)"


def _folded(text: str) -> _Folded:
    folded = " ".join(text.casefold().split())
    return _Folded(folded, tuple(_WORD.findall(folded) or folded.split()))


def _entries_of(concept: Concept) -> list[_Entry]:
    """Return what a latent can be found by, its name first."""
    texts = [] if concept.name is None else [(0, concept.name, concept.score)]
    for field, evidence in enumerate((concept.labels, concept.words, concept.vocabulary), start=1):
        texts += [(field, item.name, item.z) for item in evidence]
    return [_Entry(field, text, _folded(text), z) for field, text, z in texts]


def _match(latent: int, entries: Sequence[_Entry], query: _Folded) -> LatentMatch | None:
    """Return how a latent is meant by a query, or None where one of its words is nowhere."""
    alone, place = min((_rank(entry, query), at) for at, entry in enumerate(entries))
    by_word = [
        min((_rank(entry, _Folded(word, (word,))), at) for at, entry in enumerate(entries)) for word in query.words
    ]
    rank, places = max(rank for rank, _ in by_word), sorted({at for _, at in by_word})
    if rank < BEGINNING:
        rank |= 1  # a text that is one of the words is not the whole query
    if alone <= rank:
        rank, places = alone, [place]
    if rank >= NOWHERE:
        return None
    reason = " and ".join(f'{FIELDS[entries[at].field]} "{entries[at].written}"' for at in places)
    return LatentMatch(latent, rank, reason, min(entries[at].z for at in places))


def _rank(entry: _Entry, query: _Folded) -> int:
    """Return how directly a query lies in a text, from EXACT_NAME to NOWHERE."""
    text, words = entry.folded
    if text == query.text:
        return 2 * entry.field
    if all(word in words for word in query.words):
        return 2 * entry.field + 1
    if all(any(own.startswith(word) for own in words) for word in query.words):
        return BEGINNING + entry.field
    return INSIDE + entry.field if all(word in text for word in query.words) else NOWHERE
