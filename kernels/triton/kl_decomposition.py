"""The terms of the KL from N(0, I), means over samples of what agg_log_prob_marginals.py gives, and their gradients.
Sample i is from posterior i mod N. With t = (z - mu) e^(-logvar / 2) under it,

    c_i  = log q(z_i | x_i) = -1/2 sum_d (t^2 + logvar + ln 2 pi),
    p_id = log N(z_id; 0, 1) = -1/2 (z^2 + ln 2 pi),    p_i their sum,

and the joint j_i and the marginals m_id,

    mi: c - j   agg_kl: j - p   tc: j - sum_d m_d   dim_kl [D]: m_d - p_d   kl: c - p   entropy: -j

and saturation = exp(mi) / N. Programs own rows, and leave sums of these differences in float64, which another kernel
adds up. The backward is that of the joint and the marginals, whose upstream gradients are the same for all samples,
and what c and p pull.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, accumulator, cdiv, columns_of_partials, empty_like, launch, sum_of_rows, weight_of_each
from .agg_log_prob_marginals import agg_log_prob_marginals, marginals_gradients
from .elementary import exp, largest, times
from .packing import LOG_2PI, Pairs, clip
from .pair_gradients import new_gradients

ROWS: Config = {"BLOCK": 32, "DK": 32, "num_warps": 8}  # a tile of samples, or posteriors, and dimensions
N_NUMBERS = 6  # of a program's sums, after those of dim_kl


@triton.jit
def _held_finite(x):
    """Clips x to finite numbers; NaN stays NaN."""
    return clip(x, -largest(x.dtype), largest(x.dtype))


@triton.jit
def _inverse_sigma(v, ACC: tl.constexpr):
    return _held_finite(exp(-v, ACC, 0.5))


@triton.jit
def _load(x, row_stride, column_stride, row, d, inside, ACC: tl.constexpr):
    return tl.load(x + row[:, None] * row_stride + d[None, :] * column_stride, inside, other=0.0).to(ACC)


_STRIDES = ["z_row", "z_col", "mu_row", "mu_col", "lv_row", "lv_col"]
_INPUTS = ["z", "mu", "logvar"]


@triton.jit(do_not_specialize=[*_STRIDES, "S", "N", "D"], do_not_specialize_on_alignment=[*_INPUTS, "joint", "sums"])
def _sum_terms(
    z, z_row, z_col, mu, mu_row, mu_col, logvar, lv_row, lv_col, joint, marginals, sums, S, N, D,
    ACC: tl.constexpr, BLOCK: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    """Writes sums over its rows, [programs, D + 6] in float64: of dim_kl [D], then of mi, agg_kl, tc, the factorization
    of the prior, which is 0 unless p is infinite, kl and entropy."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    own = i % N
    D = tl.cast(D, tl.int64)
    sums += program * (D + 6)
    log_2pi = tl.full([BLOCK, DK], LOG_2PI, ACC)
    c, p, m = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, D, DK):
        d = first + tl.arange(0, DK).to(tl.int64)
        inside = (i < S)[:, None] & (d < D)[None, :]
        x = _load(z, z_row, z_col, i, d, inside, ACC)
        v = _load(logvar, lv_row, lv_col, own, d, inside, ACC)
        t = _held_finite((x - _load(mu, mu_row, mu_col, own, d, inside, ACC)) * _inverse_sigma(v, ACC))
        c_d = (-0.5 * ((t * t + v) + log_2pi)).to(tl.float64)
        p_d = (-0.5 * (x * x + log_2pi)).to(tl.float64)
        m_d = tl.load(marginals + i[:, None] * D + d[None, :], inside, other=0.0).to(tl.float64)
        c += tl.sum(tl.where(inside, c_d, 0.0), 1)
        p += tl.sum(tl.where(inside, p_d, 0.0), 1)
        m += tl.sum(m_d, 1)
        tl.store(sums + d, tl.sum(tl.where(inside, m_d - p_d, 0.0), 0), d < D)
    j = tl.load(joint + i, i < S, other=0.0).to(tl.float64)
    sums += D
    tl.store(sums, tl.sum(c - j))
    tl.store(sums + 1, tl.sum(j - p))
    tl.store(sums + 2, tl.sum(j - m))
    tl.store(sums + 3, tl.sum(p - p))
    tl.store(sums + 4, tl.sum(c - p))
    tl.store(sums + 5, -tl.sum(j))


@triton.jit(do_not_specialize=["P", "N", "D"])
def _mean_terms(
    sums, mi, agg_kl, tc, dim_kl, prior_factorization, kl, entropy, saturation, P, N, D, scale: tl.float64,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the terms, scale times their sums over programs, [P, D + 6]."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.cast(D, tl.int64) + 6
    mean = sum_of_rows(sums, n, column, column < n, P, BLOCK_P) * tl.full([BLOCK_N], scale, tl.float64)
    result = mean.to(mi.dtype.element_ty)
    tl.store(dim_kl + column, result, column < D)
    k = column - D  # one element stores each number
    tl.store(mi + k, result, k == 0)
    tl.store(agg_kl + (k - 1), result, k == 1)
    tl.store(tc + (k - 2), result, k == 2)
    tl.store(prior_factorization + (k - 3), result, k == 3)
    tl.store(kl + (k - 4), result, k == 4)
    tl.store(entropy + (k - 5), result, k == 5)
    tl.store(saturation + k, (tl.exp(mean) / tl.cast(N, tl.float64)).to(mi.dtype.element_ty), k == 0)


def kl_decomposition(pairs: Pairs) -> list[Tensor]:
    z, mu, logvar, _ = pairs
    (S, D), N = z.shape, len(mu)
    joint, marginals = agg_log_prob_marginals(pairs)
    terms = [joint.new_empty((D,) if n == 3 else ()) for n in range(8)]
    programs = cdiv(S, ROWS["BLOCK"])
    sums = joint.new_empty((programs, D + N_NUMBERS), dtype=torch.float64)
    if S:
        launch(
            *(_sum_terms, (programs,), z, *z.stride(), mu, *mu.stride(), logvar, *logvar.stride()),
            *(joint, marginals, sums, S, N, D),
            ACC=accumulator(z.dtype),
            **ROWS,
            enable_fp_fusion=False,
        )
    block = columns_of_partials(D + N_NUMBERS)
    launch(
        _mean_terms, (cdiv(D + N_NUMBERS, block["BLOCK_N"]),), sums, *terms, programs, N, D, weight_of_each(S), **block
    )
    return [*terms, joint, marginals]


@triton.jit
def _upstream(g, scale):
    """scale g, a number in float64; 0 for None."""
    x = tl.full([], 0.0, tl.float64)
    if g is not None:
        x += tl.load(g).to(tl.float64)
    return x * tl.full([], scale, tl.float64)


_NUMBERS = ["d_mi", "d_agg_kl", "d_tc", "d_dim_kl", "d_kl", "d_entropy"]


@triton.jit(do_not_specialize=["dim_stride", "D"], do_not_specialize_on_alignment=_NUMBERS)
def _upstreams(
    d_mi, d_agg_kl, d_tc, d_dim_kl, dim_stride, d_kl, d_entropy, numbers, dims, D, scale: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes what is upstream of one sample: numbers [2], of j and of c, and dims [2, D], of m_d and of -p_d."""
    g_mi, g_agg_kl, g_tc = _upstream(d_mi, scale), _upstream(d_agg_kl, scale), _upstream(d_tc, scale)
    g_kl, g_entropy = _upstream(d_kl, scale), _upstream(d_entropy, scale)
    ACC: tl.constexpr = numbers.dtype.element_ty
    tl.store(numbers, (g_agg_kl + g_tc - g_mi - g_entropy).to(ACC))
    tl.store(numbers + 1, (g_mi + g_kl).to(ACC))
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK).to(tl.int64)
        g_dim = tl.zeros([BLOCK], tl.float64)
        if d_dim_kl is not None:
            g_dim += tl.load(d_dim_kl + d * dim_stride, d < D, other=0.0).to(tl.float64)
        g_dim *= tl.full([], scale, tl.float64)
        tl.store(dims + d, (g_dim - g_tc).to(ACC), d < D)
        tl.store(dims + D + d, (g_agg_kl + g_kl + g_dim).to(ACC), d < D)


@triton.jit(do_not_specialize=[*_STRIDES, "L", "N", "D"], do_not_specialize_on_alignment=_INPUTS)
def _add_own(
    z, z_row, z_col, mu, mu_row, mu_col, logvar, lv_row, lv_col, numbers, dims, of_z, of_mu, of_logvar,
    d_z, d_mu, d_logvar, L, N, D,
    ACC: tl.constexpr, BLOCK: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    """Writes d_z [L N, D], d_mu and d_logvar [N, D]: of_z, of_mu and of_logvar, which may be the same tensors, and what
    c and p of the L samples of each posterior pull. Those not wanted are None."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.program_id(1).to(tl.int64) * DK + tl.arange(0, DK)
    inside = (j < N)[:, None] & (d < D)[None, :]
    m = _load(mu, mu_row, mu_col, j, d, inside, ACC)
    inverse_sigma = _inverse_sigma(_load(logvar, lv_row, lv_col, j, d, inside, ACC), ACC)
    g = tl.load(numbers + 1)
    g_prior = tl.load(dims + D + d, d < D, other=0.0)[None, :]
    by_mu, by_logvar = tl.zeros([BLOCK, DK], ACC), tl.zeros([BLOCK, DK], ACC)
    for l in range(0, L):  # noqa: E741
        i = tl.cast(l, tl.int64) * N + j
        x = _load(z, z_row, z_col, i, d, inside, ACC)
        t = _held_finite((x - m) * inverse_sigma)
        pull = times(g, t) * inverse_sigma
        if d_z is not None:
            at = i[:, None] * D + d[None, :]
            total = tl.load(of_z + at, inside, other=0.0) + (times(g_prior, x) - pull)
            tl.store(d_z + at, total.to(d_z.dtype.element_ty), inside)
        by_mu += pull
        by_logvar += times(0.5 * g, t * t - 1)
    at = j[:, None] * D + d[None, :]
    if d_mu is not None:
        tl.store(d_mu + at, (tl.load(of_mu + at, inside, other=0.0) + by_mu).to(d_mu.dtype.element_ty), inside)
    if d_logvar is not None:
        total = tl.load(of_logvar + at, inside, other=0.0) + by_logvar
        tl.store(d_logvar + at, total.to(d_logvar.dtype.element_ty), inside)


def kl_decomposition_backward(
    upstream: Sequence[Tensor | None],
    joint: Tensor,
    marginals: Tensor,
    pairs: Pairs,
    wanted: Sequence[bool],
    early_exit: bool,
) -> list[Tensor]:
    """The gradients; where only the joint's terms have upstream ones, `early_exit` may leave out pairs."""
    z, mu, logvar, _ = pairs
    (S, D), N = z.shape, len(mu)
    d_mi, d_agg_kl, d_tc, d_dim_kl, _, d_kl, d_entropy = upstream
    numbers, dims = joint.new_empty(2), joint.new_empty(2, D)
    launch(
        *(_upstreams, (1,), d_mi, d_agg_kl, d_tc, d_dim_kl, 0 if d_dim_kl is None else d_dim_kl.stride(0)),
        *(d_kl, d_entropy, numbers, dims, D, weight_of_each(S)),
        BLOCK=128,
        num_warps=4,
    )
    of_marginals = d_tc is not None or d_dim_kl is not None
    of_joint = not of_marginals or any(g is not None for g in (d_mi, d_agg_kl, d_tc, d_entropy))
    of_pairs = numbers[0].expand(S) if of_joint else None, dims[0].expand(S, D) if of_marginals else None
    found = new_gradients(pairs, wanted, wide=True)
    marginals_gradients(found, of_pairs, joint, pairs, early_exit)
    *sums, d_log_w = found
    gradients = [
        g if g is None or g.dtype == x.dtype else empty_like(x) for g, x in zip(sums, (z, mu, logvar), strict=True)
    ]
    if N * D and any(g is not None for g in gradients):
        launch(
            *(_add_own, (cdiv(N, ROWS["BLOCK"]), cdiv(D, ROWS["DK"]))),
            *(z, *z.stride(), mu, *mu.stride(), logvar, *logvar.stride(), numbers, dims, *sums, *gradients),
            *(S // N, N, D),
            ACC=accumulator(z.dtype),
            **ROWS,
            enable_fp_fusion=False,
        )
    return [g for g in (*gradients, d_log_w) if g is not None]
