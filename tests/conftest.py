"""Who computes in the tests: every available backend, and every instruction set of the native one."""

import contextlib
import os
import platform
from collections.abc import Iterator
from typing import NamedTuple

# Before torch is imported: its idle threads must not spin while other processes need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Before Triton is imported: where there is no GPU, its kernels run in its interpreter, on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, settings

import fastvae
from fastvae import backends
from fastvae.backends import native as native_backend

settings.register_profile(
    "quick",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=(HealthCheck.function_scoped_fixture, HealthCheck.too_slow),
)
settings.register_profile("long", settings.get_profile("quick"), derandomize=False, max_examples=500)
settings.load_profile(os.environ.get("FASTVAE_HYPOTHESIS", "quick"))

# Memory that torch.empty hands out starts as NaN, so that a result nobody wrote is seen.
torch.use_deterministic_algorithms(True, warn_only=True)


class Target(NamedTuple):
    """Where a test computes. Tests run with `device` as torch's default device."""

    backend: str
    instruction_set: str | None = None
    device: str = "cpu"
    slow: bool = False  # so that a test does less of the same there

    def leaves_out(self, seed: int) -> bool:
        """Most examples of a random search, where it is slow."""
        return self.slow and seed % 4 != 0


_SETS = {"x86_64": ("avx512", "avx2", "sse4"), "aarch64": ("neon",)}.get(platform.machine(), ("generic",))
REFERENCE = {"reference": Target("reference")}
NATIVE = {f"native-{isa}": Target("native", isa) for isa in _SETS}
TRITON = (
    {"triton-cuda": Target("triton", device="cuda")}
    if torch.cuda.is_available()
    else {"triton": Target("triton", slow=True)}
)
if "triton" in TRITON and backends.status("triton").available:
    import interpreter

    interpreter.adjust()
TARGETS = {**REFERENCE, **NATIVE, **TRITON}


@contextlib.contextmanager
def computing_on(target: Target) -> Iterator[Target]:
    """Compute there, or skip the test where that cannot be; with FASTVAE_REQUIRE_NATIVE=1 a native library that does
    not load is a failure, and on Linux so is a missing Triton."""
    available, why_not = backends.status(target.backend)[1:]
    if not available:
        needed = ("native", "triton") if platform.system() == "Linux" else ("native",)
        required = target.backend in needed and os.environ.get("FASTVAE_REQUIRE_NATIVE") == "1"
        (pytest.fail if required else pytest.skip)(why_not)
    with contextlib.ExitStack() as stack:
        stack.enter_context(fastvae.use_backend(target.backend))
        if target.instruction_set:
            if target.instruction_set not in native_backend.instruction_sets():
                pytest.skip(f"this CPU or library has no {target.instruction_set}")
            stack.callback(native_backend.use_instruction_set, os.environ.get("FASTVAE_CPU_ISA") or None)
            native_backend.use_instruction_set(target.instruction_set)
        if target.device != "cpu":
            stack.enter_context(torch.device(target.device))
        yield target


@pytest.fixture(params=TARGETS)
def backend(request: pytest.FixtureRequest) -> Iterator[Target]:
    with computing_on(TARGETS[request.param]) as target:
        yield target


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Only the native library, with each of its instruction sets."""
    with computing_on(NATIVE[request.param]) as target:
        yield target
