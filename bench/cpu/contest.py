"""One case measured: every contestant checked against float64, then its memory, then all of them raced, and if it is
small raced again with cold caches."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastvae

from ..accuracy import Results, Truth
from ..cases import Case
from ..harness import (
    LEAST,
    MODES,
    Ceilings,
    Prepare,
    give_back,
    memory_limit,
    peak_extra_bytes,
    race,
    seconds,
    time_limit,
)
from .machine import slowness

FRESH = 3  # inputs take turns
MEMORY = 4 * 2**30  # what a call may allocate
SECONDS = 4.0  # what a peer's call may take, to judge by the size before; on a slower machine, so much more
MOST = 500  # repeats
BUDGET = 0.15  # seconds of repeats of a contestant
LONG = 0.5  # seconds; a longer run, which varies less, is repeated once
SHORT = 0.01  # seconds; the time of a shorter run depends on what ran before
TURN = 20  # short runs in a row
TURNS = 5  # of short runs, at least
SWEPT = 8 * 2**20  # bytes, before a cold run
MOST_COLD = 100  # repeats
PATIENCE = 40.0  # seconds, for the calls before the race, compilation included; likewise
TOO_SLOW = "too slow"

_compiled_for: list[object] = [None]
_pace: dict[tuple[str, str, str], float] = {}  # seconds per element, by op, mode and contestant


def measure(case: Case, ceilings: Ceilings | None = None) -> tuple[dict[str, Any], list[float]]:
    """Measures a case, and gives fastvae's times in seconds, none where it is left out, after what is to be known, for
    JSON:

    op, size, mode: of the case. work: the ceiling that bounds the op, how many of its units a call needs, and the
    ceiling itself, if it is known. results: by contestant, fastvae first, either `why_not`, or `median`, `low` and
    `high` (quartiles) in seconds, `repeats`, `bytes` of peak extra memory, `error`, `bound` and `verdict`; of a small
    case `cold` too, the median of runs that each follow a sweep over memory, which leaves nothing else in inner caches.
    """
    op = case.op
    factor = slowness(ceilings) if ceilings else 1.0
    patience = factor * PATIENCE
    if _compiled_for[0] != (case.name, case.size):  # each size is compiled for as if it were the only one
        torch._dynamo.reset()
        _compiled_for[0] = (case.name, case.size)
    gc.freeze()  # what is here now is not looked through again each time that memory is given back
    sets = _inputs(case)
    leaves = [x.clone().requires_grad_("backward" in case.mode) for x in sets[0]]

    def refresh(n: int) -> None:
        with torch.no_grad():
            for leaf, new in zip(leaves, sets[n % FRESH], strict=True):
                leaf.copy_(new)

    truth = _truth(case, sets[0])
    elements = op.elements(*case.size)
    results: dict[str, dict[str, Any]] = {}
    prepares: dict[str, Prepare] = {}
    estimates: dict[str, float] = {}
    for name, function in _contestants(case).items():
        expected = _pace.get((case.name, case.mode, name), 0.0) * elements
        if isinstance(function, str):
            results[name] = {"why_not": function}
            continue
        if expected > factor * SECONDS and name != "fastvae":
            results[name] = {"why_not": f"not run: about {expected:.0f} s a call"}
            continue
        prepare = MODES[case.mode](function, *leaves)
        try:
            with time_limit(patience), memory_limit(MEMORY):
                given = _given(case, truth, name, function)
                if op.part or name in op.yardsticks:
                    prepare()()  # warmed up, as the others are by what they have given
                start = time.perf_counter()
                extra = peak_extra_bytes(prepare())
                spent = time.perf_counter() - start
                estimates[name] = spent if spent > 1 else _estimate(prepare)
            results[name] = {"bytes": extra, **_judged(truth, given)}
            prepares[name] = prepare
            if estimates[name] > SECONDS / 40:  # no longer the call's own overhead
                _pace[case.name, case.mode, name] = estimates[name] / elements
        except MemoryError:
            results[name] = {"why_not": f"out of memory: over {MEMORY / 2**30:.0f} GiB"}
        except TimeoutError:
            results[name] = {"why_not": f"{TOO_SLOW}: over {patience:.0f} s to try"}
        except ImportError as error:
            results[name] = {"why_not": f"not installed: {error.name}"}
    give_back()
    times = raced(prepares, estimates, refresh)
    for name, found in times.items():
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        results[name] |= {"median": median, "low": low, "high": high, "repeats": len(found)}
    if case.is_small:
        swept = torch.zeros(SWEPT, dtype=torch.uint8)
        for name, found in raced(prepares, estimates, refresh, lambda: swept.add_(1), MOST_COLD).items():
            results[name]["cold"] = statistics.median(found)
    work: dict[str, Any] | None = None
    if op.ceiling:
        work = {"ceiling": op.ceiling, "amount": op.work[case.mode] * elements}
        if ceilings:
            work["rate"] = getattr(ceilings, op.ceiling)
    known = {"op": case.name, "size": list(case.size), "mode": case.mode, "work": work, "results": results}
    return known, times.get("fastvae", [])


def raced(
    prepares: dict[str, Prepare],
    estimates: dict[str, float],
    refresh: Callable[[int], None] = lambda _: None,
    before: Callable[[], object] = lambda: None,
    most: int = MOST,
    budget: float = BUDGET,
) -> dict[str, list[float]]:
    """The times of each: as many as fit into `budget` seconds of its own by `estimates` of one, prepared; no more than
    `most`.

    All take turns, and before each turn `refresh(round)` writes the inputs anew. A turn is one run; or TURN short runs
    in a row, each timed by itself, after one that is not timed, so that nobody finds the caches and the threads as
    another has left them. Each timed run follows a call of `before`.
    """
    short = {name: estimates[name] < SHORT for name in prepares}

    def turns(name: str) -> int:
        runs = min(most, int(budget / estimates[name]))
        return max(TURNS, runs // TURN) if short[name] else max(2 if estimates[name] > LONG else LEAST, runs)

    def turn(name: str, n: int) -> list[float]:
        refresh(n)
        if short[name]:
            prepares[name]()()
        times = []
        for _ in range(TURN if short[name] else 1):
            run = prepares[name]()
            before()
            times.append(seconds(run))
        return times

    times = race({name: turns(name) for name in prepares}, turn)
    return {name: [*itertools.chain(*found)] for name, found in times.items()}


def try_out(case: Case) -> dict[str, dict[str, Any]]:
    """The check alone, by contestant; nothing is compiled, which takes long: a compiled peer is then its formula."""
    truth = _truth(case, _inputs(case)[0])
    with torch.compiler.set_stance("force_eager"):
        return {
            name: _judged(truth, _given(case, truth, name, function))
            for name, function in _contestants(case).items()
            if not isinstance(function, str) and name != "keops"
        }


def _estimate(prepare: Prepare) -> float:
    """Seconds of a run and what comes before it."""
    first = seconds(lambda: prepare()())
    if first > 0.1:
        return first
    return min(first, *(seconds(lambda: prepare()()) for _ in range(3)))  # a single one may be off by anything


def _inputs(case: Case) -> list[tuple[Tensor, ...]]:
    return [case.op.inputs(*case.size, seed) for seed in range(FRESH)]


def _contestants(case: Case) -> dict[str, Callable[..., Any] | str]:
    found = case.op.contestants(*case.size)
    if case.mode != "forward":
        found |= dict.fromkeys(case.op.forward_only, "has no gradient")
    if case.mode != "backward":
        found |= dict.fromkeys(case.op.backward_only, "raced in the backward alone")
    return found


def _truth(case: Case, inputs: Sequence[Tensor]) -> Truth:
    op = case.op
    exact = op.exact or _by_reference(_contestants(case)["fastvae"])
    return Truth(op.part(exact) if op.part else exact, inputs, case.mode, op.rowwise, op.hidden)


def _by_reference(function: Any) -> Callable[..., Any]:
    def exact(*inputs: Tensor) -> Any:
        with fastvae.use_backend("reference"):
            return function(*inputs)

    return exact


def _given(case: Case, truth: Truth, name: str, function: Any) -> Results | None:
    """The results that are to be judged; those of a yardstick are not."""
    if name in case.op.yardsticks:
        return None
    return truth.results(case.op.part(function) if case.op.part else function)


def _judged(truth: Truth, given: Results | None) -> dict[str, Any]:
    if given is None:
        return {}
    error = truth.judge(given)
    return {"error": error.error, "bound": error.bound, "verdict": error.verdict}
