"""sample_gauss against its peers: `pytest bench/bench_sample_gauss.py --benchmark-only`."""

import pytest

import fastvae

from . import peers
from .conftest import Case
from .inputs import posteriors

WHO = {
    "fastvae": fastvae.reparameterize,
    "eager": peers.reparameterize_formula,
}


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("size", [(128, 32), (8192, 64)], ids=str)
@pytest.mark.parametrize("who", WHO)
def bench_sample_gauss(case: Case, who: str, size: tuple[int, int], direction: str) -> None:
    case(WHO[who], posteriors(*size), direction)
