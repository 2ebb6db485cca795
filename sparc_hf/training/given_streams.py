"""Which streams the rows of a training step have, and of which one stream is given alone besides."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.model.present_rows import AloneRows, PresentRows
from sparc_hf.training.rows import present_masks

# Tells these draws apart from other draws of the same seed.
ALONE_DRAWS = 0x416C


class AloneDraws:
    """Draws, for some rows of every step, the one stream that is given.

    Rows and streams are those of the whole step, whichever micro-batches and processes share it: the rows lie evenly
    among the step's, whose order is random already, and the streams are drawn for all of them.

    Args:
        streams: the model's.
        share: of the rows of a step; 0 for none.
        weight: of the term in the loss.
        seed: of the run.
    """

    def __init__(self, streams: Sequence[str], share: float, weight: float, seed: int):
        self.streams, self.share, self.weight, self.seed = list(streams), share, weight, seed

    def of(
        self, step: int, rows_of_step: int, first: int, count: int, masks: Mapping[str, Tensor] | None
    ) -> AloneRows | None:
        """Return what `SparcModel.forward` takes for the rows `first` to `first + count` of a step.

        Args:
            step: number of the step.
            rows_of_step: its rows, over all processes.
            first: the first row of this micro-batch among them.
            count: rows of this micro-batch.
            masks: stream -> bool [count], which rows have it; a row that lacks the stream drawn takes the next it has.
        """
        if not self.share:
            return None
        numbers = np.arange(rows_of_step)
        is_alone = np.floor((numbers + 1) * self.share) > np.floor(numbers * self.share)
        drawn = np.random.default_rng([self.seed, ALONE_DRAWS, step]).integers(len(self.streams), size=rows_of_step)
        rows = np.flatnonzero(is_alone[first : first + count])
        # Processes exchange what gradients are made of, so each has to have some: of no weight where no row is due.
        share = self.share if len(rows) else float("inf")
        rows = rows if len(rows) else np.zeros(1, np.int64)
        stream_of_row = drawn[first : first + count][rows]
        if masks is not None:
            present = np.stack([masks[name].numpy()[rows] for name in self.streams])
            for _ in self.streams:
                lacks = ~present[stream_of_row, np.arange(len(rows))]
                stream_of_row = np.where(lacks, (stream_of_row + 1) % len(self.streams), stream_of_row)
        chosen = {name: torch.from_numpy(rows[stream_of_row == number]) for number, name in enumerate(self.streams)}
        return AloneRows({name: numbers for name, numbers in chosen.items() if len(numbers)}, share, self.weight)


class GivenStreams:
    """What a loop tells the model of the streams of its rows.

    Args:
        features: the rows.
        streams: those of them that are used.
        alone: the draws of streams that are given alone; none in evaluation.

    Attributes:
        any_missing: whether some row lacks a stream.
        gives_alone: whether streams are given alone besides.
    """

    def __init__(self, features: FeatureDataset, streams: Sequence[str], alone: AloneDraws | None = None):
        self.any_missing = not features.rows_without.keys().isdisjoint(streams)
        self.alone = alone
        self.gives_alone = alone is not None and alone.share > 0
        self._pair_shares = _pair_shares(features, streams) if self.any_missing else None

    def check(self, model: SparcModel, imputes: bool) -> None:
        """Raise ValueError where rows that lack streams, or streams given alone, cannot be trained on."""
        if not model.objective.selects_together:
            raise ValueError(
                f"some rows lack a stream, and `objective` {model.config.objective} imputes none; train on those that "
                "`FeatureDataset.complete_rows` names, or with `objective` sparc"
            )
        if not imputes:
            raise ValueError(
                "some training or validation rows lack a stream, or streams are given alone, and a model that imputes "
                "them keeps what it does that by; leave out `no_impute`"
            )

    def present(self, rows: Mapping[str, Tensor]) -> PresentRows | None:
        """Return what `SparcModel.forward` is to know of rows of which some are NaN; None where all are there."""
        return PresentRows(present_masks(rows), self._pair_shares) if self.any_missing else None

    def alone_in(
        self, step: int, rows_of_step: int, first: int, count: int, present: PresentRows | None
    ) -> AloneRows | None:
        """Return the rows given alone, as `AloneDraws.of`."""
        masks = None if present is None else present.masks
        return None if self.alone is None else self.alone.of(step, rows_of_step, first, count, masks)


def _pair_shares(features: FeatureDataset, streams: Sequence[str]) -> dict[tuple[str, str], float]:
    """Return (stream, stream) -> share of the rows that have both."""
    present = {name: features.present(name) for name in streams}
    return {(one, other): float((present[one] & present[other]).mean()) for one in streams for other in streams}
