"""Checks whether every op on every GPU backend is right, hangs or faults: one process for each and each dtype, many at
a time.

    python -m bench.gpu.sanity OUT      forward and backward against float64, and CUDA graphs
    python -m bench.gpu.sanity OUT --no-bulk   of the CUDA library alone, which is one that makes no bulk copies
    python -m bench.gpu.sanity --here   the ops of the CUDA library once, in this process, for compute-sanitizer

A process that faults has no context any more, and one that hangs is killed: neither says anything about the others.
They are forked before anything has asked CUDA for anything.
"""

import argparse
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae

from ..cases import OPS
from ..harness import listed
from ..inputs import SEED
from .harness import BACKENDS, DEVICE, TRIAL
from .jobs import exit_status, import_all, said

LIMIT = float(os.environ.get("FASTVAE_STALL", "25"))  # seconds of each
AT_A_TIME = 4 if TRIAL else 12  # each compiles what Triton has not compiled yet
SIZES = ((5, 7, 3),) if TRIAL else ((131, 260, 33), (16, 16, 10))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
Results = list[Tensor]
REFUSALS = {"triton": "has not run yet", "cuda": "run the step once"}  # of a first call in a graph


def evaluated(op: str, inputs: Results, backend: str, device: str, dtype: torch.dtype) -> Results:
    """Outputs and gradients, the upstream gradients being the same whatever the dtype."""
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    with fastvae.use_backend(backend):
        outputs = listed((OPS[op].checked or OPS[op].function)(*leaves))
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(device, o.dtype) for o in outputs]
        gradients = torch.autograd.grad(outputs, leaves, upstream)
    return [x.detach().cpu() for x in (*outputs, *gradients)]


def drawn(op: str, S: int, N: int, D: int) -> Results:
    """The op's inputs, S samples and N posteriors, which every dtype holds exactly."""
    *z, mu, logvar = (x.bfloat16() for x in OPS[op].inputs(max(S, N), D, SEED))
    return [*(x[:S] for x in z), mu[:N], logvar[:N]]


def compare(op: str, dtype: torch.dtype, backend: str) -> tuple[bool, str]:
    """The largest error relative to what it may be: twice that of the reference in the same dtype, and roundings."""
    worst = (0.0, "")
    for S, N, D in SIZES:
        inputs = drawn(op, S, N, D)
        exact = evaluated(op, inputs, "reference", "cpu", torch.float64)
        usual = evaluated(op, inputs, "reference", "cpu", dtype)
        got = evaluated(op, inputs, backend, DEVICE, dtype)
        for number, (g, u, e) in enumerate(zip(got, usual, exact, strict=True)):
            scale, eps = float(e.abs().max()), torch.finfo(g.dtype).eps
            noise = 1e-5 if OPS[op].hidden else 0.0  # of the normals in float32
            most = 2 * float((u.double() - e).abs().max()) + (4 * eps + noise) * scale + 1e-300
            error = float((g.double() - e).abs().max()) / most
            if not error <= worst[0]:  # or it is NaN
                worst = (error, f"result {number}, {[S, N, D]}")
            if error != error:
                return False, f"NaN in {worst[1]}"
    return worst[0] <= 1, f"{worst[0]:.2f} of its tolerance" + ("" if worst[0] <= 1 else f" ({worst[1]})")


def graph(backend: str) -> tuple[bool, str]:
    """A step captured after it has run, and replayed."""
    step = _step(backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(), step()
    torch.cuda.current_stream().wait_stream(side)
    expected = [x.clone() for x in step()]
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = step()
    return _replayed(captured, results, expected)


def first_in_graph(backend: str) -> tuple[bool, str]:
    """A step captured when it has never run: that works, or is refused by an error that says what to do and leaves the
    context in order."""
    step = _step(backend)
    expected = _step("reference", "cpu")()
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured):
            results = step()
    except Exception as error:
        known, right = REFUSALS[backend] in str(error), _close(step(), expected)
        return known and right, f"refused: {said(error)}" + ("" if right else "; afterwards the results are wrong")
    again = step()
    if not _close(again, expected):
        return False, "after the capture the results are wrong"
    return _replayed(captured, results, again)


def _close(got: Results, expected: Results) -> bool:
    return all(torch.allclose(a.cpu(), e, rtol=1e-3, atol=1e-3) for a, e in zip(got, expected, strict=True))


def _step(backend: str, device: str = DEVICE) -> Callable[[], Results]:
    leaves = [x.float().to(device).requires_grad_() for x in drawn("agg_log_prob", *SIZES[0])]
    ones = torch.ones(len(leaves[0]), device=device)
    torch.cuda.synchronize()

    def step() -> Results:
        with fastvae.use_backend(backend):
            joint = fastvae.agg_log_prob(*leaves)
            return [joint.detach(), *torch.autograd.grad(joint, leaves, ones)]

    return step


def _replayed(captured: Any, results: Results, expected: Results) -> tuple[bool, str]:
    for x in results:
        x.fill_(torch.nan)
    captured.replay()
    torch.cuda.synchronize()
    same = all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    return same, "replays to the same bits" if same else "a replay gives something else"


class Trial(NamedTuple):
    name: str
    backend: str
    run: Callable[[], tuple[bool, str]]

    @property
    def title(self) -> str:
        return f"{self.name} on {self.backend}"


def trials(backends: Sequence[str]) -> list[Trial]:
    found = [
        Trial(f"{op}, {str(dtype).removeprefix('torch.')}", b, functools.partial(compare, op, dtype, b))
        for op in reversed(OPS)  # what compiles for longest first
        for dtype in DTYPES
        for b in backends
    ]
    for b in backends:
        found += [Trial("a graph", b, functools.partial(graph, b))]
        found += [Trial("a first call in a graph", b, functools.partial(first_in_graph, b))]
    return found


def start(trial: Trial, verdict: Path) -> int:
    """Forks the process that runs a trial and writes its verdict."""
    child = os.fork()
    if child:
        return child
    log = os.open(verdict.with_suffix(".txt"), os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1 if TRIAL else 2)
    try:
        good, what = trial.run()
        how = "PASS" if good else "WRONG"
    except BaseException as error:
        traceback.print_exc()
        how, what = "FAULT", said(error)
    verdict.write_text(json.dumps([how, what]))
    os._exit(0)


def verdicts(todo: Sequence[Trial], folder: Path, report: Callable[[dict[str, list[str]]], None]) -> None:
    """Runs all trials, several at a time; `report` is called after each with the verdicts so far, as they came."""
    waiting = list(todo)
    running: dict[int, tuple[Trial, Path, float]] = {}
    found: dict[str, list[str]] = {}
    assert not torch.cuda.is_initialized()  # or no child could use it
    while waiting or running:
        while waiting and len(running) < AT_A_TIME:
            trial = waiting.pop(0)
            verdict = folder / f"{trial.title}.json"
            running[start(trial, verdict)] = (trial, verdict, time.monotonic())
        time.sleep(0.02)
        for child, (trial, verdict, begin) in list(running.items()):
            seconds = time.monotonic() - begin
            status = exit_status(child, late := seconds > LIMIT)
            if status is None:
                continue
            del running[child]
            if late and status != 0:
                how, what = "HANG", "killed"
            elif verdict.exists():
                how, what = json.loads(verdict.read_text())
            else:
                how, what = "FAULT", f"exit status {status}"
            verdict.unlink(missing_ok=True)
            found[trial.title] = [how, what, f"{seconds:.1f} s"]
            report(found)


def summary(found: dict[str, list[str]]) -> list[str]:
    """Lists what went wrong, and then what went well in one line for each op and backend."""
    wrong = [f"{how} {title}: {what}, {seconds}" for title, (how, what, seconds) in found.items() if how != "PASS"]
    right: dict[str, list[str]] = {}
    for title, (how, what, seconds) in found.items():
        if how == "PASS":
            name, _, backend = title.rpartition(" on ")
            op, _, dtype = name.partition(", ")
            right.setdefault(f"{op} on {backend}", []).append(f"{dtype + ' ' if dtype else ''}{what}, {seconds}")
    return wrong + [f"PASS {title}: {'; '.join(sorted(whats))}" for title, whats in sorted(right.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--no-bulk", action="store_true")
    parser.add_argument("--here", action="store_true")
    options = parser.parse_args()
    if options.here:
        for op in OPS:
            print(op, evaluated(op, drawn(op, *SIZES[0]), "cuda", DEVICE, torch.float32)[0].flatten()[0], flush=True)
        print("every op has run")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    import_all()
    name = "sanity-nobulk" if options.no_bulk else "sanity"
    todo = trials(("cuda",) if options.no_bulk else BACKENDS)
    seen: dict[str, list[str]] = {}

    def report(found: dict[str, list[str]]) -> None:
        seen.update(found)
        lines = summary(found)
        (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / f"{name}.summary").write_text("".join(f"{line}\n" for line in lines))
        (options.out / f"{name}.md").write_text(f"# {name}\n\n" + "".join(f"- {line}\n" for line in lines))

    verdicts(todo, options.out, report)
    wrong = [title for title, (how, *_) in seen.items() if how != "PASS"]
    if options.no_bulk and (options.out / "sanity.json").exists():
        before = json.loads((options.out / "sanity.json").read_text())
        mended = [title for title, (how, *_) in before.items() if how != "PASS" and seen.get(title, [""])[0] == "PASS"]
        line = f"Right without bulk copies, and not with them: {', '.join(mended) or 'nothing'}"
        (options.out / "mended.txt").write_text(line + "\n")
    if wrong or len(seen) < len(todo):
        sys.exit(f"not right: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
