"""Fixtures and hooks of the suites. Each test is a case: all of its contestants race, in turns and by one clock, in one
benchmark whose own figure is fastvae's; the others' are in its `extra_info`, and in the tables at the end.

    pytest bench --benchmark-only                      the suite; -k and -m target choose from it
    pytest bench --benchmark-only --benchmark-json=F   and saves what was measured, for `python -m bench.cpu.report F`
    pytest bench --benchmark-disable                   a trial: the smallest cases, checked and not measured
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .cases import COMPOSED, OPS, Case, cases, smallest
from .cpu import report
from .cpu.contest import TOO_SLOW, measure, try_out
from .cpu.machine import ceilings, describe, why_not
from .harness import Ceilings
from .targets import MEMORY_TARGETS, TARGETS

Contest = Callable[[Case], None]
BACKEND = "native"  # that computes what is called fastvae here

_measured = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "target: has a ratio, or a memory, to reach")
    config.stash[_measured] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives a test every case there is, an op's after another's."""
    if "case" in metafunc.fixturenames:
        found = [case for name in (*OPS, *COMPOSED) for case in cases(name)]
        marks = {case: [pytest.mark.target] for case in (*TARGETS, *MEMORY_TARGETS)}
        metafunc.parametrize("case", [pytest.param(c, marks=marks.get(c, ()), id=str(c)) for c in found])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _trial(config):
        of_case = {item: item.callspec.params.get("case") for item in items if hasattr(item, "callspec")}
        left_out = [item for item, case in of_case.items() if case and not smallest(case)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtestloop(session: pytest.Session) -> None:
    """Stops the run where another backend than BACKEND would compute what is called fastvae."""
    benchmarks = [item for item in session.items if report.BENCH in item.path.parents]
    reason = why_not(BACKEND) if benchmarks and not session.config.option.collectonly else ""
    if reason:
        raise pytest.UsageError(reason)


def _trial(config: pytest.Config) -> bool:
    return bool(config.getoption("benchmark_disable"))


@pytest.fixture(scope="session")
def ceiling() -> Ceilings:
    return ceilings(torch.get_num_threads())


@pytest.fixture
def contest(benchmark: Any, request: pytest.FixtureRequest) -> Contest:
    """Measures a case, and fails where fastvae is not accurate; where it is too slow for this machine, the report says
    so."""

    def run(case: Case) -> None:
        benchmark.group = f"{case.name}, {case.mode}"
        if _trial(request.config):
            results = benchmark.pedantic(try_out, (case,))
        else:
            measured, times = measure(case, request.getfixturevalue("ceiling"))
            if times:
                benchmark.pedantic(lambda: None)
                benchmark.stats.stats.data[:] = times  # in place of that call's
            benchmark.extra_info.update(measured)
            request.config.stash[_measured].append(measured)
            results = measured["results"]
        check(results["fastvae"])

    return run


def check(ours: dict[str, Any]) -> None:
    if ours.get("why_not", "").startswith(TOO_SLOW):
        pytest.skip(f"fastvae is left out, {ours['why_not']}")
    assert ours.get("verdict") == "accurate", ours


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = config.stash[_measured]
    for line in report.full_tables(measured):
        terminalreporter.write_line(line)


def pytest_benchmark_generate_machine_info() -> dict[str, object]:
    return describe()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Drops the single repeats, so that the file is small; adds the cases that fastvae was left out of, which have no
    benchmark of their own."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
        benchmark["params"] = None  # a Case, which extra_info spells out
    left_out = [m for m in config.stash[_measured] if "why_not" in m["results"]["fastvae"]]
    output_json["benchmarks"] += [{"extra_info": measured} for measured in left_out]
