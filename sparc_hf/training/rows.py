"""The rows a run trains and validates on, and what it takes of them before its first step."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.model.modeling_sparc import SparcModel

logger = logging.getLogger(__name__)


@torch.no_grad()
def center_pre_biases(model: SparcModel, features: FeatureDataset, rows: int = 8192) -> None:
    """Set the pre-biases to the mean normalised row of an evenly spread sample of the features.

    Encoders whose rows lie in a narrow cone would otherwise let the few latents along its axis win every selection.
    """
    for name in model.config.stream_names:
        sample = {name: torch.from_numpy(features.array(name, spread_rows(features, [name], rows)))}
        model.pre_bias[name].copy_(model.normalize(sample)[name].mean(dim=0))


def spread_rows(features: FeatureDataset, streams: Iterable[str], most: int) -> np.ndarray:
    """Return at most `most` row numbers, int64, evenly spread among the rows that have all these streams."""
    lacking = [name for name in streams if name in features.rows_without]
    rows = features.complete_rows(lacking) if lacking else None
    count = len(features) if rows is None else len(rows)
    places = np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))
    return places if rows is None else rows[places]


def rows_with_any(features: FeatureDataset, streams: Sequence[str]) -> FeatureDataset:
    """Return the rows that have one of these streams at least, and log how many have none.

    Raises:
        ValueError: if no row has any.
    """
    if any(name not in features.rows_without for name in streams):
        return features
    row_numbers = np.flatnonzero(np.logical_or.reduce([features.present(name) for name in streams]))
    if not len(row_numbers):
        raise ValueError(f"none of the {len(features)} rows has any of the streams {list(streams)}; give other rows")
    if len(row_numbers) == len(features):
        return features
    left_out = len(features) - len(row_numbers)
    logger.warning("%d of %d rows have none of the streams and are left out", left_out, len(features))
    return features.select(row_numbers)


def present_masks(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return stream -> bool [batch]: which rows [batch, hidden_size] of a feature dataset have it, and are not NaN."""
    return {name: ~x[:, 0].isnan() for name, x in rows.items()}


def records_of(features: FeatureDataset, streams: list[str]) -> list[dict[str, Any]]:
    """Return the records of some streams; ValueError where the dataset lacks one."""
    if unknown := [name for name in streams if name not in features.stream_names]:
        raise ValueError(f"`streams` names {unknown}, but the feature dataset has {features.stream_names}")
    records = {record["name"]: record for record in features.streams}
    return [records[name] for name in streams]


def random_split(features: FeatureDataset, fraction: float, seed: int) -> tuple[FeatureDataset, FeatureDataset]:
    """Return all other rows and a random `fraction` of them, both in stored order."""
    count = round(fraction * len(features))
    if not 0 < count < len(features):
        raise ValueError(f"`eval_fraction` {fraction} of {len(features)} rows leaves no rows on one side")
    order = np.random.default_rng(seed).permutation(len(features))
    return features.select(np.sort(order[count:])), features.select(np.sort(order[:count]))
