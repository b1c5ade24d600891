"""kl_gauss against its peers: `pytest bench/ --benchmark-only -k kl_gauss`."""

from ..cases import Case
from ..conftest import Contest


def bench_kl_gauss(contest: Contest, case: Case) -> None:
    contest(case)
