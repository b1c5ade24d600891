"""The gradients of z, mu and logvar from weights r_ij on the pairs' log-densities. With t and a in units of kappa
(packing.py):

    d z_id      = -sum_j r_ij t a / kappa^2
    d mu_jd     =  sum_i r_ij t a / kappa^2
    d logvar_jd = (sum_i r_ij t^2 / kappa^2 - sum_i r_ij) / 2

Where a number is extreme, t^2 may overflow in a sum that is none of the broadcast formula's, which multiplies the sum
of r (z - mu)^2 by 1 / sigma^2. What is far therefore sums e = t / up, up >= a, and multiplies sums by up.

A tile's r stay in registers while d runs; for each d they are summed over what passes by, and lane d mod TP keeps the
sum, so that a program reads and writes its own sums in memory, [owned, D], once for TP dimensions. No thread touches
another's.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._launch import accumulation_dtype, cdiv, empty_like, launch, resources, target
from .elementary import largest
from .log_sum_exp import summed
from .packing import DIRECT, PANEL, Packed, Pairs, in_order
from .tiles import far_t, inverse_kappa2, is_far, load_pair, offset, step

MODERATE = tl.constexpr(DIRECT.MODERATE)


@triton.jit
def held_finite(t):
    """Clips t to finite numbers, so that 0 t is 0 for finite inputs. Only needed where something is far; elsewhere t is
    finite anyway. NaN need not survive: r is NaN then."""
    return tl.maximum(tl.minimum(t, largest(t.dtype)), -largest(t.dtype))


@triton.jit
def any_far(far_samples, S):
    """Whether a panel of samples is far: then all columns have sums of e."""
    found = tl.zeros([128], tl.int32)
    for first in range(0, tl.cdiv(S, PANEL), 128):
        panel = first + tl.arange(0, 128)
        found |= tl.load(far_samples + panel, panel < tl.cdiv(S, PANEL), other=0)
    return tl.max(found, 0) != 0


@triton.jit
def scale_up(a, far_columns):
    """The factor up where something is far; for columns that are not, the most that a can be there, a power of 2."""
    return tl.where(far_columns, tl.maximum(a, 1.0), MODERATE)


@triton.jit
def far_e(z, a, b, far_columns):
    """The e of a pair where something is far."""
    a = tl.where(far_columns, tl.minimum(a, 1.0), a * (1 / MODERATE))
    return held_finite(far_t(z, a, tl.where(far_columns, b, b * (1 / MODERATE)), far_columns))


@triton.jit
def clear(to, owned, inside, D, one, RO: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr):
    """Sets the owned sums [D] to 0, from a pointer to the thread's first and the constants that make the others."""
    lane = tl.arange(0, TP)[None, None, None, :]
    for first in range(0, D, TP):
        zero = tl.zeros([RO, 1, TO, TP], to.dtype.element_ty)
        tl.store(to + first + lane * one + owned, zero, inside & (lane < D - first))


@triton.jit
def _samples_sums(
    r, x, z, rows, planes, columns, far_columns, n, lane, FAR: tl.constexpr
):  # fmt: skip
    for k in range(0, n):
        a, b = load_pair(planes, columns)
        if FAR:
            pull = r * far_e(tl.load(z + rows), a, b, far_columns) * a * scale_up(a, far_columns)
        else:
            pull = r * tl.fma(tl.load(z + rows), a, b) * a
        x = tl.where(lane == k, summed(pull, True), x)
        z += PANEL
        planes += PANEL * step(planes)
    return x


@triton.jit
def pull_samples(
    r, rescale, z, rows, planes, columns, far_columns, far_rows, to, owned, inside, one, D,
    RO: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    """Adds sum_j r t a to `rescale` times the owned samples' sums [D]."""
    lane = tl.arange(0, TP)[None, None, None, :]
    for first in range(0, D, TP):
        x = tl.zeros([RO, 1, TO, TP], r.dtype)
        z_d = z + first * PANEL
        planes_d = planes + first * PANEL * step(planes)
        n = tl.minimum(D - first, TP)
        if far_columns | far_rows:
            x = _samples_sums(r, x, z_d, rows, planes_d, columns, far_columns, n, lane, True)
        else:
            x = _samples_sums(r, x, z_d, rows, planes_d, columns, far_columns, n, lane, False)
        at = to + first + lane * one + owned
        mask = inside & (lane < D - first)
        tl.store(at, tl.fma(tl.load(at, mask, other=0.0), rescale, x), mask)


@triton.jit
def _columns_sums(
    r, x, x2, z, rows, planes, columns, far_columns, n, lane, FAR: tl.constexpr
):  # fmt: skip
    for k in range(0, n):
        a, b = load_pair(planes, columns)
        e = far_e(tl.load(z + rows), a, b, far_columns) if FAR else tl.fma(tl.load(z + rows), a, b)
        re = r * e
        x = tl.where(lane == k, summed(re, True), x)
        x2 = tl.where(lane == k, summed(re * e, True), x2)
        z += PANEL
        planes += PANEL * step(planes)
    return x, x2


@triton.jit
def pull_columns(
    r, z, rows, planes, columns, far_columns, far, to_e, apart, owned, inside, one, D,
    RO: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    """Adds sum_i r e and sum_i r e^2 to the owned columns' two sums [D], the second `apart` from the first; where
    nothing is `far`, e is t."""
    lane = tl.arange(0, TP)[None, None, None, :]
    for first in range(0, D, TP):
        x = tl.zeros([RO, 1, TO, TP], r.dtype)
        x2 = tl.zeros([RO, 1, TO, TP], r.dtype)
        z_d = z + first * PANEL
        planes_d = planes + first * PANEL * step(planes)
        n = tl.minimum(D - first, TP)
        if far:
            x, x2 = _columns_sums(r, x, x2, z_d, rows, planes_d, columns, far_columns, n, lane, True)
        else:
            x, x2 = _columns_sums(r, x, x2, z_d, rows, planes_d, columns, far_columns, n, lane, False)
        at = to_e + first + lane * one + owned
        mask = inside & (lane < D - first)
        tl.store(at, tl.load(at, mask, other=0.0) + x, mask)
        at += apart
        tl.store(at, tl.load(at, mask, other=0.0) + x2, mask)


@triton.jit
def _total(shares, at, mask, n, N):
    total = tl.zeros(at.shape, shares.dtype.element_ty)
    for k in range(n):
        total += tl.load(shares + N * k + at, mask, other=0.0)
    return total


@triton.jit
def _add_sums(x, x2, sums, at, mask, first, last, size):
    for k in range(first, last):
        x += tl.load(sums + size * (2 * k) + at, mask, other=0.0)
        x2 += tl.load(sums + size * (2 * k + 1) + at, mask, other=0.0)
    return x, x2


@triton.jit(do_not_specialize=["S", "N", "D", "n_sums", "n_shares", "n_common"])
def _combine_columns(
    sums, shares, common_shares, far_samples, planes, far_columns, order, d_mu, d_logvar, d_log_w,
    S, N, D, n_sums, n_shares, n_common, BLOCK: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    """Writes the gradients from the sums [n_sums, 2, N, D], the first n_shares of r e and r e^2, the others of r t and
    r t^2; the shares [n_shares, N] of r; and those that pull on log_w, [n_common, N]. Each gradient may be None."""
    first_column = tl.program_id(0).to(tl.int64) * BLOCK
    j = first_column + tl.arange(0, BLOCK)
    inside = j < N
    wide_N = N.to(tl.int64)
    ACC: tl.constexpr = shares.dtype.element_ty
    if d_log_w is not None:
        share = _total(common_shares, j, inside, n_common, wide_N)
        tl.store(d_log_w + j, share.to(d_log_w.dtype.element_ty), inside)
    if d_mu is not None or d_logvar is not None:
        share = _total(shares, j, inside, n_shares, wide_N)
        far_column = is_far(far_columns, first_column)
        far = far_column | any_far(far_samples, S)
        for first in range(0, D, DK):
            d = first + tl.arange(0, DK)[None, :]
            mask = inside[:, None] & (d < D)
            at = j[:, None] * D + d
            to = j[:, None] * D + in_order(order, d, D)
            a, _ = load_pair(planes, offset(j, D)[:, None] + tl.minimum(d, D - 1) * PANEL)  # the last for those past it
            zero = tl.zeros([BLOCK, DK], ACC)
            x, x2 = _add_sums(zero, zero, sums, at, mask, 0, n_shares, wide_N * D)
            if far:
                up = scale_up(a, far_column)
                x *= up
                x2 = x2 * up * up
            x, x2 = _add_sums(x, x2, sums, at, mask, n_shares, n_sums, wide_N * D)
            if d_mu is not None:
                tl.store(d_mu + to, (x * a * inverse_kappa2(ACC)).to(d_mu.dtype.element_ty), mask)
            if d_logvar is not None:
                pull = 0.5 * (x2 * inverse_kappa2(ACC) - share[:, None])
                tl.store(d_logvar + to, pull.to(d_logvar.dtype.element_ty), mask)


def new_gradients(pairs: Pairs, wanted: Sequence[bool], wide: bool = False) -> list[Tensor | None]:
    """Memory for the gradients of z, mu, logvar and log_w, for those that are wanted; with `wide`, of all but log_w in
    the dtype that sums are in, to be added to before they are rounded."""
    z, mu, logvar, (log_w, *_) = pairs
    inputs = (z, mu, logvar, log_w)[: len(wanted)]
    gradients = [empty_like(x) if want and x is not None else None for x, want in zip(inputs, wanted, strict=True)]
    dtype = accumulation_dtype(z.dtype)
    if wide and dtype != z.dtype:
        gradients[:3] = [None if g is None else g.new_empty(g.shape, dtype=dtype) for g in gradients[:3]]
    return gradients


def columns_gradients(
    packed: Packed,
    sums: Tensor | None,
    shares: Tensor,
    common_shares: Tensor | None,
    d_mu: Tensor | None,
    d_logvar: Tensor | None,
    d_log_w: Tensor | None,
) -> None:
    """Writes those gradients that are not None, from what programs left along the first axes."""
    counts = [0 if x is None else x.shape[0] for x in (sums, shares, common_shares)]
    launch(
        *(_combine_columns, (cdiv(packed.N, 32),), sums, shares, common_shares),
        *(packed.far_samples, packed.columns, packed.far_columns, packed.order, d_mu, d_logvar, d_log_w),
        *(packed.S, packed.N, packed.D, *counts),
        **{"BLOCK": 32, "DK": 16, **resources(target(), 128, 168)},
    )
