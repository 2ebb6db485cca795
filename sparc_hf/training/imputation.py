"""One pass over the features: what a model has to know of its streams to encode rows that lack some of them."""

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from accelerate.utils import tqdm
from torch import Tensor

from sparc_hf.features.batches import RowSource
from sparc_hf.model.imputation import Imputation
from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.model.sparc_objective import SparcObjective

BLOCK_ROWS = 4096
# Rows from which the selection offsets are made, where their pre-activations fit in memory.
OFFSET_ROWS = 4096
OFFSET_STEPS = 24
# Share of a uniform rate, k / N, that every latent is to have alone at the least.
LEAST_RATE = 0.05


@torch.no_grad()
def add_imputation(
    model: SparcModel, features: RowSource, *, rank: int = 0, world_size: int = 1, **settings: float
) -> Imputation:
    """Give a model statistics of its streams, by which it encodes rows that lack some of them.

    The rows are read once, block by block, and summed in float64; memory is D^2 with D the sum of the widths. A second
    look at some thousand of them makes the selection offsets.

    Args:
        model: the model, with the streams of the features.
        features: rows of all its streams, those it was trained on.
        rank: number of this process, which reads its own blocks.
        world_size: number of processes.
        **settings: as `SparcConfig.imputation`.

    Returns:
        The model's `imputation`.

    Raises:
        ValueError: for fewer than two rows, streams that the features lack, or as `SparcModel.set_imputation`.
    """
    if unknown := [name for name in model.config.stream_names if name not in features.stream_names]:
        raise ValueError(f"the features lack the model's streams {unknown}; they have {features.stream_names}")
    mean, covariance = moments_of(model, features, rank=rank, world_size=world_size)
    imputation = model.set_imputation(mean, covariance, **settings)
    if model.config.selection == "global" and len(model.config.stream_names) > 1:
        for row, offsets in enumerate(selection_offsets(model, features)):
            imputation.offsets[row] = offsets
    return imputation


def moments_of(model: SparcModel, features: RowSource, *, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D, D], float64, of the normalised rows of all streams side by side."""
    rows = len(features)
    if rows < 2:
        raise ValueError(f"the covariance of streams needs two rows at least, but the features have {rows}")
    # Taken from the mean of the first block, sums of squares keep their digits.
    origin = _side_by_side(model, features, 0, min(BLOCK_ROWS, rows)).mean(dim=0)
    width = len(origin)
    # An accelerator may lack float64, so a block's product is float32, and the sum of all is made here.
    sums, products = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    blocks = range(rank * BLOCK_ROWS, rows, world_size * BLOCK_ROWS)
    for start in tqdm(blocks, desc="statistics of the streams", unit="block", leave=False, disable=len(blocks) < 8):
        block = _side_by_side(model, features, start, min(start + BLOCK_ROWS, rows)) - origin
        sums += block.sum(dim=0).cpu().double()
        products += (block.T @ block).cpu().double()
    if world_size > 1:
        for total in (sums, products):
            shared = total.to(model.device)
            torch.distributed.all_reduce(shared)
            total.copy_(shared)
    shift = sums / rows
    return origin.cpu().double() + shift, products / rows - torch.outer(shift, shift)


def selection_offsets(model: SparcModel, features: RowSource) -> Iterator[Tensor]:
    """Yield, for each stream, offsets [N] by which a latent is as often selected from that stream alone as jointly.

    A guessed row varies less than a given one, so latents of what a stream cannot say are hardly ever selected from it
    alone, and those that suit every sample too often. From 0 on, each offset goes up where its latent's rate lies
    below the joint one, and down where above, by a step of its own that grows while the direction stays and is halved
    when it turns (Rprop): what an offset does to a rate differs by orders of magnitude between latents. The offsets
    whose rates came closest are given.

    Args:
        model: with statistics of its streams.
        features: training rows; an evenly spread sample of them is used.
    """
    imputation, config, objective = model.imputation, model.config, cast(SparcObjective, model.objective)
    if imputation is None:
        raise ValueError("the model has no statistics of its streams yet")
    count = min(
        OFFSET_ROWS, len(features), max(1, int(model.max_preactivation_mb * 2**20 / (12 * config.num_latents)))
    )
    row_numbers = torch.linspace(0, len(features) - 1, count).long().unique()
    sample = {name: torch.from_numpy(features.array(name, row_numbers.numpy())) for name in config.stream_names}
    rows = model.normalize(sample)
    joint = _rates(objective.summed_preactivations(rows), None, config.k)
    least = LEAST_RATE * config.k / config.num_latents
    wanted = joint.clamp(min=least)
    for name in config.stream_names:
        alone = {name: rows[name]}
        summed = objective.summed_preactivations({**imputation.complete(alone), **imputation.shared_rows(alone)})
        yield _offsets_to(wanted, summed, config.k)


def _offsets_to(wanted: Tensor, summed: Tensor, k: int) -> Tensor:
    """Return offsets [N] by which the k largest of summed pre-activations [rows, N] are selected at rates [N]."""
    offsets, steps = torch.zeros_like(wanted), 0.2 * summed.std(dim=0)
    before, closest, distance = torch.zeros_like(wanted), offsets, torch.inf
    for _ in range(OFFSET_STEPS):
        rates = _rates(summed, offsets, k)
        if (now := (rates - wanted).abs().sum()) < distance:
            closest, distance = offsets, now
        direction = (wanted - rates).sign()
        turned, stayed = direction * before < 0, direction * before > 0
        steps = torch.where(turned, 0.5 * steps, torch.where(stayed, 1.2 * steps, steps))
        offsets, before = offsets + steps * direction, direction
    return closest


def _rates(summed: Tensor, offsets: Tensor | None, k: int) -> Tensor:
    """Return [N], the share of rows in which a latent is among the k largest."""
    shifted = summed if offsets is None else summed + offsets
    selected = shifted.topk(k, dim=1).indices.reshape(-1)
    return torch.bincount(selected, minlength=summed.shape[1]).to(summed) / len(summed)


def _side_by_side(model: SparcModel, features: RowSource, start: int, stop: int) -> Tensor:
    """Return rows from `start` to `stop`, normalised, of all streams of a model, [rows, D]."""
    rows = {name: torch.from_numpy(features.array(name, np.arange(start, stop))) for name in model.config.stream_names}
    return torch.cat([x.float() for x in model.normalize(rows).values()], dim=1)
