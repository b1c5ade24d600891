"""Measures how fastvae's cost grows: seconds against elements (S·N·D, or B·D) on ladders of sizes, on one thread and on
all."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..cases import BOTH, FORWARD, OPS
from ..harness import MODES, seconds

DECADES = 2  # below the largest size, over which the exponent is fitted
FLAT = 1.25  # the cost per element is what it is at the largest size, as long as it is within this factor
BUDGET = 0.15  # seconds of repeats


class Ladder(NamedTuple):
    """An op in a mode at sizes that double."""

    op: str
    mode: str
    D: int
    smallest: int
    steps: int

    @property
    def sizes(self) -> list[int]:
        return [self.smallest << n for n in range(self.steps)]

    def __str__(self) -> str:
        return f"{self.op}-{self.mode}-D{self.D}"


LADDERS = (
    Ladder("kl_gauss", BOTH, 64, 32, 14),
    Ladder("reparameterize", FORWARD, 64, 32, 14),
    Ladder("agg_log_prob", FORWARD, 32, 32, 9),
    Ladder("agg_log_prob", BOTH, 32, 32, 8),
    Ladder("agg_log_prob_marginals", FORWARD, 32, 32, 8),
    Ladder("agg_log_prob_marginals", BOTH, 32, 32, 7),
)


def measure(ladder: Ladder) -> dict[str, Any]:
    """Measures a ladder, for JSON: its op, mode and D; elements by size; by the number of threads, seconds by size."""
    op = OPS[ladder.op]
    function = op.function
    threads = torch.get_num_threads()
    times: dict[int, list[float]] = {}
    try:
        for n in sorted({1, threads}):
            torch.set_num_threads(n)
            times[n] = [_median(op, function, ladder.mode, B, ladder.D) for B in ladder.sizes]
    finally:
        torch.set_num_threads(threads)
    elements = [op.elements(B, ladder.D) for B in ladder.sizes]
    about = {"scaling": ladder.op, "mode": ladder.mode, "D": ladder.D}
    return about | {"sizes": ladder.sizes, "elements": elements, "seconds": {str(n): t for n, t in times.items()}}


def _median(op: Any, function: Any, mode: str, B: int, D: int) -> float:
    prepare = MODES[mode](function, *op.inputs(B, D, 0))
    first = min(seconds(prepare()) for _ in range(3))
    return statistics.median(seconds(prepare()) for _ in range(min(200, max(3, int(BUDGET / first)))))


def exponent(elements: Sequence[float], times: Sequence[float]) -> float:
    """The exponent in cost ~ elements^exponent, by least squares of the logarithms over the last decades."""
    chosen = [n for n, e in enumerate(elements) if e >= elements[-1] / 10**DECADES]
    x, y = ([math.log(values[n]) for n in chosen] for values in (elements, times))
    return float(np.polyfit(x, y, 1)[0])


def flat_from(elements: Sequence[float], times: Sequence[float]) -> int:
    """The place from which on the cost per element is what it is at the largest size."""
    cost = [t / e for t, e in zip(times, elements, strict=True)]
    n = len(cost)
    while n and cost[-1] / FLAT <= cost[n - 1] <= cost[-1] * FLAT:
        n -= 1
    return n
