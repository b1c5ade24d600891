"""agg_log_prob_marginals against its peers: `pytest bench/ --benchmark-only -k agg_log_prob_marginals`."""

from ..cases import Case
from ..conftest import Contest


def bench_agg_log_prob_marginals(contest: Contest, case: Case) -> None:
    contest(case)
