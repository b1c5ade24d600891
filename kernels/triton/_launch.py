"""What the launchers share: rows and dtypes as kernels want them, tiles for elementwise work, the choice of a
configuration, and the kernel that adds up what several programs left."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.backends.contract import accumulation_dtype
from fastvae.backends.settings import switch

# Whether kernels run in Triton's interpreter, on tensors of any device: decided when Triton is first imported.
INTERPRETED: bool = triton.knobs.runtime.interpret
AUTOTUNE = bool(switch("FASTVAE_AUTOTUNE")) and not INTERPRETED

Config = dict[str, Any]  # keyword arguments of a kernel: block sizes, what depends on them, and launch options
Result = TypeVar("Result")


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉; Triton's own takes microseconds, as does its next_power_of_2."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not below n, and 1 for n below 1."""
    return 1 << max(0, n - 1).bit_length()


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


def resources(threads: int, registers: int) -> Config:
    """Launch options: so many threads, of at most so many registers. Where NVIDIA's compiler is not told how many it
    may use, it would rather spill a few than pass 80 or 128."""
    warps = {"num_warps": threads // target().warp}
    return warps | {"maxnreg": registers} if target().backend == "cuda" else warps


@functools.cache
def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype that a kernel on tensors of this dtype computes in, as a `tl.constexpr` parameter."""
    return tl.float64 if accumulation_dtype(dtype) == torch.float64 else tl.float32


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
    """Whether all are contiguous [n_rows, D], so that they may be taken for one long row."""
    return all(x is None or (x.shape[0] == n_rows and x.is_contiguous()) for x in tensors)


def empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@functools.lru_cache
def tile(n_rows: int, n_columns: int, elements: int = 0, num_warps: int = 4) -> Config:
    """Tiles for elementwise work on [n_rows, n_columns]: unless `elements` says how many, 16 for each thread where
    that leaves enough programs, else 4; and columns that waste less than a quarter of a block."""
    elements = elements or (2048 if n_rows * n_columns >= 1 << 20 else 512)
    columns = min(elements, max(4, next_power_of_2(n_columns)))
    while columns > 16 and cdiv(n_columns, columns) * columns > 1.25 * n_columns:
        columns //= 2
    column_blocks = max(1, cdiv(n_columns, columns))
    return {
        "column_blocks": column_blocks,
        "BLOCK_B": elements // columns,
        "BLOCK_D": columns,
        "num_warps": num_warps,
    }


def row_blocks(n_rows: int, config: Config) -> int:
    return cdiv(n_rows, config["BLOCK_B"])


def fastest(run: Callable[[Config], Result], configs: Sequence[Config], *problem: Any) -> Result:
    """run(config) in the first configuration or, where `FASTVAE_AUTOTUNE=1` asks for it, in the fastest: measured once
    for the device and the problem (names, dtypes, and sizes to a power of 2), and kept in Triton's cache directory."""
    if not AUTOTUNE or len(configs) == 1 or torch.cuda.is_current_stream_capturing():
        return run(configs[0])
    path = Path(triton.knobs.cache.dir) / "fastvae-tuned.json"
    if not _tuned and path.exists():
        _tuned.update(json.loads(path.read_text()))
    rounded = [next_power_of_2(p) if isinstance(p, int) and p > 0 else str(p) for p in problem]
    key = json.dumps([torch.cuda.get_device_name(), *rounded, configs])
    if key not in _tuned:
        times = [triton.testing.do_bench(lambda c=c: run(c), return_mode="median") for c in configs]
        _tuned[key] = times.index(min(times))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_tuned))
    return run(configs[_tuned[key]])


_tuned: dict[str, int] = {}


@triton.jit(do_not_specialize=["P"])
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
    columns = min(16, next_power_of_2(n))
    return {"BLOCK_P": 1024 // columns, "BLOCK_N": columns, "num_warps": 4}


def add_up(partials: Tensor, outs: Sequence[Tensor], scale: float = 1.0) -> None:
    """Each out [n] becomes scale * the sum over P of its partials [len(outs), P, n], in float64; one or two outs."""
    _, P, n = partials.shape
    block = columns_of_partials(n)
    second = (partials[1], outs[1]) if len(outs) == 2 else (None, None)
    _add_up[(cdiv(n, block["BLOCK_N"]), len(outs))](partials[0], outs[0], *second, P, n, scale, **block)
