"""What a latent means, from the samples it fires on: a label, words of captions, and how sure that is.

Names come from single-stream codes, so that a latent is named for what it is when a stream stands alone.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from transformers.utils.hub import cached_file

from sparc_hf.codes.code_table import CodeTable
from sparc_hf.codes.top_samples import TopSamples, top_samples
from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.files.atomic_files import write_json, writing
from sparc_hf.files.checked_reading import Count, checked, read_json
from sparc_hf.model.modeling_sparc import SparcModel

CONCEPTS_FILE = "concepts.json"
FORMAT_VERSION = 1
WORD = re.compile(r"[^\W\d_]{2,}")
# Words that carry no concept; a background count alone does not silence them in short captions.
_STOP_WORDS = """a an and are as at be by for from has have he her his in into is it its of on or out over she some
that the their them there they this to two up was were which who with"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
SURE = 3.0


@dataclass(frozen=True)
class Evidence:
    """One label or word a latent goes with.

    Attributes:
        name: the label or word.
        lift: how many times more often it is among the latent's samples than among all.
        count: the latent's samples that have it.
        z: the log odds of that difference in standard deviations (Monroe et al. 2008, equation 22).
    """

    name: str
    lift: float
    count: int
    z: float


@dataclass(frozen=True)
class SimilarWord:
    """A word of a vocabulary whose text alone raises a latent.

    Attributes:
        name: the word.
        value: the latent's pre-activation for it.
        z: that value in standard deviations above the vocabulary's mean.
    """

    name: str
    value: float
    z: float


@dataclass(frozen=True)
class Concept:
    """A latent and what it goes with.

    Attributes:
        latent: its number.
        name: the label, or else the word, or else the word of a vocabulary, of the strongest evidence; None where
            nothing is sure enough (z below 3).
        score: that evidence's z, 0 without a name.
        fires: stream -> share of the samples it fires on, each stream alone.
        labels: labels, the surest first.
        words: words of the captions of its top samples, the surest first.
        samples: stream -> names of its top samples, the strongest first.
        vocabulary: words of a vocabulary that raise it most, the surest first.
    """

    latent: int
    name: str | None
    score: float
    fires: dict[str, float]
    labels: list[Evidence] = field(default_factory=list)
    words: list[Evidence] = field(default_factory=list)
    samples: dict[str, list[str]] = field(default_factory=dict)
    vocabulary: list[SimilarWord] = field(default_factory=list)


def name_concepts(
    codes: CodeTable,
    features: FeatureDataset,
    *,
    samples: int = 20,
    per_latent: int = 5,
    vocabulary: Mapping[int, Sequence[SimilarWord]] | None = None,
) -> list[Concept]:
    """Name every latent that fires.

    Args:
        codes: single-stream codes of the features.
        features: the rows, with labels, captions, or both.
        samples: top samples of a latent in a stream whose captions count, and whose names are kept.
        per_latent: most labels and words to keep of a latent.
        vocabulary: latent -> words that raise it, see `vocabulary_evidence`.

    Raises:
        ValueError: where codes and features have different rows, or the features neither labels nor captions.
    """
    if len(codes) != len(features):
        raise ValueError(f"there are codes of {len(codes)} rows but features of {len(features)}")
    if codes.encoding != "single":
        raise ValueError(f"concepts are named from single-stream codes, but these are {codes.encoding}")
    check_nameable(features, vocabulary is not None)
    has_labels = features.label_names is not None and "labels" in features.column_names
    texts = features.text
    best = top_samples(codes, samples)
    firing: dict[str, Any] = {stream: codes.csr(stream).astype(bool) for stream in codes.streams}
    labels = _label_evidence(firing, features, per_latent) if has_labels else {}
    words = _word_evidence(best, texts, per_latent) if texts is not None else {}
    concepts = []
    fired = {stream: np.asarray(active.sum(axis=0)).ravel() for stream, active in firing.items()}
    for latent in np.flatnonzero(np.sum(list(fired.values()), axis=0)).tolist():
        own_labels, own_words = labels.get(latent, []), words.get(latent, [])
        own_vocabulary = list((vocabulary or {}).get(latent, []))
        evidence = [*own_labels[:1], *own_words[:1], *own_vocabulary[:1]]
        best_evidence = next((item for item in evidence if item.z >= SURE), None)
        concepts.append(
            Concept(
                latent=latent,
                name=best_evidence.name if best_evidence else None,
                score=best_evidence.z if best_evidence else 0.0,
                fires={stream: float(counts[latent] / len(features)) for stream, counts in fired.items()},
                labels=own_labels,
                words=own_words,
                samples={stream: _sample_names(top.rows[latent], features) for stream, top in best.items()},
                vocabulary=own_vocabulary[:per_latent],
            )
        )
    return concepts


def surest_concepts(concepts: Sequence[Concept], count: int) -> list[Concept]:
    """Return the most surely named concepts, the surest first, one of each name."""
    surest: dict[str, Concept] = {}
    for concept in sorted(concepts, key=lambda concept: -concept.score):
        if concept.name is not None:
            surest.setdefault(concept.name, concept)
    return list(surest.values())[:count]


def check_nameable(features: FeatureDataset, vocabulary: bool = False) -> None:
    """Raise ValueError for features that latents cannot be named by, without a vocabulary to do it by."""
    has_labels = features.label_names is not None and "labels" in features.column_names
    if not has_labels and features.text is None and not vocabulary:
        raise ValueError("naming needs features with `labels` and label names, or with `text`, or a vocabulary")


def vocabulary_words(text: str, prompt: str = "{}") -> list[str]:
    """Return the words of a vocabulary, one a line, each once.

    Raises:
        ValueError: for fewer than two, or a prompt without a place for them.
    """
    words = list(dict.fromkeys(word.strip() for word in text.split("\n") if word.strip()))
    if len(words) < 2 or "{}" not in prompt:
        raise ValueError(
            f"a vocabulary needs two words or more and a prompt with {{}}, but there are {len(words)} words, and the "
            f"prompt is {prompt!r}"
        )
    return words


@torch.no_grad()
def vocabulary_evidence(
    model: SparcModel, encoder: StreamEncoder, words: Sequence[str], *, prompt: str = "{}", per_latent: int = 5
) -> dict[int, list[SimilarWord]]:
    """Return latent -> the words whose texts raise it most, through a text stream.

    Args:
        model: the model.
        encoder: of the text stream.
        words: the vocabulary, at least two words.
        prompt: the text of a word, which stands in place of {}.
        per_latent: most words to keep of a latent.

    Raises:
        ValueError: for a stream that encodes no text, or fewer than two different words.
    """
    words = list(dict.fromkeys(words))
    if encoder.modality != "text" or len(words) < 2 or "{}" not in prompt:
        raise ValueError(
            f"a vocabulary needs a text stream, two words or more and a prompt with {{}}, but `{encoder.name}` "
            f"encodes {encoder.modality}, there are {len(words)} words, and the prompt is {prompt!r}"
        )
    rows = torch.from_numpy(encoder.encode([prompt.replace("{}", word) for word in words]))
    every = torch.arange(model.config.num_latents)
    values = model.preactivations(encoder.name, rows, every).cpu().numpy()
    z = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-9)
    order = np.argsort(-z, axis=0, kind="stable")[:per_latent]
    return {
        latent: [
            SimilarWord(words[at], round(float(values[at, latent]), 5), round(float(z[at, latent]), 3))
            for at in order[:, latent].tolist()
            if values[at, latent] > 0
        ]
        for latent in range(values.shape[1])
    }


def log_odds_z(inside: np.ndarray, inside_total: float, everywhere: np.ndarray, total: float) -> np.ndarray:
    """Return z scores [...] of weighted log odds with the whole as prior (Monroe et al. 2008, equations 16 to 22).

    Args:
        inside: counts of each label or word among a latent's samples, [...].
        inside_total: all counts there.
        everywhere: counts in all samples, [...]; they are also the prior, scaled to the latent's size.
        total: all counts in all samples.
    """
    # A hundredth of a count keeps the logarithm finite for what occurs nowhere.
    prior = everywhere * (inside_total / max(total, 1)) + 0.01
    prior_total = inside_total + 0.01 * np.size(everywhere)
    outside, outside_total = everywhere - inside, total - inside_total

    def log_odds(counts: np.ndarray, whole: float) -> np.ndarray:
        with_prior = counts + prior
        return np.log(with_prior / np.maximum(whole + prior_total - with_prior, 1e-9))

    spread = np.sqrt(1 / (inside + prior) + 1 / (outside + prior))
    return (log_odds(inside, inside_total) - log_odds(outside, outside_total)) / spread


def _label_evidence(firing: Mapping[str, Any], features: FeatureDataset, per_latent: int) -> dict[int, list[Evidence]]:
    """Return latent -> its labels; the samples of all streams count together."""
    labels = features.labels_csr().astype(np.float64)
    counts = np.sum([(active.astype(np.float64).T @ labels).toarray() for active in firing.values()], axis=0)
    sizes = np.sum([np.asarray(active.sum(axis=0)).ravel() for active in firing.values()], axis=0)
    streams, rows = len(firing), len(features)
    everywhere = np.asarray(labels.sum(axis=0)).ravel() * streams
    names = list(features.label_names or [])
    evidence = {}
    for latent in np.flatnonzero(sizes).tolist():
        # A label is a yes or no of each sample: the whole is the samples, not the labels.
        z = log_odds_z(counts[latent], sizes[latent], everywhere, rows * streams)
        base = np.maximum(everywhere, 1) / (rows * streams)
        lift = counts[latent] / sizes[latent] / base
        evidence[latent] = _strongest(names, lift, counts[latent], z, per_latent)
    return evidence


def _word_evidence(best: Mapping[str, TopSamples], texts: Sequence[str], per_latent: int) -> dict[int, list[Evidence]]:
    """Return latent -> the words of its top samples' captions, each counted once a sample."""
    words_of = [sorted({word for word in WORD.findall(text.lower()) if word not in STOP_WORDS}) for text in texts]
    vocabulary = sorted({word for words in words_of for word in words})
    place = {word: at for at, word in enumerate(vocabulary)}
    everywhere = np.bincount([place[word] for words in words_of for word in words], minlength=len(vocabulary))
    streams, rows = len(best), len(texts)
    evidence = {}
    for latent in range(len(next(iter(best.values())).rows)):
        rows_of_latent = [row for top in best.values() for row in top.rows[latent] if row >= 0]
        if not rows_of_latent or not vocabulary:
            continue
        seen = [place[word] for row in rows_of_latent for word in words_of[row]]
        counts = np.bincount(seen, minlength=len(vocabulary)).astype(np.float64)
        z = log_odds_z(counts, len(rows_of_latent), everywhere * streams, rows * streams)
        lift = counts / len(rows_of_latent) / (np.maximum(everywhere, 1) / rows)
        evidence[latent] = _strongest(vocabulary, lift, counts, z, per_latent)
    return evidence


def _strongest(names: list[str], lift: np.ndarray, counts: np.ndarray, z: np.ndarray, most: int) -> list[Evidence]:
    order = np.argsort(-z, kind="stable")[:most].tolist()
    return [
        Evidence(names[at], round(float(lift[at]), 3), int(counts[at]), round(float(z[at]), 3))
        for at in order
        if z[at] > 0 and counts[at] > 0
    ]


def _sample_names(rows: np.ndarray, features: FeatureDataset) -> list[str]:
    # `row_name` is for messages; here the bare id, or the row's number.
    ids = features.ids
    return [str(features.number_of(row) if ids is None else ids[row]) for row in rows.tolist() if row >= 0]


def save_concepts(concepts: Sequence[Concept], folder: str | os.PathLike, **facts: Any) -> Path:
    """Write `concepts.json` beside a model; complete or not at all.

    Args:
        concepts: what `name_concepts` returned.
        folder: the model's folder.
        **facts: what else the file shall say, such as the rows the names come from.
    """
    content = {
        "format_version": FORMAT_VERSION,
        **facts,
        "concepts": {str(concept.latent): asdict(concept) for concept in concepts},
    }
    path = Path(folder) / CONCEPTS_FILE
    with writing(f"`{path}`", "make room and run the same again"):
        write_json(path, content, indent=1)
    return path


def load_concepts(folder: str | os.PathLike) -> list[Concept]:
    """Read what `save_concepts` wrote; an empty list where a model has no names.

    Raises:
        ValueError: for a newer format, or a file that cannot be read.
    """
    path = Path(folder) / CONCEPTS_FILE
    if not path.is_file():
        return []
    try:
        content = read_json(path, dict[str, Any])
        version = checked(content.get("format_version"), int, "format_version")
        if version > FORMAT_VERSION:
            raise ValueError(f"format version {version}, where this version of sparc_hf reads up to {FORMAT_VERSION}")
        entries = checked(content.get("concepts"), dict[str, _ConceptEntry], "concepts").values()
    except ValueError as error:
        raise ValueError(f"`{path}` cannot be read: {error}") from error
    return [
        Concept(
            entry["latent"],
            entry["name"],
            entry["score"],
            entry["fires"],
            labels=[Evidence(item["name"], item["lift"], item["count"], item["z"]) for item in entry["labels"]],
            words=[Evidence(item["name"], item["lift"], item["count"], item["z"]) for item in entry["words"]],
            samples=entry.get("samples", {}),
            vocabulary=[SimilarWord(item["name"], item["value"], item["z"]) for item in entry.get("vocabulary", [])],
        )
        for entry in entries
    ]


class _EvidenceEntry(TypedDict):
    name: str
    lift: float
    count: int
    z: float


class _SimilarWordEntry(TypedDict):
    name: str
    value: float
    z: float


class _Named(TypedDict):
    latent: Count
    name: str | None
    score: float
    fires: dict[str, float]
    labels: list[_EvidenceEntry]
    words: list[_EvidenceEntry]


class _ConceptEntry(_Named, total=False):
    """A concept as the file has it."""

    samples: dict[str, list[str | int]]
    vocabulary: list[_SimilarWordEntry]


def concepts_of(model: SparcModel) -> list[Concept]:
    """Return what `concepts.json` beside a loaded model says, in its folder or on the Hub; nothing where it has none.

    Raises:
        ValueError: as `load_concepts`, and where it names latents that the model does not have.
    """
    where = str(model.config._name_or_path or "")
    if not where:
        return []
    folder = Path(where)
    if not folder.is_dir():
        revision = getattr(model.config, "_commit_hash", None)
        missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        file = cached_file(where, CONCEPTS_FILE, revision=revision, **missing)
        if file is None:
            return []
        folder = Path(file).parent
    concepts = load_concepts(folder)
    if wrong := [concept.latent for concept in concepts if concept.latent >= model.config.num_latents]:
        raise ValueError(
            f"`{folder / CONCEPTS_FILE}` names latents up to {max(wrong)}, but the model has "
            f"{model.config.num_latents}; it is of another model, name its latents again with `sparc concepts`"
        )
    return concepts


def concept_names(model: SparcModel) -> dict[int, str]:
    """Return latent -> name of a loaded model's named latents, see `concepts_of`."""
    return {concept.latent: concept.name for concept in concepts_of(model) if concept.name is not None}
