"""Evaluate a model on a feature dataset: every figure of the papers, under joint and single-stream encoding."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from sparc_hf.codes.code_table import CodeTable, check_streams, code_columns, codes_for_targets, encode_features
from sparc_hf.codes.incomplete import with_complete_rows
from sparc_hf.codes.universality import latent_universality
from sparc_hf.evaluation.count_figures import CountFigures
from sparc_hf.evaluation.intervals import Figure, mean_figure, plain_figure, random_groups, share_figure, unit_sums
from sparc_hf.evaluation.probes import (
    FEWEST_ROWS,
    bridge_figures,
    classifier_figures,
    monosemanticity_figures,
    probe_figures,
    stability_figures,
)
from sparc_hf.evaluation.results import MEASURED_ENCODINGS
from sparc_hf.evaluation.retrieval import FAMILIES, model_ranks
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.files.checked_reading import Taxonomy, checked
from sparc_hf.metrics.concept_alignment.concept_alignment import (
    concept_alignment,
    taxonomy_buckets,
)
from sparc_hf.metrics.cross_retrieval.cross_retrieval import retrieval_figures
from sparc_hf.metrics.latent_liveness.latent_liveness import latent_liveness
from sparc_hf.metrics.reconstruction.reconstruction import FIGURES, figures_of_terms, row_terms
from sparc_hf.model.modeling_sparc import SparcModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSettings:
    """How much is measured, and how.

    Attributes:
        batch_size: rows encoded at a time.
        replicates: how often figures made from counts are measured again for their intervals, each time without
            another part of the rows; 0 leaves all intervals out.
        retrieval_rows: samples that retrieval is measured on, spread evenly; all by default.
        probes: whether the slow parts are done too: probes and classifiers, where there are labels, and matching the
            atoms of models.
        seed: of what is drawn: the parts of the rows, and the probes' splits.
        dataset: what cards and reports call the rows.
    """

    batch_size: int = 1024
    replicates: int = 200
    retrieval_rows: int | None = None
    probes: bool = True
    seed: int = 0
    dataset: str = "held-out rows"

    def __post_init__(self) -> None:
        for name in ("batch_size", "retrieval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {value}")
        if self.replicates < 0 or self.replicates == 1:
            raise ValueError(f"`replicates` must be 0, or 2 or more, but it is {self.replicates}")


@dataclass(frozen=True)
class LatentFigures:
    """Figures of single latents under one encoding, each [N].

    Attributes:
        frequency: stream -> share of the rows that a latent fires on.
        universality: entropy, cofires, cofire_jaccard and energy, see `concept_universality`.
        jaccard: label Jaccard at every depth of the taxonomy; none without labels.
    """

    frequency: Mapping[str, np.ndarray]
    universality: Mapping[str, np.ndarray]
    jaccard: Sequence[np.ndarray]

    def columns(self) -> dict[str, np.ndarray]:
        """Return the figures under the names that they have in files."""
        frequency = {f"frequency/{stream}": shares for stream, shares in self.frequency.items()}
        return frequency | {**self.universality} | {f"jaccard/depth{at}": row for at, row in enumerate(self.jaccard)}


@dataclass
class Evaluation:
    """What was measured of one model.

    Attributes:
        results: JSON-ready figures, see `evaluate_model`.
        latent_figures: encoding -> figures of single latents.
    """

    results: dict[str, Any]
    latent_figures: dict[str, LatentFigures] = field(default_factory=dict)

    @property
    def latents(self) -> dict[str, dict[str, np.ndarray]]:
        """Encoding -> name in files -> [N], the figures of single latents."""
        return {encoding: figures.columns() for encoding, figures in self.latent_figures.items()}


def evaluate_models(
    models: Mapping[str, SparcModel], features: FeatureDataset, settings: EvaluationSettings | None = None
) -> dict[str, Evaluation]:
    """Return name -> evaluation of several models on the same rows, those that have all their streams.

    See `evaluate_model`.

    With `probes`, the `results` of models that have others of their shape also hold "stability": other model ->
    stream -> mean cosine of matched atoms.
    """
    for model in models.values():  # before the first one takes its minutes
        check_streams(model, features)
    streams = dict.fromkeys(name for model in models.values() for name in model.config.stream_names)
    complete = with_complete_rows(features, streams, "evaluation")
    evaluations = {name: evaluate_model(model, complete, settings) for name, model in models.items()}
    if settings is None or settings.probes:
        for name, others in stability_figures(models).items():
            if others:
                evaluations[name].results["stability"] = others
    return evaluations


def evaluate_model(
    model: SparcModel, features: FeatureDataset, settings: EvaluationSettings | None = None
) -> Evaluation:
    """Measure a model on the rows of a feature dataset that have all its streams; the model is left as it was.

    Everything is measured twice: under joint encoding, in which every stream of a sample helps to choose the latents
    of the others (with global selection the counterpart is then partly given away), and under single-stream encoding,
    in which each stream stands alone. With local selection the two are the same. Of a model that imputes the missing
    streams, what it reconstructs of another stream alone is decoded from the code of that stream's imputed rows, and
    what it would be without imputing is measured too, as "single_ignoring" with headline and reconstruction only.

    Returns:
        An evaluation whose `results` hold "dataset", "rows", "rows_left_out" (those that lack a stream, where there
        are any), "model" (the settings that tell models apart), and for each of "joint" and "single":
        "headline": name -> {"value", "low", "high"} with 95 % intervals, see `intervals`;
        "reconstruction": nmse, fvu, r2, cosine -> target -> source -> number;
        "liveness": what `latent_liveness` returns, without the per-latent part;
        "universality": means of `concept_universality` over the latents that fire above the model's dead threshold;
        "alignment" (with labels): "depths", and per depth "mean" over all latents and "mean_live" over live ones;
        "retrieval": family -> "source->target" -> R@1, R@5, R@10, median_rank, mrr;
        "probes" and "classifiers" (with labels, where the settings want them): see `probing`;
        "monosemanticity" (single-stream codes only) and "bridge_own_share" (where streams share an encoder): likewise.

    Raises:
        ValueError: for streams the dataset lacks, no row that has all of them, unusable rows, or a class that is not
            in the dataset's taxonomy.
    """
    settings = settings or EvaluationSettings()
    check_streams(model, features)
    features = with_complete_rows(features, model.config.stream_names, "evaluation")
    _check_labels(features, settings)
    config = model.config
    training = model.training
    model.eval()
    facts = ("selection", "objective", "num_latents", "k", "cross_coef")
    results: dict[str, Any] = {
        "dataset": settings.dataset,
        "rows": len(features),
        **({"rows_left_out": features.rows_left_out} if features.rows_left_out else {}),
        "model": {name: getattr(config, name) for name in facts} | {"streams": config.stream_names},
    }
    evaluation = Evaluation(results)
    try:
        for encoding in MEASURED_ENCODINGS:
            if encoding == "single" and config.selection == "local":
                results[encoding] = results["joint"]
                evaluation.latent_figures[encoding] = evaluation.latent_figures["joint"]
                continue
            figures, evaluation.latent_figures[encoding] = Measurements(model, features, encoding, settings).figures()
            results[encoding] = _json_ready(figures)
        if model.imputation is not None and config.selection == "global":
            ignoring = Measurements(model, features, "single_ignoring", settings)
            results["single_ignoring"] = _json_ready(ignoring.main_figures())
    finally:
        model.train(training)
    return evaluation


class Measurements:
    """The figures of a model under one encoding, from one pass over the features.

    Args:
        model: in eval mode.
        features: with the model's streams.
        encoding: as of `encode_features`.
        settings: how much is measured.
    """

    def __init__(self, model: SparcModel, features: FeatureDataset, encoding: str, settings: EvaluationSettings):
        self.model, self.features, self.encoding, self.settings = model, features, encoding, settings
        self.streams = model.config.stream_names
        self.table, self.terms, self.mean_rows = _encoded(model, features, encoding, settings.batch_size)
        self._check_rows()

    @cached_property
    def codes(self) -> dict[str, Any]:
        """Stream -> sparse codes [rows, N]."""
        return {stream: self.table.csr(stream) for stream in self.streams}

    @cached_property
    def labels(self) -> Any:
        """Sparse 0/1 [rows, classes], or None where no row has a label."""
        return _labels_of(self.features)

    @cached_property
    def units(self) -> np.ndarray:
        """Int [rows]: which rows are drawn together, the patch tokens of a sample; else each row alone."""
        rows = len(self.features)
        has_samples = "sample" in self.features.column_names
        return np.array(self.features.column("sample", range(rows))) if has_samples else np.arange(rows)

    @cached_property
    def searched_rows(self) -> np.ndarray:
        """The rows that retrieval is measured on, spread evenly."""
        rows = len(self.features)
        return np.unique(np.linspace(0, rows - 1, min(self.settings.retrieval_rows or rows, rows), dtype=np.int64))

    @cached_property
    def alignment(self) -> dict[str, Any]:
        """What `concept_alignment` returns; only where there are labels."""
        buckets = None
        if self.features.taxonomy is not None and self.features.label_names is not None:
            buckets = taxonomy_buckets(self.features.label_names, self.features.taxonomy)
        return concept_alignment(self.codes, self.labels, buckets)

    @cached_property
    def ranks(self) -> dict[str, dict[tuple[str, str], np.ndarray]]:
        """Family -> (source, target) -> int64 [searched rows]."""
        if len(self.searched_rows) == len(self.features):
            return model_ranks(self.model, self.features, self.table, batch_size=self.settings.batch_size)
        searched = self.features.select(self.searched_rows)
        codes = encode_features(self.model, searched, encoding=self.encoding, batch_size=self.settings.batch_size)
        return model_ranks(self.model, searched, codes, batch_size=self.settings.batch_size)

    def figures(self) -> tuple[dict[str, Any], LatentFigures]:
        """Return the figures as `evaluate_model` describes them, and those of single latents."""
        liveness, universality = latent_liveness(self.codes), latent_universality(self.model, self.codes)
        latent_figures = LatentFigures(
            frequency=liveness.pop("frequency"),
            universality={name: universality[name] for name in ("entropy", "cofires", "cofire_jaccard", "energy")},
            jaccard=() if self.labels is None else self.alignment["per_latent"],
        )
        figures = self.main_figures()
        figures |= {"liveness": liveness, "universality": self._mean_universality(universality)}
        if self.labels is not None:
            live, depths = int(self.alignment["live"].sum()), list(range(len(self.alignment["mean"])))
            means = {name: self.alignment[name] for name in ("mean", "mean_live")}
            figures["alignment"] = {"depths": depths, **means, "live": live}
        figures["retrieval"] = {
            family: {f"{source}->{target}": retrieval_figures(ranks) for (source, target), ranks in pairs.items()}
            for family, pairs in self.ranks.items()
        }
        seed = self.settings.seed
        if self.labels is not None and self.settings.probes:
            figures["probes"] = probe_figures(self.codes, self.labels, seed=seed)
            figures["classifiers"] = classifier_figures(self.model, self.features, self.table, self.labels, seed=seed)
        if self.encoding == "single" or self.model.config.selection == "local":
            figures["monosemanticity"] = monosemanticity_figures(self.model, self.features, self.table)
        if bridges := bridge_figures(self.model, self.codes):
            figures["bridge_own_share"] = bridges
        return figures, latent_figures

    def main_figures(self) -> dict[str, Any]:
        """Return "headline" and "reconstruction" alone."""
        return {"headline": self._headline(), "reconstruction": self._reconstruction()}

    def _check_rows(self) -> None:
        for stream in self.streams:
            zero = np.flatnonzero(self.terms[stream, stream][:, 1] == 0)
            if len(zero):
                raise ValueError(
                    f"stream `{stream}` holds only zeros in {self.features.row_name(int(zero[0]))}, so that its "
                    "relative error is undefined; leave such rows out"
                )

    def _reconstruction(self) -> dict[str, Any]:
        matrices: dict[str, Any] = {name: {target: {} for target in self.streams} for name in FIGURES}
        for (target, source), terms in self.terms.items():
            for name, value in figures_of_terms(terms, self.mean_rows[target]).items():
                matrices[name][target][source] = value
        return matrices

    def _mean_universality(self, universality: Mapping[str, Any]) -> dict[str, Any]:
        firing = np.sum(list(universality["fires"].values()), axis=0) > 0
        means = {
            f"mean_{name}": universality[name][firing].mean() if firing.any() else math.nan
            for name in ("entropy", "cofire_jaccard", "cofire_iou")
        }
        return {"threshold": self.model.config.dead_threshold, "firing": int(firing.sum()), **means}

    def _headline(self) -> dict[str, Figure]:
        """Figures one would put first, with intervals."""
        errors = {
            "nmse_self": [_relative_error(self.terms[name, name]) for name in self.streams],
            "nmse_cross": [_relative_error(self.terms[pair]) for pair in itertools.permutations(self.streams, 2)],
        }
        hits = {f"{family}_r_at_1": [ranks == 1 for ranks in self.ranks[family].values()] for family in FAMILIES}
        seed, replicates = self.settings.seed, self.settings.replicates
        groups = list(random_groups(self.units, replicates, seed)) if replicates else []
        units, searched = self.units, self.units[self.searched_rows]
        figures = {
            **{name: mean_figure(*unit_sums(np.mean(rows, axis=0), units)) for name, rows in errors.items() if rows},
            **CountFigures(self.codes, self.labels).with_intervals(
                tqdm(groups, desc="confidence intervals", unit="group", leave=False)
            ),
            **{name: share_figure(*unit_sums(np.mean(rows, axis=0), searched)) for name, rows in hits.items() if rows},
        }
        return figures if replicates else {name: plain_figure(figure["value"]) for name, figure in figures.items()}


def _labels_of(features: FeatureDataset) -> Any:
    labels = features.labels_csr() if "labels" in features.column_names else None
    return None if labels is None or not labels.nnz else labels


def _check_labels(features: FeatureDataset, settings: EvaluationSettings) -> None:
    """Say what cannot be measured by the labels, before anything is."""
    if features.taxonomy is not None and features.label_names is not None:
        taxonomy_buckets(features.label_names, checked(features.taxonomy, Taxonomy, "taxonomy"))
    labels = _labels_of(features)
    if labels is None and "labels" in features.column_names:
        logger.warning("no row of %s has a label, so that nothing is measured by labels", settings.dataset)
    if labels is not None and settings.probes and len(features) < FEWEST_ROWS:
        raise ValueError(
            f"probes and classifiers need {FEWEST_ROWS} rows or more, but there are {len(features)}; give more rows, "
            "or leave them out (`probes=False`, `--no_probes`)"
        )


def _encoded(
    model: SparcModel, features: FeatureDataset, encoding: str, batch_size: int
) -> tuple[CodeTable, dict[tuple[str, str], np.ndarray], dict[str, np.ndarray]]:
    """Return codes, (target, source) -> [rows, 5] reconstruction terms, and target -> mean row, in one pass."""
    streams = model.config.stream_names
    tables: list[pa.Table] = []
    terms: dict[tuple[str, str], list[np.ndarray]] = {pair: [] for pair in itertools.product(streams, repeat=2)}
    sums = {name: np.zeros(size) for name, size in model.config.hidden_sizes.items()}
    for batch, codes in codes_for_targets(model, features, encoding, batch_size, streams):
        tables.append(code_columns({source: own[source] for source, own in codes.items()}))
        with torch.no_grad():
            for target, rows in model.normalize(batch).items():
                original = rows.cpu().numpy()
                sums[target] += original.sum(axis=0, dtype=np.float64)
                for source in streams:
                    decoded = model.decode(codes[source][target], to=target).float().cpu().numpy()
                    terms[target, source].append(row_terms(original, decoded))
    table = CodeTable(
        pa.concat_tables(tables).combine_chunks(), num_latents=model.config.num_latents, encoding=encoding
    )
    return (
        table,
        {pair: np.concatenate(batches) for pair, batches in terms.items()},
        {name: total / len(features) for name, total in sums.items()},
    )


def _relative_error(terms: np.ndarray) -> np.ndarray:
    return terms[:, 0] / terms[:, 1]  # |y - x|^2 / |x|^2, see `row_terms`


def _json_ready(value: Any) -> Any:
    """Return nested values as JSON has them: lists for arrays, None for what is not a number."""
    if isinstance(value, Mapping):
        return {name: _json_ready(content) for name, content in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_json_ready(content) for content in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
