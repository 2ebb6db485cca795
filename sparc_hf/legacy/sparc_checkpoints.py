"""Checkpoints of the earlier SPARC project: a `.pth` state dict and its `run_config.json` into a SparcModel."""

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from sparc_hf.files.atomic_files import sha256_of, write_json, writing
from sparc_hf.files.atomic_folders import check_place, new_folder
from sparc_hf.files.checked_reading import checked, read_json
from sparc_hf.files.folder_lock import locked_folder
from sparc_hf.legacy.hdf5_features import RunConfig, stream_order
from sparc_hf.model.configuration_sparc import SparcConfig
from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.model_folder import ORIGIN_FILE, SETTINGS_FILE, is_ours

CHECKPOINT_NAME = "msae_checkpoint.pth"
RUN_CONFIG_NAME = "run_config.json"
# Their name of a training setting, and ours.
SETTINGS = {"lr": "learning_rate", "num_epochs": "epochs", "batch_size": "batch_size", "seed": "seed"}
SIZES = {
    "k": "k",
    "auxk": "auxk",
    "auxk_coef": "auxk_coef",
    "cross_loss_coef": "cross_coef",
    "dead_steps_threshold": "dead_after_steps",
    "auxk_threshold": "dead_threshold",
    "topk_type": "selection",
}


def import_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    run_config: str | os.PathLike | None = None,
    records: Sequence[Mapping[str, Any]] = (),
    overwrite: bool = False,
    complete: Callable[[Path], Any] | None = None,
) -> SparcModel:
    """Turn a checkpoint of the earlier SPARC project into a model folder with equal outputs.

    The file is read with `weights_only=True`, so that nothing in it can run. Atoms keep their stored norms, which that
    project lets drift by a tenth of a percent; rows are normalised by the model, as its loader did.

    Args:
        source: the `.pth` file, or the result folder with `msae_checkpoint.pth`.
        output: folder for the model; it appears only when it is whole.
        run_config: the run's `run_config.json`; by default the one beside the checkpoint.
        records: what is known of the streams beside their width (`name`, `encoder`, `modality`, ...).
        overwrite: replace a model that is in `output`.
        complete: adds to the folder what else belongs to the model, such as its card, before it appears.

    Returns:
        The model, loaded from `output`.

    Raises:
        ValueError: for a file that is no such checkpoint, a run configuration that is missing or does not fit it,
            records for other streams, or an `output` that holds something.
    """
    source, output = Path(source), Path(output)
    checkpoint = source / CHECKPOINT_NAME if source.is_dir() else source
    settings_file = Path(run_config) if run_config is not None else checkpoint.with_name(RUN_CONFIG_NAME)
    check_output(output, overwrite)
    tensors = read_tensors(checkpoint)
    content = _read_run_config(settings_file)
    config = _config(tensors, content, checkpoint, settings_file, records)
    model = SparcModel(config)
    _load(model, tensors, checkpoint)
    arguments = content["args"]
    origin = {
        "project": "SPARC (AtlasAnalyticsLab)",
        "checkpoint": checkpoint.name,
        "sha256": sha256_of(checkpoint),
        "run": arguments.get("exp_name"),
        "data": (content.get("config_file_content") or {}).get("dataset"),
    }
    settings = {ours: arguments[theirs] for theirs, ours in SETTINGS.items() if theirs in arguments}
    save_imported(model, output, origin, settings, overwrite=overwrite, complete=complete)
    return SparcModel.from_pretrained(output)


def read_checkpoint(path: Path) -> Any:
    """Read a `.pth` file without running anything in it.

    Raises:
        ValueError: if it is missing or damaged, or needs code to be read.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint `{path}`; give the .pth file or the folder with {CHECKPOINT_NAME}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`{path}` cannot be read as plain tensors, and files that need code to be read are refused: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(
            f"`{path}` is no readable checkpoint: {(str(error).splitlines() or [repr(error)])[0]}"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a `.pth` state dict without running anything in it.

    Raises:
        ValueError: as `read_checkpoint`, and if it holds something else than named tensors.
    """
    content = read_checkpoint(path)
    if isinstance(content, dict) and "model_state_dict" in content:
        raise ValueError(
            f"`{path}` is one model of a run of Universal Sparse Autoencoders; import the run's folder, which has the "
            "checkpoints of all its models"
        )
    return checked_state(content, f"`{path}`")


def checked_state(state: Any, name: str) -> dict[str, Tensor]:
    """Return a state dict of ordinary tensors with finite numbers.

    Raises:
        ValueError: for anything else, naming the tensor.
    """
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{name} holds {type(state).__name__} and not a state dict of tensors")
    for key, value in state.items():
        plain = value.layout == torch.strided and not value.is_quantized and not value.is_complex()
        if not plain or not torch.isfinite(value).all():
            kind = "a NaN or infinite number" if plain else f"{value.dtype} numbers in the layout {value.layout}"
            raise ValueError(f"{name} has {kind} in `{key}`")
    return state


def _read_run_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(
            f"there is no `{path}`, which says how the checkpoint selects and trains; name it with `run_config`"
        )
    try:
        content = read_json(path, _AnyRun)
        if missing := sorted({"n_latents", *SIZES} - set(content["args"])):
            raise ValueError(f"it lacks the settings {missing} under `args`")
        return checked(content, _Run, path.name)
    except ValueError as error:
        raise ValueError(f"`{path}` is no run_config.json of the earlier SPARC project: {error}") from error


class _AnyRun(RunConfig):
    args: dict[str, Any]


class _RunArguments(TypedDict):
    n_latents: int
    k: int
    auxk: int
    auxk_coef: float
    cross_loss_coef: float
    dead_steps_threshold: int
    auxk_threshold: float
    topk_type: Literal["global", "local"]


class _Run(RunConfig):
    """What a run says of itself."""

    args: _RunArguments


def _config(
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
    checkpoint: Path,
    settings_file: Path,
    records: Sequence[Mapping[str, Any]],
) -> SparcConfig:
    """Return the config, with the streams in the order of the run's feature files."""
    widths = {
        key.split(".")[1]: tensor.shape[1]
        for key, tensor in tensors.items()
        if key.startswith("encoders.") and key.endswith(".weight") and tensor.ndim == 2
    }
    if not widths:
        raise ValueError(f"`{checkpoint}` has no `encoders.<stream>.weight`; it holds {sorted(tensors)[:4]}")
    order = stream_order(content.get("config_file_content") or {}) or list(widths)
    if sorted(order) != sorted(widths):
        raise ValueError(
            f"`{checkpoint}` has the streams {sorted(widths)} but `{settings_file}` has {sorted(order)}; "
            "the two are not of one run"
        )
    encoder_records = {record["name"]: record for record in records}
    if unknown := sorted(set(encoder_records) - set(widths)):
        raise ValueError(f"encoders are given for {unknown}, but the streams of `{checkpoint}` are {order}")
    streams = [
        {**encoder_records.get(name, {}), "name": name, "hidden_size": widths[name], "normalize": "l2"}
        for name in order
    ]
    arguments = content["args"]
    latents = int(arguments["n_latents"])
    rows = tensors[f"encoders.{order[0]}.weight"].shape[0]
    if rows != latents:
        raise ValueError(
            f"`{checkpoint}` has {rows} latents but `{settings_file}` says {latents}; the two are not of one run"
        )
    return SparcConfig(
        streams=streams, num_latents=latents, **{ours: arguments[theirs] for theirs, ours in SIZES.items()}
    )


def _load(model: SparcModel, tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Give the model the checkpoint's tensors under our names; all of theirs must be used, and all of ours filled."""
    state, left = {}, set(tensors)
    for name in model.config.stream_names:
        ours = {
            f"encoders.{name}.weight": f"encoders.{name}.weight",
            f"encoders.{name}.bias": f"latent_biases.{name}",
            f"atoms.{name}": f"decoders.{name}.weight",
            f"pre_bias.{name}": f"pre_biases.{name}",
            f"steps_since_fired.{name}": f"stats_last_nonzero_{name}",
        }
        for key, theirs in ours.items():
            if theirs not in tensors:
                raise ValueError(f"`{checkpoint}` lacks `{theirs}`; it is not a whole checkpoint")
            left.discard(theirs)
            value = tensors[theirs].T if key.startswith("atoms") else tensors[theirs]
            if value.shape != model.state_dict()[key].shape:
                expected = list(
                    model.state_dict()[key].T.shape if key.startswith("atoms") else model.state_dict()[key].shape
                )
                raise ValueError(f"`{checkpoint}`: `{theirs}` is {list(tensors[theirs].shape)} instead of {expected}")
            state[key] = value
    if left:
        raise ValueError(f"`{checkpoint}` has tensors that no SparcModel has: {sorted(left)[:4]}")
    model.load_state_dict(state)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise ValueError where `output` holds something that may not be replaced."""
    check_place(output.resolve(), is_ours)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "config.json").is_file():
        raise ValueError(f"`{output}` exists and is not a model folder; choose another path")
    if not overwrite:
        raise ValueError(f"`{output}` already holds a model; choose another path or pass `overwrite`")


def save_imported(
    model: SparcModel,
    output: Path,
    origin: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    overwrite: bool = False,
    complete: Callable[[Path], Any] | None = None,
) -> None:
    """Write an imported model with its settings and where it came from; the folder appears when it is whole."""
    advice = "what was there before is kept; make room and run the same again"
    with locked_folder(output), writing(f"the model in `{output}`", advice):
        check_output(output, overwrite)
        with new_folder(output, is_ours, last=SETTINGS_FILE) as unfinished:
            model.save_pretrained(unfinished)
            write_json(unfinished / ORIGIN_FILE, origin)
            write_json(unfinished / SETTINGS_FILE, settings)
            if complete is not None:
                complete(unfinished)
