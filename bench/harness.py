"""Racing functions against each other: interleaved repeats in one run, medians, memory, errors, ceilings."""

import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

Run = Callable[[], object]
KERNELS = Path(__file__).parents[1] / "kernels"


class Timing(NamedTuple):
    median: float  # seconds
    low: float  # quartiles
    high: float


def race(runs: dict[str, Run], seconds: float = 6.0, least: int = 5, most: int = 200) -> dict[str, Timing]:
    """Times every function in turn, round after round, so that all see the same machine; each first warmed up
    (compilation included) outside the timing."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(), run()
    begin = time.perf_counter()
    for round_ in range(most):
        if round_ >= least and time.perf_counter() - begin > seconds:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(t), *_quartiles(t)) for name, t in times.items()}


def _quartiles(times: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(times, n=4)
    return low, high


def forward(function: Callable[..., object], *inputs: Tensor) -> Run:
    """Forward alone, with gradients off."""

    def run() -> object:
        with torch.no_grad():
            return function(*inputs)

    return run


def forward_backward(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Run:
    """Forward and backward with respect to every input; returns the gradients. The upstream gradients are ones, dense
    as the rest of a model would send them, and made beforehand."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    upstream: list[Tensor] = []

    def run() -> object:
        result = function(*leaves)
        results = (result,) if isinstance(result, Tensor) else result
        if not upstream:
            upstream.extend(map(torch.ones_like, results))
        return torch.autograd.grad(results, leaves, upstream)

    return run


def max_error(result: object, truth: object) -> float:
    """The largest absolute difference of (tuples of) tensors."""
    if isinstance(result, Tensor) and isinstance(truth, Tensor):
        return float((result.double() - truth.double()).abs().max())
    return max(max_error(r, t) for r, t in zip(result, truth, strict=True))  # type: ignore[call-overload]


def peak_extra_bytes(run: Run) -> int:
    """How far the process's resident memory rises above its start while `run` runs (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Ceilings(NamedTuple):
    """What this machine can do on `threads` threads, per second."""

    fma: float  # float32 fused multiply-adds
    exponentials: float  # float32, by our own polynomial in registers


def ceilings(threads: int) -> Ceilings:
    """Measured now, by a small native probe compiled for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        source = Path(__file__).parent / "probe.cpp"
        flags = "-std=c++20 -O3 -march=native -ffp-contract=fast -fno-math-errno -w -shared -fPIC"
        subprocess.run(
            ["g++", *flags.split(), "-I", str(KERNELS / "cpu"), str(source), "-o", str(library), "-lpthread"],
            check=True,
        )
        probe = ctypes.CDLL(str(library))
        probe.fma_rate.restype = probe.exp_rate.restype = ctypes.c_double
        return Ceilings(*(max(rate(threads) for _ in range(5)) for rate in (probe.fma_rate, probe.exp_rate)))
