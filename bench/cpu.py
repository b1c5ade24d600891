"""The CPU table: every op against what people use today, all in one run. `make bench-cpu` prints it.

    python -m bench.cpu [--only TEXT] [--threads 2] [--seconds 6] [--out FILE]

Time: median of interleaved repeats (quartiles in brackets). Error: the largest absolute difference from
float64 over all outputs, gradients included. A ratio is how many times slower than fastvae the peer is.
"""

import argparse
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae
from fastvae.backends import native

from . import peers
from .harness import Ceilings, ceilings, forward, forward_backward, max_error, peak_extra_bytes, race
from .inputs import posteriors, samples_and_posteriors

TRUTH_ROWS = 64  # a forward is checked on this many rows, evenly spread


class Row(NamedTuple):
    """One line of the table: an op at a size, its peers, and the ratios to reach."""

    title: str
    sizes: tuple[int, ...]  # (S = N, D), or (B, D)
    backward: bool
    ours: Callable[..., Any]
    peers: dict[str, Callable[..., Any]]
    targets: dict[str, float]
    inputs: Callable[..., tuple[Tensor, ...]]
    work: Callable[..., dict[str, float]] = lambda *_: {}  # ceiling's name to what the forward needs of it


def sgemm(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Not a peer but a yardstick: a matrix product with as many FMAs, 2·S·N·D."""
    return torch.cat((z, z), 1) @ torch.cat((mu, logvar), 1).T


def _fmas(B: int, D: int) -> dict[str, float]:
    return {"fma": 2.0 * B * B * D}


def _exponentials(B: int, D: int) -> dict[str, float]:
    return {"exponentials": 1.0 * B * B * (D + 1)}


AGG = fastvae.agg_log_prob
MARGINALS = fastvae.agg_log_prob_marginals
GEMM, BROADCAST, KEOPS = "compiled gemm", "compiled broadcast", "keops"
PEERS = {
    GEMM: peers.compiled_gemm,
    BROADCAST: peers.compiled_broadcast,
    KEOPS: peers.agg_keops,
    "eager gemm": peers.agg_gemm,
    "eager broadcast": peers.agg_broadcast,
    "sgemm": sgemm,
}
MARGINALS_PEERS = {"compiled": peers.compiled_marginals, "eager": peers.marginals_broadcast}
REPARAMETERIZE_PEERS = {"eager": peers.reparameterize_formula}
KL_PEERS = {"eager": peers.kl_formula, "compiled": peers.compiled_kl}


def _agg(sizes: tuple[int, int], backward: bool, targets: dict[str, float]) -> Row:
    chosen = {name: PEERS[name] for name in targets}
    return Row("agg_log_prob", sizes, backward, AGG, chosen, targets, samples_and_posteriors, _fmas)


ROWS = [
    _agg((4096, 32), False, {GEMM: 4, BROADCAST: 6, KEOPS: 12, "eager gemm": 18}),
    _agg((4096, 128), False, {GEMM: 2, BROADCAST: 2, KEOPS: 2, "sgemm": 1 / 1.1}),
    _agg((256, 10), False, {GEMM: 3, BROADCAST: 3, KEOPS: 3, "eager gemm": 3, "eager broadcast": 3}),
    _agg((256, 10), True, {GEMM: 4, BROADCAST: 4, KEOPS: 4, "eager gemm": 4, "eager broadcast": 4}),
    _agg((2048, 32), True, {GEMM: 1.6, BROADCAST: 12, KEOPS: 15}),
    Row(
        *("agg_log_prob_marginals", (2048, 32), False, MARGINALS, MARGINALS_PEERS),
        *({"compiled": 3, "eager": 25}, samples_and_posteriors, _exponentials),
    ),
    Row(
        *("agg_log_prob_marginals", (2048, 32), True, MARGINALS, MARGINALS_PEERS),
        *({"compiled": 7, "eager": 50}, samples_and_posteriors, _exponentials),
    ),
    *(
        Row(
            *("reparameterize", sizes, backward, fastvae.reparameterize, REPARAMETERIZE_PEERS),
            *({"eager": target}, posteriors),
        )
        for sizes, backward, target in (
            ((8192, 64), False, 5.0),
            ((8192, 64), True, 3.5),
            ((128, 32), True, 1.5),
        )
    ),
    Row("kl_gauss", (8192, 64), True, fastvae.kl_gauss, KL_PEERS, {"eager": 2.5, "compiled": 1.3}, posteriors),
    Row("kl_gauss", (128, 32), True, fastvae.kl_gauss, KL_PEERS, {"eager": 2}, posteriors),
]


def truth(row: Row, inputs: tuple[Tensor, ...]) -> tuple[Callable[[object], object], object]:
    """What to take of a result, and its float64 value from the reference backend."""
    exact = tuple(x.double() for x in inputs)
    with fastvae.use_backend("reference"):
        if row.backward:
            return lambda result: result, forward_backward(row.ours, *exact)()
        if len(inputs) == 3:  # rows of z are independent of each other
            rows = slice(None, None, max(1, row.sizes[0] // TRUTH_ROWS))
            return lambda result: _take(result, rows), forward(row.ours, exact[0][rows], *exact[1:])()
        return lambda result: result, forward(row.ours, *exact)()


def _take(result: object, rows: slice) -> object:
    return result[rows] if isinstance(result, Tensor) else tuple(r[rows] for r in result)  # type: ignore[attr-defined]


def measure(row: Row, ceiling: Ceilings, seconds: float) -> list[str]:
    """The Markdown lines of one row: ours first, then each peer."""
    inputs = row.inputs(*row.sizes)
    mode = forward_backward if row.backward else forward
    runs = {"fastvae": mode(row.ours, *inputs)}
    runs |= {name: mode(peer, *inputs) for name, peer in row.peers.items()}
    # A random sample has no float64 twin in the peers' generator; the tests hold ours to its definition.
    checked = row.title != "reparameterize"
    errors: dict[str, str] = dict.fromkeys(runs, "")
    if checked:
        take, exact = truth(row, inputs)
        for name, run in runs.items():
            errors[name] = "" if name == "sgemm" else f"{max_error(take(run()), exact):.1e}"
    timings = race(runs, seconds)

    ours = timings["fastvae"].median
    shares = [
        f"{100 * need / ours / getattr(ceiling, name):.0f}% of {name}"
        for name, need in (row.work(*row.sizes) if not row.backward else {}).items()
    ]
    lines = []
    for name, t in timings.items():
        ratio = target = verdict = ""
        if name in row.targets:
            reached, goal = t.median / ours, row.targets[name]
            ratio, target = f"{reached:.2f}", f"{goal:.2f}"
            verdict = "yes" if reached >= goal else "no"
        size = f"{row.sizes[0]}×{row.sizes[0]}, D {row.sizes[1]}" if len(inputs) == 3 else str(list(row.sizes))
        what = f"{row.title}, forward{' + backward' if row.backward else ''}, {size}"
        cells = (
            *((what, "**fastvae**") if name == "fastvae" else ("", name)),
            f"{_time(t.median)} [{_time(t.low)}, {_time(t.high)}]",
            *(ratio, target, verdict, errors[name]),
            ", ".join(shares) if name == "fastvae" else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds > 1e-3 else f"{seconds * 1e6:.3g} us"


def memory_line(B: int = 16384, D: int = 32, target: int = 64 * 2**20) -> str:
    """Peak extra memory of joint + marginals, forward + backward."""
    inputs = samples_and_posteriors(B, D)
    run = forward_backward(MARGINALS, *inputs)
    forward_backward(MARGINALS, *(x[:64] for x in inputs))()  # loads and warms what is not the op's own
    extra = peak_extra_bytes(run)
    return (
        f"Peak extra memory, agg_log_prob_marginals, forward + backward, {B}×{B}, D {D}: "
        f"{extra / 2**20:.1f} MiB (target: at most {target / 2**20:.0f} MiB)."
    )


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose title contains this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="per row")
    parser.add_argument("--out", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    lines: list[str] = []

    def emit(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    ceiling = ceilings(arguments.threads)
    emit("# CPU benchmarks\n")
    emit(f"`make bench-cpu` on {machine()}, {arguments.threads} threads, torch {torch.__version__}, float32,")
    emit(f"{native.status()[1]}, commit {commit.stdout.strip()}.\n")
    emit(f"Ceilings measured in the same run: {ceiling.fma / 1e9:.0f}e9 FMA/s,")
    emit(f"{ceiling.exponentials / 1e9:.1f}e9 exponentials/s.\n")
    emit("Times are medians of interleaved repeats, quartiles in brackets; a ratio is the peer's time over ours;")
    emit("errors are the largest absolute difference from float64, gradients included.\n")
    emit("| op and size | who | time | ratio | target | reached | error | share of ceiling |")
    emit("|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        if arguments.only in f"{row.title} {row.sizes}":
            for line in measure(row, ceiling, arguments.seconds):
                emit(line)
    if arguments.only in "memory":
        emit("\n" + memory_line())
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
