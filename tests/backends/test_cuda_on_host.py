"""The CUDA library: what its tests on the host see, what its machine code is, and how it says that it is not there.

That the kernels are right is for the tests of the ops, where `cuda-host` is one of the backends.
"""

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import CUDA, computing_on
from support import host_simt
from support.ahead_of_time import by_name, innermost_loops, opcodes, tool
from support.helpers import DTYPES, HALVES, LAYOUTS, Results, assert_same, draw, evaluate, needing_gradients
from support.ops import FUSED, op_named
from torch import Tensor

import fastvae
from fastvae.backends import cuda

KERNELS = host_simt.ROOT / "kernels"


@pytest.fixture
def library() -> Iterator[None]:
    with computing_on(next(iter(CUDA.values()))):
        yield


@pytest.mark.parametrize("name", FUSED)
def test_same_bits_every_time(library: None, name: str) -> None:
    op = op_named(name, torch.float32, S=3 if name in ("reparameterize", "sample_gauss") else 150, N=139, D=9)
    assert_same(evaluate(op.fast, op.inputs), evaluate(op.fast, op.inputs))


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "agg_log_prob": lambda z: fastvae.agg_log_prob(z, z, z),
    "agg_entropy": lambda z: fastvae.agg_entropy(z, z, z),
    "kl_decomposition": lambda z: sum(x.sum() for x in fastvae.kl_decomposition(z, z, z) if isinstance(x, Tensor)),
    "sample_gauss": lambda z: fastvae.sample_gauss(z, z, outputs=("kl",), reduction="batchmean").kl,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_workspace_that_is_too_small_is_an_error(library: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(cuda, "_workspace_size", lambda *_: 128)
    with pytest.raises(RuntimeError, match="the workspace is too small"):
        CALLS[name](torch.randn(5, 3))


@pytest.mark.parametrize("name", CALLS)
def test_one_call_of_the_library_each_way(library: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    called: list[str] = []
    function = cuda._function

    def noted(asked: str) -> Callable[..., int]:
        if not asked.endswith("_workspace"):
            called.append(asked)
        return function(asked)

    monkeypatch.setattr(cuda, "_function", noted)
    result = CALLS[name](torch.randn(5, 3, requires_grad=True))
    result.sum().backward()
    assert called == [name, f"{name}_backward"]


# Grids.


def test_a_grid_that_no_gpu_takes_is_an_error(library: None) -> None:
    """A grid of 2^32 blocks, which would be none in 32 bits, is an error."""
    rows = (None, 0) * 4
    status = cuda.library().fastvae_cuda_kl_gauss(0, *rows, 2**40, 0, 1, 1.0, None, None, 0, None)
    assert b"more blocks" in cuda.library().fastvae_cuda_status_string(status)


def test_a_row_is_as_long_as_memory_allows(library: None) -> None:
    """A row of more columns than a block for 1024 each could have in a grid's y."""
    x = torch.linspace(-3, 3, 2**26 + 1)[None]
    kl = cuda.kl_gauss(x, x, None, None, "none")
    torch.testing.assert_close(kl, (x * x + x.expm1() - x) / 2, atol=1e-6, rtol=1e-6)
    upstream = torch.ones(1, 1, device=x.device).expand_as(x)
    (d_mu,) = cuda.kl_gauss_backward(upstream, x, x, None, None, "none", (True, False, False, False))
    assert torch.equal(d_mu, x)


def test_a_capture_that_refuses_is_an_error_that_helps(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that CUDA does not load while the stream is being captured (900, 901)."""
    for status, helps in ((1900, True), (1901, True), (1700, False)):
        monkeypatch.setattr(cuda, "_function", lambda _, status=status: lambda *arguments: status)
        with pytest.raises(RuntimeError, match=f"status {status}") as error:
            fastvae.kl_gauss(torch.ones(2, 3), torch.ones(2, 3))
        assert ("run the step once before it is captured" in str(error.value)) == helps


@pytest.mark.parametrize("current", [0, 1])
def test_the_stream_is_that_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch, current: int) -> None:
    """The tensors' device is made the current one where it is not, as a launch is on that."""
    said: list[object] = []

    def entered(device: torch.device) -> contextlib.AbstractContextManager[None]:
        said.append(device.index)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: f"stream of {index}", raising=False)
    monkeypatch.setattr(cuda, "_function", lambda name: lambda *arguments: said.append((name, *arguments)))
    cuda._run("sample_gauss", torch.float64, torch.device("cuda", 1), (), "arguments")
    assert said == [*([1] if current == 0 else []), ("sample_gauss", 1, "arguments", None, 0, "stream of 1")]


def test_partial_sums_take_little_memory() -> None:
    """No partial sums where there is one block; one for each block, or in each column."""
    if not cuda.status()[0]:
        pytest.skip(cuda.status()[1])
    for dtype in DTYPES:
        assert cuda._workspace_size("kl_gauss", dtype, 256, 0, 32) == 0
        assert cuda._workspace_size("kl_gauss", dtype, 1, 0, 2**26) <= 2**20
        assert cuda._workspace_size("kl_gauss", dtype, 2**20, 1, 128) <= 2**20


# Accesses of 16 bytes.


def elementwise(D: int, dtype: torch.dtype, lay: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Every result and gradient of the elementwise ops, all inputs and upstream gradients laid out alike."""

    def at_hand(x: torch.Tensor) -> torch.Tensor:
        return lay(x) if x.ndim else x

    def on(fast: Callable[..., Results], **shapes: tuple[int, ...]) -> list[torch.Tensor]:
        inputs = {name: lay(draw(*shape, seed=n).to(dtype)) for n, (name, shape) in enumerate(shapes.items())}
        return evaluate(fast, needing_gradients(inputs), lambda o: at_hand(draw(*o.shape, seed=9).to(o.dtype)))

    results = []
    rows = {"mu": (13, D), "logvar": (13, D)}
    for prior in ({}, {"prior_mu": (D,), "prior_logvar": (D,)}, {"prior_mu": (13, D), "prior_logvar": (13, D)}):
        for reduction in ("none", "sample", "dim", "sum"):
            results += on(functools.partial(fastvae.kl_gauss, reduction=reduction), **rows, **prior)
    for keep in (False, True):
        results += on(functools.partial(fastvae.sample_gauss, n_samples=2, seed=3, save_noise=keep), **rows)
    return results


@pytest.mark.parametrize("layout", ["unaligned", "chunked"])
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
@pytest.mark.parametrize("D", [8, 36, 40, 33])
def test_same_bits_wherever_rows_begin(library: None, D: int, dtype: torch.dtype, layout: str) -> None:
    """Rows give the same bits at multiples of 16 bytes or not, in memory of their own or between other numbers."""
    assert_same(elementwise(D, dtype, LAYOUTS[layout]), elementwise(D, dtype, LAYOUTS["contiguous"]))


def test_loads_are_of_16_bytes_where_they_can_be(tmp_path: Path) -> None:
    """Vectors of mu [5, D] and logvar [5, D] are loaded once, unless a row does not begin at a multiple of 16 bytes."""
    call = "Vector<In> vectors[n / size];"
    library = library_with(tmp_path, True, "kl_gauss", "vectors.h", call, f"fputc(35, stderr); {call}")
    code = f"""
import ctypes, sys, numpy as np
library = ctypes.CDLL({str(library)!r})
p, n = (lambda x, at=0: ctypes.c_void_p(x.ctypes.data + 4 * at)), ctypes.c_int64
x, out, memory = (np.full(size, number, np.float32) for size, number in ((5 * 48, 0), (5 * 33, np.nan), (1 << 16, 0)))
for D, stride, at in ((32, 32, 0), (32, 36, 4), (32, 32, 1), (32, 33, 0), (33, 36, 0)):
    status = library.fastvae_cuda_kl_gauss(
        0, p(x, at), n(stride), p(x), n(stride), None, n(0), None, n(0), n(5), n(D), 0, ctypes.c_double(1), p(out),
        p(memory), n(1 << 18), None)
    assert status == 0 and not out[:5 * D].any()
    sys.stderr.write(".")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert [len(marks) for marks in ran.stderr.split(".")] == [2 * 5 * 8, 2 * 5 * 8, 0, 0, 0, 0], ran.stderr


# What is run on the host, where mistakes are put into the source.


OTHER_DTYPES = """
        case FASTVAE_CUDA_F64: return f(double());
        case FASTVAE_CUDA_BF16: return f(bfloat16());
        case FASTVAE_CUDA_F16: return f(float16());"""


def library_with(tmp_path: Path, bulk: bool, source_name: str, file: str, before: str, after: str) -> Path:
    """A library of one source's kernels, a piece of a file of it replaced; their copies in bulk or by each thread. In
    float32 alone, as the compiler takes its time."""
    shutil.copytree(KERNELS, tmp_path / "kernels")
    for name, old, new in ((file, before, after), ("numbers.h", OTHER_DTYPES, "")):
        path = tmp_path / "kernels" / "cuda" / name
        source = path.read_text()
        assert old in source
        path.write_text(source.replace(old, new))
    folders = tmp_path / "kernels" / "include", tmp_path / "kernels" / "cuda"
    library = tmp_path / "library.so"
    defined = ["-DFASTVAE_ISA=cuda", "-DFASTVAE_HOST_SIMT", f"-DFASTVAE_CUDA_BULK={int(bulk)}"]
    checked = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    options = ["-xc++", "-std=c++20", "-O0", "-shared", "-fPIC", *checked, *defined, f"-I{folders[0]}"]
    command = [host_simt.needed("c++"), *options, str(folders[1] / f"{source_name}.cu"), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def run_with(
    tmp_path: Path, bulk: bool, file: str, before: str, after: str, skip: int = 1, S: int = 9, N: int = 130
) -> subprocess.CompletedProcess[str]:
    """A joint by kernels in which a piece of source was replaced."""
    library = library_with(tmp_path, bulk, "agg_log_prob", file, before, after)
    code = f"""
import ctypes, numpy as np  # and not torch, which takes seconds to import
library = ctypes.CDLL({str(library)!r})
z, mu, logvar = (np.random.default_rng(n).standard_normal((n, 20), np.float32) for n in ({S}, {N}, {N} + 1))
mu, logvar = 3 * mu, logvar[:{N}] - 6  # far apart
z = mu[:{S}] + z * np.exp(logvar[:{S}] / 2)
joint, memory = np.empty({S}, np.float32), np.empty(1 << 24, np.uint8)
p, n, w = (lambda x: ctypes.c_void_p(x.ctypes.data)), ctypes.c_int64, ctypes.c_double
status = library.fastvae_cuda_agg_log_prob(
    0, p(z), n(20), p(mu), n(20), p(logvar), n(20), None, w(0), None, w(0), w(0), n({S}), n({N}), n(20),
    p(joint), {skip}, p(memory), n(1 << 24), None)
pairs = -(np.square(z[:, None].astype(float) - mu) * np.exp(-logvar) + logvar + np.log(2 * np.pi)).sum(-1) / 2
print(status, bool(np.abs(joint - np.logaddexp.reduce(pairs, 1)).max() < 1e-4))
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


class Mistake(NamedTuple):
    file: str
    before: str
    after: str
    seen: str  # in what is printed
    bulk: tuple[bool, ...] = (True,)


BOTH = (True, False)
BARRIER, NO_BARRIER = "if (!kEarly) {\n                __syncthreads();", "if (!kEarly) {"
WAIT = "shared_.barriers[turn.place()].wait(turn.parity(), __LINE__);"
SKIP = "if (!writes_sum<T>() || i() >= p.S) return;"
MISTAKES = {
    "none": Mistake("tile.h", "#pragma once", "#pragma once", "0 True", BOTH),
    "no wait for a copy": Mistake("ptx.h", "for (; int(groups_.size()) > n;", "for (; false;", "0 False", (False,)),
    "no wait for a bulk copy": Mistake("ptx.h", WAIT, "", "a block ends before its copies"),
    "a wait for the wrong phase": Mistake("ptx.h", WAIT, WAIT.replace("turn.parity()", "!turn.parity()"), "never come"),
    "fewer bytes expected": Mistake("ptx.h", ".expect(bytes);", ".expect(bytes - 16);", "expects other bytes"),
    "a size not of 16 bytes": Mistake("tile.h", "n * kBytes);", "n * kBytes - 4);", "pieces of 16 bytes"),
    "no barrier after the wait": Mistake("tile.h", BARRIER, NO_BARRIER, "0 False", (False,)),
    "no barrier between bulk copies": Mistake("tile.h", BARRIER, NO_BARRIER, "never come"),
    "a piece that is not aligned": Mistake("tile.h", "alignas(16) T tops", "T tops", "misaligned address"),
    "a barrier that some skip": Mistake("row_sums.h", SKIP, "if (i() >= p.S) return; __syncthreads();", "never come"),
}


@pytest.mark.parametrize(
    ("bulk", "mistake"), [pytest.param(bulk, m, id=f"{name}-{bulk}") for name, m in MISTAKES.items() for bulk in m.bulk]
)
def test_mistakes_are_seen(tmp_path: Path, bulk: bool, mistake: Mistake) -> None:
    ran = run_with(tmp_path, bulk, *mistake[:3])
    assert mistake.seen in ran.stdout + ran.stderr


def test_tiles_stop_early(tmp_path: Path) -> None:
    """Tiles stop early, all but those of the samples' own columns, after one chunk of dimensions of three; none when
    told not to."""
    call = "far = f(stage, chunk,"
    visited = {}
    for skip in (0, 1):
        ran = run_with(
            tmp_path / str(skip), True, "tile.h", call, f"if (!threadIdx.x) fputc(35, stderr); {call}", skip, 128, 1100
        )
        assert "0 True" in ran.stdout
        visited[skip] = ran.stderr.count("#")
    assert visited == {0: 9 * 3, 1: 3 + 8}


def test_the_polynomial_of_an_exponential(tmp_path: Path) -> None:
    """The polynomial of an exponential is within 2 ulp of it down to 2^-126, then 0; NaN stays NaN."""
    (tmp_path / "exponential.cpp").write_text(
        '#include "exponentials.h"\nextern "C" void powers(float *x, int n)'
        "{ for (; n--; ++x) *x = fastvae::cuda::exp2_by_polynomial(*x); }"
    )
    library = tmp_path / "library.so"
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-DFASTVAE_ISA=cuda", "-DFASTVAE_HOST_SIMT"]
    folders = [f"-I{KERNELS / 'include'}", f"-I{KERNELS / 'cuda'}"]
    subprocess.run(
        [host_simt.needed("c++"), *options, *folders, str(tmp_path / "exponential.cpp"), "-o", str(library)],
        check=True,
    )
    x = torch.cat((torch.linspace(-126, 1, 1 << 18), torch.tensor([-127.0, -300.0, -torch.inf, torch.nan])))
    y = x.clone()
    ctypes.CDLL(str(library)).powers(ctypes.c_void_p(y.data_ptr()), len(y))
    assert (y[:-4] / torch.exp2(x[:-4].double()) - 1).abs().max() < 2 * torch.finfo(torch.float32).eps
    assert (y[-4:-1] == 0).all()
    assert y[-1].isnan()


# Machine code.


@functools.cache
def machine_code(source_name: str) -> tuple[str, str]:
    """The report of ptxas on a source's kernels for sm_90, and their machine code; skips without nvcc. Of the
    marginals', that is of the joint's too."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    host_simt.BUILD.mkdir(parents=True, exist_ok=True)
    cubin = host_simt.BUILD / f"{source_name}-{os.getpid()}.cubin"
    options = ["-std=c++20", "-O3", "-arch=sm_90", "-Xptxas", "-v", "-Werror", "all-warnings", "-DFASTVAE_ISA=cuda"]
    source = KERNELS / "cuda" / f"{source_name}.cu"
    command = [nvcc, *options, f"-I{KERNELS / 'include'}", "-cubin", "-o", str(cubin), str(source)]
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        return said, tool("nvdisasm", "-c", str(cubin))
    finally:
        cubin.unlink(missing_ok=True)


def code_of(name: str, source_name: str = "agg_log_prob_marginals", types: str = "") -> dict[str, str]:
    """The machine code of the kernels of that name, and of template arguments that begin so, by mangled name."""
    sections = re.split(r"^\.text\.(\S+):$", machine_code(source_name)[1], flags=re.M)
    by_symbol = zip(sections[1::2], sections[2::2], strict=True)
    found = {symbol: code for symbol, code in by_symbol if f"{len(name)}{name}I{types}" in symbol}
    assert found
    return found


def kernels(name: str, types: str = "") -> dict[str, list[dict[str, int]]]:
    """The instructions of each innermost loop of the kernels of that name, by mangled name."""
    code = code_of(name, types=types)
    return {symbol: [by_name(opcodes(loop)) for loop in innermost_loops(lines)] for symbol, lines in code.items()}


def hottest(loops: list[dict[str, int]], opcode: str) -> dict[str, int]:
    return max(loops, key=lambda loop: loop.get(opcode, 0) / sum(loop.values()))


def usage(said: str) -> list[tuple[str, int, int, int]]:
    """The usage of each kernel that ptxas tells of: mangled name, bytes spilled, registers, bytes of shared memory."""
    found = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
        r"(?:.*?(\d+) bytes smem)?",
        re.sub(r"\n(?!ptxas info\s*: Compiling)", " ", said),
    )
    return [
        (name, int(stores) + int(loads), int(used), int(shared or 0)) for name, stores, loads, used, shared in found
    ]


@pytest.mark.parametrize(
    ("source_name", "count"), [("agg_log_prob_marginals", 20), ("cross_log_prob", 12), ("kl_decomposition", 11)]
)
def test_registers_and_shared_memory(source_name: str, count: int) -> None:
    """All kernels fit twice on a multiprocessor in float32, except for many dimensions; nothing spills."""
    kernels = usage(machine_code(source_name)[0])
    assert len(kernels) > count
    for symbol, spilled, registers, shared in kernels:
        assert spilled == 0, symbol
        assert shared <= 48 << 10
        wide = "Id" in symbol or re.search(
            "(joint_sumsIf|densitiesIf|EE)Lb1E", symbol
        )  # float64, or squares in two levels
        assert registers <= (255 if wide else 128), symbol


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_kernels_that_stop_early_do_not_spill(tmp_path: Path, target: str) -> None:
    """Kernels that stop early do not spill, nor the joint's sums at all, in float32, where half of the registers have
    to do."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    if target not in subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout:
        pytest.skip(f"this nvcc does not know {target}")
    (tmp_path / "early.cu").write_text("""#include "pull.h"
namespace fastvae::cuda {
using Early = OfShares<float, true>;
template __global__ void joint_sums<float, false, false>(Packed<float>, int64_t, RangeSums<float>);
template __global__ void joint_sums<float, false, true>(Packed<float>, int64_t, RangeSums<float>);
template __global__ void pull_on_rows<float, Early, false>(Packed<float>, Early, int64_t, RowParts<float>);
template __global__ void pull_on_columns<float, Early, false>(Packed<float>, Early, int64_t, ColumnParts<float>);
}""")
    options = ["-std=c++20", "-O3", f"-arch={target}", "-Xptxas", "-v", "-DFASTVAE_ISA=cuda"]
    folders = [f"-I{KERNELS / 'include'}", f"-I{KERNELS / 'cuda'}"]
    command = [nvcc, *options, *folders, "-cubin", "-o", str(tmp_path / "early.cubin"), str(tmp_path / "early.cu")]
    kernels = usage(subprocess.run(command, check=True, capture_output=True, text=True).stderr)
    assert len(kernels) == 4
    for symbol, spilled, registers, _ in kernels:
        assert spilled == 0, symbol
        assert registers <= 128, symbol


@pytest.mark.parametrize(
    ("name", "arithmetic", "floor"),
    [
        ("joint_sums", ("FFMA",), 0.92),
        ("pull_on_rows", ("FFMA", "FMUL"), 0.77),
        ("pull_on_columns", ("FFMA", "FMUL", "FADD"), 0.75),
    ],
)
def test_inner_loops_are_arithmetic(name: str, arithmetic: tuple[str, ...], floor: float) -> None:
    """Shares of the innermost loops in float32; and a load from shared memory gets at least four numbers."""
    for symbol, loops in kernels(name, "f").items():
        best = max(loops, key=lambda loop: sum(loop.get(op, 0) for op in arithmetic) / sum(loop.values()))
        assert sum(best.get(op, 0) for op in arithmetic) / sum(best.values()) >= floor, symbol
        squares = hottest(loops, "FFMA")
        assert squares["FFMA"] / squares["LDS"] >= 20, symbol


def test_copies_are_in_bulk() -> None:
    """Copies are in bulk from sm_90 on: by one thread, to an mbarrier that others try to wait at."""
    code = machine_code("agg_log_prob_marginals")[1]
    assert "UBLKCP" in code
    assert "SYNCS.PHASECHK" in code
    assert "LDGSTS" not in code


@pytest.mark.parametrize(("pulls", "slots"), [(False, 6.8), (True, 7.9)])
def test_marginals_share_exponentials_between_two_units(pulls: bool, slots: float) -> None:
    """The instructions of 64 pairs: those to issue, and those of the special-function unit, which take no longer."""
    for symbol, loops in kernels("marginal_sums").items():
        if f"marginal_sumsIfLb{int(pulls)}E" not in symbol:
            continue
        plain = min((loop for loop in loops if loop.get("MUFU", 0) >= 32), key=lambda loop: sum(loop.values()))
        assert sum(plain.values()) <= 64 * slots
        assert 0.93 * sum(plain.values()) <= 8 * plain["MUFU"] <= sum(plain.values())


@pytest.mark.parametrize(
    ("source_name", "name"),
    [
        ("kl_gauss", "kl_of_block"),
        ("kl_gauss", "kl_of_rows"),
        ("kl_gauss", "kl_backward"),
        ("sample_gauss", "sample_rows"),
        ("sample_gauss", "sample_backward"),
    ],
)
def test_elementwise_kernels_read_and_write_16_bytes(source_name: str, name: str) -> None:
    """Accesses to mu, logvar and what has their shape are of 16 bytes where rows allow, none of a half's size."""
    assert all(int(n) == 0 for n in re.findall(r"(\d+) bytes spill", machine_code(source_name)[0]))
    codes = code_of(name, source_name)
    assert len(codes) == 8  # four dtypes, and rows that do not allow for it
    for symbol, code in codes.items():
        names = opcodes(code.splitlines())
        wide = "Lb1E" in symbol
        assert (names.count("LDG.E.128") >= 2) == wide, symbol
        assert ("STG.E.128" in names) == (wide and name != "kl_of_rows"), symbol
        assert not (wide and any(n.endswith(".U16") for n in names if n.startswith(("LDG", "STG")))), symbol


# What the host asks of CUDA, by a runtime that says what it is asked and launches nothing.

RUNTIME = """
#include <cstdio>
#include <driver_types.h>
#include <vector_types.h>
static thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
static cudaError_t last = cudaSuccess;
static dim3 grid_, threads_;
extern "C" {
int current = 0, refuses = 0;  // the device; how often a kernel is refused
void **__cudaRegisterFatBinary(void *) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *, char *, const char *, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
}
char __cudaInitModule(void **) { return 1; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 threads, size_t, CUstream_st *) {
    grid_ = grid, threads_ = threads;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *threads, size_t *shared, void *stream) {
    *grid = grid_, *threads = threads_, *shared = 0, *static_cast<void **>(stream) = nullptr;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { const cudaError_t error = last; last = cudaSuccess; return error; }
cudaError_t cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *other) {
    const cudaStreamCaptureMode old = mode;
    mode = *other, *other = old;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, const void *) {
    std::printf("load%d ", mode);
    return last = refuses && refuses-- ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *, const void *) { return cudaSuccess; }
cudaError_t cudaLaunchKernel(const void *, dim3 grid, dim3 threads, void **, size_t, cudaStream_t) {
    std::printf("launch%d(%u,%u;%u) ", mode, grid.x, grid.y, threads.x);
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 threads, void **arguments, size_t, cudaStream_t) {
    return cudaLaunchKernel(nullptr, grid, threads, arguments, 0, nullptr);
}
}
"""


def test_what_is_launched(tmp_path: Path) -> None:
    """A kernel is loaded before its first launch by a thread on a device, in the mode in which a stream's capture
    allows for it (2, relaxed), which ends with that launch; and grids are in x."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    (tmp_path / "runtime.cpp").write_text(RUNTIME)
    options = ["-std=c++20", "-O0", "-arch=sm_90", "-shared", "--cudart=none", "-Xcompiler", "-fPIC"]
    folders = [f"-I{KERNELS / 'include'}", "-DFASTVAE_ISA=cuda"]
    sources = [str(KERNELS / "cuda" / "kl_gauss.cu"), str(tmp_path / "runtime.cpp")]
    subprocess.run([nvcc, *options, *folders, "-o", str(tmp_path / "library.so"), *sources], check=True)
    code = f"""
import ctypes, threading
library = ctypes.CDLL({str(tmp_path / "library.so")!r})
def kl(B, D, reduction):
    rows = [argument for _ in range(4) for argument in (None, ctypes.c_int64(D))]
    sizes, workspace = (ctypes.c_int64(B), ctypes.c_int64(D), reduction), ctypes.c_int64(1 << 40)
    status = library.fastvae_cuda_kl_gauss(0, *rows, *sizes, ctypes.c_double(1), None, None, workspace, None)
    ctypes.CDLL(None).fflush(None)
    print(status, flush=True)
kl(4, 4, 0), kl(4, 4, 0), kl(4, 4, 1)
kl(1, 2**26 + 1, 0), kl(2**20, 2**12, 2), kl(3, 2**26, 3)
thread = threading.Thread(target=kl, args=(4, 4, 0))
thread.start(), thread.join()
ctypes.c_int.in_dll(library, "current").value = 1
ctypes.c_int.in_dll(library, "refuses").value = 1
kl(4, 4, 0), kl(4, 4, 0), kl(4, 4, 0)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        "load2 launch2(1,1;256) 0",
        "launch0(1,1;256) 0",
        "load2 launch2(1,1;256) 0",  # another kernel
        "load2 launch2(65537,1;256) 0",
        "launch0(4096,1;256) load2 launch2(512,1;256) 0",
        "launch0(196608,1;256) launch0(1,1;256) 0",
        "load2 launch2(1,1;256) 0",  # another thread
        "load2 1900",  # another device, where it is refused and nothing is launched
        "load2 launch2(1,1;256) 0",
        "launch0(1,1;256) 0",
    ]


# Where it is not.


def say(library: str) -> str:
    code = "import fastvae; print(fastvae.backends.status('cuda'))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTVAE_CUDA_LIBRARY": library},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout


def test_a_library_that_does_not_load_is_a_reason_not_an_error(tmp_path: Path) -> None:
    said = say(str(tmp_path / "missing.so"))
    assert "available=False" in said
    assert "missing.so" in said


def test_a_build_that_fails_leaves_its_reason(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "bin").mkdir()
    for nvcc in (tmp_path / "nvcc", tmp_path / "bin" / "nvcc"):
        nvcc.write_text("#!/bin/sh\n[ $1 = --list-gpu-code ] && echo sm_90 && exit\necho 'error: a mistake'\nexit 1\n")
        nvcc.chmod(0o755)
    options = [f"-DSOURCE={host_simt.ROOT}", f"-DOUTPUT={tmp_path}", "-DVERSION=0", "-DWERROR=OFF"]
    script = str(KERNELS / "cuda" / "build.cmake")
    subprocess.run(
        [host_simt.needed("cmake"), *options, "-P", script], env=environment, check=True, capture_output=True
    )
    assert "error: a mistake" in (tmp_path / cuda.WHY_NOT).read_text()
    assert not (tmp_path / cuda.LIBRARY).exists()


def test_a_compiler_that_does_not_run_leaves_its_reason(tmp_path: Path) -> None:
    """The first one in PATH, before what an installation elsewhere has."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'no license' >&2\nexit 3\n")
    nvcc.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key not in ("CUDA_HOME", "CUDA_PATH")}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    options = [f"-DSOURCE={host_simt.ROOT}", f"-DOUTPUT={tmp_path}", "-DVERSION=0", "-DWERROR=OFF"]
    script = str(KERNELS / "cuda" / "build.cmake")
    subprocess.run(
        [host_simt.needed("cmake"), *options, "-P", script], env=environment, check=True, capture_output=True
    )
    assert f"{nvcc} does not run: no license" in (tmp_path / cuda.WHY_NOT).read_text()


@pytest.mark.parametrize(
    ("architectures", "built"),
    [
        ("", ["80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]),
        ("90", ["90,code=sm_90", "90,code=compute_90"]),
        ("90;80", ["80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]),
        ("9", []),
        ("90;100", []),
    ],
)
def test_architectures(tmp_path: Path, architectures: str, built: list[str]) -> None:
    """Architectures: all that the compiler knows, or those asked for, each of which it has to know; PTX of the last."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n[ $1 = --list-gpu-code ] && printf 'sm_80\\nsm_90\\n' && exit\necho \"$@\"\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    options = [f"-DSOURCE={host_simt.ROOT}", f"-DOUTPUT={tmp_path}", "-DVERSION=0", "-DWERROR=OFF"]
    command = [host_simt.needed("cmake"), *options, f"-DARCHITECTURES={architectures}", "-P"]
    subprocess.run([*command, str(KERNELS / "cuda" / "build.cmake")], env=environment, check=True, capture_output=True)
    if built:
        said = (tmp_path / "libfastvae_cuda.log").read_text()
        assert re.findall(r"-gencode=arch=compute_(\S+)", said) == built
    else:
        asked = architectures.split(";")[-1]
        assert f"does not know sm_{asked}, which ARCHITECTURES asks for" in (tmp_path / cuda.WHY_NOT).read_text()


def test_only_by_name() -> None:
    """CUDA kernels are chosen only by name until a measurement is committed that shows them faster."""
    assert all(names.index("cuda") > names.index("reference") for names in fastvae.backends.CANDIDATES.values())
