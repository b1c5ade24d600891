"""agg_log_prob against its peers: `pytest bench/bench_agg_log_prob.py --benchmark-only`."""

import pytest

import fastvae

from . import peers
from .conftest import Case
from .inputs import samples_and_posteriors

WHO = {
    "fastvae": fastvae.agg_log_prob,
    "eager_broadcast": peers.agg_broadcast,
    "eager_gemm": peers.agg_gemm,
    "compiled_broadcast": peers.compiled_broadcast,
    "compiled_gemm": peers.compiled_gemm,
    "keops": peers.agg_keops,
}


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("size", [(256, 10), (1024, 32)], ids=str)
@pytest.mark.parametrize("who", WHO)
def bench_agg_log_prob(case: Case, who: str, size: tuple[int, int], direction: str) -> None:
    case(WHO[who], samples_and_posteriors(*size), direction)
