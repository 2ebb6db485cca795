"""The codes of images and texts themselves, through the encoders of their streams."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.model.outputs import SparseCodes


@torch.no_grad()
def encode_samples(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    samples: Mapping[str, Sequence[Any]],
    selection: str | None = None,
) -> dict[str, SparseCodes]:
    """Return stream -> the codes of its samples, as many rows a sample as its encoder makes.

    Args:
        model: the model.
        encoders: stream -> its encoder.
        samples: stream -> images or texts; those at one place are one sample, whose streams choose latents together.
        selection: in place of the model's.
    """
    rows = {name: encoders[name].rows(encoders[name].prepare(given)) for name, given in samples.items()}
    return model.encode(rows, selection)


def sample_codes(
    model: SparcModel, encoders: Mapping[str, StreamEncoder], image: Image.Image | None, caption: str
) -> dict[str, torch.Tensor]:
    """Return stream -> float32 [N], `sample_code` of a sample in each stream that can encode it."""
    samples = {name: image if encoder.modality == "image" else caption for name, encoder in encoders.items()}
    return {
        name: sample_code(model, encoders[name], sample)
        for name, sample in samples.items()
        if sample is not None and sample != ""
    }


def sample_code(model: SparcModel, encoder: StreamEncoder, sample: Image.Image | str) -> torch.Tensor:
    """Return float32 [N], the code of an image or a text in the stream of its encoder, which stands alone.

    Of patch tokens it has the largest value of every latent.
    """
    codes = encode_samples(model, {encoder.name: encoder}, {encoder.name: [sample]})[encoder.name]
    return codes.to_dense().amax(dim=0).float().cpu()
