"""The backends that the tests run on: every available backend, and every instruction set of the native one."""

import contextlib
import ctypes
import os
import platform
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Before torch is imported: its idle threads must not spin while other processes need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from support import host_simt

# Before Triton is imported: where there is no GPU, kernels run on the CPU, Triton's in its interpreter and those in
# CUDA C++ in a build for the host.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("FASTVAE_CUDA_LIBRARY", str(host_simt.LIBRARY))

from hypothesis import HealthCheck, settings

# Freed memory is kept, by glibc, as pages that are new to the process are a fourth of the time of the formulas.
with contextlib.suppress(AttributeError, TypeError):  # another libc
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    libc = ctypes.CDLL(None)
    if libc.mallopt(M_MMAP_THRESHOLD, 2**25):
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)

from support.helpers import DTYPES

import fastvae
from fastvae import backends
from fastvae.backends import native_library

settings.register_profile(
    "quick",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=(HealthCheck.function_scoped_fixture, HealthCheck.too_slow),
)
settings.register_profile("long", settings.get_profile("quick"), derandomize=False, max_examples=500)
settings.register_profile("gpu", settings.get_profile("quick"), max_examples=3)  # compiling takes most of it
settings.load_profile(os.environ.get("FASTVAE_HYPOTHESIS", "quick"))

# Memory that torch.empty hands out starts as NaN, so that a result nobody wrote is seen.
torch.use_deterministic_algorithms(True, warn_only=True)


class Target(NamedTuple):
    """A backend, instruction set and device to compute on. Tests run with `device` as torch's default device."""

    backend: str
    instruction_set: str | None = None
    device: str = "cpu"
    slow: bool = False  # so that a test does less of the same there

    def leaves_out(self, seed: int) -> bool:
        """Tells whether an example of a random search is left out: most are, where the backend is slow."""
        return self.slow and seed % 4 != 0


_X86, _ARM = ("avx512", "avx2", "sse4"), ("neon",)
_SETS = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}.get(platform.machine(), ("generic",))
REFERENCE = {"reference": Target("reference")}
NATIVE = {f"native-{isa}": Target("native", isa) for isa in _SETS}
TRITON = (
    {"triton-cuda": Target("triton", device="cuda")}
    if torch.cuda.is_available()
    else {"triton": Target("triton", slow=True)}
)
CUDA = (
    {"cuda": Target("cuda", device="cuda")} if torch.cuda.is_available() else {"cuda-host": Target("cuda", slow=True)}
)
if "triton" in TRITON and backends.status("triton").available:
    from support import interpreter

    interpreter.adjust()
TARGETS = {**REFERENCE, **NATIVE, **TRITON, **CUDA}


REQUIRE_GPU = os.environ.get("FASTVAE_REQUIRE_GPU") == "1"


def pytest_configure(config: pytest.Config) -> None:
    """Builds what is not built yet, before workers start."""
    if REQUIRE_GPU and not torch.cuda.is_available():
        raise pytest.UsageError("there is no GPU")
    if not hasattr(config, "workerinput") and os.environ.get("FASTVAE_CUDA_LIBRARY") == str(host_simt.LIBRARY):
        try:
            host_simt.build()
        except (OSError, RuntimeError) as error:  # no CMake, or a mistake: the tests that need it say so
            warnings.warn(str(error), stacklevel=1)
            os.environ["FASTVAE_CUDA_LIBRARY"] = ""


# The CUDA kernels on the host run one thread at a time. They take part in the tests of ops, but for those of
# test_every_op.py that are not about what kernels do with their inputs, and for these files.
OF_NO_KERNEL = ("categorical", "triton_early_exit")
OF_INPUTS = ("layouts", "half", "not_finite", "opcheck")


def _leaves_out(item: pytest.Item) -> bool:
    file = item.path.stem.removeprefix("test_")
    of_kernels = (item.path.parent.name == "ops" and file not in OF_NO_KERNEL) or file == "philox"
    kept = of_kernels and (file != "every_op" or any(what in item.name for what in OF_INPUTS))
    return "[cuda-host" in item.name and not kept


# Where a backend is slow, it takes each case of these in one of the two dtypes, by turns.
IN_TWO_DTYPES = ("test_sizes", "test_weights", "test_layouts", "test_far_from_the_origin")


def _in_the_other_dtype(items: list[pytest.Item]) -> set[pytest.Item]:
    """The cases that are left out, one of each pair; a case that was asked for in one dtype alone is not."""
    of_tests: dict[tuple[object, ...], dict[str, list[pytest.Item]]] = {}  # the cases of each test of each op
    for item in items:
        parameters: dict[str, Any] = (
            item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        )
        backend, dtype = parameters.get("backend", ""), parameters.get("dtype")
        if dtype in DTYPES and TARGETS.get(backend, Target("")).slow and item.name.startswith(IN_TWO_DTYPES):
            test = item.path, item.name.partition("[")[0], backend, parameters.get("name")
            of_tests.setdefault(test, {}).setdefault(item.name.replace(str(dtype), ""), []).append(item)
    return {
        both[(number + turn) % 2]
        for number, cases in enumerate(of_tests.values())
        for turn, both in enumerate(cases.values())
        if len(both) == 2
    }


# `pytest --quick` leaves out what takes long and seldom tells anything new: all instruction sets but the best, kernels
# for GPUs, which are slow on a CPU, what the compiler compiles, and what starts programs or trains.
BEST = native_library.instruction_sets()[:1] if backends.status("native").available else []
QUICK = {"reference", *(f"native-{isa}" for isa in BEST)}
LONG_FILES = (
    "bench",
    "bench_compare",
    "c_interface",
    "cold_start",
    "compile",
    "cuda_on_host",
    "on_gpu",
    "demo",
    "examples",
    "fuzz",
    "gpu_run",
    "bounds",
    "installed",
    "main",
    "native_interruption",
    "native_library",
    "other_devices",
    "triton",
    "triton_compile",
    "triton_early_exit",
)
LONG_TESTS = (
    "anchors_of_the_whole",
    "budget",
    "compile",
    "environment",
    "inductor",
    "it_learns",
    "little_terms",
    "many_rows",
    "memory_of_a_second_derivative",
    "opcheck",
    "trains",
    "transforms",
    "triton",
    "variable",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out what takes long, most of the time")


def _takes_long(item: pytest.Item) -> bool:
    backend = BACKEND.search(item.name)
    function = item.name.partition("[")[0]
    return (
        (backend is not None and backend[1] not in QUICK)
        or item.path.stem.removeprefix("test_") in LONG_FILES
        or any(what in function for what in LONG_TESTS)
    )


# Files in which many tests look at what was made once, at some cost: they are run by one worker.
OF_ONE_WORKER = ("test_triton_compile", "test_cold_start", "test_cuda_on_host", "test_bounds")


BACKEND = re.compile(rf"(?<=[\[-])({'|'.join(map(re.escape, TARGETS))})(?=[\]-])")  # in the name of a test


def _group(nodeid: str) -> str:
    """The name of the group of tests that share what is expensive: a file, or a test on all backends, which are held to
    the same values (`helpers.remembered`)."""
    file, _, test = nodeid.partition("::")
    return file if Path(file).stem in OF_ONE_WORKER else f"{file}::{BACKEND.sub('', test, count=1)}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives a worker a group at a time, with `-n` and where no other `--dist` is asked for."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Groups(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick = config.getoption("--quick")
    left_out = {item for item in items if _leaves_out(item) or (quick and _takes_long(item))}
    left_out |= _in_the_other_dtype(items)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item not in left_out:
            groups.setdefault(_group(item.nodeid), []).append(item)
    items[:] = [item for members in groups.values() for item in members]


@contextlib.contextmanager
def computing_on(target: Target) -> Iterator[Target]:
    """Computes there, or skips the test where that cannot be. With FASTVAE_REQUIRE_NATIVE=1 a native library that does
    not load is a failure; so are, on Linux, a missing Triton and, without a GPU, missing CUDA kernels for the host.
    With FASTVAE_REQUIRE_GPU=1 Triton and the CUDA kernels must be there."""
    available, why_not = backends.status(target.backend)[1:]
    if not available:
        needed = ["native", "triton", "cuda"] if platform.system() == "Linux" else ["native"]
        needed = needed[:2] if torch.cuda.is_available() else needed  # where the CUDA library is built by hand
        required = target.backend in needed and os.environ.get("FASTVAE_REQUIRE_NATIVE") == "1"
        required |= target.backend in ("triton", "cuda") and REQUIRE_GPU
        (pytest.fail if required else pytest.skip)(why_not)
    print(target)  # pytest shows it where a test fails
    with contextlib.ExitStack() as stack:
        stack.enter_context(fastvae.use_backend(target.backend))
        if target.instruction_set:
            if target.instruction_set not in native_library.instruction_sets():
                pytest.skip(f"this CPU or library has no {target.instruction_set}")
            stack.callback(native_library.use_instruction_set, os.environ.get("FASTVAE_CPU_ISA") or None)
            native_library.use_instruction_set(target.instruction_set)
        if target.device != "cpu":
            stack.enter_context(torch.device(target.device))
        yield target


def reachable() -> list[Target]:
    """The backends that can compute here, for a test that makes something costly once and runs it on all."""
    found = []
    for target in TARGETS.values():
        with contextlib.suppress(pytest.skip.Exception), computing_on(target):
            found.append(target)
    return found


@pytest.fixture(params=TARGETS)
def backend(request: pytest.FixtureRequest) -> Iterator[Target]:
    with computing_on(TARGETS[request.param]) as target:
        yield target


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Makes torch's compiler forget everything, before and after the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Runs the test on the native library alone, with each of its instruction sets."""
    with computing_on(NATIVE[request.param]) as target:
        yield target
