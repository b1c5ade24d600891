"""Measures what a GPU can do: bytes copied, fused multiply-adds and exponentials per second, by small Triton
kernels, and the multiply-adds of matrix products, by torch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Seconds = Callable[[Callable[[], object]], float]  # times a launch


class Ceilings(NamedTuple):
    """The most that the GPU can do per second."""

    copy: float  # bytes, read plus written, of a copy much larger than the cache
    fma: float  # float32
    ex2: float  # the hardware's 2^x, float32
    bf16: float  # multiply-adds of a matrix product
    tf32: float
    fp32: float


@triton.jit
def _copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < n), i < n)


@triton.jit
def _fma(out, a, b, repeats, BLOCK: tl.constexpr):
    """16 chains for each of 128 threads, 16 steps between branches"""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = i.to(tl.float32)
    factor, term = tl.zeros([BLOCK], tl.float32) + a, tl.zeros([BLOCK], tl.float32) + b
    for _ in range(repeats):
        for _ in tl.static_range(16):
            x = tl.fma(x, factor, term)
    tl.store(out + i, x)


@triton.jit
def _ex2(out, repeats, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = i.to(tl.float32) * 1e-6
    for _ in range(repeats):
        for _ in tl.static_range(16):
            x = tl.exp2(-x)
    tl.store(out + i, x)


def ceilings(device: str, seconds: Seconds, small: bool = False) -> Ceilings:
    """Measures the ceilings: the best of a few repeats; `small` is for a trial."""
    n, programs, repeats, block = (1 << 12, 2, 2, 256) if small else (1 << 29, 132 * 64, 2048, 2048)
    x = torch.randn(n, device=device)
    y = torch.empty_like(x)
    copy = 8 * n / seconds(lambda: _copy[(triton.cdiv(n, block),)](x, y, n, block))
    copy = max(copy, 8 * n / seconds(lambda: y.copy_(x)))
    out: Tensor = torch.empty(programs * block, device=device)
    count = 16 * repeats * programs * block
    fma = count / seconds(lambda: _fma[(programs,)](out, 0.999, 1e-3, repeats, block))
    ex2 = count / 4 / seconds(lambda: _ex2[(programs,)](out, max(1, repeats // 4), block))
    return Ceilings(copy, fma, ex2, *(product(device, seconds, kind, small) for kind in ("bf16", "tf32", "fp32")))


def product(device: str, seconds: Seconds, kind: str, small: bool) -> float:
    """Multiply-adds per second of a product of two square matrices."""
    n = 32 if small else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    try:
        return n**3 / seconds(lambda: a @ a)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
