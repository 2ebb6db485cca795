"""The code of one image or text, by itself."""

from collections.abc import Mapping

import torch
from PIL import Image

from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.model.modeling_sparc import SparcModel


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


@torch.no_grad()
def sample_code(model: SparcModel, encoder: StreamEncoder, sample: Image.Image | str) -> torch.Tensor:
    """Return float32 [N], the code of an image or a text in the stream of its encoder, which stands alone.

    Of patch tokens it has the largest value of every latent.
    """
    rows = encoder.rows(encoder.prepare([sample]))  # pyright: ignore[reportArgumentType]
    return model.encode({encoder.name: rows})[encoder.name].to_dense().amax(dim=0).float().cpu()
