"""agg_log_prob_marginals against its peers: `pytest bench/bench_agg_log_prob_marginals.py --benchmark-only`."""

import pytest

import fastvae

from . import peers
from .conftest import Case
from .inputs import samples_and_posteriors

WHO = {
    "fastvae": fastvae.agg_log_prob_marginals,
    "eager": peers.marginals_broadcast,
    "compiled": peers.compiled_marginals,
}


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("size", [(256, 10), (1024, 32)], ids=str)
@pytest.mark.parametrize("who", WHO)
def bench_agg_log_prob_marginals(case: Case, who: str, size: tuple[int, int], direction: str) -> None:
    case(WHO[who], samples_and_posteriors(*size), direction)
