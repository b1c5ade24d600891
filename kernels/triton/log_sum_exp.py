"""A streaming log2 sum_j 2^s_j over tiles, a tile of terms at a time, as a maximum m and total = sum_j 2^(s_j - m);
ranges of columns are put together in order.

m is kept finite, so that no difference is NaN: the neutral element is (-largest, 0), and where terms are infinite total
is. NaN is passed over by the maximum, and found in the total.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch
from .elementary import LN2, LOG2E, largest


@triton.jit
def nothing(SHAPE: tl.constexpr, dtype: tl.constexpr):
    """The m and total of no terms."""
    return tl.zeros(SHAPE, dtype) - largest(dtype), tl.zeros(SHAPE, dtype)


@triton.jit
def highest(s, ACROSS: tl.constexpr):
    """The maximum over the passing columns of a tile [RO, RP, TO, TP]; ACROSS all lanes, or each lane's own."""
    m = tl.max(s, 1, keep_dims=True)
    if ACROSS:
        m = tl.max(m, 3, keep_dims=True)
    return m


@triton.jit
def summed(s, ACROSS: tl.constexpr):
    """The sum over the passing columns of a tile, likewise."""
    total = tl.sum(s, 1, keep_dims=True)
    if ACROSS:
        total = tl.sum(total, 3, keep_dims=True)
    return total


@triton.jit
def add_terms(m, total, carry, s, ACROSS: tl.constexpr):
    """Adds a tile of terms s to the sum so far. Returns the new m, total and carry; then 2^(s - m), its sum, and the
    factor that the sum so far was multiplied by. `carry` is what `total` has too much, after Kahan: there may be
    thousands of tiles."""
    new = tl.minimum(tl.maximum(m, highest(s, ACROSS)), largest(m.dtype))
    p = tl.exp2(s - new)
    part = summed(p, ACROSS)
    rescale = tl.exp2(m - new)
    old = total * rescale
    term = part - carry * rescale
    total = old + term
    carry = (total - old) - term
    return new, total, carry, p, part, rescale


@triton.jit
def across_lanes(m, total):
    """Adds the lanes' sums up, [RO, 1, TO, TP] -> [RO, 1, TO, 1]."""
    new = tl.max(m, 3, keep_dims=True)
    return new, tl.sum(total * tl.exp2(m - new), 3, keep_dims=True)


@triton.jit
def log_of(m, total):
    """The log of the sum, in nats."""
    wide = m.to(tl.float64) * tl.full([], LN2, tl.float64) + tl.log(total.to(tl.float64))
    return wide.to(m.dtype)


@triton.jit
def hint(log_sum):
    """A maximum to begin with, from a row's result in nats that the forward saved: terms that are nothing beside the
    sum are then known to be so from the first tile on. It is one bit, and what the result may have been rounded by,
    below that result."""
    eps: tl.constexpr = 2.3e-16 if log_sum.dtype == tl.float64 else 1.2e-7
    m = log_sum * LOG2E
    m = m - (1.0 + 32 * eps * tl.abs(m))
    return tl.where(m - m == 0, m, -largest(m.dtype))


@triton.jit
def share_factor(g, total):
    """The factor of one row's 2^(s - m) that makes them shares which add up to g."""
    return tl.where(total == 0, 0.0, g / total)


@triton.jit
def combine_ranges(ms, totals, splits, stride, inside):
    """The m and total of a row from those of its ranges of columns, `stride` apart, given pointers to the first."""
    m, total = nothing(inside.shape, ms.dtype.element_ty)
    for k in range(splits):
        m = tl.maximum(m, tl.load(ms + stride * k, inside, other=0.0))
    for k in range(splits):
        m_k = tl.load(ms + stride * k, inside, other=0.0)
        total += tl.load(totals + stride * k, inside, other=0.0) * tl.exp2(m_k - m)
    return m, total


@triton.jit(do_not_specialize=["S", "D", "splits"])
def _combine_rows(ms, totals, out, S, D, splits, BLOCK: tl.constexpr):
    """Writes out [S, D] from m and total of each range of columns, [splits, D, S]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = S.to(tl.int64) * D
    m, total = combine_ranges(ms + i, totals + i, splits, size, i < size)
    tl.store(out + i % S * D + i // S, log_of(m, total), i < size)


def room_for_ranges(out: Tensor, splits: int, *shape: int) -> tuple[Tensor, Tensor]:
    """New tensors for m and total of each range, [splits, *shape]. A single range writes neither, so `out` stands in
    for them: the kernel stays the same."""
    return (out, out) if splits == 1 else (out.new_empty((splits, *shape)), out.new_empty((splits, *shape)))


def put_together(ms: Tensor, totals: Tensor, out: Tensor, S: int, D: int, splits: int) -> None:
    """Writes out [S, D] from m and total of the ranges, if there are several."""
    if splits > 1:
        launch(_combine_rows, (cdiv(S * D, 128),), ms, totals, out, S, D, splits, BLOCK=128, num_warps=4)
