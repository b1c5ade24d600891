"""The shared library itself: the same bits on any number of threads, forks, and what it exports."""

import functools
import mmap
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from conftest import NATIVE, Target, computing_on
from support.helpers import assert_same, evaluate
from support.ops import FUSED, Op, op_named
from torch import Tensor

import fastvae
from fastvae.backends import native as backend
from fastvae.backends import native_library


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def library() -> Iterator[None]:
    """The native backend, for what is the same for all instruction sets."""
    with computing_on(Target("native")):
        yield


@functools.cache
def problem(name: str, dtype: torch.dtype) -> Op:
    """A problem large enough for several threads."""
    return op_named(name, dtype, S=3 if name in ("reparameterize", "sample_gauss") else 507, N=611, D=33)


def results(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    op = problem(name, dtype)
    return evaluate(op.fast, op.inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_same_bits_on_any_number_of_threads(native: Target, name: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    serial = results(name, dtype)
    for threads in (1, 2, 3, 8, 2):
        torch.set_num_threads(threads)
        assert_same(results(name, dtype), serial)


def test_several_python_threads_at_once(native: Target) -> None:
    """One thread gets the thread pool, the others do without; none waits for ever, and all get the same bits."""
    torch.set_num_threads(2)
    expected = {name: results(name) for name in FUSED}
    wrong: list[object] = []

    def work(first: int) -> None:
        try:
            for n in range(2 * len(FUSED)):
                name = FUSED[(first + n) % len(FUSED)]
                assert_same(results(name), expected[name])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert wrong == []


def _in_child(arguments: tuple[Tensor, ...], expected: Tensor) -> None:
    computed = fastvae.agg_log_prob(*arguments)
    right = computed.tolist() == expected.tolist() and n_threads() in (2, None)
    os._exit(0 if right else 1)


def n_threads() -> int | None:
    """The number of threads of this process; None where the system does not say."""
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else None


@pytest.mark.parametrize("again", [False, True])
def test_forked_child(native: Target, again: bool) -> None:
    """A child of a process that has used its threads computes the same, on a thread of its own beside the one that it
    has, and its parent goes on."""
    torch.set_num_threads(2)
    op = problem("agg_log_prob", torch.float32)
    arguments = tuple(op.inputs[name].detach() for name in ("z", "mu", "logvar"))
    expected = fastvae.agg_log_prob(*arguments)
    for _ in range(2 if again else 1):
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(arguments, expected))
        child.start()
        child.join(timeout=60)
        alive = child.is_alive()
        child.kill()
        assert not alive, "the child hangs"
        assert child.exitcode == 0
    assert_same([fastvae.agg_log_prob(*arguments)], [expected])


# Instruction sets


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_the_environment_chooses_the_instruction_set(native: Target) -> None:
    code = """
import torch, fastvae
from fastvae.backends import native, status
mu = torch.linspace(-1, 1, 70).reshape(2, 35)
print(status("native").detail.split()[-1], fastvae.kl_gauss(mu, mu, reduction="none").tolist())
"""
    ran = run(code, FASTVAE_CPU_ISA=str(native.instruction_set), FASTVAE_BACKEND="native")
    mu = torch.linspace(-1, 1, 70).reshape(2, 35)
    assert ran.stdout.strip() == f"{native.instruction_set} {fastvae.kl_gauss(mu, mu, reduction='none').tolist()}"


def test_an_unknown_instruction_set_is_an_error_that_names_those_known(library: None) -> None:
    ran = run("from fastvae.backends import status; print(status('native'))", FASTVAE_CPU_ISA="mmx")
    assert "available=False" in ran.stdout
    assert f"FASTVAE_CPU_ISA=mmx: of this library the CPU can run {', '.join(native_library.instruction_sets())}" in (
        ran.stdout
    )
    with pytest.raises(ValueError, match="mmx"):
        native_library.use_instruction_set("mmx")


def test_best_instruction_set_by_default(library: None) -> None:
    code = "from fastvae.backends import status; print(status('native').detail.split()[-1])"
    assert run(code, FASTVAE_CPU_ISA="").stdout.strip() == native_library.instruction_sets()[0]


# What the linker may not do


def symbols(*options: str) -> list[tuple[str, str]]:
    """(kind, demangled name) of all that the library defines."""
    if shutil.which("nm") is None or sys.platform != "linux":
        pytest.skip("reads the symbols of Linux by nm")
    command = ["nm", "--demangle", "--defined-only", *options, native_library.library()._name]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [re.fullmatch(r"[0-9a-f]* (\S) (.*)", line) for line in listing.splitlines()]
    return [(m[1], m[2]) for m in found if m]


SETS = "|".join(target.instruction_set or "" for target in NATIVE.values())
OF_THE_POOL_AND_THE_DISPATCHER = re.compile(
    r"fastvae::(run_units\b|Worker::|set_poll\b|\(anonymous namespace\)::|cpu_has_|count_visits\b)"
)


def test_no_code_is_shared_between_instruction_sets(library: None) -> None:
    """The linker keeps one of several weak symbols of one name, and it might be the AVX-512 one."""
    functions = [(kind, name) for kind, name in symbols() if kind in "tTwWvVu" and ("::" in name or "(" in name)]
    assert len(functions) > 50, "the library was stripped"
    for kind, name in functions:
        sets = set(re.findall(rf"fastvae::({SETS})::", name))
        known = kind in "tT" and OF_THE_POOL_AND_THE_DISPATCHER.match(name)
        assert len(sets) == 1 or known, f"{kind} {name}"


def test_only_the_interface_is_exported(library: None) -> None:
    interface = {
        "fastvae_interface",
        "fastvae_version",
        "fastvae_poll",
        "fastvae_take_visits",
        "fastvae_instruction_sets",
        "fastvae_kernels_for",
    }
    assert interface == {name for _, name in symbols("--dynamic")} - {"_init", "_fini"}


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_torchs_threads(library: None) -> None:
    """The library computes on them, brings no OpenMP runtime of its own, and starts no thread."""
    ran = run("""
import os, torch, fastvae
torch.set_num_threads(3)
torch.randn(10**6).exp()
before = len(os.listdir("/proc/self/task"))
z = torch.randn(999, 9)
fastvae.agg_log_prob(z, z, z)
print(before, len(os.listdir("/proc/self/task")))
print(*{line.split()[-1] for line in open("/proc/self/maps") if ".so" in line})
""")
    (before, after), libraries = (line.split() for line in ran.stdout.splitlines())
    assert before == after != "1"
    assert sum(bool(re.search(r"/lib(gomp|omp|iomp5)\b", path)) for path in libraries) == 1


def test_large_results_are_asked_for_in_huge_pages(native: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(backend, "_MADVISE", lambda begin, n_bytes, advice: asked.append((begin, n_bytes)))
    mu, logvar = torch.zeros(1025, 1024), torch.zeros(1025, 1024)
    small = fastvae.reparameterize(mu[:64], logvar[:64], seed=1)
    assert not asked
    z = fastvae.reparameterize(mu, logvar, seed=1)
    (place,) = asked
    assert place[0] % mmap.PAGESIZE == 0
    assert z.data_ptr() <= place[0] < z.data_ptr() + mmap.PAGESIZE
    assert sum(place) == z.data_ptr() + z.nbytes
    assert torch.equal(z[:64], small)
    monkeypatch.setattr(backend, "_MADVISE", None)  # a system without
    assert torch.equal(fastvae.reparameterize(mu, logvar, seed=1), z)
