"""Streams that are missing, guessed from those that are given by the conditional mean of a Gaussian."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_sparc import SparcConfig
from .sparse_ops import Selection, dots_with_atoms, gather_preactivations, row_energy, sparse_decode

# Of a fit of values, as a share of the weights: atoms of one code overlap, and what they share is split among them.
FIT_RIDGE = 0.1


class SummedMap(NamedTuple):
    """All streams' summed pre-activations as one affine map of x_M - m_M.

    Attributes:
        weight: [d_M, N].
        bias: [N].
    """

    weight: Tensor
    bias: Tensor


class Imputation(nn.Module):
    """Mean and covariance of all streams' normalised rows side by side, and what they say of a stream that is missing.

    With mean m and covariance C of the training rows, and for given streams M and missing streams T,

        x^_T = m_T + C_TM (C_MM + R)^-1 (x_M - m_M)

    is the best linear guess, where R is diagonal and holds, for each stream, `ridge` times its mean variance.
    Everything is linear, so the pre-activations of x^_T are the best linear guess of those that are missing.

    Buffers, which stay float32 whatever the weights are: `mean` [D] and `covariance` [D, D], with D the sum of the
    streams' widths, and `offsets` [streams, N], added to the summed pre-activations where that stream alone is given.

    Args:
        config: of the model; its `imputation` is not None.
    """

    mean: Tensor
    covariance: Tensor
    offsets: Tensor

    def __init__(self, config: SparcConfig):
        super().__init__()
        self.sizes = config.hidden_sizes
        ends = itertools.accumulate(self.sizes.values())
        self._columns = {
            name: slice(end - size, end) for (name, size), end in zip(self.sizes.items(), ends, strict=True)
        }
        self.settings: dict[str, Any] = dict(config.imputation or {})
        width = sum(self.sizes.values())
        self.register_buffer("mean", torch.empty(width))
        self.register_buffer("covariance", torch.empty(width, width))
        self.register_buffer("offsets", torch.empty(len(self.sizes), config.num_latents))
        self._maps: dict[Any, Tensor] = {}
        self._summed_maps: dict[Any, SummedMap] = {}

    @classmethod
    def of(cls, config: SparcConfig, mean: Tensor, covariance: Tensor) -> "Imputation":
        """Make one of measured statistics, without offsets; ValueError where they are of other widths."""
        made = cls(config)
        for name, statistic in {"mean": mean, "covariance": covariance}.items():
            expected = getattr(made, name).shape
            if statistic.shape != expected:
                raise ValueError(
                    f"the {name} of streams {config.hidden_sizes} must be {list(expected)}, but it is "
                    f"{list(statistic.shape)}"
                )
        with torch.no_grad():
            made.fill()
            made.mean.copy_(mean)
            made.covariance.copy_(covariance)
        return made

    def fill(self) -> None:
        """Start with streams that say nothing of each other."""
        init.zeros_(self.mean)
        init.copy_(self.covariance, torch.eye(len(self.mean), device=self.mean.device))
        init.zeros_(self.offsets)

    def complete(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows of all streams, [batch, d] each: those given as they are, the others guessed."""
        missing = [name for name in self.sizes if name not in rows]
        if not missing:
            return {name: rows[name] for name in self.sizes}
        guessed = self._by_stream(self._linear(rows, self._to_missing(rows)), missing)
        like = next(iter(rows.values()))
        filled = {name: (part + self._mean_of(name)).to(like.dtype) for name, part in guessed.items()}
        return {name: rows[name] if name in rows else filled[name] for name in self.sizes}

    def fill_in(self, rows: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows of all streams, [batch, d] each, with what a row lacks guessed from what it has.

        Args:
            rows: of all streams, with anything where a row lacks one.
            masks: stream -> bool [batch], which rows have it; a stream that is not named is there in every row.

        Raises:
            ValueError: for a row without any stream.
        """
        count = len(next(iter(rows.values())))
        everywhere = torch.ones(count, dtype=torch.bool)
        # On the host, where a training loop has the masks anyway, so that an accelerator never waits.
        given = torch.stack([masks[name].cpu() if name in masks else everywhere for name in self.sizes])
        patterns, pattern_of_row = given.unique(dim=1, return_inverse=True)
        filled = dict(rows)
        for number, pattern in enumerate(patterns.T.tolist()):
            names = [name for name, is_given in zip(self.sizes, pattern, strict=True) if is_given]
            if len(names) == len(self.sizes):
                continue
            row_numbers = (pattern_of_row == number).nonzero().squeeze(-1)
            if not names:
                raise ValueError(f"row {int(row_numbers[0])} has none of the streams {list(self.sizes)}")
            row_numbers = row_numbers.to(self.mean.device, non_blocking=True)
            complete = self.complete({name: rows[name][row_numbers] for name in names})
            for name in self.sizes:
                if name not in names:
                    filled[name] = filled[name].index_copy(0, row_numbers, complete[name])
        return filled

    def shared_rows(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return given rows moved by the setting `shared` towards what the other streams know of them too.

        A given row has what no other stream could say, and a guessed row has not: left as it is, the first would win
        most of a selection that all streams are to share.
        """
        share = self.settings["shared"]
        known = self._by_stream(self._linear(rows, self._to_shared(rows)), self._given(rows))
        return {
            name: torch.lerp(rows[name].float(), part + self._mean_of(name), share).to(rows[name].dtype)
            for name, part in known.items()
        }

    def offsets_of(self, rows: Mapping[str, Tensor]) -> Tensor | None:
        """Return [N] to add to the summed pre-activations, where one stream alone is given and has offsets."""
        if len(rows) != 1 or len(self.sizes) == 1:
            return None
        return self.offsets[list(self.sizes).index(next(iter(rows)))]

    @torch.no_grad()
    def summed_preactivations(
        self,
        rows: Mapping[str, Tensor],
        encoders: Mapping[str, Any],
        pre_biases: Mapping[str, Tensor],
        at_once: int,
    ) -> Iterator[Tensor]:
        """Yield all streams' summed pre-activations [block, N], float32, given rows moved as by `shared_rows`.

        Rows seen so are affine in those given, and pre-activations in them: all together are one product with the
        given rows alone, whose weight is made once for each set of given streams.

        Args:
            rows: normalised rows of the given streams.
            encoders: stream -> its encoder, of all streams.
            pre_biases: stream -> its pre-bias [d].
            at_once: rows of a block.
        """
        made_of = [part for name in self.sizes for part in (*encoders[name].parameters(), pre_biases[name])]
        # Weights are changed in ways that torch does not count (`.data`, kernels), so their numbers are looked at.
        marks = torch.stack([_mark(part) for part in (self.mean, *made_of)]).tolist()
        state = (self.mean.device, self.covariance._version, *self.settings.values(), *marks)
        key = (tuple(self._given(rows)), state)
        if key not in self._summed_maps:
            self._summed_maps = {other: made for other, made in self._summed_maps.items() if other[1] == state}
            self._summed_maps[key] = self._summed_map(rows, encoders, pre_biases)
        weight, bias = self._summed_maps[key]
        for block in zip(*(value.split(at_once) for value in rows.values()), strict=True):
            yield self._linear(dict(zip(rows, block, strict=True)), weight).add_(bias)

    def _summed_map(
        self, rows: Mapping[str, Tensor], encoders: Mapping[str, Any], pre_biases: Mapping[str, Tensor]
    ) -> SummedMap:
        given, share = self._given(rows), self.settings["shared"]
        maps = self._by_stream(self._to_missing(rows), [name for name in self.sizes if name not in rows])
        first = 0
        for name, known in self._by_stream(self._to_shared(rows), given).items():
            maps[name] = share * known
            maps[name][first : first + self.sizes[name]].diagonal().add_(1 - share)
            first += self.sizes[name]
        with torch.autocast(self.mean.device.type, enabled=False):
            weights = {name: encoders[name].weight.float() for name in self.sizes}
            away = {name: self._mean_of(name) - pre_biases[name].float() for name in self.sizes}
            biases = [weights[name] @ away[name] + encoders[name].bias.float() for name in self.sizes]
            products = [maps[name] @ weights[name].T for name in self.sizes]
            return SummedMap(torch.stack(products).sum(dim=0), torch.stack(biases).sum(dim=0))

    def _given(self, rows: Mapping[str, Tensor]) -> list[str]:
        return [name for name in self.sizes if name in rows]

    def _by_stream(self, columns: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Return stream -> its columns, [.., d] each, of streams that lie side by side in this order."""
        return dict(zip(names, columns.split([self.sizes[name] for name in names], dim=1), strict=True))

    def _mean_of(self, name: str) -> Tensor:
        return self.mean[self._columns[name]]

    def _linear(self, rows: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        """Return x_M - m_M of given rows times weights [d_M, d], in float32 under autocast too."""
        with torch.autocast(self.mean.device.type, enabled=False):
            centered = [rows[name].float() - self._mean_of(name) for name in self._given(rows)]
            return torch.cat(centered, dim=1) @ weights

    def _to_missing(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Return [d_M, d_T], the map of x_M - m_M to x^_T - m_T."""
        return self._solved(rows, "missing", self._regression)

    def _to_shared(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Return [d_M, d_M], to the part of x_M - m_M that the other streams, given or guessed, know of too."""
        return self._solved(rows, "shared", self._round_trip)

    def _solved(
        self, rows: Mapping[str, Tensor], kind: str, solve: Callable[[Tensor, list[str], list[str]], Tensor]
    ) -> Tensor:
        """Return the map of a set of given streams, solved once for each."""
        given = self._given(rows)
        # In-place changes of a buffer, such as loading weights into it, count up its version.
        state = (self.mean.device, self.covariance._version, self.settings["ridge"])
        key = (kind, tuple(given), state)
        if key not in self._maps:
            self._maps = {other: made for other, made in self._maps.items() if other[-1] == state}
            # float64, which some accelerators lack.
            covariance = self.covariance.detach().cpu().double()
            missing = [name for name in self.sizes if name not in given]
            self._maps[key] = solve(covariance, given, missing).to(self.mean.device, torch.float32)
        return self._maps[key]

    def _round_trip(self, covariance: Tensor, given: list[str], missing: list[str]) -> Tensor:
        """Return [d_M, d_M]: each given stream's row guessed from all other rows, the missing ones' guessed before."""
        to_missing = self._regression(covariance, given, missing)
        complete = torch.cat([torch.eye(to_missing.shape[0], dtype=to_missing.dtype), to_missing], dim=1)
        names = [*given, *missing]
        parts = self._by_stream(complete, names)
        columns = []
        for name in given:
            others = [other for other in names if other != name]
            columns.append(
                torch.cat([parts[other] for other in others], dim=1) @ self._regression(covariance, others, [name])
            )
        return torch.cat(columns, dim=1)

    def _regression(self, covariance: Tensor, given: list[str], wanted: list[str]) -> Tensor:
        """Return (C_MM + R)^-1 C_MT, [d_M, d_T], in float64."""
        if not wanted:
            return covariance.new_zeros(sum(self.sizes[name] for name in given), 0)
        among = torch.cat([covariance[self._columns[name]] for name in given])
        within = torch.cat([among[:, self._columns[name]] for name in given], dim=1)
        variances = [covariance.diagonal()[self._columns[name]].mean().expand(self.sizes[name]) for name in given]
        within.diagonal().add_(self.settings["ridge"] * torch.cat(variances))
        across = torch.cat([among[:, self._columns[name]] for name in wanted], dim=1)
        factor, fault = torch.linalg.cholesky_ex(within)
        if fault:  # fewer rows than channels, and no ridge
            return torch.linalg.pinv(within, hermitian=True) @ across
        return torch.cholesky_solve(across, factor)

    def _apply(self, fn: Any, recurse: bool = True) -> "Imputation":
        # They stay float32 with weights of any number type: rounded, a covariance is none.
        for name, buffer in self.named_buffers():
            moved = fn(buffer)
            setattr(self, name, moved if buffer.is_meta else buffer.to(moved.device))
        self._maps, self._summed_maps = {}, {}
        return self


def _mark(tensor: Tensor) -> Tensor:
    """Return a float32 scalar that another tensor [n] or [n, d] is as good as certain not to have."""
    for size in reversed(tensor.shape):
        tensor = tensor.to(torch.float32) @ torch.linspace(1, 3, size, device=tensor.device).square()
    return tensor


class ValueFit:
    """Values of a selection that reconstruct the rows of all streams better than those it starts from.

    Each step goes down the gradient g of sum_t w_t (|D_t^T z + b_t - x_t|^2 + ridge |z|^2) to where that is least
    along it, |g|^2 / sum_t w_t (|D_t^T g|^2 + ridge |g|^2) away.

    Args:
        start: z, [batch, k].
        centered: stream t -> x_t - b_t, [batch, d].
        atoms: stream t -> D_t, [N, d].
        selection: the latents of each row.
    """

    def __init__(
        self, start: Tensor, centered: Mapping[str, Tensor], atoms: Mapping[str, Tensor], selection: Selection
    ):
        self._start, self._centered, self._atoms, self._selection = start, centered, atoms, selection

    def values_of(self, stream: str, own_weight: float, steps: float) -> Tensor:
        """Return values [batch, k], never negative, with w_t `own_weight` for a stream and 1 for all others.

        Of a broken number of steps the last goes only that part of its way.
        """
        weights = {name: own_weight if name == stream else 1.0 for name in self._centered}
        values, ridge = self._start, FIT_RIDGE * sum(weights.values())
        for step in range(math.ceil(steps)):
            products = self._products(values) if step else self._products_at_start
            downhill = sum(weight * products[name] for name, weight in weights.items()) - ridge * values
            curvature = ridge * downhill.square().sum(dim=1)
            for name, weight in weights.items():
                curvature = curvature + weight * row_energy(
                    sparse_decode(downhill, self._atoms[name], self._selection)
                )
            length = downhill.square().sum(dim=1) / curvature.clamp(min=torch.finfo(curvature.dtype).tiny)
            values = values + min(1.0, steps - step) * length.unsqueeze(1) * downhill
        return values.relu()

    @cached_property
    def _products_at_start(self) -> dict[str, Tensor]:
        """With these the first step of every stream's fit begins."""
        return self._products(self._start)

    def _products(self, values: Tensor) -> dict[str, Tensor]:
        """Return stream -> [batch, k], the products of what values leave over with the stream's atoms."""
        products = {}
        for name, rows in self._centered.items():
            atoms = self._atoms[name]
            left = rows - sparse_decode(values, atoms, self._selection)
            dots = dots_with_atoms(self._selection.indices, atoms.detach(), left.detach())
            zero = atoms.new_zeros(())
            bias, pre_bias = zero.expand(len(atoms)), zero.expand(atoms.shape[1])
            products[name] = gather_preactivations(left, atoms, bias, pre_bias, left.detach(), dots, self._selection)
        return products
