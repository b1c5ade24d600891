"""What the suites share: one benchmark case, forward alone or forward and backward."""

from collections.abc import Callable

import pytest
from torch import Tensor

from .harness import forward, forward_backward

Case = Callable[..., None]


@pytest.fixture
def case(benchmark: Callable[..., object], request: pytest.FixtureRequest) -> Case:
    """Times a function on inputs, grouped by op, size and direction, so that peers stand side by side."""

    def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], direction: str) -> None:
        op = request.node.originalname.removeprefix("bench_")
        size = ", ".join(str(list(x.shape)) for x in inputs)
        benchmark.group = f"{op}, {direction}: {size}"
        timed = (forward if direction == "forward" else forward_backward)(function, *inputs)
        timed(), timed()  # compilation is not timed
        benchmark(timed)

    return run
