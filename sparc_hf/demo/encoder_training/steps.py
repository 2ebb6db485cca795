"""What the training of both demo encoders has in common: pixels, schedule, optimizer, steps and saving."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparc_hf.demo.raster import IMAGE_SIZE
from sparc_hf.files.atomic_files import sync_tree

IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.25, 0.25, 0.25)
IMAGE_PROCESSING: dict[str, Any] = {
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_center_crop": False,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
}
"""Settings of the image processors."""


@dataclass(frozen=True)
class Recipe:
    """Settings that both trainings have.

    Attributes:
        steps: optimizer steps.
        batch_size: scenes per step.
        learning_rate: peak, after a linear warm-up of 5 % and before a cosine decay to 0.
        weight_decay: of AdamW.
        hidden_size: width of every tower.
        patch_size: in pixels.
        seed: of everything that is drawn.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    hidden_size: int = 128
    patch_size: int = 8
    seed: int = 0


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [batch, 64, 64, 3] -> float32 [batch, 3, 64, 64] in 0..1."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255


def normalised(pixels: Tensor) -> Tensor:
    """Return pixels [batch, 3, 64, 64] in 0..1 as the image processors normalise them."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (pixels - mean) / std


def learning_rate_share(step: int, steps: int, warm_up: float = 0.05) -> float:
    """Linear warm-up over a share of the steps, then a cosine to 0; in 0..1."""
    start = max(1, int(warm_up * steps))
    if step < start:
        return (step + 1) / start
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


def adamw(module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def index_batches(rows: int, batch_size: int, steps: int, rng: np.random.Generator) -> Iterable[np.ndarray]:
    """`steps` arrays of `batch_size` row numbers, epoch by epoch in random order."""
    queue = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(queue) < batch_size:
            queue = np.concatenate([queue, rng.permutation(rows)])
        batch, queue = queue[:batch_size], queue[batch_size:]
        yield batch


def take_steps(
    name: str,
    model: nn.Module,
    loss_of: Callable[[np.ndarray], Tensor],
    rows: int,
    recipe: Recipe,
    rng: np.random.Generator,
    heads: nn.Module | None = None,
) -> None:
    """Take the steps of a recipe on `loss_of` batches of row numbers; the gradients of `model` are clipped."""
    optimizer = adamw(nn.ModuleList([model, heads or nn.Module()]), recipe.learning_rate, recipe.weight_decay)
    batches = index_batches(rows, recipe.batch_size, recipe.steps, rng)
    progress = tqdm(batches, total=recipe.steps, desc=name, unit="step")
    for step, batch in enumerate(progress):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_share(step, recipe.steps)
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == recipe.steps - 1:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def save_encoder(model: Any, processor: Any, folder: Path) -> None:
    """Write weights in float16, config and processor; `AutoModel` and `AutoProcessor` load the folder."""
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    sync_tree(folder)
    model.float()
