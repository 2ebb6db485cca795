"""The files of an evaluation: results.json, an HTML report of one or several models, model-index entries, latents."""

import base64
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparc_hf.evaluation import plots
from sparc_hf.evaluation.results import (
    ENCODING_NAMES,
    MEASURED_ENCODINGS,
    METRIC_NAMES,
    eval_results,
    figure_texts,
    headline_encodings,
    number_text,
    template,
)
from sparc_hf.evaluation.suite import Evaluation
from sparc_hf.files.atomic_files import write_json, write_text, writing
from sparc_hf.files.atomic_folders import check_place, named, new_folder
from sparc_hf.files.folder_lock import locked_folder
from sparc_hf.files.output_folder import check_output_folder
from sparc_hf.model_folder import RESULTS_FILE
from sparc_hf.version import __version__

REPORT_FILE = "report.html"
INDEX_FILE = "model-index.yaml"
PERCENT = ("dead_share",)
REPORT_FILES = named(RESULTS_FILE, REPORT_FILE, INDEX_FILE, "latents-*.csv")
# What tells a folder whose own results a report would take the place of.
OTHER_FOLDERS = ("config.json", "training_arguments.json", "sparc_features.json", "sparc_codes.json")


def model_names(paths: Sequence[str]) -> dict[str, str]:
    """Return a short name for each model -> its path: the last part, or as many parts as tell them apart.

    Raises:
        ValueError: where a path is named twice.
    """
    if doubled := sorted({path for path in paths if list(paths).count(path) > 1}):
        raise ValueError(f"name every model once; {doubled} occur more than once")
    addresses = {path: Path(path).parts for path in paths}
    for length in range(1, max(len(address) for address in addresses.values()) + 1):
        names = {"/".join(address[-length:]): path for path, address in addresses.items()}
        if len(names) == len(paths):
            return names
    return {path: path for path in paths}


def check_report_folder(folder: Path) -> None:
    """Raise ValueError where `folder` cannot take a report, before any work is done."""
    check_output_folder(folder)
    if others := [name for name in OTHER_FOLDERS if (folder / name).exists()]:
        raise ValueError(
            f"`output` {folder} holds {others[0]}, whose results a report would replace; name a folder of its own, "
            f"such as {folder / 'evaluation'}"
        )
    if (folder / RESULTS_FILE).exists() and not (folder / REPORT_FILE).exists():
        raise ValueError(f"`output` {folder} holds a {RESULTS_FILE} that is not of a report; choose another folder")
    check_place(folder.resolve(), REPORT_FILES)


def write_report(
    evaluations: Mapping[str, Evaluation],
    folder: str | Path,
    *,
    names: Mapping[str, Mapping[int, str]] | None = None,
) -> Path:
    """Write results.json, report.html, model-index.yaml and `latents-<name>.csv` per model; return the report's path.

    They take the place of those of an earlier evaluation all at once; other files in the folder stay.

    Args:
        evaluations: model name -> evaluation, all on the same rows.
        folder: made where it does not exist.
        names: model name -> latent -> its concept's name, for the CSV.

    Raises:
        ValueError: where the folder holds something else that has results, or another process writes into it.
        OSError: saying what to do, if something cannot be written.
    """
    folder = Path(folder)
    results = {name: evaluation.results for name, evaluation in evaluations.items()}
    with locked_folder(folder), writing(f"the report in `{folder}`", "an older one is kept; make room and try again"):
        check_report_folder(folder)
        with new_folder(folder, REPORT_FILES, last=RESULTS_FILE) as unfinished:
            write_text(unfinished / INDEX_FILE, model_index(results))
            for name, evaluation in evaluations.items():
                table = latents_csv(evaluation, (names or {}).get(name, {}))
                write_text(unfinished / f"latents-{name.replace('/', '-')}.csv", table)
            write_text(unfinished / REPORT_FILE, report_html(evaluations))
            write_json(unfinished / RESULTS_FILE, {"models": results})
    return folder / REPORT_FILE


def model_index(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the `model-index` entries of model name -> results as YAML, for the metadata of model cards."""
    import yaml
    from huggingface_hub.repocard_data import eval_results_to_model_index

    entries = [
        entry
        for name, model_results in results.items()
        for entry in eval_results_to_model_index(name, eval_results(model_results))
    ]
    return yaml.safe_dump({"model-index": entries}, sort_keys=False)


def report_html(evaluations: Mapping[str, Evaluation]) -> str:
    """Return the report as one HTML page that needs no other file."""
    results = {name: evaluation.results for name, evaluation in evaluations.items()}
    return template("report.html").render(
        results=results,
        first=next(iter(results.values())),
        headline=_headline_rows(results),
        columns={
            name: [ENCODING_NAMES[encoding] for encoding in headline_encodings(measured)]
            for name, measured in results.items()
        },
        retrieval=_retrieval_rows,
        settings_that_differ=_differing_settings(results),
        more=_more_rows,
        figure_texts=figure_texts,
        figures={name: list(_plots(evaluation)) for name, evaluation in evaluations.items()},
        version=__version__,
    )


def _plots(evaluation: Evaluation) -> Iterator[dict[str, str]]:
    """Yield title, caption and picture of every plot of one model, joint and single side by side."""
    by_encoding = {encoding: evaluation.results[encoding] for encoding in MEASURED_ENCODINGS}
    latents = evaluation.latent_figures

    def shown(title: str, caption: str, plot: Callable[..., Any], *args: Any, **options: Any) -> dict[str, str]:
        wide, narrow = (_embedded(plot(*args, **options, stacked=stacked)) for stacked in (False, True))
        return {"title": title, "caption": caption, "address": wide, "narrow": narrow}

    ways = (("nmse", "low", "Normalised squared error, 0 is perfect"), ("cosine", "high", "Cosine similarity"))
    for name, better, words in ways:
        panels = {encoding: figures["reconstruction"][name] for encoding, figures in by_encoding.items()}
        caption = f"{words}, of every target stream decoded from every source stream's code."
        yield shown(f"reconstruction, {name}", caption, plots.reconstruction_matrix, panels, name, better=better)
    if "alignment" in by_encoding["joint"]:
        scores = {encoding: dict(enumerate(figures.jaccard)) for encoding, figures in latents.items()}
        caption = "How alike the labels are of the rows on which a latent fires in different streams."
        yield shown("label Jaccard", caption, plots.jaccard_by_depth, scores)
    patterns = {encoding: _patterns(figures["liveness"]) for encoding, figures in by_encoding.items()}
    yield shown("liveness", "In which streams latents fire at all on these rows.", plots.liveness_bars, patterns)
    histograms = {}
    for encoding, figures in by_encoding.items():
        histogram = figures["liveness"]["histogram"]
        counts = {stream: np.array(counts) for stream, counts in histogram["counts"].items()}
        histograms[encoding] = (np.array(histogram["edges"]), counts)
    yield shown("firing frequency", "How often live latents fire.", plots.frequency_histogram, histograms)
    firing = {encoding: np.sum(list(figures.frequency.values()), axis=0) > 0 for encoding, figures in latents.items()}
    entropies = {encoding: figures.universality["entropy"][firing[encoding]] for encoding, figures in latents.items()}
    caption = "Firing entropy of the latents that fire: 1 fires equally often in all streams, 0 in one only."
    yield shown("firing entropy", caption, plots.entropy_histogram, entropies)
    points = ("energy", "cofires")
    cofires = {encoding: tuple(figures.universality[name] for name in points) for encoding, figures in latents.items()}
    caption = "Rows on which a latent fires in all streams at once, against its energy, the length of what it adds."
    yield shown("co-fires against energy", caption, plots.cofires_against_energy, cofires)


def _patterns(liveness: Mapping[str, Any]) -> dict[str, int]:
    return {"all streams": liveness["alive_in_all"], **liveness["patterns"], "dead": liveness["dead"]}


def _headline_rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (metric, texts of its figure and interval for each model and encoding)."""
    headlines = [
        model_results[encoding]["headline"]
        for model_results in results.values()
        for encoding in headline_encodings(model_results)
    ]
    return [
        (words, [figure_texts(headline.get(name), percent=name in PERCENT) for headline in headlines])
        for name, words in METRIC_NAMES.items()
        if any(name in headline for headline in headlines)
    ]


def _differing_settings(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Return (setting, its value for each model)."""
    settings = [model_results["model"] for model_results in results.values()]
    return [(name, [values[name] for values in settings]) for name in settings[0] if name != "streams"]


def _retrieval_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, dict[str, Any]]]]:
    """Yield family, pair and encoding -> figures, of one model's results."""
    for family, pairs in results["joint"]["retrieval"].items():
        for pair in pairs:
            yield (
                family.replace("_", " "),
                pair.replace("->", " → "),
                {encoding: results[encoding]["retrieval"][family][pair] for encoding in MEASURED_ENCODINGS},
            )


def _more_rows(results: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return (figure, its text under each encoding) of what of one model's results stands in no other table."""
    both = [results[encoding] for encoding in MEASURED_ENCODINGS]
    rows = [
        (words, [number_text(figures["universality"][name]) for figures in both])
        for name, words in (
            ("mean_entropy", "Firing entropy, mean over latents that fire"),
            ("mean_cofire_jaccard", "Rows on which all streams fire, of those on which any does"),
        )
    ]
    for stream, probes in both[-1].get("probes", {}).items():
        for name, words in (("loss", "loss in nats (chance 0.693)"), ("ap", "average precision (chance 0.5)")):
            texts = [number_text(figures["probes"][stream][name]) for figures in both]
            rows.append((f"One-latent probes of {probes['classes']} classes, {stream}: {words}", texts))
    for kind, inputs in both[-1].get("classifiers", {}).items():
        for name in inputs:
            texts = [number_text(figures["classifiers"][kind][name]) for figures in both]
            rows.append((f"Linear classifier on {kind.replace('_', ' ')}, {name}: mAP", texts))
    for stream, others in both[-1].get("monosemanticity", {}).items():
        for other, scores in others.items():
            texts = [
                number_text(figures["monosemanticity"][stream][other]["mean"])
                if "monosemanticity" in figures
                else "not measured"
                for figures in both
            ]
            rows.append((f"Monosemanticity of {stream}'s {scores['latents']} latents by {other}'s features", texts))
    for pair in both[-1].get("bridge_own_share", {}):
        texts = [number_text(figures["bridge_own_share"][pair]) for figures in both]
        rows.append((f"Bridge score of latents with themselves, share, {pair}", texts))
    for other, streams in results.get("stability", {}).items():
        for stream, value in streams.items():
            rows.append((f"Mean cosine of {stream}'s atoms with those of {other}, matched", [number_text(value)] * 2))
    return rows


def latents_csv(evaluation: Evaluation, names: Mapping[int, str]) -> str:
    """Return a CSV of single latents: number, name where there are any, a column per encoding and figure."""
    columns = {
        f"{encoding}/{name}": values
        for encoding, by_name in evaluation.latents.items()
        for name, values in by_name.items()
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["latent", *(["name"] if names else []), *columns])
    for latent, values in enumerate(zip(*columns.values(), strict=True)):
        name = [names.get(latent, "")] if names else []
        writer.writerow([latent, *name, *(f"{value:.6g}" for value in values)])
    return buffer.getvalue()


def _embedded(figure: Any) -> str:
    """Return a matplotlib Figure as a data address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
