"""The figures of a results.json: how they are called and shown, and which of its models a folder is."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from sparc_hf.evaluation.intervals import Figure
from sparc_hf.files.checked_reading import Count, Limit, read_json
from sparc_hf.files.installed_folders import templates_folder
from sparc_hf.model.configuration_sparc import SparcConfig

Matrix = Annotated[
    dict[str, dict[str, float | None]],
    Limit(
        "a number for every pair of streams", lambda rows: rows and all(set(row) == set(rows) for row in rows.values())
    ),
]
# Every figure is of these; of `single_ignoring`, which a model that imputes has too, the headline and reconstruction.
MEASURED_ENCODINGS = ("joint", "single")
ENCODING_NAMES = {"joint": "joint", "single": "single", "single_ignoring": "single, ignoring the others"}
METRIC_NAMES = {
    "nmse_self": "Self-reconstruction nmse",
    "nmse_cross": "Cross-reconstruction nmse",
    "dead_share": "Dead latents, mean share over streams",
    "jaccard": "Label Jaccard between streams, mean over all latents",
    "jaccard_live": "Label Jaccard between streams, mean over live latents",
    "self_reconstruction_r_at_1": "Self-reconstruction retrieval R@1",
    "latent_alignment_r_at_1": "Counterpart retrieval by codes R@1",
    "cross_reconstruction_r_at_1": "Counterpart retrieval by cross-reconstruction R@1",
}


class Reconstruction(TypedDict):
    """What of the reconstruction errors cards show."""

    nmse: Matrix


class Figures(TypedDict):
    """The figures of one encoding."""

    headline: dict[str, Figure]
    reconstruction: Reconstruction


class _Results(TypedDict):
    dataset: str
    rows: Count
    joint: Figures
    single: Figures


class ModelResults(_Results, total=False):
    """The figures of one model, and the settings that tell it from others."""

    model: dict[str, Any]
    rows_left_out: Count
    single_ignoring: Figures


class ResultsFile(TypedDict):
    """A results.json."""

    models: Annotated[dict[str, ModelResults], Limit("an object of at least one model", bool)]


def results_of_model(path: str | Path, model: str | Path) -> dict[str, Any]:
    """Return one model's results from a results.json, told by its folder where the file has several models.

    Raises:
        ValueError: where the file is not one, or which of its models is meant cannot be told from the folder's name.
    """
    models = _models_of(Path(path))
    if len(models) == 1:
        return next(iter(models.values()))
    # A folder may be named by a link, or by where the link leads.
    addresses = [Path(model).absolute().parts, Path(model).resolve().parts]
    fitting = [
        name for name in models if any(address[-len(Path(name).parts) :] == Path(name).parts for address in addresses)
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"{path} holds the models {list(models)}, none or several of which are {model}; name a file with its "
            "results by `--results`, or evaluate it again"
        )
    return models[fitting[0]]


def check_results(results: Mapping[str, Any], config: SparcConfig, model: str | Path) -> None:
    """Raise ValueError where results tell of a model of other streams or settings, and so are another model's."""
    for encoding in MEASURED_ENCODINGS:
        streams = list(results[encoding]["reconstruction"]["nmse"])
        if set(streams) != set(config.stream_names):
            raise ValueError(
                f"the results are of the streams {streams}, but {model} has {config.stream_names}; evaluate it with "
                "`sparc evaluate`"
            )
    for name, measured in results.get("model", {}).items():
        own = config.stream_names if name == "streams" else getattr(config, name, measured)
        if own != measured:
            raise ValueError(
                f"the results are of a model with `{name}` {measured}, but {model} has {own}; evaluate it with "
                "`sparc evaluate`"
            )


def headline_encodings(results: Mapping[str, Any]) -> list[str]:
    """Return the encodings that the headline figures of a model's results are of, in the order they are shown."""
    return [encoding for encoding in ENCODING_NAMES if encoding in results]


def _models_of(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return read_json(path, ResultsFile)["models"]
    except ValueError as error:
        raise ValueError(f"{path} is not a results.json of `sparc evaluate`: {error}") from error


def eval_results(results: Mapping[str, Any]) -> list[Any]:
    """Return the headline figures of `evaluate_model`'s results as huggingface_hub.EvalResult, for a model-index."""
    from huggingface_hub import EvalResult

    dataset = results["dataset"]
    return [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-"),
            dataset_name=dataset,
            metric_type=name,
            metric_name=f"{METRIC_NAMES.get(name, name)} ({ENCODING_NAMES[encoding]} encoding)",
            metric_value=round(figure["value"], 6),
        )
        for encoding in headline_encodings(results)
        for name, figure in results[encoding]["headline"].items()
        if figure["value"] is not None
    ]


def template(name: str, **filters: Callable[..., Any]) -> Any:
    """Return the jinja template of a card or, where its name says so, of an HTML page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_folder()),
        undefined=jinja2.StrictUndefined,
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(name)


def figure_texts(figure: Mapping[str, Any] | None, percent: bool = False) -> tuple[str, str]:
    """Return a headline figure and its interval as texts; the latter is empty where there is none."""
    if figure is None or figure["value"] is None:
        return "not measured", ""
    form = ".1%" if percent else ".3f"
    bounds = [] if None in (figure["low"], figure["high"]) else [figure["low"], figure["high"]]
    return format(figure["value"], form), " to ".join(format(bound, form) for bound in bounds)


def figure_text(figure: Mapping[str, Any] | None, percent: bool = False) -> str:
    """Return a headline figure as text, with its interval where there is one."""
    value, interval = figure_texts(figure, percent)
    return f"{value} ({interval})" if interval else value


def number_text(value: float | None) -> str:
    """Return a number without an interval as text."""
    return "undefined" if value is None else f"{value:.3f}"
