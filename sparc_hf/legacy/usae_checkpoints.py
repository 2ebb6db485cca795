"""Checkpoints of Universal Sparse Autoencoders: one `.pth` a model, and the run's YAML file, into one SparcModel."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor

from sparc_hf.files.atomic_files import sha256_of
from sparc_hf.files.checked_reading import Limit, checked, read_yaml
from sparc_hf.legacy.sparc_checkpoints import check_output, checked_state, read_checkpoint, save_imported
from sparc_hf.model.configuration_sparc import SparcConfig
from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.model.stream_record import check_stream_name

AUXK_COEF = 0.1
SETTINGS = {"lr": "learning_rate", "nb_epochs": "epochs", "batch_size": "batch_size"}
# Our name of a tensor, and theirs.
TENSORS = {
    "encoders.{}.weight": "encoder.final_block.0.weight",
    "encoders.{}.bias": "encoder.final_block.0.bias",
    "encoder_norm.{}.weight": "encoder.final_block.1.weight",
    "encoder_norm.{}.bias": "encoder.final_block.1.bias",
    "encoder_norm.{}.running_mean": "encoder.final_block.1.running_mean",
    "encoder_norm.{}.running_var": "encoder.final_block.1.running_var",
    "encoder_norm.{}.num_batches_tracked": "encoder.final_block.1.num_batches_tracked",
    "atoms.{}": "dictionary._weights",
}


def import_usae_checkpoints(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    run_config: str | os.PathLike | None = None,
    records: Sequence[Mapping[str, Any]] = (),
    overwrite: bool = False,
    complete: Callable[[Path], Any] | None = None,
) -> SparcModel:
    """Turn the checkpoints of a run into one model folder with equal codes and reconstructions.

    Files are read with `weights_only=True`, so that nothing in them can run. Of several epochs of a model the last is
    taken, which must be the same for all.

    Args:
        source: the run's folder, with `uni_<model>_checkpoint_<epoch>.pth` in it or in folders below.
        output: folder for the model; it appears only when it is whole.
        run_config: the run's YAML file (`sae_params`, `model_zoo`, ...); by default the only one in the folder.
        records: what is known of the streams beside the files (`name`, `encoder`, `modality`, ...).
        overwrite: replace a model that is in `output`.
        complete: see `import_checkpoint`.

    Raises:
        ValueError: for a run without checkpoints or settings, files that do not belong together or have another form,
            records for other streams, or an `output` that holds something.
    """
    source, output = Path(source), Path(output)
    check_output(output, overwrite)
    settings = _read_settings(source, run_config)
    general, zoo = settings["global"], settings["model_zoo"]
    files = {name: _newest(source, name) for name in zoo}
    if len({epoch for epoch, _ in files.values()}) > 1:
        epochs = {name: epoch for name, (epoch, _) in files.items()}
        raise ValueError(f"the newest checkpoints in `{source}` are of different epochs: {epochs}")
    tensors = {name: _state(file) for name, (_, file) in files.items()}
    config = _config(tensors, settings, records)
    model = SparcModel(config)
    state = model.state_dict()
    for name, model_tensors in tensors.items():
        for ours, theirs in TENSORS.items():
            key = ours.format(name)
            if theirs not in model_tensors or model_tensors[theirs].shape != state[key].shape:
                shape = list(model_tensors[theirs].shape) if theirs in model_tensors else "missing"
                raise ValueError(f"`{files[name][1]}`: `{theirs}` is {shape} instead of {list(state[key].shape)}")
            state[key] = model_tensors[theirs]
        if left := sorted(set(model_tensors) - set(TENSORS.values())):
            raise ValueError(f"`{files[name][1]}` has tensors that no SparcModel has: {left[:4]}")
    model.load_state_dict(state)
    origin = {
        "project": "Universal Sparse Autoencoders (YorkUCVIL)",
        "checkpoint": ", ".join(file.name for _, file in files.values()),
        "sha256": ", ".join(sha256_of(file) for _, file in files.values()),
        "run": source.name,
        "data": (settings.get("viz") or {}).get("dataset"),
    }
    training = {ours: general[theirs] for theirs, ours in SETTINGS.items() if theirs in general}
    save_imported(model, output, origin, training, overwrite=overwrite, complete=complete)
    return SparcModel.from_pretrained(output)


class _SaeParams(TypedDict):
    top_k: int


# One of its names is a word of Python.
_UsaeRun = TypedDict(
    "_UsaeRun",
    {
        "sae_params": _SaeParams,
        "global": dict[str, Any],
        "model_zoo": Annotated[dict[str, dict[str, Any]], Limit("an object of at least one model", bool)],
    },
)


class UsaeRun(_UsaeRun, total=False):
    """The configuration of a run."""

    viz: dict[str, Any] | None


def _read_settings(source: Path, run_config: str | os.PathLike | None) -> dict[str, Any]:
    files = [Path(run_config)] if run_config is not None else sorted(source.glob("*.yaml"))
    if len(files) != 1 or not files[0].is_file():
        raise ValueError(
            f"the run's YAML file says how many latents are active and how rows were standardised, but `{source}` has "
            f"{[file.name for file in files]}; name it with `run_config`"
        )
    try:
        content = checked(read_yaml(files[0]), UsaeRun, files[0].name)
    except ValueError as error:
        raise ValueError(f"`{files[0]}` is no configuration of Universal Sparse Autoencoders: {error}") from error
    for name in content["model_zoo"]:
        try:
            check_stream_name(name)
        except ValueError as error:
            raise ValueError(f"`{files[0]}` names a model that has to be renamed there: {error}") from error
    return content


def _newest(source: Path, name: str) -> tuple[int, Path]:
    numbered = [
        (int(match[1]), file)
        for file in source.rglob(f"uni_{name}_checkpoint_*.pth")
        if (match := re.fullmatch(rf"uni_{name}_checkpoint_(\d+)\.pth", file.name))
    ]
    if not numbered:
        raise ValueError(f"there is no `uni_{name}_checkpoint_<epoch>.pth` in `{source}` or below")
    return max(numbered)


def _state(file: Path) -> dict[str, Tensor]:
    content = read_checkpoint(file)
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if state is None:
        raise ValueError(f"`{file}` has no `model_state_dict` of tensors")
    return checked_state(state, f"`{file}`")


def _number(value: Any, name: str) -> float:
    """Return a number, which YAML takes for a text where it is written as 1e-3."""
    try:
        return checked(float(value) if isinstance(value, str) else value, float, name)
    except ValueError as error:
        raise ValueError(f"`{name}` must be a finite number, but it is {value!r}") from error


def _config(
    tensors: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> SparcConfig:
    general, zoo = settings["global"], settings["model_zoo"]
    encoder_records = {record["name"]: record for record in records}
    if unknown := sorted(set(encoder_records) - set(zoo)):
        raise ValueError(f"encoders are given for {unknown}, but the models of the run are {list(zoo)}")
    streams, latents = [], set()
    for name, model_tensors in tensors.items():
        atoms = model_tensors.get("dictionary._weights", torch.empty(0, 0))
        if atoms.ndim != 2:
            raise ValueError(f"`dictionary._weights` of `{name}` is {list(atoms.shape)} instead of [latents, width]")
        latents.add(atoms.shape[0])
        record: dict[str, Any] = {**encoder_records.get(name, {}), "name": name, "hidden_size": atoms.shape[1]}
        if general.get("standardize"):
            if missing := [key for key in ("model_mean", "model_std") if key not in zoo[name]]:
                raise ValueError(f"rows of `{name}` were standardised, but `model_zoo.{name}` lacks {missing}")
            record |= {
                "normalize": "standardize",
                "mean": _number(zoo[name]["model_mean"], f"model_zoo.{name}.model_mean"),
                "std": _number(zoo[name]["model_std"], f"model_zoo.{name}.model_std"),
            }
        else:
            record["normalize"] = "l2" if general.get("divide_norm") else "none"
        streams.append(record)
    if len(latents) > 1:
        raise ValueError(f"the models of one run share their latents, but these have {sorted(latents)}")
    count = latents.pop()
    return SparcConfig(
        streams=streams,
        num_latents=count,
        k=int(settings["sae_params"]["top_k"]),
        auxk=count // 2,
        auxk_coef=AUXK_COEF,
        selection="local",
        objective="usae",
        distance="l1" if general.get("loss_criterion", "L1") == "L1" else "l2",
    )
