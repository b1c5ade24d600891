"""Timing on a GPU, where work is asynchronous: events, a cold cache, CUDA graphs, and the peak of memory.

In Triton's interpreter (TRITON_INTERPRET=1) everything runs once or twice on the CPU, as a trial of the programs.
"""

import os
import statistics
import time

import torch
from torch import Tensor

from .harness import Run

DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if DRY else "cuda"
CALLS = 2 if DRY else 100  # between events, where a call is too short for them


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def once(run: Run, flush: Tensor | None = None) -> float:
    """Seconds of one call on the device, the cache flushed before it."""
    if DRY:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    if flush is not None:
        flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def best(run: Run) -> float:
    run()
    return min(once(run) for _ in range(2 if DRY else 8))


def race(runs: dict[str, Run], seconds: float) -> dict[str, float | str]:
    """The median of interleaved repeats, or why there is none."""
    flush = torch.empty(1 if DRY else 1 << 28, dtype=torch.int8, device=DEVICE)
    times: dict[str, list[float]] = {}
    failed: dict[str, float | str] = {}
    for name, run in runs.items():
        try:
            run(), run()
            synchronize()
            times[name] = []
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    until = time.perf_counter() + seconds
    for round_ in range(100):
        if round_ >= (1 if DRY else 3) and time.perf_counter() > until:
            break
        for name in times:
            times[name].append(once(runs[name], flush))
    return {name: statistics.median(t) for name, t in times.items()} | failed


def graphed(run: Run) -> Run:
    """The same work as one launch of a CUDA graph."""
    if DRY:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(), run(), run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def repeated(run: Run) -> Run:
    def many() -> None:
        for _ in range(CALLS):
            run()

    return many


def peak(run: Run) -> tuple[float, int]:
    """Seconds of one call, and the bytes that it had allocated at most."""
    if DRY:
        return once(run), 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = once(run)
    return seconds, torch.cuda.max_memory_allocated() - before
