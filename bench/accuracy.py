"""Checks whether a contestant is right: its results, or gradients, against float64.

Error: the largest absolute difference of an output from its float64 value, relative to the largest value of that
output. Bound: four times the sum of the change that half an ulp in every input makes to the float64 value, and of
float32's eps; what a careful float32 program stays under. An error above it is `inaccurate`; above WRONG it is no
rounding any more, and the time says nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .harness import forward, forward_backward, listed
from .inputs import SEED

ROWS = 64  # samples that are checked, where they do not depend on each other
WRONG = 1e-3
EPS = torch.finfo(torch.float32).eps


class Error(NamedTuple):
    """The error of the output that exceeds its bound most, or comes nearest to it, and that bound."""

    error: float
    bound: float

    @property
    def verdict(self) -> str:
        if not self.error <= max(WRONG, self.bound):  # NaN is wrong
            return "wrong"
        return "accurate" if self.error <= self.bound else "inaccurate"


class Results(NamedTuple):
    got: list[Tensor]
    hidden: tuple[Tensor, ...]  # what else they depend on


class Truth:
    """The values that a function of `inputs` should give.

    Args:
        exact: the function in float64, called with the inputs and then with what `hidden` returns.
        rowwise: how many of the first inputs are taken row by row: row i of every output depends on row i of these and
            of what is hidden, and on all rows of the other inputs, so that ROWS rows are enough to check. 0 if every
            row depends on all rows.
        hidden: called with a contestant and the inputs; returns what else its results depend on: noise, parameters.
    """

    def __init__(
        self,
        exact: Callable[..., Any],
        inputs: Sequence[Tensor],
        mode: str,
        rowwise: int = 0,
        hidden: Callable[..., tuple[Tensor, ...]] | None = None,
    ):
        self.exact, self.mode, self.rowwise, self.hidden = exact, mode, rowwise, hidden
        self.inputs = [x.detach() for x in inputs]
        n = len(self.inputs[0])
        self.rows = torch.arange(0, n, n // ROWS)[:ROWS] if rowwise and n > ROWS else None
        self._known: tuple[list[Tensor], list[float]] | None = None

    def error(self, function: Callable[..., Any]) -> Error:
        return self.judge(self.results(function))

    def results(self, function: Callable[..., Any]) -> Results:
        """Calls a contestant once; `judge` computes the float64 values, which takes longer."""
        hidden: tuple[Tensor, ...] = ()
        if self.hidden is not None:
            torch.manual_seed(SEED)
            hidden = self.hidden(function, *self.inputs)
            torch.manual_seed(SEED)
        return Results(self._results(function, self.inputs, self.rows), hidden)

    def judge(self, results: Results) -> Error:
        if self._known is None or results.hidden:
            self._known = self._expected(results.hidden)
        errors = [
            Error(float((g.double() - e).abs().max()) / _largest(e), bound)
            for g, e, bound in zip(results.got, *self._known, strict=True)
        ]
        return max(errors, key=lambda e: e.error / e.bound if e.error == e.error else math.inf)

    def _expected(self, hidden: tuple[Tensor, ...]) -> tuple[list[Tensor], list[float]]:
        """The float64 values, and the bounds."""
        exact, *nudged = (self._exactly(hidden, seed) for seed in (None, 1, 2))
        changes = [max(float((n - e).abs().max()) for n in others) for e, *others in zip(exact, *nudged, strict=True)]
        return exact, [4 * (change / _largest(e) + EPS) for change, e in zip(changes, exact, strict=True)]

    def _exactly(self, hidden: tuple[Tensor, ...], seed: int | None) -> list[Tensor]:
        """The float64 values of the rows that are checked; with a seed, at inputs half an ulp up or down."""
        n = len(self.inputs)
        wide = [x.double() for x in (*self.inputs, *hidden)]
        if self.rows is not None:
            wide = [x[self.rows] if i < self.rowwise or i >= n else x for i, x in enumerate(wide)]
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            wide = [x * (1 + EPS / 2 * (2 * torch.randint(2, x.shape, generator=generator) - 1)) for x in wide]
        return self._results(lambda *x: self.exact(*x, *wide[n:]), wide[:n], None)

    def _results(self, function: Callable[..., Any], inputs: Sequence[Tensor], rows: Tensor | None) -> list[Tensor]:
        """The outputs, or by mode the gradients of the inputs, of the rows."""
        if "backward" in self.mode:
            gradients = forward_backward(function, *inputs, rows=rows)()
            return [g if rows is None or i >= self.rowwise else g[rows] for i, g in enumerate(gradients)]  # type: ignore
        outputs: Any = forward(function, *inputs)() if self.mode == "forward" else function(*inputs)
        return [o if rows is None else o[rows] for o in listed(outputs)]


def _largest(x: Tensor) -> float:
    return max(float(x.abs().max()), 1e-300)
