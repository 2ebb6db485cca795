"""The rows a run trains and validates on, and what it takes of them before its first step."""

from typing import Any

import numpy as np
import torch

from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.model.modeling_sparc import SparcModel


@torch.no_grad()
def center_pre_biases(model: SparcModel, features: FeatureDataset, rows: int = 8192) -> None:
    """Set the pre-biases to the mean normalised row of an evenly spread sample of the features.

    Encoders whose rows lie in a narrow cone would otherwise let the few latents along its axis win every selection.
    """
    row_numbers = np.unique(np.linspace(0, len(features) - 1, min(rows, len(features)), dtype=np.int64))
    sample = {name: torch.from_numpy(features.array(name, row_numbers)) for name in model.config.stream_names}
    for name, normalized in model.normalize(sample).items():
        model.pre_bias[name].copy_(normalized.mean(dim=0))


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
