"""Measures what a GPU can do: its ceilings, by small Triton kernels, and matrix products, by torch."""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..harness import Ceilings, Run

Seconds = Callable[[Run], float]  # times a launch


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
    bandwidth = 8 * n / seconds(lambda: _copy[(triton.cdiv(n, block),)](x, y, n, block))
    bandwidth = max(bandwidth, 8 * n / seconds(lambda: y.copy_(x)))
    out: Tensor = torch.empty(programs * block, device=device)
    count = 16 * repeats * programs * block
    fma = count / seconds(lambda: _fma[(programs,)](out, 0.999, 1e-3, repeats, block))
    exponentials = count / 4 / seconds(lambda: _ex2[(programs,)](out, max(1, repeats // 4), block))
    return Ceilings(fma, exponentials, bandwidth)


def products(device: str, seconds: Seconds, small: bool = False) -> dict[str, float]:
    """Multiply-adds per second of products of two square matrices, by the kind of number."""
    n = 32 if small else 8192
    found = {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for kind in ("bf16", "tf32", "fp32"):
            a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
            torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
            found[kind] = n**3 / seconds(functools.partial(torch.matmul, a, a))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return found
