"""Every op, and what is made of many, against its peers: `pytest bench/ --benchmark-only -k agg_log_prob`."""

from ..cases import Case
from ..conftest import Contest


def bench_ops(contest: Contest, case: Case) -> None:
    contest(case)
