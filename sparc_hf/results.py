"""The figures of a results.json: which of its models a folder is, and whether they can be that model's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from sparc_hf.configuration_sparc import SparcConfig
from sparc_hf.plain_files import Count, Limit, read_json

Matrix = Annotated[
    dict[str, dict[str, float | None]],
    Limit(
        "a number for every pair of streams", lambda rows: rows and all(set(row) == set(rows) for row in rows.values())
    ),
]


class Figure(TypedDict):
    """A figure with its interval, null where it is undefined or has none."""

    value: float | None
    low: float | None
    high: float | None


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
    for encoding in ("joint", "single"):
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


def _models_of(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return read_json(path, ResultsFile)["models"]
    except ValueError as error:
        raise ValueError(f"{path} is not a results.json of `sparc evaluate`: {error}") from error
