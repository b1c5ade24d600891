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
    """m and total of no terms"""
    return tl.zeros(SHAPE, dtype) - largest(dtype), tl.zeros(SHAPE, dtype)


@triton.jit
def highest(s, ACROSS: tl.constexpr):
    """Over the passing columns of a tile [RO, RP, TO, TP]; of all lanes, or each lane for itself."""
    m = tl.max(s, 1, keep_dims=True)
    if ACROSS:
        m = tl.max(m, 3, keep_dims=True)
    return m


@triton.jit
def summed(s, ACROSS: tl.constexpr):
    total = tl.sum(s, 1, keep_dims=True)
    if ACROSS:
        total = tl.sum(total, 3, keep_dims=True)
    return total


@triton.jit
def add_terms(m, total, carry, s, ACROSS: tl.constexpr):
    """The sum so far with a tile of terms; then 2^(s - m), their sum, and what the sum so far was multiplied by.
    `carry` is what `total` has too much, after Kahan: tiles may be thousands."""
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
    """[RO, 1, TO, TP] -> [RO, 1, TO, 1]"""
    new = tl.max(m, 3, keep_dims=True)
    return new, tl.sum(total * tl.exp2(m - new), 3, keep_dims=True)


@triton.jit
def log_of(m, total):
    """In nats"""
    wide = m.to(tl.float64) * tl.full([], LN2, tl.float64) + tl.log(total.to(tl.float64))
    return wide.to(m.dtype)


@triton.jit
def hint(log_sum):
    """A maximum to begin with that no row's sum is far below, from the saved result in nats: terms that are nothing
    beside it are then known to be from the first tile on. A bit less than the rounding of the result may have taken."""
    eps: tl.constexpr = 2.3e-16 if log_sum.dtype == tl.float64 else 1.2e-7
    m = log_sum * LOG2E
    m = m - (1.0 + 32 * eps * tl.abs(m))
    return tl.where(m - m == 0, m, -largest(m.dtype))


@triton.jit
def share_factor(g, total):
    """Shares of one row are 2^(s - m) times this, so that they add up to g."""
    return tl.where(total == 0, 0.0, g / total)


@triton.jit
def combine_ranges(ms, totals, splits, stride, inside):
    """m and total of a row from those of its ranges of columns, `stride` apart; the pointers are to the first ones."""
    m, total = nothing(inside.shape, ms.dtype.element_ty)
    for k in range(splits):
        m = tl.maximum(m, tl.load(ms + stride * k, inside, other=0.0))
    for k in range(splits):
        m_k = tl.load(ms + stride * k, inside, other=0.0)
        total += tl.load(totals + stride * k, inside, other=0.0) * tl.exp2(m_k - m)
    return m, total


@triton.jit(do_not_specialize=["S", "D", "splits"])
def _combine_rows(ms, totals, out, S, D, splits, BLOCK: tl.constexpr):
    """out [S, D] from m and total of each range of columns, [splits, D, S]"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = S.to(tl.int64) * D
    m, total = combine_ranges(ms + i, totals + i, splits, size, i < size)
    tl.store(out + i % S * D + i // S, log_of(m, total), i < size)


def room_for_ranges(out: Tensor, splits: int, *shape: int) -> tuple[Tensor, Tensor]:
    """m and total of each range, [splits, *shape]. Of a single one nothing is written there, and what is there anyway
    serves: the kernel is the same."""
    return (out, out) if splits == 1 else (out.new_empty((splits, *shape)), out.new_empty((splits, *shape)))


def put_together(ms: Tensor, totals: Tensor, out: Tensor, S: int, D: int, splits: int) -> None:
    """out [S, D] from them, if there are several."""
    if splits > 1:
        launch(_combine_rows, (cdiv(S * D, 128),), ms, totals, out, S, D, splits, BLOCK=128, num_warps=4)
