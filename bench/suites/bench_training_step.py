"""A whole beta-TCVAE step against the broadcast formula: `pytest bench/ --benchmark-only -k training_step`."""

from ..cases import Case
from ..conftest import Contest


def bench_training_step(contest: Contest, case: Case) -> None:
    contest(case)
