"""The rows of the GPU table: every op against its ceiling, on both backends in turns, and against what people use."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae

from .. import peers
from ..harness import Ceilings, Run, forward, forward_backward, max_error
from ..inputs import population, posteriors, samples_and_posteriors
from .harness import CALLS, DEVICE, TRIAL, Time, graphed, on_backend, raced, repeated
from .jobs import Job, Progress, Result, said

BACKENDS = ("triton", "cuda")
SECONDS = 0.02 if TRIAL else 0.8  # of a race
BIG, SMALL = (1 << 20, 128), (256, 32)


class Row(NamedTuple):
    """An op at a size, and the share of a ceiling to reach."""

    op: str
    sizes: tuple[int, int]  # (S = N, D), or (B, D)
    backward: bool = False
    ceiling: str = ""
    amount: float = 0.0  # of the ceiling's unit, per element of [S, N, D] or [B, D]
    share: float = 0.0  # to reach
    note: str = ""
    backends: tuple[str, ...] = BACKENDS
    exact_skips: tuple[bool | None, ...] = (None,)  # early exit, off and on
    population: tuple[int, float] | None = None  # how many dimensions are active, and their logvar
    peers: dict[str, Callable[..., Any]] = {}  # noqa: RUF012

    @property
    def of_pairs(self) -> bool:
        return self.op.startswith("agg")

    @property
    def here(self) -> tuple[int, int]:
        return (16, 8) if TRIAL else self.sizes

    def __str__(self) -> str:
        mode = "forward + backward" if self.backward else "forward"
        return f"{self.op}{self.note and ', '}{self.note}, {mode}, {list(self.sizes)}"

    def inputs(self) -> list[Tensor]:
        S, D = self.here
        if self.population:
            active, logvar = self.population
            return list(population(S, D, device=DEVICE, active=min(active, D), logvar=logvar))
        return list((samples_and_posteriors if self.of_pairs else posteriors)(S, D, device=DEVICE))

    def run(self, inputs: list[Tensor], function: Callable[..., Any] | None = None) -> Run:
        return (forward_backward if self.backward else forward)(function or OPS[self.op], *inputs)

    def ours(self, inputs: list[Tensor]) -> dict[str, Run]:
        said = {None: "", False: "", True: ", early exit"}
        return {
            name + said[skip]: on_backend(name, self.run(inputs), skip)
            for name in self.backends
            for skip in self.exact_skips
        }


def sample_all(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    return tuple(fastvae.sample_gauss(mu, logvar))  # type: ignore[arg-type]


def on_tensor_cores(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    with fastvae.precision("tf32x3"):
        return fastvae.agg_log_prob(z, mu, logvar)


OPS: dict[str, Callable[..., Any]] = {
    "kl_gauss": fastvae.kl_gauss,
    "reparameterize": fastvae.reparameterize,
    "sample_gauss": sample_all,
    "agg_log_prob": fastvae.agg_log_prob,
    "agg_log_prob, tf32x3": on_tensor_cores,
    "agg_log_prob_marginals": fastvae.agg_log_prob_marginals,
}
AGG, MARGINALS = "agg_log_prob", "agg_log_prob_marginals"


def early_exit(D: int, active: int, logvar: float, backward: bool) -> Row:
    note = f"{active} of {D} active, logvar {logvar:g}"
    return Row(AGG, (16384, D), backward, note=note, exact_skips=(False, True), population=(active, logvar))


# Work per element: bytes that must move; FMAs, 2 forward and 6 backward; exponentials, one for each pair and dimension.
ROWS = [
    Row(AGG, (16384, 64), False, "fma", 2, 0.75),
    Row(AGG, (16384, 64), True, "fma", 8, 0.55),
    Row(MARGINALS, (8192, 32), False, "exponentials", 1, 0.85),
    Row(MARGINALS, (8192, 32), True, "exponentials", 2, 0.60),
    Row(AGG, (16384, 10), False, "fma", 2),
    Row(AGG, (16384, 10), True, "fma", 8),
    Row("kl_gauss", BIG, False, "bandwidth", 8, 0.85),
    Row("kl_gauss", BIG, True, "bandwidth", 24, 0.80),
    Row("reparameterize", BIG, False, "bandwidth", 12, 0.85),
    Row("reparameterize", BIG, True, "bandwidth", 28, 0.80),
    Row("sample_gauss", BIG, False, "bandwidth", 12, 0.85),
    Row("sample_gauss", BIG, True, "bandwidth", 28, 0.80),
    *(early_exit(*case, backward) for case in ((128, 20, -3.0), (64, 64, 0.0)) for backward in (False, True)),
    Row("agg_log_prob, tf32x3", (16384, 64), False, "fma", 2, backends=("triton",)),
]
SMALL_ROWS = [
    Row(op, SMALL, backward, peers={"eager": formula})
    for op, formula in (
        ("kl_gauss", peers.kl_formula),
        ("reparameterize", peers.reparameterize_formula),
        (AGG, peers.agg_broadcast),
        (MARGINALS, peers.marginals_broadcast),
    )
    for backward in (False, True)
]


def flex_attention(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z) [S] as the log-sum-exp that attention has anyway: the expanded square as queries, keys and a bias."""
    from torch.nn.attention import flex_attention as flex

    precision = torch.exp(-logvar)
    bias = -0.5 * (mu.square() * precision + logvar + peers.LOG_2PI).sum(-1)
    q, k = torch.cat((z.square(), z), -1)[None, None], torch.cat((-0.5 * precision, mu * precision), -1)[None, None]
    attend = torch.compile(flex.flex_attention, dynamic=False)
    _, lse = attend(q, k, k, score_mod=lambda score, b, h, i, j: score + bias[j], scale=1.0, return_lse=True)  # type: ignore
    return lse[0, 0] - math.log(mu.shape[0])


COMPILED_GEMM = {"compiled gemm (less accurate)": peers.compiled_gemm}
COMPILED_BROADCAST = {"compiled broadcast": peers.compiled_broadcast}
PEER_ROWS = [  # the cheapest compilations first
    Row("kl_gauss", BIG, False, peers={"eager": peers.kl_formula, "compiled": peers.compiled_kl}),
    Row("kl_gauss", BIG, True, peers={"eager": peers.kl_formula, "compiled": peers.compiled_kl}),
    *(
        Row(
            *("reparameterize", BIG, backward),
            peers={"eager": peers.reparameterize_formula, "compiled": peers.compiled_reparameterize},
        )
        for backward in (False, True)
    ),
    Row(AGG, (16384, 64), False, peers=COMPILED_GEMM | COMPILED_BROADCAST),
    Row(AGG, (16384, 64), True, peers=COMPILED_GEMM | COMPILED_BROADCAST),
    Row(MARGINALS, (8192, 32), False, peers={"compiled": peers.compiled_marginals}),
    Row(MARGINALS, (8192, 32), True, peers={"compiled": peers.compiled_marginals}),
    Row(AGG, (16384, 64), False, note="KeOps", peers={"keops": peers.agg_keops}),
    Row(AGG, (16384, 64), False, note="attention", peers={"flex_attention (less accurate)": flex_attention}),
]


# Jobs.


def large(row: Row, ceiling: Ceilings | None, progress: Progress) -> Result:
    """Races our backends and the peers, and finds how far the forward is from float64."""
    inputs = row.inputs()
    ours = row.ours(inputs)
    runs = ours | {name: row.run(inputs, peer) for name, peer in row.peers.items()}
    times = all_but_bad(runs, progress)
    work = row.amount * float(row.here[0]) * row.here[1] * (row.here[0] if row.of_pairs else 1)
    unit = getattr(ceiling, row.ceiling, math.nan) if row.ceiling and ceiling else math.nan
    errors = errors_of(row, inputs, [name for name in runs if isinstance(times[name], Time)])
    first = next((t for name in ours if isinstance(t := times[name], Time)), None)
    lines: list[str] = []
    parts: list[str] = []
    shares = {name: work / t.device / unit for name in ours if isinstance(t := times[name], Time)}
    for name, t in times.items():
        title = "" if lines else str(row)
        if not isinstance(t, Time):
            lines.append(f"| {title} | {name} | {t} | | | | |")
            parts.append(f"{name} {t[:60]}")
            continue
        if name in ours:
            reached = "" if math.isnan(shares[name]) else f"{shares[name]:.0%} of {row.ceiling}"
        else:
            reached = f"{t.device / first.device:.2f}×" if first else ""
        target = f"{row.share:.0%}" if row.share and name in ours else ""
        found = errors.get(name, "")
        error = found if isinstance(found, str) else f"{found:.1e}"
        lines.append(f"| {title} | {name} | {shown(t.device)} | {shown(t.host)} | {reached} | {target} | {error} |")
        parts.append(f"{name} {shown(t.device)} {reached}".strip())
    summary = f"{row}: {'; '.join(parts)}" + (f" (target {row.share:.0%})" if row.share else "")
    failures = [f"{row}: {name}: {times[name]}" for name in ours if name not in shares]
    failures += [f"{row}: {name}: {errors[name]}" for name in ours if isinstance(errors.get(name), str)]
    known = {name: share for name, share in shares.items() if not math.isnan(share)}  # NaN is not JSON
    numbers = {"seconds": times, "errors": errors, "ceiling": row.ceiling, "shares": known, "share to reach": row.share}
    return Result(lines, [summary], failures, numbers)


def all_but_bad(runs: dict[str, Run], progress: Progress, cold: bool = True) -> dict[str, Time | str]:
    """Races `runs`, without those that ended a process before; times in the order of `runs`."""
    times = raced({n: r for n, r in runs.items() if n not in progress.bad}, SECONDS, progress.about_to, cold)
    return {name: times.get(name, progress.bad.get(name, "")) for name in runs}


def errors_of(row: Row, inputs: list[Tensor], names: list[str]) -> dict[str, float | str]:
    """The largest absolute difference from float64 on some rows of z, forward, or why there is none."""
    if row.backward or not row.of_pairs:
        return {}
    take = slice(None, None, max(1, row.here[0] // 32))
    with fastvae.use_backend("reference"):
        exact = OPS[row.op](inputs[0][take].double(), *(x.double() for x in inputs[1:]))
    runs = row.ours(inputs) | {name: row.run(inputs, peer) for name, peer in row.peers.items()}
    errors: dict[str, float | str] = {}
    for name in names:
        try:
            got: Any = runs[name]()
            errors[name] = max_error(got[take] if isinstance(got, Tensor) else tuple(g[take] for g in got), exact)
        except Exception as error:
            torch.cuda.synchronize()  # raises where nothing more can be computed by this process
            errors[name] = said(error)
    return errors


def small(row: Row, progress: Progress) -> Result:
    """Times a small call, by itself and within a CUDA graph: the device's time and the host's."""
    inputs = row.inputs()
    functions: dict[str, tuple[Run, Callable[[Run], Run]]] = {
        name: (row.run(inputs), functools.partial(on_backend, name)) for name in BACKENDS
    }
    functions |= {name: (row.run(inputs, peer), lambda run: run) for name, peer in row.peers.items()}
    runs: dict[str, Run] = {}
    for name, (run, on) in functions.items():
        runs[name] = on(repeated(run))
        runs[f"{name}, graph"] = replayed(on(run))
    times = all_but_bad(runs, progress, cold=False)
    lines: list[str] = []
    parts: list[str] = []
    failures: list[str] = []
    for name in functions:
        cells = []
        for key in (name, f"{name}, graph"):
            t = times[key]
            if isinstance(t, Time):
                t = Time(t.device / CALLS, t.host / CALLS)
                times[key] = t
                cells += [shown(t.device), shown(t.host)]
            else:
                cells += [t, ""]
                if name in BACKENDS:
                    failures.append(f"{row}: {key}: {t}")
        lines.append(f"| {row if not lines else ''} | {name} | " + " | ".join(cells) + " |")
        parts.append(f"{name} {cells[0]} (host {cells[1]}), graph {cells[2]}")
    return Result(lines, [f"{row}: {'; '.join(parts)}"], failures, {"row": str(row), "seconds": times})


def replayed(run: Run) -> Run:
    """A call captured when it is first made, replayed as often as the others are repeated."""
    captured = functools.cache(lambda: repeated(graphed(run)))
    return lambda: captured()()


def shown(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds > 1e-3 else f"{seconds * 1e6:.3g} us"


TABLE = (
    "Device time behind a sleeping kernel, the cache flushed; a peer's ratio is its time over our first backend's;",
    "errors are the largest absolute difference from float64.",
    "",
    "| op and size | who | device | host | reached | target | error |",
    "|---|---|--:|--:|--:|--:|--:|",
)
SMALL_TABLE = (
    f"A call's share of {CALLS} calls queued at once.",
    "",
    "| op and size | who | device | host | device, graph | host, graph |",
    "|---|---|--:|--:|--:|--:|",
)


def table(ceiling: Ceilings | None) -> list[Job]:
    return [Job(str(row), functools.partial(large, row, ceiling), TABLE, row.op) for row in ROWS]


def small_table() -> list[Job]:
    return [Job(str(row), functools.partial(small, row), SMALL_TABLE, row.op) for row in SMALL_ROWS]


def peers_table() -> list[Job]:
    return [Job(str(row), functools.partial(large, row, None), TABLE, row.op) for row in PEER_ROWS]
