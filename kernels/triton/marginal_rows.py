"""The rows of the marginals, log2 sum_j w_ij q(z_id | x_j) of a block of samples in one dimension over a range of
columns, and in the backward with what the columns pull on z.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch
from .elementary import times
from .grids import grid_per_dimension, kind_of
from .log_sum_exp import across_lanes, add_terms, combine_ranges, log_of, nothing, share_factor, summed
from .packing import PANEL, Packed, new
from .pair_gradients import held_finite
from .tiles import (
    add_log_weights,
    far_t,
    inverse_kappa2,
    is_far,
    load_pair,
    meets_own,
    minus_square,
    offset,
    owned,
    passing,
    step,
)


@triton.jit
def marginal_sums(
    block, d, split, samples, far_samples, planes, far_columns, c, log_w, own, own_low, own_high, log_w_own, log_w_next,
    S, N, D, tiles, OWN: tl.constexpr, NEXT: tl.constexpr, PULL: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    """The m and total [RO, 1, TO, 1] of a block of samples in dimension d over a range of columns; with PULL also
    sum_j 2^(s - m) t a."""
    first_row = block.to(tl.int64) * (RO * TO)
    row_lane, rows = owned(RO, TO)
    column_lane, columns = passing(RP, TP)
    z = tl.load(samples + offset(first_row, D) + d * PANEL + row_lane + rows)
    far_rows = is_far(far_samples, first_row)
    m, total = nothing([RO, 1, TO, TP], z.dtype)
    carry = tl.zeros_like(m)
    pull = tl.zeros_like(m)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(N, RP * TP))):
        first_column = tl.full([], RP * TP, tl.int64) * tile
        at = offset(first_column, D) + d * PANEL + column_lane
        a, b = load_pair(planes + at * step(planes), columns)
        far = is_far(far_columns, first_column)
        if far | far_rows:
            t = far_t(z, a, b, far)
        else:
            t = tl.fma(z, a, b)
        meets = meets_own(own_low, own_high, first_row, first_column, N, OWN, NEXT, RP * TP)
        s = add_log_weights(
            minus_square(tl.load(c + at + columns), t), log_w, own, log_w_own, log_w_next, meets,
            first_row + row_lane + rows, column_lane, columns, first_column, N, OWN, NEXT, RP * TP,
        )  # fmt: skip
        m, total, carry, p, _, rescale = add_terms(m, total, carry, s, False)
        if PULL:
            if far | far_rows:
                t = held_finite(t)
            pull = tl.fma(pull, rescale, summed(p * t * a, False))
    highest, sum_of_lanes = across_lanes(m, total)
    if PULL:
        pull = tl.sum(pull * tl.exp2(m - highest), 3, keep_dims=True)
    return highest, sum_of_lanes, pull


@triton.jit
def marginal_program(
    program, samples, far_samples, planes, far_columns, c, log_w, own, own_low, own_high, log_w_own, log_w_next,
    marginals, ms, totals, pulls, S, N, D, blocks, splits, tiles, OWN: tl.constexpr, NEXT: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    """Writes marginals [S, D]; or where that is None, or there are several ranges, m, total and the pull on z of each,
    [splits, D, S]; the last may be None."""
    block = program % blocks
    d = program // blocks % D
    split = program // blocks // D
    m, total, pull = marginal_sums(
        block, d, split, samples, far_samples, planes, far_columns, c, log_w, own, own_low, own_high,
        log_w_own, log_w_next, S, N, D, tiles, OWN, NEXT, pulls is not None, RO, RP, TO, TP,
    )  # fmt: skip
    lane, rows = owned(RO, TO)
    i = block.to(tl.int64) * (RO * TO) + lane + rows
    if marginals is not None:
        tl.store(marginals + i * D + d, log_of(m, total), (i < S) & (splits == 1))
    if splits > 1 or marginals is None:
        at = (split.to(tl.int64) * D + d) * S + i
        tl.store(ms + at, m, i < S)
        tl.store(totals + at, total, i < S)
        if pulls is not None:
            tl.store(pulls + at, pull, i < S)


@triton.jit(do_not_specialize=["S", "N", "D", "blocks", "splits", "tiles"])
def _marginal_rows(
    samples, far_samples, planes, far_columns,
    c, log_w, own, own_low, own_high, log_w_own: tl.float64, log_w_next: tl.float64,
    ms, totals, pulls, S, N, D, blocks, splits, tiles, OWN: tl.constexpr, NEXT: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    marginal_program(
        tl.program_id(0), samples, far_samples, planes, far_columns, c, log_w, own, own_low, own_high, log_w_own,
        log_w_next, None, ms, totals, pulls, S, N, D, blocks, splits, tiles, OWN, NEXT, RO, RP, TO, TP,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["grad_row", "grad_column", "S", "D", "splits"], do_not_specialize_on_alignment=["d_marginals"]
)
def _combine_rows_backward(
    ms, totals, pulls, d_marginals, grad_row, grad_column, m_out, factors, joint_d_z, d_z, S, D, splits,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes m and factors [D, S] of the shares, and d_z [S, D] with the joint's added; each of the two may be None."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = S.to(tl.int64) * D
    inside = at < size
    i = at % S
    d = at // S
    m, total = combine_ranges(ms + at, totals + at, splits, size, inside)
    g = tl.load(d_marginals + i * grad_row + d * grad_column, inside, other=0.0).to(m.dtype)
    factor = share_factor(g, total)
    tl.store(m_out + at, m, inside)
    tl.store(factors + at, factor, inside)
    if d_z is not None:
        x = tl.zeros([BLOCK], m.dtype)
        for k in range(splits):
            m_k = tl.load(ms + size * k + at, inside, other=0.0)
            x += times(tl.exp2(m_k - m), tl.load(pulls + size * k + at, inside, other=0.0))
        x = times(-factor * inverse_kappa2(m.dtype), x)
        if joint_d_z is not None:
            x += tl.load(joint_d_z + i * D + d, inside, other=0.0)
        tl.store(d_z + i * D + d, x.to(d_z.dtype.element_ty), inside)


def marginal_operands(packed: Packed) -> tuple[Tensor | float | None, ...]:
    _, *weights = packed.weights
    return packed.samples, packed.far_samples, packed.columns, packed.far_columns, packed.marginal_c, *weights


def marginal_shares_of_rows(
    packed: Packed, d_marginals: Tensor, joint_d_z: Tensor | None, d_z: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns m and factor [D, S] of the marginals' shares; writes d_z [S, D], with the joint's added, where wanted."""
    S, N, D = packed.S, packed.N, packed.D
    m, factors = new(packed, D, S), new(packed, D, S)
    if S == 0:
        return m, factors
    each = grid_per_dimension(S, N, D, packed.dtype, d_marginals.device, kind_of(packed, reduce=True))
    ms, totals = new(packed, each.splits, D, S), new(packed, each.splits, D, S)
    pulls = None if d_z is None else new(packed, each.splits, D, S)
    OWN, NEXT = packed.overridden
    launch(
        *(_marginal_rows, (each.programs,), *marginal_operands(packed), ms, totals, pulls),
        *(S, N, D, each.blocks, each.splits, each.tiles),
        **{"OWN": OWN, "NEXT": NEXT, **each.config},
    )
    launch(
        *(_combine_rows_backward, (cdiv(S * D, 128),), ms, totals, pulls, d_marginals, *d_marginals.stride()),
        *(m, factors, joint_d_z, d_z, S, D, each.splits),
        BLOCK=128,
        num_warps=4,
    )
    return m, factors
