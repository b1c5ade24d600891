"""The KL's terms over a whole data set against its peers: `pytest bench/ --benchmark-only -k full_dataset`."""

from ..cases import Case
from ..conftest import Contest


def bench_full_dataset(contest: Contest, case: Case) -> None:
    contest(case)
