"""The figures of a results.json: which of its models a folder is, and whether they can be that model's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparc_hf.configuration_sparc import SparcConfig


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
    """Raise ValueError where results tell of a model of other settings, and so are another model's."""
    for name, measured in results.get("model", {}).items():
        own = config.stream_names if name == "streams" else getattr(config, name, measured)
        if own != measured:
            raise ValueError(
                f"the results are of a model with `{name}` {measured}, but {model} has {own}; evaluate it with "
                "`sparc evaluate`"
            )


def _models_of(path: Path) -> dict[str, dict[str, Any]]:
    text = path.read_bytes()
    try:
        models = json.loads(text)["models"]
        if not models or any(
            not isinstance(models[name][part], dict) for name in models for part in ("joint", "single")
        ):
            raise TypeError("no figures")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results.json of `sparc evaluate`") from error
    return models
