"""The columns of log sum_j w_ij q(z_i | x_j): N posteriors and their log-weights, in memory or read chunk by chunk."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..backends.contract import LogWeights
from ..ops.checks import accumulated
from ..ops.interpolate import Chunk, Interpolant, interpolate, interpolation, transposed
from .posteriors import Posteriors, shown

Evaluate = Callable[..., Sequence[Tensor]]  # of mu and logvar [n, D], and the fields of LogWeights


class Columns(Protocol):
    """The columns that `fastvae.aggregate.marginals` sums over."""

    N: int
    weights: LogWeights  # own columns are numbered from 0 to N − 1

    def log_sum(self, evaluate: Evaluate) -> list[Tensor]:
        """The log-sum-exp over all columns, tensor by tensor, of the results of `evaluate`, which is called with some
        of them at a time: mu and logvar `[n, D]`, and their weights."""

    def by_dimension(self) -> Iterator[Chunk]:
        """Yield all columns, some at a time, transposed."""

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar `[S, D]` of the columns with the numbers `index` `[S]`."""

    def of_samples(self, rows: Tensor) -> "Columns":
        """The same columns, with the weights for a part of the samples, those with the numbers `rows`."""

    def interpolate(self, interpolant: Interpolant, z: Tensor) -> Tensor:
        """The tabulated marginals at the samples, `[S, D]` in float64."""


class InMemory:
    """Columns mu and logvar `[N, D]` in memory: all that is computed from them is differentiable."""

    def __init__(self, mu: Tensor, logvar: Tensor, weights: LogWeights):
        self.mu, self.logvar, self.weights, self.N = mu, logvar, weights, len(mu)
        self._transposed: Chunk | None = None

    def log_sum(self, evaluate: Evaluate) -> list[Tensor]:
        return list(evaluate(self.mu, self.logvar, *self.weights))

    def by_dimension(self) -> Iterator[Chunk]:
        if self._transposed is None:
            self._transposed = transposed(self.mu, self.logvar, self.weights.log_w)
        yield self._transposed

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.mu[index], self.logvar[index]

    def of_samples(self, rows: Tensor) -> "InMemory":
        own = None if self.weights.own is None else self.weights.own[rows]
        return InMemory(self.mu, self.logvar, self.weights._replace(own=own))

    def interpolate(self, interpolant: Interpolant, z: Tensor) -> Tensor:
        weights = self.weights
        return interpolation(z, self.mu, self.logvar, weights.log_w, weights.common(self.N), list(interpolant))


class Streamed:
    """All posteriors of a data set, each of weight 1/N, `batch_size` at a time; without gradient.

    Args:
        own: `[S]` int64, the column that each sample's sum leaves out, −1 for none; None where no sum leaves one out.
        progress: show how far a sum is on stderr.
    """

    def __init__(self, posteriors: Posteriors, *, own: Tensor | None = None, batch_size: int, progress: bool = False):
        self.posteriors, self.batch_size, self.progress = posteriors, batch_size, progress
        self.N = len(posteriors.mu)
        log_w_own = None if own is None else -math.inf
        self.weights = LogWeights(log_w_all=-math.log(self.N), own=own, log_w_own=log_w_own)

    def log_sum(self, evaluate: Evaluate) -> list[Tensor]:
        totals: list[Tensor] = []
        for first in shown(range(0, self.N, self.batch_size), "columns", self.progress):
            mu, logvar = self._read(first)
            parts = [part.double() for part in evaluate(mu, logvar, *self._weights_of(first, len(mu)))]
            for total, part in zip(totals, parts, strict=False):
                torch.logaddexp(total, part, out=total)
            totals = totals or parts
        return totals

    def by_dimension(self) -> Iterator[Chunk]:
        for first in range(0, self.N, self.batch_size):
            mu, logvar = self._read(first)
            yield transposed(mu, logvar, None)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.posteriors.read(index.numpy(force=True))

    def of_samples(self, rows: Tensor) -> "Streamed":
        own = None if self.weights.own is None else self.weights.own[rows]
        return Streamed(self.posteriors, own=own, batch_size=self.batch_size)

    def interpolate(self, interpolant: Interpolant, z: Tensor) -> Tensor:
        return interpolate(interpolant, z)

    def _read(self, first: int) -> tuple[Tensor, ...]:
        """(mu, logvar) of a chunk of columns, the first of which has the number `first`, in one dtype."""
        return accumulated(*self.posteriors.read(slice(first, first + self.batch_size)))

    def _weights_of(self, first: int, n: int) -> LogWeights:
        """The weights of the n columns from `first` on, renumbered from 0; own is −1 where it is not among them."""
        own = self.weights.own
        if own is None:
            return self.weights
        return self.weights._replace(own=(own - first).where((own >= first) & (own < first + n), -1))
