"""Captions made wrong by one word, as token ids: what an encoder has to tell apart that is to see every attribute."""

import re
from collections.abc import Sequence

import numpy as np
from transformers import CLIPTokenizer

from sparc_hf.demo.captions import NUMBER_WORDS, ROW_WORDS, SIDE_WORDS, SIZE_SYNONYMS, VERTICAL_WORDS
from sparc_hf.demo.taxonomy import (
    BACKGROUND_SYNONYMS,
    COLOUR_SYNONYMS,
    SHAPE_SYNONYMS,
    TEXTURE_SYNONYMS,
    TONE_SYNONYMS,
    plural,
)

WordGroup = Sequence[Sequence[str]]
"""Words that may stand for each other in a sentence, by class: words of one class mean the same."""

_PLURALS: WordGroup = [[plural(word) for word in words] for words in SHAPE_SYNONYMS]
# Shapes, plural shapes, colours and textures: a scene has several, so a wrong one must not be another object's.
OBJECT_GROUPS: tuple[WordGroup, ...] = (SHAPE_SYNONYMS, _PLURALS, COLOUR_SYNONYMS, TEXTURE_SYNONYMS)
OTHER_GROUPS: tuple[WordGroup, ...] = (
    SIZE_SYNONYMS,
    BACKGROUND_SYNONYMS,
    TONE_SYNONYMS,
    SIDE_WORDS,
    ROW_WORDS,
    VERTICAL_WORDS,
    [[word] for word in NUMBER_WORDS[2:]],
)


def _any_of(*groups: WordGroup) -> str:
    return "(?:" + "|".join(word for group in groups for words in group for word in words) + ")"


_OBJECT_PHRASE = re.compile(
    rf"\ban? (?:{_any_of(SIZE_SYNONYMS, COLOUR_SYNONYMS, TEXTURE_SYNONYMS)} )*"
    rf"{_any_of(SHAPE_SYNONYMS)}(?: in {_any_of(COLOUR_SYNONYMS)})?\b"
)


def object_phrases(captions: Sequence[str]) -> list[str]:
    """Return the different noun phrases of single objects in captions, such as "a small red circle"."""
    return list(dict.fromkeys(phrase for caption in captions for phrase in _OBJECT_PHRASE.findall(caption)))


class WordSwaps:
    """Replaces words of captions by others of their group that are wrong for the scene.

    Nothing is known of a scene but its captions: a shape, colour or texture that any of them names is never put in.

    Args:
        tokenizer: has most words of the groups as one token; the others are not replaced.
        token_ids: int64 [scenes, captions, tokens], all captions of all scenes.
    """

    def __init__(self, tokenizer: CLIPTokenizer, token_ids: np.ndarray):
        vocabulary = tokenizer.get_vocab()
        self._group = np.full(len(vocabulary), -1)
        self._class = np.full(len(vocabulary), -1)
        for group, classes in enumerate((*OBJECT_GROUPS, *OTHER_GROUPS)):
            # The plural of a shape is the class of its singular.
            first = 0 if classes is _PLURALS else 100 * group
            for place, words in enumerate(classes):
                tokens = [vocabulary[f"{word}</w>"] for word in words if f"{word}</w>" in vocabulary]
                self._group[tokens], self._class[tokens] = group, first + place
        self._words = np.flatnonzero(self._group >= 0)
        self._articles = np.array([vocabulary["a</w>"], vocabulary["an</w>"]])
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        self._article_before = self._articles[[int(word[0] in "aeiou") for word in words]]
        self._named = self._classes_named(token_ids)

    def _classes_named(self, token_ids: np.ndarray) -> np.ndarray:
        """Which classes of objects a scene's captions name, bool [scenes, classes]."""
        named = np.zeros((len(token_ids), self._class.max() + 1), bool)
        classes = np.where(self._group < len(OBJECT_GROUPS), self._class, -1)[token_ids].reshape(len(token_ids), -1)
        scenes, positions = np.nonzero(classes >= 0)
        named[scenes, classes[scenes, positions]] = True
        return named

    def swapped(
        self, token_ids: np.ndarray, scenes: np.ndarray, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return variants of captions, each wrong by one word, at different places as far as there are enough.

        Args:
            token_ids: int64 [captions, tokens].
            scenes: the scene of each caption.
            count: variants of each caption.
            rng: source of places and words.

        Returns:
            int64 [captions, count, tokens], and bool [captions, count]: whether there was a word to replace.
        """
        places = self._places(token_ids, count, rng)
        old = np.take_along_axis(token_ids, places, axis=1)
        fits = self._group[self._words] == self._group[old][..., None]
        fits &= self._class[self._words] != self._class[old][..., None]
        fits &= ~self._named[scenes][:, None, self._class[self._words]]
        valid = fits.any(axis=2)
        new = self._words[np.argmax(rng.random(fits.shape) * fits, axis=2)]
        variants = np.repeat(token_ids[:, None], count, axis=1)
        rows, columns = np.nonzero(valid)
        at = places[rows, columns]
        variants[rows, columns, at] = new[rows, columns]
        # A caption starts with a special token, so that there is a place before every word.
        before = variants[rows, columns, at - 1]
        articles = np.where(np.isin(before, self._articles), self._article_before[new[rows, columns]], before)
        variants[rows, columns, at - 1] = articles
        return variants, valid

    def _places(self, token_ids: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Positions of words that have a group, int64 [captions, count]; again from the first where they run out."""
        has_group = self._group[token_ids] >= 0
        order = np.argsort(rng.random(token_ids.shape) - has_group, axis=1)
        turns = np.arange(count)[None, :] % np.maximum(has_group.sum(axis=1), 1)[:, None]
        return np.take_along_axis(order, turns, axis=1)
