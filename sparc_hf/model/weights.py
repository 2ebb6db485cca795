"""The weight files of a saved model: those config.json was saved with, of its names, shapes and number type."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .configuration_sparc import SparcConfig

# Arguments of `from_pretrained` that say where files are.
DOWNLOAD_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# What safetensors calls the number types of weights.
NUMBER_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
SHARD = re.compile(r"-\d{5}-of-\d{5}")
BLOCK = 2**20

Stamps = dict[str, tuple[int, int]]
_LOADING_FAULTS = {
    "missing_keys": "missing",
    "unexpected_keys": "unexpected",
    "mismatched_keys": "mis-shaped",
    "mistyped_keys": "of another number type",
}


class WeightFiles:
    """The weight files that `from_pretrained` would load, found on disk or brought from the Hub.

    Args:
        source: folder or Hub id.
        variant: as of `from_pretrained`.
        **download: `DOWNLOAD_ARGUMENTS`.
    """

    def __init__(self, source: str, variant: str | None = None, **download: Any):
        self.source = source
        self._download = {"_raise_exceptions_for_missing_entries": False, **download}
        self.files: dict[str, str] = {}
        if (whole := self._path(_named(SAFE_WEIGHTS_NAME, variant))) is not None:
            self.files = {Path(whole).name: whole}
        elif (index := self._path(_named(SAFE_WEIGHTS_INDEX_NAME, variant))) is not None:
            self.files = {name: path for name in _shards(index) if (path := self._path(name)) is not None}

    def check(self, config: SparcConfig, model: nn.Module, verify: bool) -> None:
        """Compare the files with what their config.json says, and with a model of it, on any device.

        Raises:
            ValueError: for a file that cannot be read, tensors that are missing, too many, of another shape or number
                type, or, with `verify`, a file that is not the one `config` was saved with.
        """
        # No file at all is for transformers to tell.
        if self.files:
            self._check_tensors(model, str(config.dtype).removeprefix("torch."))
        checksums = config.weights_sha256
        if not verify or checksums is None:
            return
        for name, path in self.files.items():
            if checksums.get(name) != sha256_of(path):
                raise ValueError(
                    f"`{name}` in `{self.source}` is not the file that config.json was saved with: it was damaged, "
                    "replaced or not saved to its end; copy or download it again, save the model anew, or load it "
                    "with `verify=False`"
                )

    def _path(self, name: str) -> str | None:
        return cached_file(self.source, name, **self._download)

    def _check_tensors(self, model: nn.Module, dtype: str) -> None:
        expected, headers = model.state_dict(), self._headers()
        shared = sorted(headers.keys() & expected.keys())
        floats = {headers[name][1] for name in shared if expected[name].is_floating_point() and not stays_float(name)}
        # A config that does not say its number type has weights of any one.
        number_type = NUMBER_TYPES.get(dtype) or min(floats & set(NUMBER_TYPES.values()), default="F32")
        kinds = {name: number_type if expected[name].is_floating_point() else "I64" for name in shared}
        kinds |= {name: "F32" for name in shared if stays_float(name)}
        faults = {
            "missing_keys": sorted(expected.keys() - headers.keys()),
            "unexpected_keys": sorted(headers.keys() - expected.keys()),
            "mismatched_keys": [
                (name, headers[name][0], list(expected[name].shape))
                for name in shared
                if headers[name][0] != list(expected[name].shape)
            ],
            "mistyped_keys": [
                (name, headers[name][1], kinds[name]) for name in shared if headers[name][1] != kinds[name]
            ],
        }
        reject_loading_faults(faults, self.source)

    def _headers(self) -> dict[str, tuple[list[int], str]]:
        """Return tensor name -> shape and number type, from the files' headers alone."""
        headers = {}
        for name, path in self.files.items():
            try:
                with safe_open(path, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118 it is no dict
                        tensor = tensors.get_slice(key)
                        headers[key] = list(tensor.get_shape()), tensor.get_dtype()
            except SafetensorError as error:
                raise ValueError(
                    f"`{name}` in `{self.source}` cannot be read ({error}); copy or download it again"
                ) from error
        return headers


def reject_unusable_numbers(model: nn.Module) -> None:
    """Raise ValueError where a weight is NaN or infinite, or a batch norm's variance negative."""
    for name, value in model.state_dict().items():
        if value.is_meta or not value.is_floating_point():
            continue
        least, most = (float(number) for number in value.aminmax())
        # The extremes of an array with NaN in it are NaN.
        if not -torch.inf < least <= most < torch.inf:
            raise ValueError(f"the weights hold NaN or infinite numbers, in `{name}`; this model was spoilt")
        if name.endswith(".running_var") and least < 0:
            raise ValueError(f"the weights hold a variance below 0, in `{name}`; this model was spoilt")


def stays_float(name: str) -> bool:
    """Return whether a tensor of a model is float32 whatever number type its weights have."""
    return name.startswith("imputation.")


def stamps_of(folder: Path) -> Stamps:
    """Return the weight files of a folder, with what changes when one is written."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("model*.safetensors")}


def finish_saving(folder: Path, before: Stamps) -> dict[str, str]:
    """Remove what the weight files just written replace, and give them the mode of config.json.

    Args:
        folder: the model's folder.
        before: `stamps_of` it, before anything was written.

    Returns:
        File name -> SHA-256 of all weight files that are there now; empty where none was written.
    """
    written = [name for name, stamp in stamps_of(folder).items() if before.get(name) != stamp]
    for name in written:
        # safetensors makes its files readable for their owner alone, whatever the umask says.
        shutil.copymode(folder / CONFIG_NAME, folder / name)
        # A model that was not in shards would be loaded in place of the shards.
        if (whole := SHARD.sub("", name)) not in written:
            (folder / whole).unlink(missing_ok=True)
    return {name: sha256_of(folder / name) for name in sorted(stamps_of(folder))} if written else {}


def sha256_of(path: str | Path) -> str:
    """Return the checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _named(name: str, variant: str | None) -> str:
    """Return model.safetensors, or as transformers names a variant, model.<variant>.safetensors."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _shards(index: str) -> list[str]:
    return sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))


def reject_loading_faults(info: Mapping[str, Any], path: str) -> None:
    """Raise ValueError where loading info, such as transformers', says that weights and config do not fit."""
    faults = [
        f"{len(info[key])} {word}: {_listed(info[key])}" for key, word in _LOADING_FAULTS.items() if info.get(key)
    ]
    if faults:
        raise ValueError(
            f"the weights in `{path}` do not fit its config.json ({'; '.join(faults)}); "
            "the two files must come from one `save_pretrained`"
        )


def _listed(keys: Any, limit: int = 3) -> str:
    # Mis-shaped and mistyped keys come as (name, what it is in the file, what it is in the model).
    texts = sorted(
        key if isinstance(key, str) else f"{key[0]} is {_plain(key[1])} instead of {_plain(key[2])}" for key in keys
    )
    return ", ".join(texts[:limit]) + (", ..." if len(texts) > limit else "")


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else list(value)
