"""Coordinated activation maximisation (USAE, arXiv 2502.03714): an image per stream that fires the same latent."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.encoders.token_grid import resample_tokens
from sparc_hf.encoders.views import pixel_statistics
from sparc_hf.model.modeling_sparc import SparcModel

PARAMETRISATIONS = ("fourier", "pixels")


@dataclass(frozen=True)
class MaximisationSettings:
    """How images are made.

    Attributes:
        steps: of Adam.
        learning_rate: of Adam.
        parametrisation: "fourier" (a spectrum whose coarse waves weigh more, Olah et al. 2017) or "pixels".
        starts: images a stream, each from a start of its own.
        jitter: the image moves at random by up to this share of its side in each step.
        scale: and is drawn larger or smaller by up to this share.
        total_variation: weight of the mean absolute difference of neighbouring pixels, in units of the activation's
            spread over random images.
        random_images: to which the result is compared.
        seed: of everything random.
    """

    steps: int = 256
    learning_rate: float = 0.1
    parametrisation: str = "fourier"
    starts: int = 3
    jitter: float = 0.06
    scale: float = 0.1
    total_variation: float = 40.0
    random_images: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.parametrisation not in PARAMETRISATIONS:
            raise ValueError(
                f"`parametrisation` must be one of {list(PARAMETRISATIONS)}, but it is {self.parametrisation!r}"
            )
        for name in ("steps", "starts", "random_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {getattr(self, name)}")


@dataclass(frozen=True)
class MaximisedStream:
    """What maximising a latent gave in one stream.

    Attributes:
        images: one per start, the strongest first.
        activations: their pre-activations of the latent (for patch tokens, the mean over the tokens).
        random: pre-activations of random images of the same spectrum, [random_images].
    """

    images: list[Image.Image]
    activations: list[float]
    random: np.ndarray

    @property
    def factor(self) -> float:
        """The strongest image's activation over the largest of any random image; infinity where none is positive."""
        largest = float(self.random.max())
        return self.activations[0] / largest if largest > 0 else math.inf


def maximise_latent(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    latent: int,
    settings: MaximisationSettings | None = None,
) -> dict[str, MaximisedStream]:
    """Find images that fire one latent, through the frozen encoder of every image stream.

    Args:
        model: the model.
        encoders: stream -> its encoder; text streams are left out, because texts cannot be optimised so.
        latent: the latent.
        settings: how.

    Raises:
        ValueError: for a latent the model does not have, or no image stream.
    """
    settings = settings or MaximisationSettings()
    if not 0 <= latent < model.config.num_latents:
        raise ValueError(f"there is no latent {latent}; this model has 0 to {model.config.num_latents - 1}")
    used = {name: encoder for name, encoder in encoders.items() if encoder.modality == "image"}
    if not used:
        raise ValueError(f"maximisation needs a stream that encodes images, but there are {list(encoders)}")
    return {name: _maximise(model, encoder, latent, settings) for name, encoder in used.items()}


def _maximise(
    model: SparcModel, encoder: StreamEncoder, latent: int, settings: MaximisationSettings
) -> MaximisedStream:
    draws = torch.Generator().manual_seed(settings.seed)
    height, width = encoder.record["image_size"]
    start = _Parametrisation(settings, settings.random_images, (height, width), draws, encoder.device)
    with torch.no_grad():
        random = _activation(model, encoder, start.images(), latent).cpu().numpy()
    parameters = _Parametrisation(settings, settings.starts, (height, width), draws, encoder.device)
    weight = settings.total_variation * float(random.std())
    optimizer = torch.optim.Adam([parameters.values], lr=settings.learning_rate)
    steps = range(settings.steps)
    for _ in tqdm(steps, desc=f"maximising latent {latent} in {encoder.name}", unit="step", delay=2, leave=False):
        images = parameters.images()
        seen = _moved(images, settings, draws)
        loss = (weight * _total_variation(images) - _activation(model, encoder, seen, latent)).sum()
        # Not `backward`, which would leave gradients on the model.
        (parameters.values.grad,) = torch.autograd.grad(loss, [parameters.values])
        optimizer.step()
    with torch.no_grad():
        images = parameters.images()
        activations = _activation(model, encoder, images, latent).cpu()
    order = activations.argsort(descending=True).tolist()
    pixels = (images.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    return MaximisedStream(
        [Image.fromarray(pixels[at]) for at in order], [float(activations[at]) for at in order], random
    )


class _Parametrisation:
    """Images [batch, 3, height, width] from 0 to 1 as a function of what is optimised."""

    def __init__(
        self,
        settings: MaximisationSettings,
        batch: int,
        size: tuple[int, int],
        draws: torch.Generator,
        device: torch.device,
    ):
        self.size, self.fourier = size, settings.parametrisation == "fourier"
        if self.fourier:
            rows, columns = torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])[None]
            frequency = (rows.square() + columns.square()).sqrt().clamp(min=1 / max(size))
            waves = 1 / frequency
            # Unit coefficients shall give pixels of unit spread, before the sigmoid.
            self.scale = (waves / waves.square().mean().sqrt()).to(device)
            shape = (batch, 3, size[0], size[1] // 2 + 1, 2)
        else:
            shape = (batch, 3, *size)
        # Small enough that no pixel starts in the flat ends of the sigmoid.
        self.values = torch.randn(shape, generator=draws).mul(0.7).to(device)
        self.values.requires_grad_()

    def images(self) -> Tensor:
        if not self.fourier:
            return self.values.sigmoid()
        spectrum = torch.view_as_complex(self.values) * self.scale
        return torch.fft.irfft2(spectrum, s=self.size, norm="ortho").sigmoid()


def _activation(model: SparcModel, encoder: StreamEncoder, images: Tensor, latent: int) -> Tensor:
    """Return pre-activations [batch] of images from 0 to 1, differentiable."""
    mean, std = (torch.tensor(colours, device=images.device)[:, None, None] for colours in pixel_statistics(encoder))
    inputs = encoder.placed({"pixel_values": (images - mean) / std})
    latents = torch.tensor([latent])
    if encoder.pooling != "tokens":
        return model.preactivations(encoder.name, encoder.vectors(encoder.output(inputs), inputs), latents)[:, 0]
    pixels = inputs["pixel_values"]
    tokens = encoder.patches(encoder.tower(**inputs).last_hidden_state, pixels)
    if encoder.grid is not None:
        tokens = resample_tokens(tokens, encoder.grid_of(pixels), encoder.grid)
    values = model.preactivations(encoder.name, tokens.flatten(0, 1), latents)
    return values.unflatten(0, tokens.shape[:2]).mean((1, 2))


def _moved(images: Tensor, settings: MaximisationSettings, draws: torch.Generator) -> Tensor:
    """Return images moved and scaled at random, all of a step alike; what comes from beyond an edge repeats it."""
    shift_x, shift_y, scale = (torch.rand(3, generator=draws) * 2 - 1).tolist()
    zoom = 1 / (1 + settings.scale * scale)
    place = torch.tensor([[zoom, 0, 2 * settings.jitter * shift_x], [0, zoom, 2 * settings.jitter * shift_y]])
    grid = F.affine_grid(place.expand(len(images), 2, 3).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _total_variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels, [batch]."""
    across, down = images.diff(dim=-1).abs().mean((1, 2, 3)), images.diff(dim=-2).abs().mean((1, 2, 3))
    return across + down
