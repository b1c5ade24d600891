"""The benchmarks: the harness is fair, the check finds what is wrong, every peer computes what fastvae does, the report
prints no ratio that means nothing, and the figures in the README are those that were measured."""

import functools
import itertools
import json
import math
import statistics
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import fastvae
from bench import cases, harness, peers
from bench import conftest as bench_conftest
from bench.accuracy import ROWS, Error, Truth
from bench.cases import BOTH, COMPOSED, FORWARD, OPS, Case
from bench.cpu import calls, contest, machine, report
from bench.inputs import posteriors, samples_and_posteriors
from bench.pictures import races as pictures
from bench.targets import HEADLINES, MEMORY_TARGETS, TARGETS
from fastvae import backends
from fastvae.backends import contract

MEBIBYTE = 2**20
REPORTS = sorted(report.BENCH.glob("results/*/results.json"))


def for_ever() -> None:
    while True:
        pass


# The harness.


def test_race_interleaves_its_contestants_on_fresh_inputs() -> None:
    events: list[str] = []

    def contestant(name: str) -> harness.Prepare:
        return lambda: lambda: events.append(name)

    estimates = {"first": 0.01, "even": 0.01, "rare": 0.04}
    times = contest.raced(
        {name: contestant(name) for name in estimates}, estimates, lambda n: events.append(f"inputs {n}"), budget=0.3
    )
    assert {name: len(t) for name, t in times.items()} == {"first": 30, "even": 30, "rare": 7}
    inputs, runs = events[::2], events[1::2]
    assert all(event.startswith("inputs") for event in inputs)
    assert [int(i.split()[1]) for i, who in zip(inputs, runs, strict=True) if who == "first"] == [*range(30)]
    rare = [n for n, who in enumerate(runs) if who == "rare"]
    assert max(b - a for a, b in itertools.pairwise(rare)) <= 2 * len(runs) / 7
    assert {runs[n - 1] for n in rare} == {"first", "even"}  # the order changes


def test_short_runs_follow_each_other_in_turns() -> None:
    events: list[str] = []
    now = [0.0]

    def contestant(name: str) -> harness.Prepare:
        def prepare() -> harness.Run:
            now[0] += 100  # not timed

            def run() -> None:
                events.append(name)
                now[0] += len(events)

            return run

        return prepare

    def refresh(n: int) -> None:
        events.append("|")

    def before() -> None:
        events.append(".")
        now[0] += 100

    estimates = {"a": 0.001, "b": 0.009, "c": 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.time, "perf_counter", lambda: now[0])
        times = contest.raced({name: contestant(name) for name in "abc"}, estimates, refresh, before, budget=0.17)
    turns = "".join(events).split("|")[1:]
    assert sorted(turns) == sorted(
        8 * ["a" + 20 * ".a"] + 5 * ["b" + 20 * ".b"] + 8 * [".c"]
    )  # 8: c has no more than a
    for name in "abc":
        assert times[name] == [n + 1 for n, who in enumerate(events) if who == name and events[n - 1] == "."]


def test_what_a_mode_times() -> None:
    calls: list[str] = []

    def function(x: Tensor) -> Tensor:
        calls.append("forward")
        assert torch.is_grad_enabled() == x.requires_grad
        y = 2 * x
        if y.requires_grad:
            y.register_hook(lambda _: calls.append("backward"))
        return y

    for mode, timed in ((FORWARD, ["forward"]), ("backward", ["backward"]), (BOTH, ["forward", "backward"])):
        prepare = harness.MODES[mode](function, torch.ones(3, requires_grad=mode != FORWARD))
        run = prepare()
        calls.clear()
        result = run()
        assert calls == timed
        torch.testing.assert_close(result if mode == FORWARD else result[0], torch.full((3,), 2.0))  # type: ignore[index]


def test_a_forward_has_no_gradient() -> None:
    result = harness.MODES[FORWARD](lambda x: 2 * x, torch.ones(3, requires_grad=True))()()
    assert not result.requires_grad  # type: ignore[attr-defined]


def test_gradients_of_some_rows() -> None:
    x, rows = torch.ones(5, 2), torch.tensor([1, 3])
    gradients: Any = harness.forward_backward(lambda x: x.square(), x, rows=rows)()
    (gradient,) = gradients
    expected = torch.zeros(5, 2)
    expected[rows] = 2.0
    torch.testing.assert_close(gradient, expected)


def test_memory_is_that_of_the_call() -> None:
    assert harness.peak_extra_bytes(lambda: None) < 2 * MEBIBYTE

    def ones(size: int) -> Tensor:
        return torch.ones(size * MEBIBYTE // 4).sum()

    for size in (3, 30, 300):  # below and above what the allocator gives back by itself
        warm = torch.ones(size * MEBIBYTE // 4)
        del warm
        peak = harness.peak_extra_bytes(functools.partial(ones, size))
        assert size - 0.5 < peak / MEBIBYTE < size + 2


def test_the_limits_hold_and_are_lifted() -> None:
    with pytest.raises(MemoryError), harness.memory_limit(512 * MEBIBYTE):
        torch.empty(1024 * MEBIBYTE, dtype=torch.int8)
    assert torch.empty(1024 * MEBIBYTE, dtype=torch.int8).numel() == 1024 * MEBIBYTE
    with pytest.raises(RuntimeError, match="something else"), harness.memory_limit(512 * MEBIBYTE):
        raise RuntimeError("something else")
    with pytest.raises(TimeoutError), harness.time_limit(0.05):
        for_ever()
    with harness.time_limit(0.05):
        pass
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)  # no alarm any more


def test_the_probe_finds_the_order_of_the_ceilings() -> None:
    found = machine.ceilings(1, repeats=1)
    assert 1e8 < found.exponentials < found.fma / 3 < 1e13
    assert 1e8 < found.bandwidth < 1e13


def test_the_machine_is_described_without_its_name() -> None:
    import platform

    text = json.dumps(machine.describe())
    assert f'"threads": {torch.get_num_threads()}' in text
    assert platform.node() not in text


# The check against float64.


def check(
    function: Callable[..., Any], mode: str, exact: Callable[..., Any] = peers.agg_broadcast, n: int = 20
) -> Error:
    return Truth(exact, samples_and_posteriors(n, 3), mode, rowwise=1).error(function)


@pytest.mark.parametrize("mode", [FORWARD, "backward", BOTH])
@pytest.mark.parametrize("n", [20, 3 * ROWS + 1])
def test_the_check_tells_rounding_from_error(mode: str, n: int) -> None:
    assert check(peers.agg_broadcast, mode, n=n).verdict == "accurate"
    assert check(lambda *x: (1 + 1e-5) * peers.agg_broadcast(*x), mode, n=n).verdict == "inaccurate"
    assert check(lambda *x: 1.01 * peers.agg_broadcast(*x), mode, n=n).verdict == "wrong"
    assert check(lambda *x: math.nan * peers.agg_broadcast(*x), mode, n=n).verdict == "wrong"


def test_the_check_looks_at_every_input_and_output() -> None:
    def stopped(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return peers.agg_broadcast(z, mu, logvar.detach()) + 0 * logvar.sum()

    assert check(stopped, FORWARD).verdict == "accurate"
    assert check(stopped, BOTH).verdict == "wrong"

    def swapped(*x: Tensor) -> tuple[Tensor, Tensor]:
        joint, marginals = peers.marginals_broadcast(*x)
        return joint, marginals.flip(1)

    assert check(swapped, FORWARD, peers.marginals_broadcast).verdict == "wrong"


def test_a_random_function_is_held_to_its_own_noise() -> None:
    op = OPS["reparameterize"]
    truth = Truth(op.exact, posteriors(9, 3), FORWARD, hidden=op.hidden)  # type: ignore[arg-type]
    assert truth.error(fastvae.reparameterize).verdict == "accurate"
    assert truth.error(peers.reparameterize_formula).verdict == "accurate"
    assert truth.error(lambda mu, logvar: mu + torch.randn_like(mu) * torch.exp(logvar)).verdict == "wrong"


# The peers.


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


ALL = OPS | COMPOSED
CONTESTANTS = [
    pytest.param(name, who, mode, id=f"{name}-{who}-{mode}")
    for name, op in ALL.items()
    for who, function in op.contestants(5, 3).items()
    if not isinstance(function, str) and who not in op.yardsticks
    for mode in ((FORWARD, BOTH) if BOTH in op.sizes and who not in op.forward_only else op.sizes)
    if (mode == FORWARD or who not in op.forward_only)
    and (who != "keops" or (mode == FORWARD and name != "full_dataset"))  # of which each mode compiles for long
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "who", "mode"), CONTESTANTS)
def test_every_contestant_is_the_reference_in_float64(name: str, who: str, mode: str) -> None:
    if who == "keops":
        pytest.importorskip("pykeops")
    op, (B, D) = ALL[name], (5, 3)
    inputs = [x.double() for x in op.inputs(B, D, 0)]
    if name == "full_dataset":  # which samples by itself
        inputs[0] = fastvae.reparameterize(inputs[1], inputs[2], seed=0)
    truth = contest._truth(Case(name, (B, D), mode), inputs)
    with torch.compiler.set_stance("force_eager"):  # what is compiled is the formula
        contestant = op.contestants(B, D)[who]
        assert not isinstance(contestant, str)
        assert truth.error(contestant).error < 1e-12


@pytest.mark.parametrize("name", [name for name, op in ALL.items() if op.rowwise])
def test_what_is_checked_by_rows_has_rows(name: str) -> None:
    op, B = ALL[name], ROWS + 1
    truth = Truth(op.exact or op.function, op.inputs(B, 3, 0), BOTH, op.rowwise, op.hidden)
    assert truth.error(op.function).verdict == "accurate"


# A whole case.

SMALL = Case("kl_gauss", (256, 32), FORWARD)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def hungry(mu: Tensor, logvar: Tensor) -> Tensor:
        return torch.empty(2 * contest.MEMORY, dtype=torch.int8).sum()

    def slow(mu: Tensor, logvar: Tensor) -> Tensor:
        for_ever()
        return mu

    def missing(mu: Tensor, logvar: Tensor) -> Tensor:
        raise ModuleNotFoundError("no", name="somepackage")

    contestants: dict[str, Any] = {
        "fastvae": fastvae.kl_gauss,
        "eager": peers.kl_formula,
        "rough": lambda *x: peers.kl_formula(*x) * (1 + 1e-5),
        "wrong": lambda *x: peers.kl_formula(*x) * 1.01,
        "hungry": hungry,
        "slow": slow,
        "missing": missing,
        "absent": "has none",
    }
    monkeypatch.setattr(contest, "PATIENCE", 1.0)
    monkeypatch.setitem(OPS, "kl_gauss", OPS["kl_gauss"]._replace(contestants=lambda B, D: dict(contestants)))
    known, times = contest.measure(SMALL, harness.Ceilings(1e11, 1e10, 1e10))  # of which a third of the bandwidth
    ours = known["results"]["fastvae"]
    assert (len(times), statistics.median(times)) == (ours["repeats"], ours["median"])
    return known


def left_out(monkeypatch: pytest.MonkeyPatch, **contestants: Callable[..., Any]) -> dict[str, Any]:
    """A case for which fastvae has no time."""

    def slow(mu: Tensor, logvar: Tensor) -> Tensor:
        for_ever()
        return mu

    monkeypatch.setattr(contest, "PATIENCE", 0.5)
    contestants = {"fastvae": slow, **contestants}
    op = OPS["kl_gauss"]._replace(contestants=lambda B, D: dict(contestants), exact=peers.kl_formula)
    monkeypatch.setitem(OPS, "kl_gauss", op)

    known, times = contest.measure(SMALL)
    assert times == []
    return known


def test_where_fastvae_is_left_out_the_report_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = left_out(monkeypatch, eager=peers.kl_formula)
    ours, eager = measured["results"]["fastvae"], measured["results"]["eager"]
    assert ours == {"why_not": "too slow: over 0 s to try"}
    assert eager["verdict"] == "accurate"
    assert eager["median"] > 0
    with pytest.raises(pytest.skip.Exception, match="fastvae is left out, too slow: over"):
        bench_conftest.check(ours)
    with pytest.raises(AssertionError):
        bench_conftest.check({"why_not": "out of memory"})
    raw = json.loads(written(tmp_path / "1.json", made_up(KL, fastvae=1.0)).read_text())
    config = types.SimpleNamespace(stash={bench_conftest._measured: [made_up(KL, fastvae=1.0), measured]})
    bench_conftest.pytest_benchmark_update_json(config, raw)  # type: ignore[arg-type]
    (tmp_path / "2.json").write_text(json.dumps(raw))
    results = report.load([tmp_path / "2.json"])
    assert list(results.cases) == [KL, SMALL]
    assert "| [256, 32] | **fastvae** | too slow: over 0 s to try |" in report.document(results)
    everywhere = dict.fromkeys((*HEADLINES, *TARGETS), measured)
    assert "| too slow: over 0 s to try | " in report.section(results._replace(cases=everywhere))
    assert "| too slow: over 0 s to try | " in "\n".join(report.target_lines(results._replace(cases=everywhere)))
    pictures.draw(everywhere, tmp_path)


def test_nobody_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [*left_out(monkeypatch)["results"]] == ["fastvae"]


def test_patience_is_for_the_contestants_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience does not count the time of the float64 values. Nor is fastvae left out for what it took at other
    sizes."""

    def exact(mu: Tensor, logvar: Tensor) -> Tensor:
        time.sleep(0.7)  # of three
        return peers.kl_formula(mu, logvar)

    contestants = {"fastvae": peers.kl_formula, "eager": peers.kl_formula}
    op = OPS["kl_gauss"]._replace(contestants=lambda B, D: dict(contestants), exact=exact)
    monkeypatch.setattr(contest, "PATIENCE", 2.0)
    monkeypatch.setattr(contest, "_pace", {("kl_gauss", FORWARD, who): 1.0 for who in contestants})
    monkeypatch.setitem(OPS, "kl_gauss", op)
    results = contest.measure(SMALL)[0]["results"]
    assert results["fastvae"]["verdict"] == "accurate"
    assert results["eager"] == {"why_not": "not run: about 8192 s a call"}


def test_patience_grows_with_slowness() -> None:
    known = machine.OF_THE_LIMITS
    assert machine.slowness(known) == machine.slowness(known._replace(fma=1e15)) == 1
    assert machine.slowness(known._replace(exponentials=known.exponentials / 3)) == pytest.approx(3)


def test_no_other_backend_is_called_fastvae() -> None:
    if not backends.status("native").available:
        pytest.skip(backends.status("native").detail)
    with fastvae.use_backend(None):
        assert machine.why_not("native") == ""
    items = [types.SimpleNamespace(path=report.BENCH / "suites" / "bench_ops.py")]
    option = types.SimpleNamespace(collectonly=False)
    session: Any = types.SimpleNamespace(items=items, config=types.SimpleNamespace(option=option))
    with fastvae.use_backend("reference"):
        with pytest.raises(pytest.UsageError, match="measured on its backend native, but reference would compute"):
            bench_conftest.pytest_runtestloop(session)
        option.collectonly = True
        bench_conftest.pytest_runtestloop(session)


def test_a_case_shows_what_cannot_run_and_marks_what_is_wrong(measured: dict[str, Any]) -> None:
    results = measured["results"]
    assert {name: r["verdict"] for name, r in results.items() if "verdict" in r} == {
        "fastvae": "accurate",
        "eager": "accurate",
        "rough": "inaccurate",
        "wrong": "wrong",
    }
    assert {name: r["why_not"] for name, r in results.items() if "why_not" in r} == {
        "hungry": "out of memory: over 4 GiB",
        "slow": "too slow: over 3 s to try",
        "missing": "not installed: somepackage",
        "absent": "has none",
    }
    for name in ("fastvae", "eager", "rough", "wrong"):
        assert 0 < results[name]["low"] <= results[name]["median"] <= results[name]["high"]
        assert results[name]["repeats"] >= harness.LEAST
    assert measured["work"] == {"ceiling": "bandwidth", "amount": 8.0 * 256 * 32, "rate": 1e10}
    json.dumps(measured)

    text = "\n".join(report.full_tables([measured]))
    assert report.ratio(measured, "wrong") is None
    lines = {line.split("|")[2].strip(): line for line in text.splitlines() if line.count("|") > 3}
    assert "‡" in lines["wrong"]
    assert "×" not in lines["wrong"]
    assert "†" in lines["rough"]
    assert "×" in lines["rough"]
    assert "out of memory" in lines["hungry"]
    assert report.peers_of(measured)[-1:] != ["wrong"]


def test_quartiles_are_among_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "raced", lambda *_: {"fastvae": [1.0, 3.0]})  # as of what takes long
    ours = contest.measure(SMALL)[0]["results"]["fastvae"]
    assert (ours["low"], ours["median"], ours["high"]) == (1.5, 2.0, 2.5)


def test_small_cases_are_timed_cold_too(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("cold" in r for r in measured["results"].values())  # of a forward
    contestants: dict[str, Any] = {"fastvae": fastvae.kl_gauss, "eager": peers.kl_formula, "absent": "has none"}
    monkeypatch.setitem(OPS, "kl_gauss", OPS["kl_gauss"]._replace(contestants=lambda B, D: dict(contestants)))
    known, _ = contest.measure(Case("kl_gauss", (64, 10), BOTH))
    assert {name: "cold" in r for name, r in known["results"].items()} == dict.fromkeys(("fastvae", "eager"), True) | {
        "absent": False
    }
    cold = [known["results"][name]["cold"] for name in ("fastvae", "eager")]
    assert report.ratio(known, "eager", "cold") == cold[1] / cold[0]
    text = "\n".join(report.full_tables([known]))
    assert "| cold |" in text
    assert all(f"| {report.time_text(t)} |" in text for t in cold)
    assert "| cold |" not in "\n".join(report.full_tables([measured]))


def test_every_op_of_the_contract_is_raced_and_compared() -> None:
    assert {*contract.OPS} <= {*OPS}
    assert {*contract.OPS} <= {call.function for call in calls.CALLS.values()}


def test_every_case_of_the_suite_can_be_told_apart() -> None:
    every = [case for name in ALL for case in cases.cases(name)]
    assert len({*map(str, every)}) == len(every)
    assert {*TARGETS, *MEMORY_TARGETS, *HEADLINES} <= {*every}
    for name, op in ALL.items():
        sizes = [op.elements(*case.size) for case in cases.cases(name)]
        assert sizes == sorted(sizes)  # what is too slow is known from a smaller size
        assert any(cases.smallest(case) for case in cases.cases(name))
    for case, goals in TARGETS.items():
        assert {*goals} <= {*case.op.contestants(*case.size)}


# The report.


def made_up(case: Case, **milliseconds: float) -> dict[str, Any]:
    results = {
        name: {
            "median": t / 1e3,
            "low": t / 1e3,
            "high": t / 1e3,
            "repeats": 5,
            "bytes": MEBIBYTE,
            "error": 1e-7,
            "bound": 1e-6,
            "verdict": "accurate",
        }
        for name, t in milliseconds.items()
    }
    return {"op": case.name, "size": list(case.size), "mode": case.mode, "work": None, "results": results}


def written(path: Path, *measured: dict[str, Any], cpu: str = "Some CPU") -> Path:
    raw = {
        "machine_info": {"cpu": cpu, "threads": 2, "memory": 2**33, "python": "3", "fastvae": "lib", "versions": {}},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"extra_info": m, "stats": {"data": [1, 2, 3]}} for m in measured],
    }
    path.write_text(json.dumps(raw))
    return path


AGG = Case("agg_log_prob", (4096, 32), FORWARD)
KL = Case("kl_gauss", (128, 32), BOTH)


def test_no_ratio_where_a_check_failed() -> None:
    measured = made_up(AGG, fastvae=2.0, keops=5.0)
    assert report.ratio(measured, "keops") == 2.5
    measured["results"]["keops"]["verdict"] = "inaccurate"
    assert report.ratio(measured, "keops") == 2.5
    measured["results"]["keops"]["verdict"] = "wrong"
    assert report.ratio(measured, "keops") is None
    measured["results"]["keops"]["verdict"] = "accurate"
    measured["results"]["fastvae"]["verdict"] = "inaccurate"
    assert report.ratio(measured, "keops") is None
    assert report.share(measured | {"work": {"ceiling": "fma", "amount": 1.0, "rate": 1.0}}) is None
    assert report.ratio(made_up(AGG, keops=1.0) | {"results": {"fastvae": {"why_not": "?"}}}, "keops") is None


def test_the_share_of_the_ceiling() -> None:
    measured = made_up(AGG, fastvae=10.0) | {"work": {"ceiling": "fma", "amount": 1e9, "rate": 2e11}}
    assert report.share(measured) == pytest.approx(0.5)
    measured["work"] = {"ceiling": "bandwidth", "amount": 1e6, "rate": 1e10}
    assert report.share(measured) is None  # from the caches


def test_runs_in_parts_are_put_together(tmp_path: Path) -> None:
    first = written(tmp_path / "1.json", made_up(KL, fastvae=1.0), made_up(AGG, fastvae=1.0))
    second = written(tmp_path / "2.json", made_up(AGG, fastvae=3.14159))
    results = report.load([first, second])
    assert (results.name, results.commit, results.date) == ("some-cpu-2-threads", "012345678", "2026-01-02")
    assert [*results.cases] == [KL, AGG]
    assert results.cases[AGG]["results"]["fastvae"]["median"] == 3.14159e-3
    slim = tmp_path / "slim.json"
    results = results._replace(commit="012345678, 9abcdef01-dirty")
    slim.write_text(report.dump(results))
    assert "data" not in slim.read_text()
    again = report.load([slim])
    assert report.dump(again) == slim.read_text()
    assert again.commit == results.commit
    assert again.cases[AGG]["results"]["fastvae"]["median"] == 3.142e-3
    with pytest.raises(ValueError, match="different machines"):
        report.load([first, written(tmp_path / "3.json", cpu="Another")])


def test_targets_and_losses_are_said(tmp_path: Path) -> None:
    path = written(
        tmp_path / "1.json",
        made_up(AGG, fastvae=10.0, compiled_gemm=41.0, keops=100.0),
        made_up(KL, fastvae=2.0, eager=1.5),
    )
    results = report.load([path])
    text = "\n".join(report.target_lines(results))
    assert "41 ms | compiled_gemm | 4.00× | 4.10× | yes |" in text
    assert "100 ms | keops | 12.00× | 10× | no |" in text
    assert "not measured" in text
    assert "kl_gauss forward + backward [128, 32]: eager 0.75×" in report.slower_lines(results)[0]
    assert report.slower_lines(results)[0].startswith("Where a peer is faster (1 of 2 cases)")
    assert "0.75×" in report.section(results)


def test_cold_calls_are_said(tmp_path: Path) -> None:
    measured = made_up(KL, fastvae=2.0, eager=3.0, compiled=4.0)
    before = report.document(report.load([written(tmp_path / "1.json", measured)]))
    assert "cold" not in before.lower()
    for who, milliseconds in {"fastvae": 5.0, "eager": 6.5, "compiled": 4.5}.items():
        measured["results"][who]["cold"] = milliseconds / 1e3
    results = report.load([written(tmp_path / "2.json", measured, made_up(AGG, fastvae=1.0, keops=0.5))])
    text = report.document(results)
    assert report.COLD_NOTES in text
    assert "| kl_gauss | forward + backward | [128, 32] | 2 ms | 5 ms | compiled, 4.5 ms, 0.90× |" in text
    assert "Where a peer is faster (1 of 1 cases): kl_gauss forward + backward [128, 32]: compiled 0.90×." in text
    assert "| eager | 3 ms | 3 ms to 3 ms | 1.50× | 6.5 ms | 1.30× |" in text
    assert "| 3 ms | eager | 2.00× | 1.50× | no | 1.30× |" in text
    assert "Cold calls. Where a peer is faster (1 of 1 cases): kl_gauss" in report.section(results)


def test_a_column_that_is_empty_is_left_out() -> None:
    assert report.table(("a", "b", "c"), [("1", "", "3"), ("", "", "4")], left=2) == [
        "| a | c |",
        "|---|--:|",
        "| 1 | 3 |",
        "|  | 4 |",
    ]
    assert report.table(("a", "b"), []) == ["| a | b |", "|---|--:|"]


def test_pictures_end_a_line_where_a_peer_runs_out(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    small, large = (
        made_up(AGG._replace(size=(64, 32)), fastvae=1, keops=3, eager_gemm=2),
        made_up(AGG, fastvae=9, keops=9),
    )
    small["results"]["eager_gemm"]["verdict"] = "inaccurate"
    large["results"]["eager_gemm"] = {"why_not": "out of memory"}
    measured = {AGG._replace(size=(64, 32)): small, AGG: large}
    figure = Figure()
    pictures.against_size(measured, "median", "time", pictures._time, figure)
    lines = figure.axes[0].get_lines()
    crosses = [line for line in lines if line.get_marker() == "x"]
    assert [float(np.asarray(line.get_xdata())[0]) for line in crosses] == [64]
    assert crosses[0].get_color() == pictures.LOOKS["eager_gemm"][0]
    assert [line.get_markerfacecolor() for line in lines if line.get_marker() == "^"].count("white") == 1
    pictures.draw(measured, tmp_path)
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("time.png", "memory.png", "error.png"))


# What is committed.


def test_the_section_of_the_readme_can_be_replaced_only_between_its_markers() -> None:
    text = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    assert report.with_section(text, "new\n") == f"a\n{report.BEGIN}\nnew\n{report.END}\nb\n"
    assert report.between_markers(text) == "old\n"
    with pytest.raises(ValueError, match="expected the lines"):
        report.with_section("nothing here", "new\n")


def test_the_readme_says_what_was_measured() -> None:
    sections = [report.section(report.load([path])) for path in REPORTS] or [""]  # nothing, where nothing was measured
    assert report.between_markers(report.README.read_text()) in sections


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.parent.name)
def test_the_report_says_what_was_measured(path: Path) -> None:
    results = report.load([path])
    assert path.parent.name == results.name
    assert (path.parent / "README.md").read_text() == report.document(results)
    assert report.dump(results) == path.read_text()
    assert {*HEADLINES} <= {*results.cases}
    assert all(m["results"]["fastvae"]["verdict"] == "accurate" for m in results.cases.values())
