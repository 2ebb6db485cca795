"""One pass over the features: what a model has to know of its streams to encode rows that lack some of them."""

import itertools
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from accelerate.utils import tqdm
from torch import Tensor

from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.model.configuration_sparc import SparcConfig
from sparc_hf.model.imputation import Imputation
from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.model.normalization import normalized_rows
from sparc_hf.model.sparc_objective import SparcObjective
from sparc_hf.training.rows import present_masks, records_of, spread_rows

BLOCK_ROWS = 4096
# Rows from which the selection offsets are made, where their pre-activations fit in memory.
OFFSET_ROWS = 4096
OFFSET_STEPS = 24
# Share of a uniform rate, k / N, that every latent is to have alone at the least.
LEAST_RATE = 0.05
# Ridges to choose from where rows lack streams, and one of how many rows is kept out to choose by.
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
RIDGE_EVERY = 10
LEAST_KEPT_OUT = 20


@torch.no_grad()
def add_imputation(
    model: SparcModel, features: FeatureDataset, *, rank: int = 0, world_size: int = 1, **settings: float
) -> Imputation:
    """Give a model statistics of its streams, by which it encodes rows that lack some of them.

    The rows are read once, block by block, and summed in float64; memory is D^2 with D the sum of the widths. A second
    look at some thousand of them makes the selection offsets. Where rows lack streams and no ridge is given, all but
    some are read once more, to choose one by how well it guesses those.

    Args:
        model: the model, with the streams of the features.
        features: rows of all its streams, those it was trained on.
        rank: number of this process, which reads its own blocks.
        world_size: number of processes.
        **settings: as `SparcConfig.imputation`.

    Returns:
        The model's `imputation`.

    Raises:
        ValueError: for fewer than two rows of a stream, streams that the features lack, or as
            `SparcModel.set_imputation`.
    """
    records_of(features, model.config.stream_names)
    add_statistics(model, features, rank=rank, world_size=world_size, **settings)
    return add_offsets(model, features)


@torch.no_grad()
def add_statistics(
    model: SparcModel, features: FeatureDataset, *, rank: int = 0, world_size: int = 1, **settings: float
) -> Imputation:
    """Do what `add_imputation` does, but for the selection offsets, which depend on the trained weights."""
    names = model.config.stream_names
    SparcConfig.from_dict({**model.config.to_dict(), "imputation": settings})  # refused before rows are read
    if "ridge" not in settings and not features.rows_without.keys().isdisjoint(names):
        settings = {**settings, "ridge": _ridge_of(model, features, rank, world_size)}
    mean, covariance = moments_of(model, features, rank=rank, world_size=world_size)
    return model.set_imputation(mean, covariance, **settings)


@torch.no_grad()
def add_offsets(model: SparcModel, features: FeatureDataset) -> Imputation:
    """Make the selection offsets of a model that has statistics of its streams."""
    imputation = model.imputation
    if imputation is None:
        raise ValueError("the model has no statistics of its streams yet")
    if model.config.selection == "global" and len(model.config.stream_names) > 1:
        for row, offsets in enumerate(selection_offsets(model, features)):
            imputation.offsets[row] = offsets
    return imputation


class _Sums:
    """What mean and covariance of streams are made of, float64, where rows may lack some of them.

    Attributes:
        rows: [streams, streams], numbers of rows that have both.
        sums: [streams, D], of the rows that have that stream.
        products: [D, D], over the rows that have both.
    """

    def __init__(self, widths: list[int]):
        self.stream_of_column = torch.repeat_interleave(torch.tensor(widths))
        streams, width = len(widths), sum(widths)
        self.rows = torch.zeros(streams, streams, dtype=torch.float64)
        self.sums = torch.zeros(streams, width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, block: Tensor) -> None:
        """Add rows [rows, D], NaN where they lack a stream."""
        first_columns = torch.searchsorted(self.stream_of_column, torch.arange(len(self.rows)))
        present = (~block[:, first_columns.to(block.device)].isnan()).to(block.dtype)
        block = block.nan_to_num(nan=0.0)
        # An accelerator may lack float64, so a block's product is float32, and the sum of all is made here.
        self.rows += (present.T @ present).cpu().double()
        self.sums += (present.T @ block).cpu().double()
        self.products += (block.T @ block).cpu().double()

    def share(self, device: torch.device) -> None:
        """Sum over all processes."""
        for total in (self.rows, self.sums, self.products):
            shared = total.to(device)
            torch.distributed.all_reduce(shared)
            total.copy_(shared)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean [D] and covariance [D, D], each of the rows there are for it.

        The covariance of two streams that only some rows have both of is shrunk by n / (n + d), n being those rows and
        d the streams' mean width: the fewer they are, the more of it is chance. A matrix put together from several
        sets of rows need not be a covariance; the nearest that is one takes its place.
        """
        own = self.stream_of_column
        rows = self.rows[own][:, own].clamp(min=1)
        # [D, D]: mean of a column over the rows that have the other column's stream too.
        means = self.sums[own].T / rows
        covariance = self.products / rows - means * means.T
        everywhere = self.rows.max()
        if (self.rows == everywhere).all():
            return means.diagonal().clone(), covariance
        widths = torch.bincount(own).double()
        shrunk = self.rows / (self.rows + (widths.unsqueeze(0) + widths) / 2)
        shrunk = torch.where(self.rows == everywhere, 1.0, shrunk).fill_diagonal_(1.0)
        values, vectors = torch.linalg.eigh(covariance * shrunk[own][:, own])
        return means.diagonal().clone(), (vectors * values.clamp(min=0)) @ vectors.T


def moments_of(
    model: SparcModel,
    features: FeatureDataset,
    *,
    row_numbers: np.ndarray | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D, D], float64, of the normalised rows of all streams side by side.

    Args:
        model: the model.
        features: its rows.
        row_numbers: the rows to read, all by default.
        rank: number of this process, which reads its own blocks.
        world_size: number of processes.

    Raises:
        ValueError: for fewer than two rows of a stream.
    """
    for name in model.config.stream_names:
        every = len(features) - features.rows_without.get(name, 0)
        if (count := every if row_numbers is None else int(features.present(name, row_numbers).sum())) < 2:
            raise ValueError(
                f"the covariance of streams needs two rows of each at least, but `{name}` has {count} of them"
            )

    def block_at(start: int) -> Tensor:
        stop = min(start + BLOCK_ROWS, total)
        numbers = np.arange(start, stop) if row_numbers is None else row_numbers[start:stop]
        return _side_by_side(model, features, numbers)

    total = len(features) if row_numbers is None else len(row_numbers)
    # Taken from the mean of the first block, sums of squares keep their digits.
    origin = block_at(0).nanmean(dim=0).nan_to_num(nan=0.0)
    sums = _Sums(list(model.config.hidden_sizes.values()))
    starts = range(rank * BLOCK_ROWS, total, world_size * BLOCK_ROWS)
    for start in tqdm(starts, desc="statistics of the streams", unit="block", leave=False, disable=len(starts) < 8):
        sums.add(block_at(start) - origin)
    if world_size > 1:
        sums.share(model.device)
    mean, covariance = sums.moments()
    return origin.cpu().double() + mean, covariance


def _ridge_of(model: SparcModel, features: FeatureDataset, rank: int, world_size: int) -> float:
    """Return the ridge by which a stream alone guesses the others best, on rows that were kept out.

    Where few rows have two streams, what connects them is mostly chance, and a small ridge would believe it.
    """
    names = model.config.stream_names
    paired = np.flatnonzero(sum(features.present(name).astype(int) for name in names) > 1)
    most = min(BLOCK_ROWS, max(len(paired) // RIDGE_EVERY, min(LEAST_KEPT_OUT, len(paired) // 2)))
    kept_out = paired[np.linspace(0, len(paired) - 1, most).astype(np.int64)]
    others = np.setdiff1d(np.arange(len(features)), kept_out)
    if len(kept_out) < 2 or any(features.present(name, others).sum() < 2 for name in names):
        return RIDGES[-1]  # hardly any pair to learn from: believe little of it
    mean, covariance = moments_of(model, features, row_numbers=others, rank=rank, world_size=world_size)
    rows = _normalized(model, features, kept_out)
    errors = {}
    for ridge in RIDGES:
        settings = SparcConfig.from_dict({**model.config.to_dict(), "imputation": {"ridge": ridge}})
        errors[ridge] = _guess_error(Imputation.of(settings, mean, covariance).to(model.device), rows)
    return min(RIDGES, key=errors.__getitem__)


def _guess_error(imputation: Imputation, rows: dict[str, Tensor]) -> float:
    """Return the mean error of each stream guessed from each other one alone, over the rows that have both."""
    errors = []
    for source, target in itertools.permutations(rows, 2):
        both = ~(rows[source][:, 0].isnan() | rows[target][:, 0].isnan())
        if both.any():
            guess = imputation.complete({source: rows[source][both]})[target]
            x = rows[target][both].float()
            errors.append(((guess - x).square().sum(dim=1) / x.square().sum(dim=1)).mean().item())
    return float(np.mean(errors))


def selection_offsets(model: SparcModel, features: FeatureDataset) -> Iterator[Tensor]:
    """Yield, for each stream, offsets [N] by which a latent is as often selected from that stream alone as jointly.

    A guessed row varies less than a given one, so latents of what a stream cannot say are hardly ever selected from it
    alone, and those that suit every sample too often. From 0 on, each offset goes up where its latent's rate lies
    below the joint one, and down where above, by a step of its own that grows while the direction stays and is halved
    when it turns (Rprop): what an offset does to a rate differs by orders of magnitude between latents. The offsets
    whose rates came closest are given.

    Args:
        model: with statistics of its streams.
        features: training rows; an evenly spread sample of those that have every stream is used. Without any such
            row there are no offsets.
    """
    imputation, config = cast(Imputation, model.imputation), model.config
    objective = cast(SparcObjective, model.objective)
    # The summed pre-activations, those of one stream, and a copy for the top-k.
    count = min(OFFSET_ROWS, model.rows_at_once(3, per_product=OFFSET_ROWS))
    row_numbers = spread_rows(features, config.stream_names, count)
    if not len(row_numbers):
        return
    rows = _normalized(model, features, row_numbers)
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


def _side_by_side(model: SparcModel, features: FeatureDataset, row_numbers: np.ndarray) -> Tensor:
    """Return rows, normalised, of all streams of a model, [rows, D], NaN where they lack a stream."""
    return torch.cat([x.float() for x in _normalized(model, features, row_numbers).values()], dim=1)


def _normalized(model: SparcModel, features: FeatureDataset, row_numbers: np.ndarray) -> dict[str, Tensor]:
    """Return stream -> normalised rows [rows, hidden_size], NaN where they lack a stream."""
    names = model.config.stream_names
    rows = {name: torch.from_numpy(features.array(name, row_numbers)) for name in names}
    masks = present_masks(rows)
    normalized = normalized_rows(model, rows, masks=masks)
    return {name: x.where(masks[name].to(x.device).unsqueeze(1), torch.nan) for name, x in normalized.items()}
