"""Standard normals that depend on a seed and an element's index alone: Philox4x32-10 (Salmon et al. 2011), Box-Muller.

The four words of the block with counter (g, 0), g of 64 bits, make elements 4g to 4g + 3. A pair of words (w0, w1)
makes two: r cos(2 pi u2) and r sin(2 pi u2), where r = sqrt(-2 ln u1), u1 = ((w0 >> 8) + 1) 2^-24 and
u2 = (w1 >> 8) 2^-24. In float32 they are within 1e-6; the hardware's approximations of ln, sin and cos are not.
"""

import triton
import triton.language as tl

from .elementary import polynomial


@triton.jit
def philox(group, seed):
    """The four words of blocks `group` (int64), each of the shape of `group`, uint32."""
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def _radius(n, ACC: tl.constexpr):
    """sqrt(-2 ln(n 2^-24)) for integers n in [1, 2^24]

    In float32, n 2^-24 = m 2^e with m in [sqrt(1/2), sqrt(2)), f = m - 1, and ln m = f - f^2 / 2 + f^3 P(f), P's
    error 3e-8; the factor -2 is in the coefficients.
    """
    x = n.to(ACC)
    if ACC.is_fp64():
        r = tl.sqrt(-2.0 * tl.log(x * 2.0**-24))
    else:
        SQRT_HALF: tl.constexpr = 0x3F3504F3  # its bits
        shifted = x.to(tl.int32, bitcast=True) - (SQRT_HALF + (24 << 23))
        e = (shifted >> 23).to(ACC)
        f = ((shifted & 0x7FFFFF) + SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
        f2 = f * f
        C: tl.constexpr = (
            -6.666666236e-01, 4.999999392e-01, -4.000143150e-01, 3.333560464e-01, -2.849811530e-01,
            2.485137466e-01, -2.337083984e-01, 2.295946770e-01, -1.394322294e-01,
        )  # fmt: skip
        tail = tl.fma(e, tl.full(x.shape, -2 * 1.42860682030941723e-06, ACC), polynomial(f, C) * (f2 * f))
        y = tl.fma(e, tl.full(x.shape, -2 * 0.693145751953125, ACC), (tail + f2) - (f + f))
        y = tl.maximum(y, 1e-30)
        s = tl.rsqrt(y)
        r = y * s
        r = tl.fma(tl.fma(-r, r, y), 0.5 * s, r)  # a step of Newton's
    return r


@triton.jit
def _circle(angle, ACC: tl.constexpr):
    """(cos, sin) of 2 pi angle 2^-24, for integers: polynomials in t, the quarter turns from the nearest quadrant."""
    quadrant = (angle + (1 << 21)) >> 22
    t = (angle - (quadrant << 22)).to(ACC) * 2.0**-22  # in [-1/2, 1/2], exact
    t2 = t * t
    if ACC.is_fp64():  # sin(pi t / 2) / t and cos(pi t / 2): 3e-21 and 3e-22
        S: tl.constexpr = (
            1.57079632679489662, -0.645964097506246252, 0.0796926262461669245, -0.00468175413531482707,
            0.0001604411847266723, -3.5988427171448578e-6, 5.69192785048963342e-8, -6.62762493899247236e-10,
        )  # fmt: skip
        C: tl.constexpr = (
            1.0, -1.23370055013616983, 0.253669507901048014, -0.0208634807633529503, 0.000919260274839089406,
            -0.00002520204236776104, 4.71087432643113147e-7, -6.38638909690451652e-9, 6.51322272759281111e-11,
        )  # fmt: skip
    else:  # 5e-9 and 8e-10
        S: tl.constexpr = (1.57079632, -0.645963478, 0.0796802176, -0.00460214921)
        C: tl.constexpr = (1.0, -1.23370055, 0.253669410, -0.0208615283, 0.000906739898)
    sine, cosine = polynomial(t2, S) * t, polynomial(t2, C)
    swap = (quadrant & 1) == 1
    x, y = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    return tl.where(((quadrant + 1) & 2) == 2, -x, x), tl.where((quadrant & 2) == 2, -y, y)


@triton.jit
def _box_muller(w0, w1, ACC: tl.constexpr):
    """The even and the odd normal of a pair of words."""
    r = _radius((w0 >> 8).to(tl.int32) + 1, ACC)
    x, y = _circle((w1 >> 8).to(tl.int32), ACC)
    return r * x, r * y


@triton.jit
def normals_of_groups(group, seed, ACC: tl.constexpr):
    """The normals of elements 4 `group` to 4 `group` + 3, [..., G] -> [..., 4 G]."""
    w0, w1, w2, w3 = philox(group, seed)
    n0, n1 = _box_muller(w0, w1, ACC)
    n2, n3 = _box_muller(w2, w3, ACC)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def normals_of_elements(element, seed, ACC: tl.constexpr):
    """The normals of any elements (int64); the three others of each one's group are computed for nothing."""
    w0, w1, w2, w3 = philox(element >> 2, seed)
    first = (element & 2) == 0
    even, odd = _box_muller(tl.where(first, w0, w2), tl.where(first, w1, w3), ACC)
    return tl.where((element & 1) == 0, even, odd)
