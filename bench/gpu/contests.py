"""The contests on a GPU: every op against its ceiling, on both backends in turns, and against what people use."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae

from ..cases import BOTH, FORWARD, OPS, Case
from ..harness import MODES, Ceilings, Run, listed
from ..inputs import SEED
from .harness import BACKENDS, CALLS, DEVICE, TRIAL, Time, graphed, on_backend, raced, repeated
from .jobs import Job, Progress, Result, said

SECONDS = 0.02 if TRIAL else 0.8  # of a race
EXITS = {None: "", False: "", True: ", early exit"}


class Contest(NamedTuple):
    """A case, and what is special where it is raced on a GPU."""

    case: Case
    share: float = 0.0  # of the op's ceiling, to reach
    peers: Sequence[str] = ()  # of the op's contestants
    backends: Sequence[str] = BACKENDS
    exact_skips: Sequence[bool | None] = (None,)  # early exit, off and on

    @property
    def size(self) -> tuple[int, int]:
        return (16, 8) if TRIAL else self.case.size

    @property
    def ours(self) -> dict[str, tuple[str, bool | None]]:
        """Our contestants by name: a backend, and whether it may exit early."""
        return {name + EXITS[skip]: (name, skip) for name in self.backends for skip in self.exact_skips}

    def __str__(self) -> str:
        against = f", against {' and '.join(self.peers)}" if self.peers else ""
        return f"{self.case.name}, {self.case.mode}, {list(self.case.size)}{against}"

    def inputs(self) -> tuple[Tensor, ...]:
        return self.case.op.inputs(*self.size, SEED, DEVICE)

    def runs(self, inputs: Sequence[Tensor], as_timed: Callable[[Run], Run] = lambda run: run) -> dict[str, Run]:
        """The contestants' runs, ours first, each made into what is timed."""
        functions = self.case.op.contestants(*self.size)

        def run(who: str) -> Run:
            return as_timed(MODES[self.case.mode](functions[who], *inputs)())

        ours = {who: on_backend(name, run("fastvae"), skip) for who, (name, skip) in self.ours.items()}
        return ours | {who: run(who) for who in self.peers}


# What is raced.

SIZES = {"bandwidth": (1 << 20, 128), "fma": (16384, 64), "exponentials": (8192, 32)}  # at which ops near their ceiling
SMALL = (256, 32)
RACED = (FORWARD, BOTH)
SHARES = {  # to reach, forward and with the backward
    "kl_gauss": (0.85, 0.80),
    "reparameterize": (0.85, 0.80),
    "sample_gauss": (0.85, 0.80),
    "agg_log_prob": (0.75, 0.55),
    "agg_log_prob_marginals": (0.85, 0.60),
}


def large_cases(name: str) -> list[Case]:
    return [Case(name, SIZES[OPS[name].ceiling], mode) for mode in RACED]


TABLE = [
    *(
        Contest(case, share)
        for name in OPS
        for case, share in zip(large_cases(name), SHARES.get(name, (0.0, 0.0)), strict=True)
    ),
    *(Contest(Case("agg_log_prob", (16384, 10), mode)) for mode in RACED),
    *(
        Contest(Case(f"agg_log_prob, {active}", (16384, D), mode), exact_skips=(False, True))
        for active, D in (("20 active, logvar -3", 128), ("64 active, logvar 0", 64))
        for mode in RACED
    ),
    Contest(Case("agg_log_prob, tf32x3", (16384, 64), FORWARD), backends=("triton",)),
]
SMALL_TABLE = [
    Contest(Case(name, SMALL, mode), peers=[who for who in op.contestants(*SMALL) if who.startswith("eager")][:1])
    for name, op in OPS.items()
    for mode in RACED
]
PEERS_TABLE = [  # the cheapest compilations first
    *(Contest(case, peers=op.on_gpu) for name, op in OPS.items() if op.on_gpu for case in large_cases(name)),
    Contest(Case("agg_log_prob", (16384, 64), FORWARD), peers=["keops"]),
    Contest(Case("agg_log_prob, attention", (16384, 64), FORWARD), peers=["flex_attention"]),
]


# Jobs.


def large(contest: Contest, ceilings: Ceilings | None, progress: Progress) -> Result:
    """Races our backends and the peers, and finds how far the forward is from float64."""
    op, ours = contest.case.op, contest.ours
    inputs = contest.inputs()
    runs = contest.runs(inputs)
    times = all_but_bad(runs, progress)
    seconds = {name: t.device for name, t in times.items() if isinstance(t, Time)}
    work = op.work[contest.case.mode] * op.elements(*contest.size)
    least = work / getattr(ceilings, op.ceiling) if ceilings else 0.0  # seconds
    shares = {name: least / seconds[name] for name in ours if least and name in seconds}
    errors = errors_of(contest, inputs, {name: runs[name] for name in seconds})
    first = next((seconds[name] for name in ours if name in seconds), math.nan)
    lines: list[str] = []
    parts: list[str] = []
    for name, t in times.items():
        title = "" if lines else str(contest)
        if not isinstance(t, Time):
            lines.append(f"| {title} | {name} | {t} | | | | |")
            parts.append(f"{name} {t[:60]}")
            continue
        if name in ours:
            reached = f"{shares[name]:.0%} of {op.ceiling}" if name in shares else ""
        else:
            reached = f"{t.device / first:.2f}×" if first > 0 else ""
        target = f"{contest.share:.0%}" if contest.share and name in ours else ""
        found = errors.get(name, "")
        error = found if isinstance(found, str) else f"{found:.1e}"
        lines.append(f"| {title} | {name} | {shown(t.device)} | {shown(t.host)} | {reached} | {target} | {error} |")
        parts.append(f"{name} {shown(t.device)} {reached}".strip())
    summary = f"{contest}: {'; '.join(parts)}" + (f" (target {contest.share:.0%})" if contest.share else "")
    failures = [f"{contest}: {name}: {times[name]}" for name in ours if name not in seconds]
    failures += [f"{contest}: {name}: {errors[name]}" for name in ours if isinstance(errors.get(name), str)]
    numbers = {"seconds": times, "errors": errors, "ceiling": op.ceiling, "shares": shares, "to reach": contest.share}
    return Result(lines, [summary], failures, numbers)


def all_but_bad(runs: dict[str, Run], progress: Progress, cold: bool = True) -> dict[str, Time | str]:
    """Races `runs`, without those that ended a process before; times in the order of `runs`."""
    times = raced({n: r for n, r in runs.items() if n not in progress.bad}, SECONDS, progress.about_to, cold)
    return {name: times.get(name, progress.bad.get(name, "")) for name in runs}


def errors_of(contest: Contest, inputs: Sequence[Tensor], runs: dict[str, Run]) -> dict[str, float | str]:
    """The largest absolute difference from float64 on some rows of z, forward, or why there is none."""
    op = contest.case.op
    if contest.case.mode != FORWARD or not op.of_pairs:
        return {}
    take = slice(None, None, max(1, contest.size[0] // 32))
    z, *posteriors = (x.double() for x in inputs)
    with fastvae.use_backend("reference"), torch.no_grad():
        expected = listed(op.function(z[take], *posteriors))
    errors: dict[str, float | str] = {}
    for name, run in runs.items():
        try:
            got: Any = run()
            pairs = zip(listed(got), expected, strict=True)
            errors[name] = max(float((x[take].double() - e).abs().max()) for x, e in pairs)
        except Exception as error:
            torch.cuda.synchronize()  # raises where nothing more can be computed by this process
            errors[name] = said(error)
    return errors


def small(contest: Contest, progress: Progress) -> Result:
    """Times a small call, by itself and within a CUDA graph: the device's time and the host's."""
    inputs = contest.inputs()
    plain, graphs = contest.runs(inputs, repeated), contest.runs(inputs, replayed)
    times = all_but_bad(plain | {f"{name}, graph": run for name, run in graphs.items()}, progress, cold=False)
    times = {key: Time(*(x / CALLS for x in t)) if isinstance(t, Time) else t for key, t in times.items()}
    lines: list[str] = []
    parts: list[str] = []
    failures: list[str] = []
    for name in plain:
        cells = []
        for key in (name, f"{name}, graph"):
            t = times[key]
            cells += [shown(t.device), shown(t.host)] if isinstance(t, Time) else [t, ""]
            if not isinstance(t, Time) and name in contest.ours:
                failures.append(f"{contest}: {key}: {t}")
        lines.append(f"| {contest if not lines else ''} | {name} | " + " | ".join(cells) + " |")
        parts.append(f"{name} {cells[0]} (host {cells[1]}), graph {cells[2]}")
    return Result(lines, [f"{contest}: {'; '.join(parts)}"], failures, {"seconds": times})


def replayed(run: Run) -> Run:
    """A call captured when it is first made, replayed as often as the others are repeated."""
    captured = functools.cache(lambda: repeated(graphed(run)))
    return lambda: captured()()


def shown(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds > 1e-3 else f"{seconds * 1e6:.3g} us"


LARGE_HEAD = (
    "Device time behind a sleeping kernel, the cache flushed; a peer's ratio is its time over our first backend's;",
    "errors are the largest absolute difference from float64. compiled_gemm and flex_attention expand the square into",
    "matrix products, which is less accurate.",
    "",
    "| op and size | who | device | host | reached | target | error |",
    "|---|---|--:|--:|--:|--:|--:|",
)
SMALL_HEAD = (
    f"A call's share of {CALLS} calls queued at once.",
    "",
    "| op and size | who | device | host | device, graph | host, graph |",
    "|---|---|--:|--:|--:|--:|",
)


def jobs(contests: Sequence[Contest], do: Callable[[Contest, Progress], Result], head: tuple[str, ...]) -> list[Job]:
    """A job for each; what hangs in one is not tried again in another of the same op, whatever its variant."""
    return [Job(str(c), functools.partial(do, c), head, c.case.name.partition(",")[0]) for c in contests]


def table(ceilings: Ceilings | None) -> list[Job]:
    return jobs(TABLE, lambda contest, progress: large(contest, ceilings, progress), LARGE_HEAD)


def small_table() -> list[Job]:
    return jobs(SMALL_TABLE, small, SMALL_HEAD)


def peers_table() -> list[Job]:
    return jobs(PEERS_TABLE, lambda contest, progress: large(contest, None, progress), LARGE_HEAD)
