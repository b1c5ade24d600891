"""The GPU table: every op against its ceiling and against what people use today, all in one run.

    python -m bench.gpu OUT [--seconds 240] [--only TEXT]

Writes OUT/gpu.json and OUT/gpu.md, again after each row, so that a run cut short leaves what it has. Ceilings are
measured in the same run (gpu_ceilings.py). Large sizes: CUDA events around a call, the cache flushed before each, peers
interleaved, medians. Small ones: many calls between events, and a CUDA graph of the call. FASTVAE_BACKEND=cuda measures
that backend instead of Triton's. With TRITON_INTERPRET=1 and FASTVAE_BACKEND=triton it is a dry run: all of it at tiny
sizes in Triton's interpreter, on the CPU, which measures nothing.
"""

import argparse
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import fastvae
from fastvae.backends.settings import setting

from . import peers
from .early_exit import population
from .gpu_ceilings import Ceilings, ceilings
from .gpu_harness import CALLS, DEVICE, DRY, best, graphed, peak, race, repeated
from .harness import Run, forward, forward_backward, max_error
from .inputs import posteriors, samples_and_posteriors
from .machine import why_not

BACKEND = setting("FASTVAE_BACKEND") or "triton"  # that computes what is called fastvae here
SMALL = (256, 32)
CHECKED = ("kl_gauss", "reparameterize", "agg_log_prob", "agg_log_prob_marginals")  # for determinism
DSPRITES = (737_280, 10)


class Row(NamedTuple):
    """An op at a size, its peers with the ratios to reach, and the share of a ceiling to reach."""

    title: str
    sizes: tuple[int, int]  # (S = N, D), or (B, D)
    ours: Callable[..., Any]
    peers: dict[str, Callable[..., Any]]
    inputs: Callable[..., tuple[Tensor, ...]]
    backward: bool = False
    targets: dict[str, float] = {}  # noqa: RUF012
    ceiling: str = ""
    work: float = 0.0  # of the ceiling's unit, per element of [S, N, D] or [B, D]
    share: float = 0.0  # to reach
    checked: bool = True  # against float64
    early: bool = False  # with early exit and without, instead of peers

    @property
    def of_pairs(self) -> bool:
        return self.inputs is not posteriors

    def elements(self, sizes: tuple[int, int]) -> float:
        S, D = sizes
        return float(S) * D * (S if self.of_pairs else 1)


def flex_attention(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z) [S] as the log-sum-exp that attention has anyway: the expanded square as queries, keys and a bias."""
    from torch.nn.attention import flex_attention as flex

    precision = torch.exp(-logvar)
    bias = -0.5 * (mu.square() * precision + logvar + peers.LOG_2PI).sum(-1)
    q, k = torch.cat((z.square(), z), -1)[None, None], torch.cat((-0.5 * precision, mu * precision), -1)[None, None]
    attend = torch.compile(flex.flex_attention, dynamic=False)
    _, lse = attend(q, k, k, score_mod=lambda score, b, h, i, j: score + bias[j], scale=1.0, return_lse=True)
    return lse[0, 0] - math.log(mu.shape[0])


compiled_reparameterize = torch.compile(peers.reparameterize_formula)
AGG_PEERS = {
    "compiled broadcast": peers.compiled_broadcast,
    "compiled gemm (less accurate)": peers.compiled_gemm,
    "keops": peers.agg_keops,
    "flex_attention (less accurate)": flex_attention,
}
AGG_TRAIN_PEERS = {name: AGG_PEERS[name] for name in ("compiled broadcast", "compiled gemm (less accurate)")}
MARGINALS_PEERS = {"compiled": peers.compiled_marginals}
KL_PEERS = {"eager": peers.kl_formula, "compiled": peers.compiled_kl}
SAMPLE_PEERS = {"eager": peers.reparameterize_formula, "compiled": compiled_reparameterize}
BIG = (1 << 20, 128)


def sample_all(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    return tuple(fastvae.sample_gauss(mu, logvar))  # type: ignore[arg-type]


def on_tensor_cores(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    with fastvae.precision("tf32x3"):
        return fastvae.agg_log_prob(z, mu, logvar)


def early_exit(D: int, active: int, logvar: float, backward: bool) -> Row:
    inputs = functools.partial(population, active=active, logvar=logvar)
    title = f"agg_log_prob, {active} of {D} active, logvar {logvar:g}"
    return Row(title, (16384, D), fastvae.agg_log_prob, {}, inputs, backward, early=True)


# Work per element: bytes that must move; FMAs, 2 forward and 6 backward; exponentials, one for each pair and dimension.
ROWS = [
    Row("kl_gauss", BIG, fastvae.kl_gauss, KL_PEERS, posteriors, False, {}, "copy", 8, 0.85),
    Row("kl_gauss", BIG, fastvae.kl_gauss, KL_PEERS, posteriors, True, {}, "copy", 24, 0.80),
    Row("reparameterize", BIG, fastvae.reparameterize, SAMPLE_PEERS, posteriors, False, {}, "copy", 12, 0.85, False),
    Row("reparameterize", BIG, fastvae.reparameterize, SAMPLE_PEERS, posteriors, True, {}, "copy", 28, 0.80, False),
    Row("sample_gauss, all outputs", BIG, sample_all, {}, posteriors, False, {}, "copy", 12, 0.85, False),
    Row("sample_gauss, all outputs", BIG, sample_all, {}, posteriors, True, {}, "copy", 28, 0.80, False),
    Row(
        *("agg_log_prob", (16384, 64), fastvae.agg_log_prob, AGG_PEERS, samples_and_posteriors, False),
        *({"compiled broadcast": 3, "keops": 3}, "fma", 2, 0.70),
    ),
    Row("agg_log_prob, tf32x3", (16384, 64), on_tensor_cores, {}, samples_and_posteriors),
    Row(
        *(
            "agg_log_prob_marginals",
            (8192, 32),
            fastvae.agg_log_prob_marginals,
            MARGINALS_PEERS,
            samples_and_posteriors,
        ),
        *(False, {"compiled": 4}, "ex2", 1, 0.60),
    ),
    Row(
        *("agg_log_prob", (16384, 64), fastvae.agg_log_prob, AGG_TRAIN_PEERS, samples_and_posteriors, True),
        *({"compiled broadcast": 4}, "fma", 8, 0.55),
    ),
    Row(
        *(
            "agg_log_prob_marginals",
            (8192, 32),
            fastvae.agg_log_prob_marginals,
            MARGINALS_PEERS,
            samples_and_posteriors,
        ),
        *(True, {}, "ex2", 2),
    ),
    *(early_exit(*case, backward) for case in ((128, 20, -3.0), (64, 64, 0.0)) for backward in (False, True)),
]
SMALL_ROWS = [
    Row("kl_gauss", SMALL, fastvae.kl_gauss, {"eager": peers.kl_formula}, posteriors),
    Row("reparameterize", SMALL, fastvae.reparameterize, {"eager": peers.reparameterize_formula}, posteriors),
    Row("agg_log_prob", SMALL, fastvae.agg_log_prob, {"eager": peers.agg_broadcast}, samples_and_posteriors),
    Row(
        *("agg_log_prob_marginals", SMALL, fastvae.agg_log_prob_marginals),
        *({"eager": peers.marginals_broadcast}, samples_and_posteriors),
    ),
]


# The parts: each returns Markdown lines and adds to `results`.

results: dict[str, Any] = {"rows": [], "small": [], "checks": {}}


def inputs_of(row: Row) -> tuple[Tensor, ...]:
    sizes = (16, 8) if DRY else row.sizes
    return tuple(x.to(DEVICE) for x in row.inputs(*sizes))


def skipping(run: Run, on: bool) -> Run:
    """The whole call, as the backward asks too."""

    def call() -> object:
        with fastvae.use_backend(BACKEND, exact_skip=on):
            return run()

    return call


def contestants(row: Row, mode: Callable[..., Run], inputs: tuple[Tensor, ...]) -> dict[str, Run]:
    ours = mode(row.ours, *inputs)
    if row.early:
        return {"fastvae": skipping(ours, False), "fastvae, exact_skip=True": skipping(ours, True)}
    return {"fastvae": ours} | {name: mode(peer, *inputs) for name, peer in row.peers.items()}


def large(row: Row, ceiling: Ceilings, seconds: float) -> list[str]:
    inputs = inputs_of(row)
    times = race(contestants(row, forward_backward if row.backward else forward, inputs), seconds)
    errors = {}
    if row.checked and not row.backward and row.of_pairs:  # on some rows of z
        take = slice(None, None, max(1, row.sizes[0] // 32))
        with fastvae.use_backend("reference"):
            exact = row.ours(inputs[0][take].double(), *(x.double() for x in inputs[1:]))
        for name, run in contestants(row, forward, inputs).items():
            if isinstance(times[name], float):
                got: Any = run()
                errors[name] = max_error(got[take] if isinstance(got, Tensor) else tuple(g[take] for g in got), exact)
    ours = times["fastvae"]
    sizes = (len(inputs[0]), inputs[0].shape[1])
    work = row.work * row.elements(sizes)
    share = work / ours / getattr(ceiling, row.ceiling) if isinstance(ours, float) and row.ceiling else math.nan
    what = f"{row.title}, forward{' + backward' if row.backward else ''}, {list(sizes)}"
    results["rows"].append(
        {
            **{"what": what, "seconds": times, "errors": errors, "ceiling": row.ceiling},
            **{"share": None if math.isnan(share) else share, "least": row.share},  # NaN is not JSON
        }
    )
    lines = []
    for name, seconds_ in times.items():
        if not isinstance(seconds_, float):
            lines.append(f"| {what} | {name} | {cell(seconds_)} | | | |")
            continue
        first = name == "fastvae"
        reached, target = "", ""
        if first and row.ceiling:
            reached, target = f"{share:.0%} of {row.ceiling}", f"{row.share:.0%}" if row.share else ""
        elif not first and isinstance(ours, float):
            reached, target = f"{seconds_ / ours:.2f}×", f"{row.targets[name]}×" if name in row.targets else ""
        error = f"{errors[name]:.1e}" if name in errors else ""
        lines.append(f"| {what if first else ''} | {name} | {shown(seconds_)} | {reached} | {target} | {error} |")
    return lines


def small(row: Row, backward: bool, seconds: float) -> list[str]:
    """Call by call and within a CUDA graph, against the eager formula call by call."""
    inputs = inputs_of(row)
    mode = forward_backward if backward else forward
    ours, eager = mode(row.ours, *inputs), mode(row.peers["eager"], *inputs)
    runs = {"fastvae": ours, "eager": eager, "fastvae, graph": graphed(ours), "eager, graph": graphed(eager)}
    times = race({name: repeated(run) for name, run in runs.items()}, seconds)
    per_call = {name: t / CALLS if isinstance(t, float) else t for name, t in times.items()}
    what = f"{row.title}, forward{' + backward' if backward else ''}, {list(row.sizes)}"
    results["small"].append({"what": what, "seconds": per_call})
    cells = [shown(t) if isinstance(t, float) else cell(t) for t in (per_call[name] for name in runs)]
    a, b, c = (per_call[name] for name in ("eager", "fastvae", "fastvae, graph"))
    if isinstance(a, float) and isinstance(b, float) and isinstance(c, float):
        cells += [f"{a / b:.2f}×", f"{a / c:.2f}×"]
    return [f"| {what} | " + " | ".join(cells) + " |"]


def determinism(name: str) -> list[str]:
    """An op, forward and backward: 50 times the same bits."""
    B, D, repeats = (9, 5, 2) if DRY else (4099, 67, 50)
    inputs = [x.to(DEVICE) for x in (samples_and_posteriors if "agg" in name else posteriors)(B, D)]
    keywords = {"n_samples": 3, "seed": 1} if name == "reparameterize" else {}
    run = forward_backward(functools.partial(getattr(fastvae, name), **keywords), *inputs)
    first = tuple(run())  # type: ignore[call-overload]
    same = all(torch.equal(a, b) for _ in range(repeats) for a, b in zip(run(), first, strict=True))  # type: ignore[call-overload]
    results["checks"][f"deterministic {name}"] = same
    return [f"- {name}, forward + backward, {repeats} repeats: {'the same bits' if same else 'DIFFERENT BITS'}"]


def memory() -> list[str]:
    sizes = (16, 8) if DRY else (16384, 32)
    inputs = [x.to(DEVICE) for x in samples_and_posteriors(*sizes)]
    _, extra = peak(forward_backward(fastvae.agg_log_prob_marginals, *inputs))
    results["checks"]["memory"] = {"sizes": sizes, "bytes": extra}
    return [f"- agg_log_prob_marginals, forward + backward, {list(sizes)}: {extra / 2**20:.1f} MiB above its inputs"]


def dsprites() -> list[str]:
    """A data set of that size, all pairs, the marginals directly."""

    def decompose(*inputs: Tensor) -> Any:
        return fastvae.kl_decomposition(*inputs, own=torch.arange(len(inputs[0]), device=DEVICE))

    S, D = (16, 8) if DRY else DSPRITES
    inputs = [x.to(DEVICE) for x in samples_and_posteriors(S, D)]
    forward(decompose, *(x[: S // 2] for x in inputs))()
    seconds, extra = peak(forward(decompose, *inputs))
    results["checks"]["dsprites"] = {"sizes": (S, D), "seconds": seconds, "bytes": extra}
    return [
        f"- kl_decomposition, [{S}, {D}]: {shown(seconds)} (target: 4 s), {extra / 2**20:.0f} MiB above its inputs"
        " (target: 1024 MiB)"
    ]


def shown(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds > 1e-3 else f"{seconds * 1e6:.3g} us"


def cell(text: str) -> str:
    """Of a Markdown table"""
    return " ".join(text.split()).replace("|", "/")


def commit() -> str:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        found = ""
    return found.strip() or os.environ.get("FASTVAE_COMMIT", "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0, help="start no part after this")
    parser.add_argument("--only", default="", help="rows whose title contains this")
    options = parser.parse_args()
    if reason := why_not(BACKEND, DEVICE):
        sys.exit(reason)
    begin = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def emit(*more: str) -> None:
        for line in more:
            print(line, flush=True)
        lines.extend(more)
        (options.out / "gpu.md").write_text("\n".join(lines) + "\n")
        (options.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")

    def guarded(part: Callable[..., list[str]], title: str, *arguments: Any) -> None:
        if options.only not in title:
            return
        if time.monotonic() - begin > options.seconds:
            emit(f"| {title} | out of time |")
            return
        try:
            emit(*part(*arguments))
        except Exception as error:
            traceback.print_exc()
            results.setdefault("failed", []).append(f"{title}: {error!r}")
            emit(f"| {title} | failed: {cell(f'{type(error).__name__}: {error}'[:200])} |")
        if not DRY:
            torch.cuda.empty_cache()

    results.update({"commit": commit(), "dry_run": DRY, "torch": torch.__version__})
    results.update(
        {"triton": triton.__version__, "device": platform.machine() if DRY else torch.cuda.get_device_name()}
    )
    emit("# GPU benchmarks" + (": a dry run, whose numbers mean nothing" if DRY else ""), "")
    emit(
        f"`bench/gpu_check.sh` on {results['device']}, torch {torch.__version__}, Triton {triton.__version__}, float32,"
    )
    emit(f"commit {results['commit']}.", "")
    ceiling = ceilings(DEVICE, best, DRY)
    results["ceilings"] = ceiling._asdict()
    emit(
        f"Ceilings measured in the same run: copy {ceiling.copy / 1e12:.2f} TB/s, {ceiling.fma / 1e12:.2f}e12 FMA/s,"
        f" {ceiling.ex2 / 1e12:.2f}e12 ex2/s.",
    )
    emit("", "Checks, which come first, that a run cut short has them:", "")
    guarded(memory, "memory")
    for name in CHECKED:
        guarded(determinism, f"determinism of {name}", name)
    guarded(dsprites, "dsprites")
    emit(
        "",
        "A peer's ratio is its time over ours. Errors are the largest absolute difference from float64.",
        "",
        "| op and size | who | time | reached | target | error |",
        "|---|---|---|---|---|---|",
    )
    each = 0.2 if DRY else 1.5
    for row in ROWS:
        guarded(large, row.title, row, ceiling, each)
    emit("", "Per call, small; the last two: the eager formula's time over ours (targets: 1×, and 5× in a graph).", "")
    emit("| op and size | fastvae | eager | fastvae, graph | eager, graph | eager / ours | eager / graph |")
    emit("|---|---|---|---|---|---|---|")
    for row in SMALL_ROWS:
        for backward in (False, True):
            guarded(small, row.title, row, backward, each / 3)
    if not all(results["checks"].get(f"deterministic {name}", True) for name in CHECKED):
        sys.exit("an op is not deterministic")


if __name__ == "__main__":
    main()
