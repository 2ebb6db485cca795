"""Parts of a pretrained checkpoint: frozen model, image processor and tokenizer, with one way to fail."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from sparc_hf.encoders.inputs import upright_rgb
from sparc_hf.files.installed_folders import package_folder

DEMO_PREFIX = "demo:"
IMAGE_BACKENDS = ("pil", "torchvision")
# Longer images are cut to this ratio of their sides before they are resized, which would make millions of pixels.
LONGEST_RATIO = 100
LoadedModels = dict[tuple[Any, ...], nn.Module]


class ImageInputs:
    """The image processor of a checkpoint: PIL images to `pixel_values` [batch, 3, height, width].

    Args:
        encoder: Hub id or folder.
        revision: commit on the Hub.
        backend: "pil", which gives the same pixels on every machine, or "torchvision", which is faster where it is
            installed and resizes a little differently.
        trust_remote_code: see `load_part`.

    Raises:
        ValueError: if the checkpoint has none that works here, or torchvision is asked for and not installed.
    """

    def __init__(self, encoder: str, revision: str | None, backend: str, trust_remote_code: bool = False):
        if backend not in IMAGE_BACKENDS:
            raise ValueError(f"`image_backend` must be one of {list(IMAGE_BACKENDS)}, but it is {backend!r}")
        # transformers would fall back to PIL without a word, and the record would be wrong.
        if backend == "torchvision" and not is_torchvision_available():
            raise ValueError("`image_backend` torchvision needs torchvision: `pip install torchvision`")
        settings = {"revision": revision, "backend": backend, "trust_remote_code": trust_remote_code}
        self.processor = load_part(AutoImageProcessor, encoder, "image processor", **settings)

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        rgb = [self._without_far_ends(upright_rgb(image)) for image in images]
        return {"pixel_values": self.processor(images=rgb, return_tensors="pt")["pixel_values"]}

    def _without_far_ends(self, image: Image.Image) -> Image.Image:
        """Cut off of a line of pixels what the centre crop would drop.

        The processor rounds the length it resizes to, so that a cut moves its sampling points a little; of pictures
        up to `LONGEST_RATIO` it gets the whole.
        """
        size = dict(self.processor.size or {}).get("shortest_edge") if self.processor.do_resize else None
        if not size or not getattr(self.processor, "do_center_crop", False):
            return image
        short, (width, height) = min(image.size), image.size
        longest = short * LONGEST_RATIO
        # An even margin keeps the centre.
        margins = [max(0, side - longest) // 2 for side in (width, height)]
        if not any(margins):
            return image
        return image.crop((margins[0], margins[1], width - margins[0], height - margins[1]))


class TextInputs:
    """The tokenizer of a checkpoint: texts to `input_ids` and `attention_mask` [batch, tokens].

    Args:
        encoder: Hub id or folder.
        revision: commit on the Hub.
        positions: longest text of the model, in tokens, if known.
        masked: whether padding is masked; if not, every text is padded to full length and there is no mask.
        trust_remote_code: see `load_part`.

    Raises:
        ValueError: if the checkpoint has no tokenizer.
    """

    def __init__(
        self,
        encoder: str,
        revision: str | None,
        positions: int | None,
        masked: bool,
        trust_remote_code: bool = False,
    ):
        settings = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.tokenizer = load_part(AutoTokenizer, encoder, "tokenizer", **settings)
        # Where the files are missing, transformers makes a tokenizer that knows its special tokens only.
        if len(self.tokenizer) <= len(self.tokenizer.all_special_ids):
            raise ValueError(f"`{encoder}` has no tokenizer files; add its tokenizer to encode text")
        # A tokenizer without a limit says so with a number above any text.
        limits = [limit for limit in (self.tokenizer.model_max_length, positions) if limit and limit < 1 << 20]
        self.settings = {
            "truncation": bool(limits),
            "max_length": min(limits, default=None),
            "padding": True if masked else "max_length",
        }
        self.masked = masked

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        inputs = dict(self.tokenizer(list(texts), return_tensors="pt", **self.settings))
        return {key: value for key, value in inputs.items() if self.masked or key != "attention_mask"}

    def unread(self, text: str) -> str:
        """Return the end of a text that is not read, because it is too long; mostly ""."""
        offsets = self.tokenizer([text], return_offsets_mapping=True, **self.settings)["offset_mapping"][0]
        return text[max((end for _, end in offsets), default=0) :].strip()


def frozen_model(
    encoder: str,
    revision: str | None,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    loaded: LoadedModels,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a model in eval mode with frozen weights, or return the one in `loaded` with the same settings.

    Raises:
        ValueError: if it cannot be loaded, has pickled weights only, or the checkpoint lacks weights.
    """
    key = (encoder, revision, dtype, trust_remote_code, *options.items())
    if key not in loaded:
        settings = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code, **options}
        # Pickled weights can run code, so that an encoder without safetensors is not loaded.
        settings |= {"use_safetensors": True, "output_loading_info": True}
        model, report = load_part(AutoModel, encoder, "model", **settings)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"the checkpoint `{encoder}` lacks {len(missing)} weights ({missing[0]} among them), which would be "
                "random; it is not a trained encoder of its model type, or not with this `pooling`"
            )
        loaded[key] = model.eval().requires_grad_(False)
    return loaded[key]


def load_part(auto_class: Any, encoder: str, what: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Call `from_pretrained`, and raise one ValueError for the many ways in which it can fail.

    Code of the encoder's repository is run only with `trust_remote_code`, and nobody is asked.
    """
    try:
        return auto_class.from_pretrained(checkpoint_of(encoder), trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ValueError(
                f"encoder `{encoder}` needs code from its repository, which was not run; look at that code, and pass "
                "`trust_remote_code` (`--trust_remote_code`) if you trust it"
            ) from error
        raise ValueError(f"cannot load the {what} of encoder `{encoder}`: {_first_line(error)}") from error


def checkpoint_of(encoder: str) -> str:
    """Return the Hub id or folder of an encoder.

    Those shipped with the package are called "demo:clip" and "demo:dino", because stream records travel with features
    and models to machines where the package lies elsewhere.
    """
    if encoder.startswith(DEMO_PREFIX):
        return str(package_folder() / "demo" / "encoders" / encoder.removeprefix(DEMO_PREFIX))
    return encoder


def commit_of(encoder: str, revision: str | None) -> str | None:
    """Return the commit that `revision` of a Hub repository stands for, or None for a folder.

    Raises:
        ValueError: if `encoder` is neither.
    """
    if Path(checkpoint_of(encoder)).is_dir():
        return None
    try:
        file = cached_file(checkpoint_of(encoder), "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"encoder `{encoder}` is neither a folder nor a repository on the Hub that can be reached: "
            f"{_first_line(error)}"
        ) from error
    snapshot = re.search(r"snapshots/([0-9a-f]{40})/", Path(str(file)).as_posix())
    return snapshot.group(1) if snapshot else revision


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
