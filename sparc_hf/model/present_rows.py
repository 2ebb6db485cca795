"""Training rows that lack some streams: which they have, and how much each counts where it is measured."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .outputs import SparseCodes


class PresentRows:
    """Which rows of a batch have which streams.

    A term of the loss is a mean over the rows that have both its source and its target. For a step that several
    processes and micro-batches share it is taken as the sum over the rows of each, divided by how many of them are to
    be expected, so that the step's gradient does not depend on how it is split.

    Args:
        masks: stream -> bool [batch]; a stream that is not named is there in every row.
        pair_shares: (stream, other stream) -> share of the training rows that have both, (stream, same stream) those
            that have it; by default, of the batch itself.
    """

    def __init__(self, masks: Mapping[str, Tensor], pair_shares: Mapping[tuple[str, str], float] | None = None):
        self.masks, self.pair_shares = masks, pair_shares

    def weights(self, sources: Iterable[str], target: str, like: Tensor) -> Tensor:
        """Return [sources, batch] by which errors are multiplied before their mean over all rows is taken.

        Args:
            sources: streams whose codes are decoded.
            target: the stream they are decoded to.
            like: a tensor [..., batch] of the errors, for its size, type and device.
        """
        weights, everyone = [], torch.arange(like.shape[-1])
        for source in sources:
            both = self.has(source, everyone) & self.has(target, everyone)
            share = float(both.float().mean()) if self.pair_shares is None else self.pair_shares[source, target]
            weights.append(both.float() / share if share else both.float())
        return torch.stack(weights).to(like.device, like.dtype, non_blocking=True)

    def never_both(self, source: str, target: str) -> bool:
        """Return whether no training row has both streams, by `pair_shares`."""
        return self.pair_shares is not None and not self.pair_shares[source, target]

    def measured(self, codes: Mapping[str, SparseCodes]) -> dict[str, SparseCodes]:
        """Return codes whose values are 0 in rows that lack their stream, in which it does not fire."""
        return {
            name: SparseCodes(
                code.indices,
                code.values * self.masks[name].to(code.values, non_blocking=True).unsqueeze(1),
                code.num_latents,
            )
            if name in self.masks
            else code
            for name, code in codes.items()
        }

    def has(self, stream: str, rows: Tensor) -> Tensor:
        """Return bool [len(rows)]: whether those rows of the batch have a stream; `rows` int64 on a CPU."""
        mask = self.masks.get(stream)
        return torch.ones(len(rows), dtype=torch.bool) if mask is None else mask.cpu()[rows]


class AloneRows(NamedTuple):
    """Rows of a batch of which one stream is given alone, in addition to the batch itself.

    Attributes:
        rows: stream -> int64 numbers of the rows in which it alone is given, on a CPU.
        share: of all rows of the step those that are given alone; infinity where `rows` are to have no weight.
        weight: of the term in the loss.
    """

    rows: Mapping[str, Tensor]
    share: float
    weight: float
