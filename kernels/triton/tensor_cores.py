"""log sum_j w_ij q(z_i | x_j) on tensor cores, which `fastvae.precision("tf32x3")` asks for: less exact, by name only.

With z and mu counted from the centre, the sum of squares is that of packing.py multiplied out, two matrix products

    sum_d t^2 = sum_d z^2 a^2 + sum_d z 2 a b + sum_d b^2,

each of them three products of numbers rounded to 11 bits ("tf32x3": big big + big small + small big). What is lost is
relative to the terms, not to their sum: at most eta(D) sum_d (|z| a + |b|)^2, where

    eta(D) = (1 + D / 8) 2^-20,

2^-20 for operands and products, and D / 8 times that if every step of 8 terms were rounded towards zero. A tile that is
far (packing.py, by the narrower bounds here, within which nothing overflows) is computed by the direct form.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from .grids import matrix_grid
from .log_sum_exp import add_terms, log_of, nothing, put_together, room_for_ranges
from .packing import PANEL, Limits, Pairs, new, pack
from .tiles import add_log_weights, far_t, is_far, load_pair, meets_own, minus_squares, offset, step

LIMITS = Limits(32.0, 2.0**30)


@triton.jit
def _direct(z, planes, far_columns, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums t^2 over d, [ROWS, COLUMNS], in a far tile, from pointers to dimension 0 of its samples and columns."""
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(0, D):
        a, b = load_pair(planes, 0)
        t = far_t(tl.load(z)[:, None], a[None, :], b[None, :], far_columns)
        squares = tl.fma(t, t, squares)
        z += PANEL
        planes += PANEL * step(planes)
    return squares


@triton.jit
def _multiplied_out(z, planes, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Sums t^2 over d in any other tile, by matrix products."""
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    b2 = tl.zeros([COLUMNS], tl.float32)
    d = tl.arange(0, DEPTH)
    for first in range(0, D, DEPTH):
        inside = d < D - first
        x = tl.load(z[:, None] + (d * PANEL)[None, :], inside[None, :], other=0.0)  # [ROWS, DEPTH]
        both = tl.load(planes[None, :] + (d * PANEL)[:, None], inside[:, None], other=0)  # [DEPTH, COLUMNS]
        a = (both & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        b = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        squares = tl.dot(x * x, a * a, squares, input_precision="tf32x3")
        squares = tl.dot(x, 2 * a * b, squares, input_precision="tf32x3")
        b2 += tl.sum(b * b, 0)
        z += DEPTH * PANEL
        planes += DEPTH * PANEL
    return squares + b2[None, :]


@triton.jit(do_not_specialize=["S", "N", "D", "blocks", "splits", "tiles"])
def _joint_rows_tf32x3(
    samples, far_samples, planes, far_columns,
    c, log_w, own, own_low, own_high, log_w_own: tl.float64, log_w_next: tl.float64,
    joint, ms, totals, S, N, D, blocks, splits, tiles, OWN: tl.constexpr, NEXT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Writes joint [S], or where there are several ranges of columns m and total of each, [splits, S]."""
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    first_row = block.to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    z = samples + offset(first_row, D) + row
    far_rows = is_far(far_samples, first_row)
    m, total = nothing([1, 1, ROWS, 1], tl.float32)
    carry = tl.zeros_like(m)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(N, COLUMNS))):
        first_column = tl.full([], COLUMNS, tl.int64) * tile
        ab = planes + offset(first_column, D) + column
        far = is_far(far_columns, first_column)
        if far | far_rows:
            squares = _direct(z, ab, far, D, ROWS, COLUMNS)
        else:
            squares = _multiplied_out(z, ab, D, ROWS, COLUMNS, DEPTH)
        meets = meets_own(own_low, own_high, first_row, first_column, N, OWN, NEXT, COLUMNS)
        s = minus_squares(tl.load(c + first_column + column)[None, :], squares)
        s = add_log_weights(
            s, log_w, own, log_w_own, log_w_next, meets, first_row + row[:, None], 0, column[None, :], first_column, N,
            OWN, NEXT, COLUMNS,
        )  # fmt: skip
        m, total, carry, _, _, _ = add_terms(m, total, carry, tl.trans(s)[None, :, :, None], False)
    i = first_row + row[None, None, :, None]
    if splits == 1:
        tl.store(joint + i, log_of(m, total), i < S)
    else:
        tl.store(ms + split.to(tl.int64) * S + i, m, i < S)
        tl.store(totals + split.to(tl.int64) * S + i, total, i < S)


def agg_log_prob(pairs: Pairs) -> Tensor:
    packed = pack(pairs, limits=LIMITS)
    S, N, D = packed.S, packed.N, packed.D
    joint = new(packed, S)
    if S == 0:
        return joint
    g = matrix_grid(S, N, D, joint.device)
    ms, totals = room_for_ranges(joint, g.splits, S)
    OWN, NEXT = packed.overridden
    launch(
        *(_joint_rows_tf32x3, (g.programs,)),
        *(packed.samples, packed.far_samples, packed.columns, packed.far_columns, *packed.weights),
        *(joint, ms, totals, S, N, D, g.blocks, g.splits, g.tiles),
        **{"OWN": OWN, "NEXT": NEXT, **g.config},
    )
    put_together(ms, totals, joint, S, 1, g.splits)
    return joint
