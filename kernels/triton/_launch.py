"""The parts that launchers share: the launch itself, rows and dtypes as kernels want them, tiles for elementwise work,
the choice of a configuration, and the kernel that adds up what several programs left.

A kernel is compiled for each combination of its constants, the dtypes and alignments of its pointers, and which of them
are None. None is compiled for a number of rows or of dimensions, nor for a stride: those are `do_not_specialize`, and
what a kernel must know about them is a constant with few values, such as the unit that they are counted in.
"""

import contextlib
import functools
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether kernels run in Triton's interpreter, on tensors of any device: decided when Triton is first imported.
INTERPRETED: bool = triton.knobs.runtime.interpret
AUTOTUNE = False  # whether `fastest` measures; fastvae/backends/triton.py sets it

LARGE = 1 << 20  # elements of elementwise work: enough that every program may have 16 for each thread
Config = dict[str, Any]  # keyword arguments of a kernel: block sizes, what depends on them, and launch options
Result = TypeVar("Result")


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉; Triton's own takes microseconds, as does its next_power_of_2."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not below n, and 1 for n below 1."""
    return 1 << max(0, n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants), where all constants come last in the kernel's parameters.

    Triton finds the binary that it has made for such arguments by describing each of them, which takes longer than
    many a kernel runs. On NVIDIA's GPUs this remembers it by what tells binaries apart: dtypes, which arguments are
    None, integers of more than 32 bits, constants, and, where a kernel's parameter is specialized on that, alignment or
    being 1. Nothing else may be specialized on. What is changed later of Triton's knobs for compiling is not seen."""
    observer = observed.by
    if target().backend != "cuda":  # AMD's compiler asks how large a tensor's storage is
        kernel[grid](*arguments, **constants)
        if observer:
            observer(None, grid, arguments)
        return
    parameters, binaries = _known.get(kernel.fn) or _known.setdefault(kernel.fn, (_specialized(kernel), {}))
    kinds = _kinds(arguments, parameters)
    key = (triton.runtime.driver.active.get_current_device(), *kinds, *constants.items())
    if found := binaries.get(key):
        binary, last = found
        grid = (*grid, 1, 1)
        binary[grid](*arguments, *last)
    else:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{kernel.__name__} has not run yet with such arguments, and a CUDA graph is being captured, while"
                " which no kernel can be compiled and loaded: run what is captured once before, with tensors of the"
                " same shapes and dtypes, forward and backward"
            )
        last = [constants[name] for name in kernel.arg_names[len(arguments) :]]
        binary = kernel[grid](*arguments, **constants)
        if binary is not None:  # as a hook may have it
            binaries[key] = binary, last
    if observer:
        observer(binary, grid, (*arguments, *last))


class _Observed(threading.local):
    """Who is told of this thread's launches, with the binary, or None where there is none to launch again, the grid
    and all arguments, constants included."""

    by: Callable[[Any, tuple[int, ...], Sequence[Any]], None] | None = None


observed = _Observed()


def _specialized(kernel: Any) -> list[tuple[bool, bool]]:
    """Whether Triton compiles anew, for each parameter: for an integer that is 1, and for a pointer that is aligned."""
    ones = [not p.do_not_specialize for p in kernel.params]
    return [(one, one and not p.do_not_specialize_on_alignment) for one, p in zip(ones, kernel.params, strict=True)]


def _kinds(arguments: tuple[Any, ...], specialized: list[tuple[bool, bool]]) -> list[object]:
    """The properties of a launch's arguments that its binary depends on."""
    kinds: list[object] = []
    for a, (ones, aligned) in zip(arguments, specialized, strict=False):  # which has the constants too
        if a is None:
            kinds.append(None)
        elif type(a) is int:
            kinds.append(1 if a == 1 and ones else int if -(2**31) <= a < 2**31 else "wide")
        elif type(a) is float:
            kinds.append(float)
        else:
            kinds.append((a.dtype,) if aligned and a.data_ptr() % 16 else a.dtype)
    return kinds


_Binaries = dict[tuple[object, ...], tuple[Any, list[Any]]]
_known: dict[Callable[..., None], tuple[list[tuple[bool, bool]], _Binaries]] = {}  # of each kernel


class Target(NamedTuple):
    backend: str  # "cuda", "hip", or none in the interpreter
    warp: int  # threads
    pairs_fmas: bool  # whether its compiler makes one instruction of two, of neighbouring registers


@functools.cache
def _target_of(driver: Any) -> Target:
    found = driver.get_current_target()
    return Target(found.backend, found.warp_size, found.backend == "cuda" and found.arch >= 100)


def target() -> Target:
    return Target("", 32, False) if INTERPRETED else _target_of(triton.runtime.driver.active)


def resources(on: Target, threads: int, registers: int) -> Config:
    """Launch options: so many threads, of at most so many registers. Where NVIDIA's compiler is not told how many it
    may use, it would rather spill a few than pass 80 or 128."""
    warps = {"num_warps": threads // on.warp}
    return warps | {"maxnreg": registers} if on.backend == "cuda" else warps


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of this dtype are computed in, and sums are given in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The same as a `tl.constexpr` parameter of a kernel."""
    return tl.float64 if accumulation_dtype(dtype) == torch.float64 else tl.float32


@overload
def rows(x: Tensor, n_rows: int) -> tuple[Tensor, int]: ...
@overload
def rows(x: Tensor | None, n_rows: int) -> tuple[Tensor | None, int]: ...
def rows(x: Tensor | None, n_rows: int) -> tuple[Tensor | None, int]:
    """x [n_rows, D], or [1, D] that serves all rows, with contiguous rows; and its row stride, 0 for the latter."""
    if x is None:
        return None, 0
    (n, D), (row, column) = x.shape, x.stride()
    if column != 1 and D > 1:
        x = x.contiguous()
        row = D
    return x, 0 if n == 1 != n_rows else row


def same_layout(n_rows: int, *tensors: Tensor | None) -> bool:
    """Whether all are contiguous [n_rows, D], so that they may be taken for one long row.

    torch calls a single row contiguous whatever its row stride is. Here it must have the stride D too, so that the last
    batch of a training run, which may be one row of wider ones, needs no other kernel than the batches before it."""
    return all(
        x is None or (x.shape[0] == n_rows and x.is_contiguous() and (n_rows > 1 or x.stride(0) == x.shape[1]))
        for x in tensors
    )


def unit_of(dtype: torch.dtype, *sizes: int) -> int:
    """The number of elements that all these row lengths and strides are multiples of: as many as 16 bytes hold, at
    least 4, or else 1. A kernel has it as a constant, gets the sizes divided by it, and multiplies them again."""
    unit = max(4, 16 // dtype.itemsize)
    return unit if all(size % unit == 0 for size in sizes) else 1


def in_units(inputs: Sequence[tuple[Tensor | None, int]], unit: int) -> list[Tensor | int | None]:
    """Tensors and their row strides as a kernel takes them, each stride after its tensor and counted in units."""
    return [part for x, stride in inputs for part in (x, stride // unit)]


def one_row(B: int, D: int, unit: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows, D and unit where [B, D] is taken for one long row. The unit is that of D, so that a batch with an odd
    number of rows needs no other kernel, and in large problems that of the long row."""
    n = B * D
    return 1, n, unit_of(dtype, n) if n >= LARGE else unit


@triton.jit
def load_rows(x, stride, row, column, inside, ACC: tl.constexpr, UNIT: tl.constexpr):
    """A tile [BB, BD] of x; the stride is counted in units."""
    return tl.load(x + row[:, None] * (tl.cast(stride, tl.int64) * UNIT) + column[None, :], inside, other=0.0).to(ACC)


@functools.cache
def nowhere(dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor for an output that this launch does not write: None would be another kernel."""
    return torch.empty(0, dtype=dtype, device=device)


def empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@functools.lru_cache
def tile(n_rows: int, n_columns: int, elements: int = 0, num_warps: int = 4, flat: bool = False) -> Config:
    """A tile for elementwise work on [n_rows, n_columns], of as many columns as waste less than a quarter of a block.

    Args:
        elements: of the tile; 0 for 16 for each thread where that leaves enough programs, else 4.
        flat: whether the columns are one long row, whose length depends on the batch: the tile then does not.
    """
    elements = elements or (2048 if n_rows * n_columns >= LARGE else 512)
    columns = elements if flat else min(elements, max(4, next_power_of_2(n_columns)))
    while not flat and columns > 16 and cdiv(n_columns, columns) * columns > 1.25 * n_columns:
        columns //= 2
    return {"BLOCK_B": elements // columns, "BLOCK_D": columns, "num_warps": num_warps}


def blocks_of(n_rows: int, n_columns: int, config: Config) -> tuple[int, int]:
    """The number of tiles below each other, and beside each other, at least one. Where one tile is as wide as the rows,
    kernels are told so (ALONE), but not for one long row, whose length depends on the batch."""
    return cdiv(n_rows, config["BLOCK_B"]), max(1, cdiv(n_columns, config["BLOCK_D"]))


def fastest(run: Callable[[Config], Result], configs: Sequence[Config], *problem: Any) -> Result:
    """run(config) in the first configuration or, where AUTOTUNE asks for it, in the fastest: measured once
    for the device and the problem (names, dtypes, and sizes to a power of 2), and kept in Triton's cache directory."""
    if not AUTOTUNE or len(configs) == 1:
        return run(configs[0])
    path = Path(triton.knobs.cache.dir) / "fastvae-tuned.json"
    rounded = [next_power_of_2(p) if isinstance(p, int) and p > 0 else str(p) for p in problem]
    key = json.dumps([torch.cuda.get_device_name(), *rounded, configs])
    if key not in _tuned:
        _tuned.update(_read(path))
    if not 0 <= _tuned.get(key, -1) < len(configs):
        if torch.cuda.is_current_stream_capturing():
            return run(configs[0])
        times = [triton.testing.do_bench(lambda c=c: run(c), return_mode="median") for c in configs]
        _tuned[key] = times.index(min(times))
        _write(path, _read(path) | _tuned)  # another process may have added to it
    return run(configs[_tuned[key]])


_tuned: dict[str, int] = {}


def _read(path: Path) -> dict[str, int]:
    """The choices made before; none where there is no such file, or one that cannot be understood."""
    try:
        found = json.loads(path.read_text())
        return {str(key): int(choice) for key, choice in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, tuned: dict[str, int]) -> None:
    """Writes a file beside the path and moves it there, so that nobody reads half of it. A folder that cannot be
    written is no reason to fail: it is measured again next time."""
    beside = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(json.dumps(tuned))
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def weight_of_each(n: int) -> float:
    """The weight of each of n in their mean; the mean of none is NaN."""
    return 1.0 / n if n else math.nan


@triton.jit(do_not_specialize=["P", "n"], do_not_specialize_on_alignment=["partials", "out", "partials2", "out2"])
def _add_up(partials, out, partials2, out2, P, n, scale: tl.float64, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[i] = scale * sum_p partials[p, i], in the order of p whatever the launch; likewise out2, where given."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    if partials2 is not None and tl.program_id(1) == 1:
        _add_up_one(partials2, out2, columns, P, n, scale, BLOCK_P, BLOCK_N)
    else:
        _add_up_one(partials, out, columns, P, n, scale, BLOCK_P, BLOCK_N)


@triton.jit
def _add_up_one(partials, out, columns, P, n, scale, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    result = sum_of_rows(partials, n, columns, columns < n, P, BLOCK_P) * tl.full([BLOCK_N], scale, tl.float64)
    if not out.dtype.element_ty.is_fp64():
        result = result.to(tl.float32)
    tl.store(out + columns, result, columns < n)


@triton.jit
def sum_of_rows(x, stride, columns, inside, P, BLOCK_P: tl.constexpr):
    """sum_p x[p stride + columns] in float64, for those of the columns [BN] that are inside."""
    total = tl.zeros([BLOCK_P, columns.shape[0]], tl.float64)
    for first in range(0, P, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        there = (p < P)[:, None] & inside[None, :]
        total += tl.load(x + p[:, None] * stride + columns[None, :], there, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


def columns_of_partials(n: int) -> Config:
    """A tile of partial sums [P, n]: few columns, so that there are many programs."""
    columns = 1 if n == 1 else 16
    return {"BLOCK_P": 1024 // columns, "BLOCK_N": columns, "num_warps": 4}


def add_up(partials: Tensor, outs: Sequence[Tensor], scale: float = 1.0) -> None:
    """Each out [n] becomes scale * the sum over P of its partials [len(outs), P, n], in float64; one or two outs."""
    _, P, n = partials.shape
    block = columns_of_partials(n)
    second = (partials[1], outs[1]) if len(outs) == 2 else (None, None)
    grid = (cdiv(n, block["BLOCK_N"]), len(outs))
    launch(_add_up, grid, partials[0], outs[0], *second, P, n, scale, **block)
