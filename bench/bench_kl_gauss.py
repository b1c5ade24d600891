"""kl_gauss against its peers: `pytest bench/bench_kl_gauss.py --benchmark-only`."""

import pytest

import fastvae

from . import peers
from .conftest import Case
from .inputs import posteriors

WHO = {
    "fastvae": fastvae.kl_gauss,
    "eager": peers.kl_formula,
    "compiled": peers.compiled_kl,
}


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("size", [(128, 32), (8192, 64)], ids=str)
@pytest.mark.parametrize("who", WHO)
def bench_kl_gauss(case: Case, who: str, size: tuple[int, int], direction: str) -> None:
    case(WHO[who], posteriors(*size), direction)
