"""The growth of cost with size, and its fall with threads: `pytest bench/ --benchmark-only -k scaling`."""

from typing import Any

import pytest

from ..cpu.scaling import LADDERS, Ladder, measure


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def bench_scaling(benchmark: Any, ladder: Ladder) -> None:
    benchmark.group = "scaling"
    if benchmark.disabled:  # a trial
        ladder = ladder._replace(steps=2)
    benchmark.extra_info.update(benchmark.pedantic(measure, (ladder,)))
