"""The rows' sums of the joint, log2 sum_j w_ij q(z_i | x_j) of a block of samples over a range of columns, a tile of
pairs at a time; in the backward with what the columns pull on z.
"""

import triton
import triton.language as tl

from .early_exit import balanced, squares_unless_far, steep, wants_look
from .elementary import INF
from .log_sum_exp import across_lanes, add_terms, hint, log_of, nothing
from .packing import PANEL
from .pair_gradients import clear, pull_samples
from .tiles import add_log_weights, is_far, meets_own, minus_squares, offset, owned, passing, square_sums, step


@triton.jit
def joint_sums(
    block, split, samples, far_samples, planes, far_columns, c, log_w, own, own_low, own_high, log_w_own, log_w_next,
    known, d_z, likely, reach, margin, S, N, D, tiles, one,
    TWO_LEVELS: tl.constexpr, OWN: tl.constexpr, NEXT: tl.constexpr, BACKWARD: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The m and total [RO, 1, TO, 1] of a block of samples over a range of columns.

    `known` [S] is the forward's result, in the backward. The pull on z is added to d_z [splits, S, D], unless that is
    None. `likely` [S], `reach` [N / 128] and `margin` are early_exit.py's, or None; the backward needs no likely terms.
    """
    ROWS: tl.constexpr = RO * TO
    COLUMNS: tl.constexpr = RP * TP
    first_row = block.to(tl.int64) * ROWS
    row_lane, rows = owned(RO, TO)
    column_lane, columns = passing(RP, TP)
    row = row_lane + rows
    inside = row < tl.minimum(S - first_row, ROWS).to(tl.int32)
    z = samples + offset(first_row, D) + row_lane
    if BACKWARD:
        m = hint(tl.load(known + first_row + row, inside, other=0.0))
        total = tl.zeros_like(m)
    else:
        m, total = nothing([RO, 1, TO, TP], samples.dtype.element_ty)
    carry = tl.zeros_like(m)
    far_rows = is_far(far_samples, first_row)
    if reach is not None:
        balance = tl.full([], D, tl.int32)
        if not BACKWARD:
            likely_term = tl.load(likely + first_row + row, inside, other=INF)
    if d_z is not None:
        to = d_z + (split.to(tl.int64) * S + first_row + row_lane) * D
        clear(to, rows * D, inside, D, one, RO, TO, TP)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(N, COLUMNS))):
        first_column = tl.full([], COLUMNS, tl.int64) * tile
        ab = planes + (offset(first_column, D) + column_lane) * step(planes)
        far = is_far(far_columns, first_column)
        meets = meets_own(own_low, own_high, first_row, first_column, N, OWN, NEXT, COLUMNS)
        if reach is not None:
            bound = tl.load(reach + first_column // PANEL)
            looks = (bound < INF) & (far_rows == 0) & wants_look(balance, tile)
            if OWN or NEXT:
                looks = looks & (meets == 0)
            limit = bound + tl.full([], margin, m.dtype)
            if looks:
                if BACKWARD:
                    limit = steep(limit - tl.min(tl.where(inside, m, INF)))
                else:
                    limit -= tl.min(tl.maximum(m, likely_term))
            squares, near, d = squares_unless_far(
                z, rows, ab, columns, far, looks, limit, D, TWO_LEVELS, RO, RP, TO, TP, UNROLL
            )  # fmt: skip
            balance = balanced(balance, looks, near, d, D, TWO_LEVELS)
        else:
            near: tl.constexpr = True
            squares = square_sums(z, rows, ab, columns, far, D, TWO_LEVELS, RO, RP, TO, TP, UNROLL)
        if near:
            s = minus_squares(tl.load(c + (first_column + columns) + column_lane), squares)
            s = add_log_weights(
                s, log_w, own, log_w_own, log_w_next, meets, first_row + row_lane + rows, column_lane, columns,
                first_column, N, OWN, NEXT, COLUMNS,
            )  # fmt: skip
            m, total, carry, p, part, rescale = add_terms(m, total, carry, s, BACKWARD)
            if d_z is not None:  # noqa: SIM102 (known when compiled)
                if tl.max(tl.where(part == 0, 0, 1)) != 0:  # far columns cost no more than their densities
                    pull_samples(
                        p, rescale, z, rows, ab, columns, far, far_rows, to, rows * D, inside, one, D, RO, TO, TP
                    )  # fmt: skip
    if not BACKWARD:
        m, total = across_lanes(m, total)
    return m, total


@triton.jit
def joint_program(
    program, samples, far_samples, planes, far_columns,
    c, log_w, own, own_low, own_high, log_w_own, log_w_next,
    known, d_z, likely, reach, margin, joint, ms, totals, S, N, D, blocks, splits, tiles, one,
    TWO_LEVELS: tl.constexpr, OWN: tl.constexpr, NEXT: tl.constexpr, BACKWARD: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Writes joint [S]; or where that is None, or there are several ranges, m and total of each, [splits, S]."""
    block = program % blocks
    split = program // blocks
    m, total = joint_sums(
        block, split, samples, far_samples, planes, far_columns, c, log_w, own, own_low, own_high, log_w_own,
        log_w_next, known, d_z, likely, reach, margin, S, N, D, tiles, one, TWO_LEVELS, OWN, NEXT, BACKWARD,
        RO, RP, TO, TP, UNROLL,
    )  # fmt: skip
    lane, rows = owned(RO, TO)
    i = block.to(tl.int64) * (RO * TO) + lane + rows
    if joint is not None:
        tl.store(joint + i, log_of(m, total), (i < S) & (splits == 1))
    if splits > 1 or joint is None:
        tl.store(ms + split.to(tl.int64) * S + i, m, i < S)
        tl.store(totals + split.to(tl.int64) * S + i, total, i < S)


@triton.jit(do_not_specialize=["S", "N", "D", "blocks", "splits", "tiles", "one"])
def joint_rows(
    samples, far_samples, planes, far_columns,
    c, log_w, own, own_low, own_high, log_w_own: tl.float64, log_w_next: tl.float64,
    known, d_z, likely, reach, margin: tl.float64, joint, ms, totals, S, N, D, blocks, splits, tiles, one,
    TWO_LEVELS: tl.constexpr, OWN: tl.constexpr, NEXT: tl.constexpr, BACKWARD: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    joint_program(
        tl.program_id(0), samples, far_samples, planes, far_columns, c, log_w, own, own_low, own_high, log_w_own,
        log_w_next, known, d_z, likely, reach, margin, joint, ms, totals, S, N, D, blocks, splits, tiles, one,
        TWO_LEVELS, OWN, NEXT, BACKWARD, RO, RP, TO, TP, UNROLL,
    )  # fmt: skip
