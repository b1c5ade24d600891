"""Timing on a GPU, where work is asynchronous: events behind a sleeping kernel, a cold cache, graphs, memory.

With FASTVAE_TRIAL=1 everything is tiny and is repeated as little as possible, as a rehearsal that measures nothing.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

import fastvae
from fastvae.backends.settings import switch

from ..harness import Run, race
from .jobs import RACE, said

TRIAL = bool(switch("FASTVAE_TRIAL"))
DEVICE = "cuda"
BACKENDS = ("triton", "cuda")
CLOCK = 2e9  # cycles per second that the sleeping kernel counts, at most
CALLS = 2 if TRIAL else 20  # behind one sleep, where a call is too short for events; the queue holds 1,024 kernels
MOST = 1 if TRIAL else 100  # repeats
LONGEST = 0.2  # seconds of sleep; who needs more waits for the device within the call


class Time(NamedTuple):
    """Seconds, medians."""

    device: float  # of its work, all of it queued before it begins
    host: float  # until the call has queued it


def on_backend(name: str, run: Run, exact_skip: bool | None = None) -> Run:
    """The function on that backend, its backward too, which asks for the backend again."""

    def call() -> object:
        with fastvae.use_backend(name, exact_skip=exact_skip):
            return run()

    return call


def repeated(run: Run) -> Run:
    def many() -> None:
        for _ in range(CALLS):
            run()

    return many


def once(run: Run, flush: Tensor | None = None, sleep: float = 1e-3) -> Time:
    """One call. The device sleeps until the host has queued it, or the host's own time would be measured; where it
    woke up too soon the call is repeated behind a longer sleep."""
    while True:
        if flush is not None:
            flush.sum()  # reads: what is written would have to be written back while a call is timed
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start = time.perf_counter()
        torch.cuda._sleep(int(sleep * CLOCK))
        begin.record()
        run()
        end.record()
        host = time.perf_counter() - start
        in_time = not begin.query()
        end.synchronize()
        if in_time or sleep >= LONGEST:
            return Time(begin.elapsed_time(end) * 1e-3, host)
        sleep = min(LONGEST, 2 * max(sleep, host))


def best(run: Run) -> float:
    """Seconds on the device, the best of a few."""
    run()
    return min(once(run).device for _ in range(1 if TRIAL else 8))


def raced(
    runs: dict[str, Run],
    limit: float,
    about_to: Callable[[str], None] = lambda name: None,
    cold: bool = True,
) -> dict[str, Time | str]:
    """Medians of interleaved repeats of each, in `limit` seconds, or why there are none. `about_to` is told who is next
    for the first time."""
    flush = torch.zeros(1 if TRIAL else 1 << 25, dtype=torch.int64, device=DEVICE) if cold else None  # 256 MiB
    failed: dict[str, Time | str] = {}
    for name, run in runs.items():
        about_to(name)
        try:
            run(), run()
            torch.cuda.synchronize()
        except Exception as error:
            torch.cuda.synchronize()  # raises where nothing more can be computed by this process
            failed[name] = said(error)
    sleep = {name: 1e-3 for name in runs if name not in failed}
    told = ""

    def timed(name: str, n: int) -> Time:
        nonlocal told
        mark = name if n == 0 else RACE
        if mark != told:
            about_to(mark)
        told = mark
        found = once(runs[name], flush, sleep[name])
        sleep[name] = min(LONGEST, max(2e-4, 2 * found.host))
        return found

    times = race(dict.fromkeys(sleep, MOST), timed, limit=limit)
    about_to(RACE)
    return {name: medians(found) for name, found in times.items()} | failed


def medians(times: Iterable[Time]) -> Time:
    return Time(*(statistics.median(column) for column in zip(*times, strict=True)))


def graphed(run: Run) -> Run:
    """A run as one launch of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(), run(), run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak(run: Run) -> tuple[float, int]:
    """Seconds of one call, and the bytes that it had allocated at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3, torch.cuda.max_memory_allocated() - before
