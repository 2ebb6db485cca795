"""Rows that lack streams of a model: their codes, and the rows that lack none, which figures are measured on."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.model.outputs import SparseCodes

logger = logging.getLogger(__name__)


def with_complete_rows(features: FeatureDataset, streams: Iterable[str], purpose: str) -> FeatureDataset:
    """Return the rows that have all these streams, and log how many of how many these are where some do not.

    Args:
        features: the rows.
        streams: names of its streams.
        purpose: what the rows are for, in the log and the error.

    Raises:
        ValueError: if no row has all of them.
    """
    names = list(streams)
    complete = features.complete_rows(names)
    if len(complete) == len(features):
        return features
    if not len(complete):
        raise ValueError(
            f"{purpose} needs rows that have every stream of {names}, but none of the {len(features)} rows has; give "
            "other rows"
        )
    logger.warning("%s: on the %d of %d rows that have every stream", purpose, len(complete), len(features))
    chosen = features.select(complete)
    chosen.rows_left_out = features.rows_left_out + len(features) - len(complete)
    chosen.row_numbers = complete if features.row_numbers is None else features.row_numbers[complete]
    return chosen


def check_encodable(model: SparcModel, features: FeatureDataset, encoding: str) -> None:
    """Raise ValueError where rows that lack streams of the model have no codes under an encoding."""
    lacking = streams_lacked(model, features)
    if not lacking or encoding != "joint":
        return
    if model.imputation is None:
        counts = ", ".join(f"`{name}`: {features.rows_without[name]}" for name in lacking)
        can_impute = model.config.objective == "sparc"
        raise ValueError(
            f"some rows lack streams ({counts}), and this model has no statistics of its streams to impute them by; "
            f"{'make them with `sparc impute`, ' if can_impute else ''}keep the rows that have all "
            "(`features.select(features.complete_rows())`), or encode each stream alone (`--encoding single`)"
        )
    has_any = np.logical_or.reduce([features.present(name) for name in model.config.stream_names])
    if not has_any.all():
        raise ValueError(
            f"{features.row_name(int(np.argmin(has_any)))} has none of the model's streams "
            f"{model.config.stream_names}, so that there is nothing to impute them from; leave such rows out"
        )


def streams_lacked(model: SparcModel, features: FeatureDataset) -> list[str]:
    """Return the streams of the model that some of the rows lack."""
    return [name for name in model.config.stream_names if name in features.rows_without]


def check_complete(features: FeatureDataset, streams: Iterable[str]) -> None:
    """Raise ValueError where rows lack one of these streams and what is to be done needs them all."""
    if lacking := [name for name in streams if name in features.rows_without]:
        raise ValueError(
            f"some rows lack the streams {lacking}; choose those that have all "
            "(`features.select(features.complete_rows())`)"
        )


def codes_of_incomplete(
    model: SparcModel, features: FeatureDataset, encoding: str, batch_size: int
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, SparseCodes]]]:
    """Yield stream -> bool [batch], which rows have it, and stream -> codes of consecutive rows, with a progress bar.

    Under "joint" encoding, rows with the same streams are encoded together, and the codes of missing streams are those
    of their imputed rows. Alone, a stream that is missing has nothing to be encoded: its code is empty, all values 0.

    Args:
        model, features, encoding, batch_size: as for `encode_features`; see `check_encodable`.
    """
    names = model.config.stream_names
    starts = range(0, len(features), batch_size)
    for start in tqdm(starts, desc=f"encoding ({encoding.replace('_', ', ')})", unit="batch", leave=False):
        rows = np.arange(start, min(start + batch_size, len(features)))
        given = {name: features.present(name, rows) for name in names}
        batch = {name: torch.from_numpy(features.array(name, rows)) for name in names}
        codes = {name: _empty_codes(model, len(rows)) for name in names}
        with torch.no_grad():
            for streams, among in _same_streams(given) if encoding == "joint" else _each_alone(given):
                some = {name: batch[name][among] for name in streams}
                wanted = names if encoding == "joint" else streams
                missing = "ignore" if encoding == "single_ignoring" else None
                for name, code in model.encode(some, missing=missing, streams=wanted).items():
                    codes[name].indices[among] = code.indices.cpu()
                    codes[name].values[among] = code.values.float().cpu()
        yield given, codes


def _empty_codes(model: SparcModel, rows: int) -> SparseCodes:
    k = model.config.k
    return SparseCodes(torch.arange(k).repeat(rows, 1), torch.zeros(rows, k), model.config.num_latents)


def _same_streams(given: Mapping[str, np.ndarray]) -> Iterator[tuple[Sequence[str], torch.Tensor]]:
    """Yield streams, and int64 [rows] the rows that have these and no others."""
    patterns, pattern_of = np.unique(np.stack(list(given.values()), axis=1), axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        streams = [name for name, there in zip(given, pattern, strict=True) if there]
        yield streams, torch.from_numpy(np.flatnonzero(pattern_of.reshape(-1) == number))


def _each_alone(given: Mapping[str, np.ndarray]) -> Iterator[tuple[Sequence[str], torch.Tensor]]:
    """Yield each stream that any row has, and int64 [rows] the rows that have it."""
    for name, there in given.items():
        if there.any():
            yield [name], torch.from_numpy(np.flatnonzero(there))
