"""Measures on a GPU: `python -m bench.gpu.measure PART OUT [--only TEXT]`, as bench/gpu/run.sh does.

    checks  ceilings, determinism, memory, a data set of the size of dSprites
    table   every op against its ceiling, on both backends in turns
    small   small calls, eager and in a CUDA graph
    peers   against what people use today

Writes OUT/PART.json, .md and .summary, again after each row. Exits with 1 where one of ours is missing or failed.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvae

from ..cases import OPS
from ..harness import Ceilings, forward, forward_backward, listed
from ..inputs import SEED, samples_and_posteriors
from .ceilings import ceilings, products
from .contests import peers_table, shown, small_table, table
from .harness import BACKENDS, DEVICE, TRIAL, best, on_backend, peak
from .jobs import Job, Progress, Result, Work, said

REPEATS = 2 if TRIAL else 50
DSPRITES = (737_280, 10)
STALL = {"peers": 40}  # seconds that one thing may take; compilers of peers take longest
CHECKS = ("Checks:", "")
KINDS = ("", ", early exit", ", graph")  # of contestants that are a backend


def measured_ceilings(progress: Progress) -> Result:
    found, rates = ceilings(DEVICE, best, TRIAL), products(DEVICE, best, TRIAL)
    most = ", ".join(f"{name} {rate / 1e12:.3g}e12/s" for name, rate in found._asdict().items())
    line = f"Ceilings: {most}; matrix products: {', '.join(f'{k} {rate / 1e12:.3g}e12/s' for k, rate in rates.items())}"
    return Result([line], [line], [], {"ceilings": found._asdict(), "products": rates})


def determinism(backend: str, progress: Progress) -> Result:
    """Checks that every op, forward and backward, gives the same bits each time."""
    B, D = (9, 5) if TRIAL else (4099, 67)
    same: dict[str, bool | str] = dict(progress.bad)  # type: ignore[arg-type]
    for name, op in OPS.items():
        if name in progress.bad:
            continue
        progress.about_to(name)
        inputs = op.inputs(B, D, SEED, DEVICE)
        run: Callable[[], Any] = on_backend(backend, everything(op.checked or op.function, *inputs))
        try:
            first = run()
            same[name] = all(torch.equal(a, b) for _ in range(REPEATS) for a, b in zip(run(), first, strict=True))
        except Exception as error:
            torch.cuda.synchronize()
            same[name] = said(error)
    failures = [
        f"{name} on {backend}: {'not deterministic' if how is False else how}"
        for name, how in same.items()
        if how is not True
    ]
    good = [name for name, how in same.items() if how is True]
    line = f"{backend}, forward + backward, {REPEATS} repeats, the same bits: {', '.join(good)}"
    return Result([f"- {line}", *(f"- {failure}" for failure in failures)], [line], failures, same)


def everything(function: Callable[..., Any], *inputs: Tensor) -> Callable[[], list[Tensor]]:
    """A call that gives outputs and gradients."""
    leaves = [x.requires_grad_() for x in inputs]

    def run() -> list[Tensor]:
        outputs = listed(function(*leaves))
        ones = [torch.ones_like(o) for o in outputs]
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, ones)]

    return run


def memory(backend: str, progress: Progress) -> Result:
    """Checks that a call allocates less than a sixteenth of a matrix of all pairs."""
    S, D = (16, 8) if TRIAL else (16384, 32)
    inputs = samples_and_posteriors(S, D, device=DEVICE)
    run = on_backend(backend, forward_backward(fastvae.agg_log_prob_marginals, *inputs))
    run()
    _, extra = peak(run)
    most = max(1 << 20, 4 * S * S // 16)
    line = (
        f"{backend}, agg_log_prob_marginals, forward + backward, [{S}, {D}]: {extra / 2**20:.1f} MiB above its inputs"
        f" (at most {most / 2**20:.0f})"
    )
    return Result([f"- {line}"], [line], [] if extra <= most else [line], extra)


def dsprites(backend: str, progress: Progress) -> Result:
    """The KL's terms of a data set as large as dSprites: all pairs, the marginals directly and from a table."""
    S, D = (16, 8) if TRIAL else DSPRITES
    inputs = samples_and_posteriors(S, D, device=DEVICE)
    lines: list[str] = []
    failures: list[str] = []
    numbers = {}
    for method in ("direct", "table"):
        if method in progress.bad:
            failures.append(f"dsprites on {backend}, {method}: {progress.bad[method]}")
            continue
        progress.about_to(method)

        def decompose(*inputs: Tensor, method: str = method) -> Any:
            own = torch.arange(len(inputs[0]), device=DEVICE)
            return fastvae.kl_decomposition(*inputs, own=own, method=method)

        on_backend(backend, forward(decompose, *(x[: S // 8] for x in inputs)))()
        seconds, extra = peak(on_backend(backend, forward(decompose, *inputs)))
        numbers[method] = {"seconds": seconds, "bytes": extra}
        lines.append(
            f"{backend}, kl_decomposition, [{S}, {D}], {method}: {shown(seconds)} (target 2 s),"
            f" {extra / 2**20:.0f} MiB above its inputs (target 1024)"
        )
    return Result([f"- {line}" for line in (*lines, *failures)], lines, failures, numbers)


def checks() -> list[Job]:
    def for_each(run: Callable[[str, Progress], Result]) -> list[Job]:
        return [Job(f"{run.__name__} on {name}", functools.partial(run, name), CHECKS) for name in BACKENDS]

    ceiling = Job("ceilings", measured_ceilings)
    return [ceiling, *for_each(determinism), *for_each(memory), *for_each(dsprites)]


def known_ceilings(folder: Path) -> Ceilings | None:
    """The ceilings that the part `checks` has measured."""
    try:
        return Ceilings(**json.loads((folder / "checks.json").read_text())["done"]["ceilings"]["numbers"]["ceilings"])
    except (OSError, KeyError, TypeError):
        return None


def known_to_fail(folder: Path, jobs: Sequence[Job]) -> dict[str, str]:
    """Contestants that hung or faulted in float32 in the check of results (sanity.py), which are not tried again."""
    try:
        found = json.loads((folder / "sanity.json").read_text())
    except (OSError, ValueError):
        return {}
    bad: dict[str, str] = {}
    for title, (how, what, *_) in found.items():
        name, _, backend = title.rpartition(" on ")
        op, _, dtype = name.partition(", ")
        if dtype != "float32" or how not in ("HANG", "FAULT"):
            continue
        marks = [f"{job.key} | {backend}{kind}" for job in jobs if job.work == op for kind in KINDS]
        marks += [f"determinism on {backend} | {op}"]
        marks += [f"{check} on {backend}" for check in ("memory", "dsprites") if op == "agg_log_prob_marginals"]
        keys = {job.key for job in jobs}
        bad |= {mark: f"{how} (as before: {what})" for mark in marks if mark.partition(" | ")[0] in keys}
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("checks", "table", "small", "peers"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="contests whose title contains this")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = {
        "checks": checks,
        "table": lambda: table(known_ceilings(options.out)),
        "small": small_table,
        "peers": peers_table,
    }[options.part]()
    seconds = float(os.environ.get("FASTVAE_UNTIL", time.time() + 600)) - time.time()
    work = Work(options.part, [job for job in jobs if options.only in job.key], options.out)
    work.state["bad"] = known_to_fail(options.out, work.jobs)
    stall = float(os.environ.get("FASTVAE_STALL", STALL.get(options.part, 15)))
    if not work.through(seconds - 3, stall):
        sys.exit("\n".join(work.failures()))


if __name__ == "__main__":
    main()
