"""The demo vision-only encoder: a small `Dinov2WithRegistersModel` trained on scenes without text or labels.

A fixed rule finds the blobs that stand out from an image's median colour, and k-means sorts their silhouettes and
colours into clusters. From an image with distorted colours and light, the CLS token predicts the clusters of its
blobs, and each patch token those of the blob it lies on, or that it lies on none (as DeepCluster, arXiv 1807.05520,
with clusters of a fixed rule). Other objectives were tried in the same time: contrastive views told scenes apart by
place and background or, strongly distorted, did not start to learn, and so did predicting the silhouettes' pixels.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BitImageProcessorPil, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from sparc_hf.demo.encoder_training.steps import IMAGE_PROCESSING, Recipe, normalised, take_steps, to_pixels
from sparc_hf.demo.raster import IMAGE_SIZE

SILHOUETTE = 16
# Square of pixels; smaller blobs are specks of the background, larger ones parts of it.
BLOB_AREA = (20, 1800)
BORDER_PIXELS = 4


@dataclass(frozen=True)
class DinoRecipe(Recipe):
    """Settings of the self-supervised training; the defaults made the shipped encoder.

    Attributes:
        layers: blocks.
        registers: register tokens.
        silhouette_clusters: clusters of silhouettes.
        colour_clusters: clusters of colours.
        colour_weight: weight of the colour clusters beside the silhouette clusters.
    """

    steps: int = 2600
    learning_rate: float = 1.5e-3
    layers: int = 4
    registers: int = 4
    silhouette_clusters: int = 64
    colour_clusters: int = 16
    colour_weight: float = 0.2


class Blobs(NamedTuple):
    """What stands out of one image.

    Attributes:
        owner: int64 [patches], the blob that covers most of a patch, -1 where less than a quarter is covered.
        silhouettes: float32 [blobs, 256], centred and brought to one size, 0..1.
        colours: float32 [blobs, 3], mean colour, 0..1.
    """

    owner: np.ndarray
    silhouettes: np.ndarray
    colours: np.ndarray


def find_blobs(image: np.ndarray, patch_size: int) -> Blobs:
    """Find the connected areas of a uint8 image [64, 64, 3] that are far from its median colour."""
    pixels = image.astype(np.float32) / 255
    smooth = ndimage.uniform_filter(pixels, (3, 3, 1))  # pyright: ignore[reportArgumentType]
    distance = np.linalg.norm(smooth - np.median(pixels.reshape(-1, 3), axis=0), axis=2)
    # Opening removes lines and grains of the background.
    opened = ndimage.binary_opening(distance > 0.25, np.ones((3, 3)))
    areas, count = ndimage.label(opened)  # pyright: ignore[reportGeneralTypeIssues]
    labels = [blob for blob in range(1, count + 1) if _is_object(areas == blob)]
    if not labels:
        patches = (IMAGE_SIZE // patch_size) ** 2
        return Blobs(np.full(patches, -1), np.empty((0, SILHOUETTE**2), np.float32), np.empty((0, 3), np.float32))
    masks = np.stack([areas == blob for blob in labels])
    cells = masks.reshape(len(labels), IMAGE_SIZE // patch_size, patch_size, IMAGE_SIZE // patch_size, patch_size)
    covered = cells.mean(axis=(2, 4)).reshape(len(labels), -1)
    owner = np.where(covered.max(axis=0) >= 0.25, covered.argmax(axis=0), -1)
    return Blobs(
        owner,
        np.stack([_silhouette(mask) for mask in masks]),
        np.stack([pixels[mask].mean(axis=0) for mask in masks]),
    )


def _is_object(mask: np.ndarray) -> bool:
    border = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum()
    return BLOB_AREA[0] <= mask.sum() <= BLOB_AREA[1] and border <= BORDER_PIXELS


def _silhouette(mask: np.ndarray) -> np.ndarray:
    """Return the mask [64, 64] in the middle of a 16x16 square, just filling it, as float32 [256]."""
    rows, columns = np.nonzero(mask)
    side = 1.15 * max(np.ptp(rows), np.ptp(columns), 4)
    steps = (np.arange(SILHOUETTE) + 0.5) / SILHOUETTE - 0.5
    middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
    grid = np.meshgrid(middle[0] + steps * side, middle[1] + steps * side, indexing="ij")
    return ndimage.map_coordinates(mask.astype(np.float32), grid, order=1).reshape(-1)


class _Targets:
    """Clusters of the blobs of all images.

    Attributes:
        patches: int64 [images, patches, 2], one more than the silhouette and colour cluster of the blob a patch lies
            on, 0 where it lies on none.
        images: two arrays float32 [images, clusters], the share of an image's blobs in each cluster.
        usable: numbers of the images with at least one blob.
    """

    def __init__(self, images: np.ndarray, recipe: DinoRecipe):
        progress = tqdm(images, desc="finding blobs", unit="scene")
        blobs_of = [find_blobs(image, recipe.patch_size) for image in progress]
        counts = np.array([len(blobs.colours) for blobs in blobs_of])
        self.usable = np.flatnonzero(counts)
        sizes = (recipe.silhouette_clusters, recipe.colour_clusters)
        silhouettes = np.concatenate([blobs.silhouettes for blobs in blobs_of])
        colours = np.concatenate([blobs.colours for blobs in blobs_of])
        labels = [
            kmeans2(values, size, minit="++", seed=recipe.seed, iter=30)[1]  # pyright: ignore[reportCallIssue]
            for values, size in zip((silhouettes, colours), sizes, strict=True)
        ]
        image_of_blob = np.repeat(np.arange(len(images)), counts)
        self.images = [np.zeros((len(images), size), np.float32) for size in sizes]
        for share, label in zip(self.images, labels, strict=True):
            np.add.at(share, (image_of_blob, label), 1 / counts[image_of_blob])
        # One row in front of the blobs' for patches that lie on none.
        clusters = np.concatenate([np.zeros((1, 2), np.int64), np.stack(labels, axis=1) + 1])
        first = np.cumsum(counts) - counts
        self.patches = np.stack(
            [
                clusters[np.where(blobs.owner < 0, 0, blobs.owner + start + 1)]
                for blobs, start in zip(blobs_of, first, strict=True)
            ]
        )


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


def distort(images: Tensor, draws: torch.Generator) -> Tensor:
    """Return images [batch, 3, 64, 64] in 0..1 with other light, contrast and noise; some with mixed channels."""
    batch = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=draws, device=images.device) * (high - low) + low

    mixing = uniform(-1, 1, 3, 3)
    mixing = mixing / mixing.abs().sum(dim=2, keepdim=True)
    keeps_colours = (uniform(0, 1) < 0.7)[:, None, None]
    mixing = torch.where(keeps_colours, torch.eye(3, device=images.device).expand_as(mixing), mixing)
    middle = images.mean(dim=(2, 3), keepdim=True)
    mixed = torch.einsum("bij,bjhw->bihw", mixing, images - middle) * uniform(0.8, 1.3, 1, 1, 1)
    light = torch.where(keeps_colours[..., None], middle + uniform(-0.1, 0.1, 1, 1, 1), uniform(0.25, 0.75, 3, 1, 1))
    noise = torch.randn(images.shape, generator=draws, device=images.device) * uniform(0, 0.05, 1, 1, 1)
    return (mixed + light + noise).clamp(0, 1)


class _Heads(nn.Module):
    """Predicts silhouette and colour clusters from the CLS token and from patch tokens; needed in training only."""

    def __init__(self, recipe: DinoRecipe):
        super().__init__()
        sizes = (recipe.silhouette_clusters, recipe.colour_clusters)
        self.weights = (1.0, recipe.colour_weight)
        self.image_heads = nn.ModuleList([nn.Linear(recipe.hidden_size, size) for size in sizes])
        self.patch_heads = nn.ModuleList([nn.Linear(recipe.hidden_size, size + 1) for size in sizes])

    def loss(self, cls: Tensor, patches: Tensor, image_targets: list[Tensor], patch_targets: Tensor) -> Tensor:
        """Cross-entropies of cls [batch, hidden] and patches [batch, patches, hidden]; blobs and rest weigh alike."""
        total = cls.new_zeros(())
        on_blob = patch_targets[..., 0] > 0
        for kind, weight in enumerate(self.weights):
            total = total + weight * F.cross_entropy(self.image_heads[kind](cls), image_targets[kind])
            for inside in (on_blob, ~on_blob):
                logits = self.patch_heads[kind](patches[inside])
                total = total + weight / 2 * F.cross_entropy(logits, patch_targets[..., kind][inside])
        return total


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
    targets = _Targets(images, recipe)
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    draws = torch.Generator(device=device).manual_seed(recipe.seed)
    model: Any = build_dino(recipe)
    model.to(device).train()
    heads = _Heads(recipe).to(device)

    def loss_of(positions: np.ndarray) -> Tensor:
        rows = targets.usable[positions]
        pixels = normalised(distort(to_pixels(images[rows], device), draws))
        tokens = model(pixel_values=pixels).last_hidden_state
        return heads.loss(
            tokens[:, 0],
            tokens[:, 1 + recipe.registers :],
            [torch.from_numpy(shares[rows]).to(device) for shares in targets.images],
            torch.from_numpy(targets.patches[rows]).to(device),
        )

    take_steps("dino", model, loss_of, len(targets.usable), recipe, rng, heads)
    return model.eval(), BitImageProcessorPil(**IMAGE_PROCESSING)
