"""The leaf classes of the demo world, their words, and their three-level taxonomy."""

from typing import Any

SHAPES = (
    "circle",
    "ellipse",
    "ring",
    "semicircle",
    "heart",
    "crescent",
    "square",
    "diamond",
    "pentagon",
    "hexagon",
    "cross",
    "triangle",
    "star",
    "arrow",
)
COLOURS = (
    "red",
    "orange",
    "yellow",
    "pink",
    "green",
    "cyan",
    "blue",
    "purple",
    "white",
    "grey",
    "black",
    "brown",
)
TEXTURES = ("solid", "shaded", "striped", "dotted", "checkered")
BACKGROUNDS = ("plain", "gradient", "grainy", "grid", "cloudy")
TONES = ("light", "dark")

CLASS_NAMES: tuple[str, ...] = (
    *SHAPES,
    *COLOURS,
    *TEXTURES,
    *(f"{name} background" for name in BACKGROUNDS),
    *(f"{name} background" for name in TONES),
)
"""Leaf classes in the order of their ids; the labels of a scene index this tuple."""

COLOUR_OFFSET = len(SHAPES)
TEXTURE_OFFSET = COLOUR_OFFSET + len(COLOURS)
BACKGROUND_OFFSET = TEXTURE_OFFSET + len(TEXTURES)
TONE_OFFSET = BACKGROUND_OFFSET + len(BACKGROUNDS)

SHAPE_IDS = range(COLOUR_OFFSET)
COLOUR_IDS = range(COLOUR_OFFSET, TEXTURE_OFFSET)
TEXTURE_IDS = range(TEXTURE_OFFSET, BACKGROUND_OFFSET)
BACKGROUND_IDS = range(BACKGROUND_OFFSET, TONE_OFFSET)
TONE_IDS = range(TONE_OFFSET, len(CLASS_NAMES))

# One list of words per class, in the order of the tuples above; the first word is the usual one.
SHAPE_SYNONYMS = (
    ("circle", "disc"),
    ("ellipse", "oval"),
    ("ring", "hoop"),
    ("semicircle", "dome"),
    ("heart",),
    ("crescent", "moon"),
    ("square", "box"),
    ("diamond", "rhombus"),
    ("pentagon",),
    ("hexagon",),
    ("cross", "plus"),
    ("triangle",),
    ("star",),
    ("arrow",),
)
COLOUR_SYNONYMS = (
    ("red", "crimson"),
    ("orange",),
    ("yellow", "golden"),
    ("pink", "rosy"),
    ("green",),
    ("cyan", "turquoise"),
    ("blue", "azure"),
    ("purple", "violet"),
    ("white",),
    ("grey", "gray"),
    ("black",),
    ("brown",),
)
TEXTURE_SYNONYMS = (
    ("solid", "uniform"),
    ("shaded", "fading"),
    ("striped", "stripy"),
    ("dotted", "spotted"),
    ("checkered", "chequered"),
)
BACKGROUND_SYNONYMS = (
    ("plain", "empty"),
    ("gradient", "blended"),
    ("grainy", "noisy"),
    ("grid", "lattice"),
    ("cloudy", "misty"),
)
TONE_SYNONYMS = (("light", "bright"), ("dark", "dim"))

_IRREGULAR_PLURALS = {"box": "boxes", "rhombus": "rhombuses", "cross": "crosses", "plus": "pluses"}


def plural(word: str) -> str:
    """Plural of a shape word."""
    return _IRREGULAR_PLURALS.get(word, word + "s")


def _word_table() -> dict[str, int]:
    table: dict[str, int] = {}
    groups = (SHAPE_SYNONYMS, COLOUR_SYNONYMS, TEXTURE_SYNONYMS, BACKGROUND_SYNONYMS, TONE_SYNONYMS)
    for class_id, words in enumerate(word_list for group in groups for word_list in group):
        for word in words:
            table[word] = class_id
            if class_id in SHAPE_IDS:
                table[plural(word)] = class_id
    return table


WORD_CLASSES: dict[str, int] = _word_table()
"""Every caption word that names a class -> the id of that class."""


def _node(name: str, *children: "str | dict[str, Any]") -> dict[str, Any]:
    leaves = [{"LabelName": child} if isinstance(child, str) else child for child in children]
    return {"LabelName": name, "Subcategory": leaves}


TAXONOMY: dict[str, Any] = _node(
    "scene",
    _node(
        "shape",
        _node("round shape", "circle", "ellipse", "ring", "semicircle"),
        _node("curved shape", "heart", "crescent"),
        _node("angular shape", "square", "diamond", "pentagon", "hexagon", "cross"),
        _node("pointed shape", "triangle", "star", "arrow"),
    ),
    _node(
        "colour",
        _node("warm colour", "red", "orange", "yellow", "pink"),
        _node("cool colour", "green", "cyan", "blue", "purple"),
        _node("neutral colour", "white", "grey", "black", "brown"),
    ),
    _node(
        "texture",
        _node("smooth texture", "solid", "shaded"),
        _node("patterned texture", "striped", "dotted", "checkered"),
    ),
    _node(
        "background",
        _node("smooth background", "plain background", "gradient background"),
        _node("rough background", "grainy background", "grid background", "cloudy background"),
        _node("background tone", "light background", "dark background"),
    ),
)
"""Families -> groups -> leaf classes under one root, in the nested form of the Open Images hierarchy."""
