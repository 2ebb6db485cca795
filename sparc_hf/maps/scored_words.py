"""How much of targets the words of texts carry, as each stream's tokens show it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.maps.methods import WORD_METHODS, check_method, token_scores
from sparc_hf.maps.targets import StreamTargets, Target, targets_per_sample
from sparc_hf.model.modeling_sparc import SparcModel


class WordScore(NamedTuple):
    """A word, how much of a target it carries (0 or more), and its first and last + 1 character in the text."""

    word: str
    score: float
    start: int
    end: int


def word_scores(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    texts: Sequence[str],
    targets: Sequence[Target] | Sequence[Sequence[Target]],
    method: str = "relevance",
    *,
    start_layer: int = 0,
    batch_size: int = 16,
) -> dict[str, list[list[list[WordScore]]]]:
    """Return how much of each target each word of each text carries, as the text streams see it.

    A word is what the tokenizer calls one; its score is the mean of its tokens'. Special tokens and padding have none,
    nor have words beyond the longest text the encoder reads.

    Args:
        model: the model.
        encoders: stream -> its encoder, see `load_encoders`.
        texts: the texts.
        targets: the same for all texts, or a list a text.
        method: "relevance", or "gradient" (gradient times activation, at the first norm of the last block).
        start_layer: as in `image_maps`.
        batch_size: texts at a time.

    Returns:
        stream -> text -> target -> its words in order; an empty list where an image map would be NaN.

    Raises:
        ValueError: as `image_maps`.
    """
    check_method(method, WORD_METHODS)
    lists = targets_per_sample(texts, targets, "texts")
    streams = {
        name: StreamTargets(model, encoders, name, lists)
        for name, encoder in encoders.items()
        if encoder.modality == "text"
    }
    if not streams:
        raise ValueError(f"none of the streams {list(encoders)} encodes text")
    words: dict[str, list[list[list[WordScore]]]] = {name: [] for name in streams}
    for start in range(0, len(texts), batch_size):
        batch = slice(start, start + batch_size)
        for name, stream_targets in streams.items():
            inputs = encoders[name].prepare(texts[batch])
            scores = token_scores(stream_targets, inputs, batch, method, start_layer)
            words[name] += [
                merged_words(encoders[name], text, text_scores)
                for text, text_scores in zip(texts[batch], scores, strict=True)
            ]
    return words


def merged_words(encoder: StreamEncoder, text: str, scores: np.ndarray) -> list[list[WordScore]]:
    """Merge scores of tokens [targets, tokens] into words; a target whose scores are NaN has none."""
    inputs: Any = encoder.inputs_of
    encoded = inputs.tokenizer([text], return_offsets_mapping=True, **inputs.settings)
    offsets = encoded["offset_mapping"][0]
    groups: dict[tuple[int, int], list[int]] = {}
    for token, word in enumerate(encoded.word_ids(0)):
        start, end = offsets[token]
        if word is None or not text[start:end].strip():
            continue
        # Some tokenizers take a whole text for one word, so what stands between spaces is a word too.
        blank = len(text[start:end]) - len(text[start:end].lstrip())
        groups.setdefault((word, len((text[: start + blank] + "x").split())), []).append(token)
    return [
        [_word(text, offsets, tokens, target_scores) for tokens in groups.values()]
        if np.isfinite(target_scores).all()
        else []
        for target_scores in scores
    ]


def _word(text: str, offsets: Sequence[tuple[int, int]], tokens: Sequence[int], scores: np.ndarray) -> WordScore:
    start, end = offsets[tokens[0]][0], offsets[tokens[-1]][1]
    word = text[start:end].strip()
    start = text.index(word, start)
    return WordScore(word, float(np.mean(scores[tokens])), start, start + len(word))
