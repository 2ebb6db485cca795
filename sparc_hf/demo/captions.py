"""Sentences about a scene: varied wording, true facts, and never all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparc_hf.demo.taxonomy import (
    BACKGROUND_SYNONYMS,
    COLOUR_SYNONYMS,
    SHAPE_SYNONYMS,
    TEXTURE_SYNONYMS,
    TONE_SYNONYMS,
    plural,
)

SIZE_SYNONYMS = (("small", "little", "tiny"), ("medium", "mid-sized"), ("large", "big", "huge"))
SIDE_WORDS = (("left",), ("right",))
ROW_WORDS = (("top",), ("bottom",))
VERTICAL_WORDS = (("above", "over"), ("below", "under"))
NUMBER_WORDS = ("no", "one", "two", "three")
OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "a scene with ", "we see ", "a drawing of ")


@dataclass(frozen=True)
class ObjectFacts:
    """What a caption may say of one object: indices into the class tuples, size 0..2 and centre in pixels."""

    shape: int
    colour: int
    texture: int
    size: int
    x: float
    y: float


class _Writer:
    """Draws words; the random numbers come in one block because single draws are slow."""

    def __init__(self, rng: np.random.Generator):
        self._draws = iter(rng.random(64).tolist())

    def chance(self, probability: float) -> bool:
        return next(self._draws) < probability

    def index(self, count: int) -> int:
        return int(next(self._draws) * count)

    def pick(self, options: Sequence[str]) -> str:
        return options[self.index(len(options))]


def with_article(phrase: str) -> str:
    """Return "a red circle" for "red circle", and "an" where it belongs."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _noun_phrase(facts: ObjectFacts, writer: _Writer, detail: float) -> str:
    """`[size] [colour] [texture] shape` with some of the adjectives; `detail` is their share, 0..1."""
    shape, colour = writer.pick(SHAPE_SYNONYMS[facts.shape]), writer.pick(COLOUR_SYNONYMS[facts.colour])
    texture = writer.pick(TEXTURE_SYNONYMS[facts.texture])
    words = [shape]
    tell_texture = writer.chance(detail if facts.texture else 0.3 * detail)
    tell_colour = writer.chance(0.92)
    if tell_texture and tell_colour and writer.chance(0.25):
        words = [texture, shape, "in", colour]
    else:
        words = [colour] * tell_colour + [texture] * tell_texture + words
    if writer.chance(0.6 * detail):
        words = [writer.pick(SIZE_SYNONYMS[facts.size]), *words]
    return with_article(" ".join(words))


def _place(facts: ObjectFacts, writer: _Writer) -> str:
    """Where an object lies: the image in thirds."""
    row = "top" if facts.y < 25 else "bottom" if facts.y > 39 else ""
    column = "left" if facts.x < 25 else "right" if facts.x > 39 else ""
    if row and column:
        return writer.pick((f"in the {row} {column} corner", f"at the {row} {column}", f"in the {row} {column}"))
    if column:
        return writer.pick((f"on the {column}", f"on the {column} side", f"at the {column} edge"))
    if row:
        return writer.pick((f"at the {row}", f"near the {row}", f"at the {row} edge"))
    return writer.pick(("in the middle", "in the centre", "at the centre"))


def _relation(first: ObjectFacts, second: ObjectFacts, writer: _Writer) -> str:
    """Words between two objects: where the first lies as seen from the second."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > 1.3 * abs(dy):
        side = "left" if dx < 0 else "right"
        return writer.pick((f"to the {side} of", f"{side} of", "next to", "beside", "and", "with"))
    if abs(dy) > 1.3 * abs(dx):
        side = VERTICAL_WORDS[int(dy >= 0)]
        return writer.pick((*side, *side, "and", "with"))
    return writer.pick(("and", "with", "near", "together with"))


def _background(background: int, tone: int, writer: _Writer) -> str:
    kind, shade = writer.pick(BACKGROUND_SYNONYMS[background]), writer.pick(TONE_SYNONYMS[tone])
    words = writer.pick((kind, shade, f"{shade} {kind}"))
    return f"on {with_article(words)} {writer.pick(('background', 'background', 'backdrop'))}"


def _one_object(facts: ObjectFacts, writer: _Writer) -> str:
    phrase = _noun_phrase(facts, writer, 0.8)
    if not writer.chance(0.6):
        return phrase
    place = _place(facts, writer)
    return f"{place} {phrase}" if writer.chance(0.2) else f"{phrase} {place}"


def _same_shapes(objects: Sequence[ObjectFacts], writer: _Writer) -> str:
    shape = plural(writer.pick(SHAPE_SYNONYMS[objects[0].shape]))
    colours = list(dict.fromkeys(writer.pick(COLOUR_SYNONYMS[facts.colour]) for facts in objects))
    if len({facts.colour for facts in objects}) == 1:
        return f"{NUMBER_WORDS[len(objects)]} {colours[0]} {shape}"
    listed = ", ".join(colours[:-1]) + " and " + colours[-1]
    return f"{NUMBER_WORDS[len(objects)]} {shape} in {listed}"


def _several_objects(objects: Sequence[ObjectFacts], writer: _Writer) -> str:
    if len({facts.shape for facts in objects}) == 1 and writer.chance(0.7):
        return _same_shapes(objects, writer)
    detail = 0.55 if len(objects) == 2 else 0.3
    phrases = [_noun_phrase(facts, writer, detail) for facts in objects]
    count = f"{NUMBER_WORDS[len(objects)]} {writer.pick(('shapes', 'objects', 'things'))}"
    if len(objects) == 2:
        if writer.chance(0.12):
            return f"{count}, one is {phrases[0]}"
        return f"{phrases[0]} {_relation(objects[0], objects[1], writer)} {phrases[1]}"
    if writer.chance(0.35):
        return f"{count} including {phrases[0]} and {phrases[1]}"
    if writer.chance(0.25):
        return f"{phrases[0]} {_relation(objects[0], objects[1], writer)} {phrases[1]}"
    return f"{phrases[0]}, {phrases[1]} and {phrases[2]}"


def write_caption(objects: Sequence[ObjectFacts], background: int, tone: int, rng: np.random.Generator) -> str:
    """One lower-case sentence that mentions about two to five facts of the scene.

    Args:
        objects: one to three objects.
        background: index into `taxonomy.BACKGROUNDS`.
        tone: index into `taxonomy.TONES`.
        rng: source of the wording.
    """
    writer = _Writer(rng)
    opening = writer.pick(OPENINGS)
    shift = writer.index(len(objects))
    turned = [*objects[shift:], *objects[:shift]]
    sentence = _one_object(turned[0], writer) if len(turned) == 1 else _several_objects(turned, writer)
    if writer.chance(0.5 if len(turned) == 1 else 0.3):
        scenery = _background(background, tone, writer)
        sentence = f"{scenery} {sentence}" if writer.chance(0.15) else f"{sentence} {scenery}"
    return opening + sentence
