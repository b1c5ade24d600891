"""kl_gauss against its peers: `pytest bench/bench_kl_gauss.py --benchmark-only`."""

from .cases import Case
from .conftest import Contest


def bench_kl_gauss(contest: Contest, case: Case) -> None:
    contest(case)
