"""The files of an evaluation: results.json, an HTML report of one or several models, model-index entries, latents."""

import base64
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparc_hf import plots
from sparc_hf.atomic_files import write_json, write_text, writing
from sparc_hf.atomic_folders import check_place, named, new_folder
from sparc_hf.codes import ENCODINGS
from sparc_hf.evaluation import Evaluation
from sparc_hf.folder_lock import locked_folder
from sparc_hf.hub import METRIC_NAMES, eval_results, figure_text, templates_folder
from sparc_hf.output_folder import check_output_folder
from sparc_hf.run_folder import RESULTS_FILE
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
    parts = {path: Path(path).parts for path in paths}
    for length in range(1, max(len(found) for found in parts.values()) + 1):
        names = {"/".join(found[-length:]): path for path, found in parts.items()}
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
                told = latents_csv(evaluation, (names or {}).get(name, {}))
                write_text(unfinished / f"latents-{name.replace('/', '-')}.csv", told)
            write_text(unfinished / REPORT_FILE, report_html(evaluations))
            write_json(unfinished / RESULTS_FILE, {"models": results})
    return folder / REPORT_FILE


def model_index(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the `model-index` entries of model name -> results as YAML, for the metadata of model cards."""
    import yaml
    from huggingface_hub.repocard_data import eval_results_to_model_index

    entries = [
        entry for name, found in results.items() for entry in eval_results_to_model_index(name, eval_results(found))
    ]
    return yaml.safe_dump({"model-index": entries}, sort_keys=False)


def report_html(evaluations: Mapping[str, Evaluation]) -> str:
    """Return the report as one HTML page that needs no other file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_folder()),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results = {name: evaluation.results for name, evaluation in evaluations.items()}
    first = next(iter(results.values()))
    return environment.get_template("report.html").render(
        results=results,
        first=first,
        headline=_headline_rows(results),
        columns=[(name, encoding) for name in results for encoding in ENCODINGS],
        retrieval=_retrieval_rows,
        settings_that_differ=_differing_settings(results),
        more=_more_rows,
        figure_text=figure_text,
        figures={name: list(_figures(evaluation)) for name, evaluation in evaluations.items()},
        version=__version__,
    )


def _figures(evaluation: Evaluation) -> Iterator[dict[str, str]]:
    """Yield title, caption and picture of every plot of one model, joint and single side by side."""
    both = {encoding: evaluation.results[encoding] for encoding in ENCODINGS}
    latents = evaluation.latents

    def shown(title: str, caption: str, plot: Callable[..., Any], *args: Any, **options: Any) -> dict[str, str]:
        wide, narrow = (_embedded(plot(*args, **options, stacked=stacked)) for stacked in (False, True))
        return {"title": title, "caption": caption, "address": wide, "narrow": narrow}

    ways = (("nmse", "low", "Normalised squared error, 0 is perfect"), ("cosine", "high", "Cosine similarity"))
    for name, better, words in ways:
        panels = {encoding: found["reconstruction"][name] for encoding, found in both.items()}
        caption = f"{words}, of every target stream decoded from every source stream's code."
        yield shown(f"reconstruction, {name}", caption, plots.reconstruction_matrix, panels, name, better=better)
    if "alignment" in both["joint"]:
        scores = {
            encoding: {depth: latents[encoding][f"jaccard/depth{depth}"] for depth in found["alignment"]["depths"]}
            for encoding, found in both.items()
        }
        caption = "How alike the labels are of the rows on which a latent fires in different streams."
        yield shown("label Jaccard", caption, plots.jaccard_by_depth, scores)
    patterns = {encoding: _patterns(found["liveness"]) for encoding, found in both.items()}
    yield shown("liveness", "In which streams latents fire at all on these rows.", plots.liveness_bars, patterns)
    histograms = {
        encoding: (
            np.array(found["liveness"]["histogram"]["edges"]),
            {stream: np.array(counts) for stream, counts in found["liveness"]["histogram"]["counts"].items()},
        )
        for encoding, found in both.items()
    }
    yield shown("firing frequency", "How often live latents fire.", plots.frequency_histogram, histograms)
    firing = {encoding: np.sum(_frequencies(found), axis=0) > 0 for encoding, found in latents.items()}
    entropies = {encoding: found["entropy"][firing[encoding]] for encoding, found in latents.items()}
    caption = "Firing entropy of the latents that fire: 1 fires equally often in all streams, 0 in one only."
    yield shown("firing entropy", caption, plots.entropy_histogram, entropies)
    cofires = {encoding: (found["energy"], found["cofires"]) for encoding, found in latents.items()}
    caption = "Rows on which a latent fires in all streams at once, against its energy, the length of what it adds."
    yield shown("co-fires against energy", caption, plots.cofires_against_energy, cofires)


def _patterns(liveness: Mapping[str, Any]) -> dict[str, int]:
    return {"all streams": liveness["alive_in_all"], **liveness["patterns"], "dead": liveness["dead"]}


def _frequencies(latents: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [values for name, values in latents.items() if name.startswith("frequency/")]


def _headline_rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return (figure, its text for each model and encoding)."""
    names = [name for name in METRIC_NAMES if any(name in found["joint"]["headline"] for found in results.values())]
    return [
        (
            METRIC_NAMES[name],
            [
                figure_text(found[encoding]["headline"].get(name), percent=name in PERCENT)
                for found in results.values()
                for encoding in ENCODINGS
            ],
        )
        for name in names
    ]


def _differing_settings(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Return (setting, its value for each model)."""
    first = next(iter(results.values()))["model"]
    return [(name, [found["model"][name] for found in results.values()]) for name in first if name != "streams"]


def _retrieval_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, dict[str, Any]]]]:
    """Yield family, pair and encoding -> figures."""
    for family, pairs in found["joint"]["retrieval"].items():
        for pair in pairs:
            yield (
                family.replace("_", " "),
                pair.replace("->", " → "),
                {encoding: found[encoding]["retrieval"][family][pair] for encoding in ENCODINGS},
            )


def _more_rows(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return (figure, its text under each encoding) of what stands in no other table."""
    both = [found[encoding] for encoding in ENCODINGS]
    rows = [
        (words, [_text(part["universality"][name]) for part in both])
        for name, words in (
            ("mean_entropy", "Firing entropy, mean over latents that fire"),
            ("mean_cofire_jaccard", "Rows on which all streams fire, of those on which any does"),
        )
    ]
    for stream, probes in both[-1].get("probes", {}).items():
        for name, words in (("loss", "loss in nats (chance 0.693)"), ("ap", "average precision (chance 0.5)")):
            texts = [_text(part["probes"][stream][name]) for part in both]
            rows.append((f"One-latent probes of {probes['classes']} classes, {stream}: {words}", texts))
    for kind, inputs in both[-1].get("classifiers", {}).items():
        for name in inputs:
            texts = [_text(part["classifiers"][kind][name]) for part in both]
            rows.append((f"Linear classifier on {kind.replace('_', ' ')}, {name}: mAP", texts))
    for stream, others in both[-1].get("monosemanticity", {}).items():
        for other, scores in others.items():
            measured = [part.get("monosemanticity") for part in both]
            texts = ["not measured" if part is None else _text(part[stream][other]["mean"]) for part in measured]
            rows.append((f"Monosemanticity of {stream}'s {scores['latents']} latents by {other}'s features", texts))
    for pair in both[-1].get("bridge_own_share", {}):
        texts = [_text(part["bridge_own_share"][pair]) for part in both]
        rows.append((f"Bridge score of latents with themselves, share, {pair}", texts))
    for other, streams in found.get("stability", {}).items():
        for stream, value in streams.items():
            rows.append((f"Mean cosine of {stream}'s atoms with those of {other}, matched", [_text(value)] * 2))
    return rows


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def latents_csv(evaluation: Evaluation, names: Mapping[int, str]) -> str:
    """Return a CSV of single latents: number, name where there are any, a column per encoding and figure."""
    columns = {
        f"{encoding}/{name}": values
        for encoding, found in evaluation.latents.items()
        for name, values in found.items()
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["latent", *(["name"] if names else []), *columns])
    for latent, values in enumerate(zip(*columns.values(), strict=True)):
        told = [names.get(latent, "")] if names else []
        writer.writerow([latent, *told, *(f"{value:.6g}" for value in values)])
    return buffer.getvalue()


def _embedded(figure: Any) -> str:
    """Return a matplotlib Figure as a data address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
