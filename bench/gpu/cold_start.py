"""Counts what a training run compiles before it is under way: Triton's binaries, and the seconds they take.

    python -m bench.gpu.cold_start

A model trains a few steps: full batches, a last one that is smaller and odd, batches of other sizes; then others of the
same kind, with more latent dimensions. Nothing has been compiled before, as the cache is a folder of its own. All
that is counted is a kernel of this library's Triton backend; CUDA's are compiled beforehand. A GPU is needed, or in the
tests a mocked one (tests/bench/test_cold_start.py), for which kernels are compiled but not launched.
"""

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae

from ..cpu.machine import why_not
from ..training import DATASET_SIZE, model

OBJECTIVES: dict[str, Callable[[], Any]] = {
    "ELBO": fastvae.ELBO,
    "BetaTCVAE": lambda: fastvae.BetaTCVAE(beta=6.0, dataset_size=DATASET_SIZE),
    "InfoVAE": fastvae.InfoVAE,
    "IWAE, 5 samples": lambda: fastvae.IWAE(5),
}


class Stage(NamedTuple):
    """A stage of a training run: batches of these sizes, with D latents."""

    what: str
    D: int
    batches: Sequence[int]


STAGES = (
    Stage("batches of 128", 10, (128, 128)),
    Stage("a last one of 37", 10, (37,)),
    Stage("batches of 3, 64, 100, 256, 500 and 1024", 10, (3, 64, 100, 256, 500, 1024)),
    Stage("another model", 32, (128, 37)),
    Stage("another model", 33, (128, 37)),
    Stage("another model", 64, (128, 37)),
)


class Compiled(NamedTuple):
    """The binaries that a stage compiled and none before it had."""

    objective: str
    stage: Stage
    kernels: Counter[str]
    compiling: float  # seconds
    elapsed: float  # seconds, with everything


class Compilations:
    """The binaries that Triton has compiled since this object was made."""

    def __init__(self) -> None:
        self.keys: set[tuple[str, str]] = set()  # of binaries, with their kernel's name
        self.seconds = 0.0

    def since(self, before: set[tuple[str, str]]) -> Counter[str]:
        return Counter(name for name, _ in self.keys - before)


@contextmanager
def compilations(compiles: bool = True) -> Iterator[Compilations]:
    """Counts Triton's compilations in a `with` block; with compiles=False Triton counts the binaries it would need and
    compiles none."""
    from triton import knobs

    found = Compilations()

    def wanted(*, key: str, fn: Any, **_: Any) -> bool:
        found.keys.add((fn.name.rpartition(".")[2], key))
        return not compiles

    def compiled(*, times: Any, **_: Any) -> None:
        found.seconds += times.total / 1e6  # microseconds

    with tempfile.TemporaryDirectory() as folder, knobs.runtime.scope(), knobs.compilation.scope(), knobs.cache.scope():
        knobs.runtime.jit_cache_hook, knobs.compilation.listener, knobs.cache.dir = wanted, compiled, folder
        yield found


def training(objective: Any, D: int, device: str) -> Callable[[int], None]:
    """A training step as a function of the number of examples; parameters stay in place between steps."""
    vae = model(D).to(device)
    vae.objective = objective
    optimizer = torch.optim.Adam(vae.parameters())

    def step(B: int) -> None:
        x: Tensor = (torch.rand(B, 784, device=device) < 0.13).float()
        optimizer.zero_grad()
        vae(x).loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def stages(
    device: str, objectives: Iterable[str] = OBJECTIVES, plan: Sequence[Stage] = STAGES, compiles: bool = True
) -> Iterator[Compiled]:
    """Goes through the stages of each objective, which starts with nothing compiled, and yields what each compiled."""
    for name in objectives:
        with compilations(compiles) as found:
            _forget_binaries()
            steps: dict[int, Callable[[int], None]] = {}
            for stage in plan:
                keys, seconds, begin = set(found.keys), found.seconds, time.perf_counter()
                if stage.D not in steps:
                    steps[stage.D] = training(OBJECTIVES[name](), stage.D, device)
                for B in stage.batches:
                    steps[stage.D](B)
                elapsed = time.perf_counter() - begin
                yield Compiled(name, stage, found.since(keys), found.seconds - seconds, elapsed)


def _forget_binaries() -> None:
    """Makes Triton and the launchers forget every binary, as in a new process."""
    from fastvae.kernels.triton import _launch
    from triton.runtime.jit import JITFunction

    _launch._known.clear()
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("fastvae.kernels.triton"):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()


def main() -> None:
    if reason := why_not("triton", "cuda"):
        sys.exit(reason)
    print("| objective | D | what trains | new binaries | compiling | in all |")
    print("|---|--:|---|--:|--:|--:|")
    with fastvae.use_backend("triton"):
        for c in stages("cuda"):
            times = f"{c.compiling:.1f} s | {c.elapsed:.1f} s"
            print(f"| {c.objective} | {c.stage.D} | {c.stage.what} | {c.kernels.total()} | {times} |", flush=True)


if __name__ == "__main__":
    main()
