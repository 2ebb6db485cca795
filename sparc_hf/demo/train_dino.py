"""The demo vision-only encoder: a small `Dinov2WithRegistersModel` trained on scenes without text or labels.

Two augmented views of a scene must find each other among the views of other scenes by their CLS tokens (contrastive,
with the colours distorted, since colour alone would tell most scenes apart), and the masked patches of one view are
predicted from the rest, which keeps patch tokens about what stands at their place.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BitImageProcessorPil, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from .raster import IMAGE_SIZE
from .train_clip import IMAGE_MEAN, IMAGE_STD, adamw, index_batches, learning_rate_share

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DinoRecipe:
    """Settings of the self-supervised training; the defaults made the shipped encoder.

    Attributes:
        steps: optimizer steps.
        batch_size: scenes per step, two views each.
        learning_rate: peak, after a linear warm-up of 5 % and before a cosine decay to 0.
        hidden_size: width.
        layers: blocks.
        patch_size: in pixels.
        registers: register tokens.
        temperature: of the contrastive softmax.
        mask_share: share of one view's patches that are masked.
        mask_weight: weight of the masked-patch term.
        weight_decay: of AdamW.
        seed: of the initial weights, the order of scenes and the views.
    """

    steps: int = 1200
    batch_size: int = 128
    learning_rate: float = 2e-3
    hidden_size: int = 128
    layers: int = 4
    patch_size: int = 8
    registers: int = 4
    temperature: float = 0.15
    mask_share: float = 0.3
    mask_weight: float = 0.3
    weight_decay: float = 0.05
    seed: int = 0


class _Heads(nn.Module):
    """What only training needs: the CLS projection and the pixels of a masked patch."""

    def __init__(self, recipe: DinoRecipe):
        super().__init__()
        width = recipe.hidden_size
        self.projection = nn.Sequential(
            nn.Linear(width, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )
        self.pixels = nn.Linear(width, 3 * recipe.patch_size**2)


def build_dino(recipe: DinoRecipe) -> Dinov2WithRegistersModel:
    """A Dinov2WithRegistersModel with fresh weights for 64-pixel images."""
    config = Dinov2WithRegistersConfig(
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden_size // 32,
        mlp_ratio=4,
        image_size=IMAGE_SIZE,
        patch_size=recipe.patch_size,
        num_register_tokens=recipe.registers,
    )
    return Dinov2WithRegistersModel(config)


def build_image_processor() -> BitImageProcessorPil:
    """Image processor for 64 pixels, without a crop."""
    return BitImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )


def augment(images: Tensor, draws: torch.Generator) -> Tensor:
    """Return one random view of each image [batch, 3, 64, 64] in 0..1: moved, turned, scaled, recoloured, blurred."""
    batch = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=draws, device=images.device) * (high - low) + low

    zoom, angle = uniform(0.65, 1.0), uniform(-0.35, 0.35)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    shift = uniform(-1, 1, 2) * (1 - zoom)[:, None]
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    rows = [cosine * flip, -sine, shift[:, 0], sine * flip, cosine, shift[:, 1]]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(batch, 2, 3), list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    # Mix the channels at random: hue, saturation and grey in one, keeping what is light and what is dark.
    mixing = uniform(0, 1, 3, 3).pow(2)
    mixing = mixing / mixing.sum(dim=2, keepdim=True)
    kept = (uniform(0, 1) < 0.2)[:, None, None]
    mixing = torch.where(kept, torch.eye(3, device=images.device).expand_as(mixing), mixing)
    views = torch.einsum("bij,bjhw->bihw", mixing, views)
    middle = views.mean(dim=(1, 2, 3), keepdim=True)
    contrast, light = uniform(0.6, 1.4, 1, 1, 1), uniform(-0.2, 0.2, 3, 1, 1)
    views = (views - middle) * contrast + middle + light

    blurred = F.avg_pool2d(F.pad(views, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    views = torch.where((uniform(0, 1) < 0.3)[:, None, None, None], blurred, views)
    noise = torch.randn(views.shape, generator=draws, device=images.device) * uniform(0, 0.06, 1, 1, 1)
    return (views + noise).clamp(0, 1)


def contrastive_loss(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """NT-Xent over two views [batch, dim]: each finds its partner among all other views of the batch."""
    views = F.normalize(torch.cat([one, other]), dim=1)
    logits = views @ views.T / temperature
    logits.fill_diagonal_(-math.inf)
    batch = len(one)
    partner = torch.arange(2 * batch, device=one.device).roll(batch)
    return F.cross_entropy(logits, partner)


def masked_patch_loss(predicted: Tensor, pixels: Tensor, masked: Tensor, patch_size: int) -> Tensor:
    """Mean squared error of masked patches' pixels.

    Args:
        predicted: [batch, patches, 3 * patch_size^2].
        pixels: [batch, 3, 64, 64], normalised.
        masked: bool [batch, patches].
        patch_size: in pixels.
    """
    patches = F.unfold(pixels, patch_size, stride=patch_size).transpose(1, 2)
    return (predicted - patches)[masked].pow(2).mean()


def _normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (images - mean) / std


def _dino_step(
    model: Dinov2WithRegistersModel, heads: _Heads, images: Tensor, recipe: DinoRecipe, draws: torch.Generator
) -> Tensor:
    """Loss of a batch of images [batch, 3, 64, 64] in 0..1."""
    pixels = _normalised(torch.cat([augment(images, draws), augment(images, draws)]))
    patches = (IMAGE_SIZE // recipe.patch_size) ** 2
    masked = torch.rand(len(pixels), patches, generator=draws, device=images.device) < recipe.mask_share
    masked[len(images) :] = False  # the second view is whole
    tokens = model(pixel_values=pixels, bool_masked_pos=masked).last_hidden_state
    one, other = heads.projection(tokens[:, 0]).chunk(2)
    first = slice(0, len(images))
    predicted = heads.pixels(tokens[first, 1 + recipe.registers :])
    return contrastive_loss(one, other, recipe.temperature) + recipe.mask_weight * masked_patch_loss(
        predicted, pixels[first], masked[first], recipe.patch_size
    )


def train_dino(
    images: np.ndarray, *, recipe: DinoRecipe | None = None, device: torch.device | str = "cpu"
) -> tuple[Dinov2WithRegistersModel, BitImageProcessorPil]:
    """Train the encoder from nothing, on images alone.

    Args:
        images: uint8 [scenes, 64, 64, 3].
        recipe: settings, default `DinoRecipe()`.
        device: where to train.

    Returns:
        The model in eval mode and its image processor.
    """
    recipe = recipe or DinoRecipe()
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    draws = torch.Generator(device=device).manual_seed(recipe.seed)
    model: Any = build_dino(recipe)
    model.to(device).train()
    heads = _Heads(recipe).to(device)
    optimizer = adamw(nn.ModuleList([model, heads]), recipe.learning_rate, recipe.weight_decay)
    progress = tqdm(
        index_batches(len(images), recipe.batch_size, recipe.steps, rng), total=recipe.steps, desc="dino", unit="step"
    )
    for step, rows in enumerate(progress):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_share(step, recipe.steps)
        batch = torch.from_numpy(images[rows]).to(device).permute(0, 3, 1, 2).float() / 255
        loss = _dino_step(model, heads, batch, recipe, draws)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == recipe.steps - 1:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval(), build_image_processor()


def save_dino(model: Dinov2WithRegistersModel, processor: BitImageProcessorPil, folder: Path) -> None:
    """Write weights in float16, config and image processor; `AutoModel` and `AutoImageProcessor` load the folder."""
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    model.float()
