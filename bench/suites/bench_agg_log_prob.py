"""agg_log_prob against its peers: `pytest bench/ --benchmark-only -k agg_log_prob`."""

from ..cases import Case
from ..conftest import Contest


def bench_agg_log_prob(contest: Contest, case: Case) -> None:
    contest(case)
