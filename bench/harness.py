"""Racing functions against each other: what is timed, interleaved repeats, memory, limits."""

import contextlib
import ctypes
import gc
import random
import re
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]  # what is timed
Prepare = Callable[[], Run]  # what must be done before, untimed
Clock = Callable[[Prepare, int], Sequence[float]]  # the times of so many runs, in seconds

LEAST, MOST = 3, 300  # repeats
LONG = 0.5  # seconds; a longer run, which varies less, is repeated once
SHORT = 0.01  # seconds; the time of a shorter run depends on what ran before


# What is timed.


def forward(function: Callable[..., object], *inputs: Tensor) -> Run:
    """A run of the forward alone, with gradients off."""

    def run() -> object:
        with torch.no_grad():
            return function(*inputs)

    return run


def forward_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor, rows: Tensor | None = None
) -> Run:
    """A run of forward and backward with respect to every input; returns the gradients. Upstream gradients are ones, as
    dense as the rest of a model would send them, and made beforehand; with `rows`, zero in all others."""
    prepare = backward(function, *inputs, rows=rows)
    return lambda: prepare()()


def backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor, rows: Tensor | None = None
) -> Prepare:
    """The backward of `forward_backward` alone: the forward belongs to the preparation and is not timed."""
    leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
    upstream: list[Tensor] = []

    def prepare() -> Run:
        result = function(*leaves)
        results = (result,) if isinstance(result, Tensor) else result
        if not upstream:
            upstream.extend(torch.ones_like(r) if rows is None else _ones_in(rows, r) for r in results)
        return lambda: torch.autograd.grad(results, leaves, upstream)

    return prepare


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


def in_turns(repeats: int, *runs: Run) -> list[float]:
    """The median time of each."""
    times = [[seconds(run) for run in runs] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def by_hand(ready: Prepare, rounds: int) -> list[float]:
    return [seconds(ready()) for _ in range(rounds)]


def race(
    prepares: dict[str, Prepare],
    estimates: dict[str, float],
    refresh: Callable[[int], None] = lambda _: None,
    clock: Clock = by_hand,
    budget: float = 0.15,
) -> dict[str, list[float]]:
    """The times of each: as many as fit into `budget` seconds of its own by `estimates` of one, prepared.

    The first takes part in every round, timed by `clock`; the others' repeats are spread evenly over the rounds, in an
    order that changes. A short run follows one of its own that is not timed, so that nobody finds the caches and the
    threads as another has left them. Before each run `refresh(round)` writes the inputs anew.
    """
    first, *others = prepares
    least = {name: 2 if estimate > LONG else LEAST for name, estimate in estimates.items()}
    repeats = {name: min(MOST, max(least[name], int(budget / estimates[name]))) for name in prepares}
    rounds = repeats[first]
    times: dict[str, list[float]] = {name: [] for name in prepares}
    order = random.Random(0)
    number = iter(range(rounds))

    def prepared(name: str, n: int) -> Run:
        if estimates[name] < SHORT:
            refresh(n)
            prepares[name]()()
        refresh(n)
        return prepares[name]()

    def ready() -> Run:
        n = next(number)
        due = [name for name in others if _due(n, min(repeats[name], rounds), rounds)]
        for name in order.sample(due, len(due)):
            times[name].append(seconds(prepared(name, n)))
        return prepared(first, n)

    times[first] = list(clock(ready, rounds))
    return times


def _due(n: int, repeats: int, rounds: int) -> bool:
    """Tells whether a contestant takes part in round n, when its repeats are spread evenly over the rounds."""
    return (n + 1) * repeats // rounds > n * repeats // rounds


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


def max_error(result: object, truth: object) -> float:
    """The largest absolute difference of (tuples of) tensors."""
    if isinstance(result, Tensor) and isinstance(truth, Tensor):
        return float((result.double() - truth.double()).abs().max())
    return max(max_error(r, t) for r, t in zip(result, truth, strict=True))  # type: ignore[call-overload]
