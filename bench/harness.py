"""Racing functions against each other: what is timed, interleaved repeats, ceilings, memory, limits."""

import contextlib
import ctypes
import gc
import math
import random
import re
import resource
import signal
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Run = Callable[[], object]  # what is timed
Prepare = Callable[[], Run]  # what must be done before, untimed
Name = TypeVar("Name", bound=Hashable)
Time = TypeVar("Time")

LEAST = 3  # repeats


class Ceilings(NamedTuple):
    """The most that a machine can do per second: a CPU on all threads that torch uses, or a GPU."""

    fma: float  # float32 fused multiply-adds
    exponentials: float  # float32: a CPU's by our own polynomial in registers, a GPU's the hardware's 2^x
    bandwidth: float  # bytes, read plus written, of a copy much larger than the caches


# What is timed.


def forward(function: Callable[..., object], *inputs: Tensor) -> Run:
    """A run of the forward alone, with gradients off."""

    def run() -> object:
        with torch.no_grad():
            return function(*inputs)

    return run


def forward_backward(
    function: Callable[..., Tensor | Sequence[Tensor]], *inputs: Tensor, rows: Tensor | None = None
) -> Run:
    """A run of forward and backward with respect to every input; returns the gradients. Upstream gradients are ones, as
    dense as the rest of a model would send them, and made beforehand; with `rows`, zero in all others."""
    prepare = backward(function, *inputs, rows=rows)
    return lambda: prepare()()


def backward(
    function: Callable[..., Tensor | Sequence[Tensor]], *inputs: Tensor, rows: Tensor | None = None
) -> Prepare:
    """The backward of `forward_backward` alone: the forward belongs to the preparation and is not timed."""
    leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
    upstream: list[Tensor] = []

    def prepare() -> Run:
        results = listed(function(*leaves))
        if not upstream:
            upstream.extend(torch.ones_like(r) if rows is None else _ones_in(rows, r) for r in results)
        return lambda: torch.autograd.grad(results, leaves, upstream)

    return prepare


def listed(results: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _ones_in(rows: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_fill_(0, rows, 1)


def _always(run: Run) -> Prepare:
    return lambda: run


MODES: dict[str, Callable[..., Prepare]] = {
    "forward": lambda function, *inputs: _always(forward(function, *inputs)),
    "backward": backward,
    "forward + backward": lambda function, *inputs: _always(forward_backward(function, *inputs)),
    "step": lambda function, *inputs: _always(lambda: function(*inputs)),
}


# Time.


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def race(
    repeats: dict[Name, int], once: Callable[[Name, int], Time], limit: float = math.inf
) -> dict[Name, list[Time]]:
    """The times of each, where `once(name, n)` times a run, or a turn of several, in round n.

    There are as many rounds as repeats of the first, who takes part in all. The others' repeats are spread evenly over
    them. The order in a round changes. No round begins after `limit` seconds, but for the first LEAST.
    """
    times: dict[Name, list[Time]] = {name: [] for name in repeats}
    rounds = next(iter(repeats.values()), 0)
    order = random.Random(0)
    until = time.perf_counter() + limit
    for n in range(rounds):
        if n >= LEAST and time.perf_counter() > until:
            break
        due = [name for name in repeats if _due(n, min(repeats[name], rounds), rounds)]
        for name in order.sample(due, len(due)):
            times[name].append(once(name, n))
    return times


def _due(n: int, repeats: int, rounds: int) -> bool:
    """Tells whether a contestant takes part in round n, when its repeats are spread evenly over the rounds."""
    return (n + 1) * repeats // rounds > n * repeats // rounds


def in_turns(repeats: int, *runs: Run) -> list[float]:
    """The median time of each."""
    times = race(dict.fromkeys(range(len(runs)), repeats), lambda k, n: seconds(runs[k]))
    return [statistics.median(found) for found in times.values()]


# Memory, and limits.


def peak_extra_bytes(run: Run) -> int:
    """The rise of the process's resident memory above its start while `run` runs, its results included (Linux; the
    kernel's counters are right to a few hundred KiB)."""
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which no library does or tells
    before = _memory().rss
    result = run()
    (peak,) = re.findall(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    del result
    return max(0, int(peak) * 1024 - before)


def give_back() -> None:
    """Returns freed memory to the system, so that the next to use it is seen to."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Makes allocations fail with a MemoryError that would take the process `extra` bytes beyond what it has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory().vms + extra, hard))
    failed = False
    try:
        yield
    except RuntimeError as error:  # as torch says it
        if "can't allocate memory" not in str(error):
            raise
        failed = True
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if failed:
        raise MemoryError(f"over {extra} bytes")


@contextlib.contextmanager
def time_limit(limit: float) -> Iterator[None]:
    """Raises a TimeoutError after `limit` seconds, as soon as the interpreter is back from what it calls."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"over {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _memory() -> Any:
    """The memory of this process in bytes: `rss` is resident, `vms` all of its addresses."""
    import psutil  # which the races on a GPU, where nothing is installed, do without

    return psutil.Process().memory_info()
