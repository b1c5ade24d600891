"""cross_log_prob against its peers: `pytest bench/bench_cross_log_prob.py --benchmark-only`."""

from .cases import Case
from .conftest import Contest


def bench_cross_log_prob(contest: Contest, case: Case) -> None:
    contest(case)
