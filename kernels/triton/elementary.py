"""Exponentials that stay accurate near 0 and for large arguments, as kernels/cpu/elementary.h has them.

`ACC` is the type of the arguments, float32 or float64. Kernels that use these are launched with
`enable_fp_fusion=False` and fuse by `tl.fma`, so that a term has the same bits wherever it is computed.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.44269504088896340736)
LN2 = tl.constexpr(0.69314718055994530942)
INF = tl.constexpr(math.inf)


@triton.jit
def largest(dtype: tl.constexpr):
    return tl.full([], 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38, dtype)


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr):
    """sum_k c_k x^k"""
    N: tl.constexpr = len(COEFFICIENTS)
    y = tl.full(x.shape, COEFFICIENTS[N - 1], x.dtype)
    for k in tl.static_range(1, N):
        y = tl.fma(y, x, tl.full(x.shape, COEFFICIENTS[N - 1 - k], x.dtype))
    return y


@triton.jit
def exp(x, ACC: tl.constexpr, SCALE: tl.constexpr = 1.0):
    """e^(SCALE x), SCALE a power of 2: in float32 within 3 ulp, by the hardware's 2^t with the rounding error of
    t = x log2(e) made good."""
    if ACC.is_fp64():
        y = tl.exp(SCALE * x)
    else:
        HI: tl.constexpr = SCALE * 1.44269502162933349609375  # log2(e) in float32, and the rest of it
        LO: tl.constexpr = SCALE * 1.92596299e-8
        x = tl.clamp(x, -104.0 / SCALE, 89.0 / SCALE, propagate_nan=tl.PropagateNan.ALL)  # t and its error are finite
        t = x * HI
        error = tl.fma(x, tl.full(x.shape, HI, ACC), -t)
        error = tl.fma(x, tl.full(x.shape, LO, ACC), error)
        y = tl.exp2(t) * tl.fma(error, tl.full(x.shape, 0.69314718055994530942, ACC), tl.full(x.shape, 1.0, ACC))
    return y


@triton.jit
def _tail_near_0(x, ACC: tl.constexpr):
    """e^x - 1 - x on [-1, 1]: a polynomial good to 1e-10 and 1e-22, times x^2"""
    if ACC.is_fp64():
        C: tl.constexpr = (
            5.00000000000000000e-01, 1.66666666666666657e-01, 4.16666666666666644e-02, 8.33333333333333322e-03,
            1.38888888888888894e-03, 1.98412698412696976e-04, 2.48015873015872304e-05, 2.75573192240768469e-06,
            2.75573192240313263e-07, 2.50521083551334255e-08, 2.08767569727268982e-09, 1.60590495647274897e-10,
            1.14707484593771740e-11, 7.64654746625834047e-13, 4.77916942111103945e-14, 2.84660370997499535e-15,
            1.57948440565175789e-16,
        )  # fmt: skip
    else:
        C: tl.constexpr = (
            5.000000000e-01, 1.666666658e-01, 4.166666659e-02, 8.333345241e-03, 1.388889879e-03,
            1.983698849e-04, 2.479802595e-05, 2.812644435e-06, 2.803093810e-07,
        )  # fmt: skip
    return polynomial(x, C) * (x * x)


@triton.jit
def exp_tail(x, e_x, ACC: tl.constexpr):
    """e^x - 1 - x, never negative and accurate near 0; `e_x` is exp(x)."""
    half = 0.5 * x
    return tl.where(tl.abs(x) < 1, _tail_near_0(x, ACC), ((e_x - 1) - half) - half)  # 2 half may overflow


@triton.jit
def expm1(x, e_x, ACC: tl.constexpr):
    """e^x - 1, accurate near 0; `e_x` is exp(x)."""
    return tl.where(tl.abs(x) < 1, _tail_near_0(x, ACC) + x, e_x - 1)


@triton.jit
def times(g, x):
    """g x, but 0 where g is 0 even if x overflowed: no gradient in, none out."""
    return tl.where(g == 0, 0.0, g * x)
