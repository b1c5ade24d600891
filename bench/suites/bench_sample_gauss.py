"""sample_gauss, and z alone, against their peers: `pytest bench/ --benchmark-only -k sample_gauss`."""

from ..cases import Case
from ..conftest import Contest


def bench_reparameterize(contest: Contest, case: Case) -> None:
    contest(case)


def bench_sample_gauss(contest: Contest, case: Case) -> None:
    contest(case)
