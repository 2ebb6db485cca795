"""Probes of a model: what its latents, codes and reconstructions tell of labels, and of an independent encoder."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sparc_hf.codes.code_table import CodeTable, decoded_rows, normalized_rows
from sparc_hf.codes.top_samples import top_samples
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.metrics.concept_probe.concept_probe import classify, concept_probe
from sparc_hf.metrics.dictionary_stability.dictionary_stability import bridge_scores, match_atoms
from sparc_hf.metrics.monosemanticity.monosemanticity import monosemanticity
from sparc_hf.model.modeling_sparc import SparcModel

TOP_SAMPLES = 16
# Shares of the rows to fit on and to choose by; the rest is measured. Fewer rows leave one of the three without any.
FITTED, CHOSEN_BY = 0.7, 0.15
FEWEST_ROWS = 4


def probe_figures(codes: Mapping[str, Any], labels: Any, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Return stream -> mean loss (nats), accuracy and average precision of the one-latent probes, and their number."""
    figures = {}
    for stream, matrix in tqdm(codes.items(), desc="probing", unit="stream", leave=False):
        probes = concept_probe(matrix, labels, seed=seed)
        means = {name: probes[f"mean_{name}"] for name in ("loss", "accuracy", "ap")}
        figures[stream] = {"classes": len(probes["classes"]), **means}
    return figures


def classifier_figures(
    model: SparcModel, features: FeatureDataset, table: CodeTable, labels: Any, *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return what is classified -> stream or "target<-source" -> mAP of a linear multi-label classifier.

    Rows are split at random, 70 % to fit, 15 % to choose by, 15 % to measure, the same for all. "raw" are normalised
    features, "codes" sparse codes, "reconstructions" a stream decoded from its own codes, "cross_reconstructions" a
    target stream decoded from a source's codes.
    """
    rows = len(features)
    ends = [int(FITTED * rows), int((FITTED + CHOSEN_BY) * rows)]
    split = np.split(np.random.default_rng(seed).permutation(rows), ends)
    figures: dict[str, dict[str, float]] = {
        name: {} for name in ("raw", "codes", "reconstructions", "cross_reconstructions")
    }
    streams = table.streams
    with tqdm(total=2 * len(streams) + len(streams) ** 2, desc="classifying", unit="fit", leave=False) as bar:

        def measure(kind: str, name: str, inputs: Any) -> None:
            figures[kind][name] = classify(inputs, labels, split, seed=seed)["map"]
            bar.update()

        for stream in streams:
            measure("raw", stream, normalized_rows(model, features, stream))
            measure("codes", stream, table.csr(stream))
        for target, source in itertools.product(streams, repeat=2):
            decoded = decoded_rows(model, table, source, target)
            if source == target:
                measure("reconstructions", target, decoded)
            else:
                measure("cross_reconstructions", f"{target}<-{source}", decoded)
    return figures


def monosemanticity_figures(
    model: SparcModel, features: FeatureDataset, table: CodeTable
) -> dict[str, dict[str, dict[str, float]]]:
    """Return stream -> other stream -> mean monosemanticity of the stream's latents under the other's features.

    The other stream's rows are centred, so that 0 means no more alike than any two samples. Give single-stream codes:
    in joint codes of a model with global selection the other stream is no independent witness.
    """
    best = top_samples(table, TOP_SAMPLES)
    figures: dict[str, dict[str, dict[str, float]]] = {stream: {} for stream in table.streams}
    for other in table.streams:
        rows = normalized_rows(model, features, other)
        rows -= rows.mean(axis=0)
        for stream in table.streams:
            if stream != other:
                scores = monosemanticity(best[stream].rows, best[stream].values, rows)
                figures[stream][other] = {"mean": scores["mean"], "latents": scores["latents"]}
    return figures


def bridge_figures(model: SparcModel, codes: Mapping[str, Any]) -> dict[str, float]:
    """Return "a<->b" -> share of the positive bridge scores that latents have with themselves.

    Only for streams of one space: those of one encoder, as their records say, with the same width.
    """
    shares = {}
    for first, second in itertools.combinations(codes, 2):
        records = [model.config.stream(name) for name in (first, second)]
        encoders, widths = ({record.get(key) for record in records} for key in ("encoder", "hidden_size"))
        if len(encoders) == len(widths) == 1 and encoders != {None}:
            atoms = [_atoms(model, name) for name in (first, second)]
            shares[f"{first}<->{second}"] = bridge_scores(codes[first], codes[second], *atoms)["own_share"]
    return shares


def stability_figures(models: Mapping[str, SparcModel]) -> dict[str, dict[str, dict[str, float]]]:
    """Return model -> other model -> stream -> mean cosine of their matched atoms, for models of the same shape."""
    figures: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    for first, second in itertools.combinations(models, 2):
        shapes = [(models[name].config.num_latents, models[name].config.hidden_sizes) for name in (first, second)]
        if shapes[0] == shapes[1]:
            streams = models[first].config.stream_names
            matched = {
                stream: match_atoms(_atoms(models[first], stream), _atoms(models[second], stream))["stability"]
                for stream in tqdm(streams, desc="matching atoms", unit="stream", leave=False)
            }
            figures[first][second] = figures[second][first] = matched
    return figures


def _atoms(model: SparcModel, stream: str) -> np.ndarray:
    return model.atoms[stream].detach().float().cpu().numpy()
