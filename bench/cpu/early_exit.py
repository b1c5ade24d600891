"""The early exit of agg_log_prob against going through all pairs, for `bench.cpu.beyond`."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastvae
from fastvae.backends import native_library

from ..harness import in_turns
from ..inputs import population
from ..peers import compiled_broadcast, compiled_gemm


class Population(NamedTuple):
    """N samples and posteriors, whose active dimensions have logvar; in the others all are nearly N(0, I). The ratios
    to reach are of all pairs' time, and of the fastest compiled formula's."""

    N: int
    D: int
    active: int
    logvar: float
    backward: bool
    of_plain: str = ""
    of_compiled: str = ""

    def __str__(self) -> str:
        mode = "forward + backward" if self.backward else "forward"
        return f"{mode}, {self.N}×{self.N}, D {self.D}, {self.active} active, logvar {self.logvar:g}"


CASES = (
    Population(4096, 128, 20, -3, False, "3.5", "10"),
    Population(4096, 32, 32, -4, False),
    Population(4096, 32, 32, -2, False),
    Population(4096, 10, 10, 0, False, "0.98"),
    Population(4096, 32, 32, 0, False, "0.98"),
    Population(4096, 64, 64, -4, True, "2.5"),
    Population(4096, 32, 32, -2, True),
    Population(4096, 10, 10, 0, True, "0.98"),
)


def run(inputs: Sequence[Tensor], backward: bool, exact_skip: bool) -> Callable[[], list[Tensor]]:
    leaves = [x.requires_grad_(backward) for x in inputs]

    def call() -> list[Tensor]:
        with fastvae.use_backend("native", exact_skip=exact_skip):
            joint = fastvae.agg_log_prob(*leaves)
            return [joint.detach(), *(torch.autograd.grad(joint.sum(), leaves) if backward else ())]

    return call


def visited(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], float]:
    """A call's result, and the share of the pairs' dimensions that it visited."""
    native_library.take_visits()
    result = call()
    visits, everything = native_library.take_visits()
    return result, visits / everything


def lines(repeats: int) -> Iterator[str]:
    """A Markdown table, row by row as it is measured: medians, in turns. Visited is the share of the pairs' dimensions
    that the early exit goes through. Differences are between all pairs and early exit, relative to the largest element,
    gradients included."""
    columns = "all pairs | early exit | ratio | target | visited | compiled | ratio | target | difference"
    yield f"| agg_log_prob | {columns} |"
    yield f"|---{'|--:' * 9}|"
    for case in CASES:
        inputs = population(case.N, case.D, active=case.active, logvar=case.logvar)
        early, plain = (run(inputs, case.backward, skip) for skip in (True, False))
        results, share = visited(early)
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, plain(), strict=True))
        peers = [functools.partial(f, *inputs) for f in (compiled_gemm, compiled_broadcast) if case.of_compiled]
        for peer in peers:
            peer()  # compiled now
        slow, fast, *others = (1e3 * median for median in in_turns(repeats, plain, early, *peers))
        compiled = f"{min(others):.2f} ms | {min(others) / fast:.2f} | {case.of_compiled}" if others else " | | "
        figures = f"{slow:.2f} ms | {fast:.2f} ms | {slow / fast:.2f} | {case.of_plain} | {share:.1%}"
        yield f"| {case} | {figures} | {compiled} | {difference:.1e} |"
