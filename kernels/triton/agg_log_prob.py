"""log sum_j w_ij q(z_i | x_j), never forming [S, N], and its gradients.

A program owns a block of samples and streams a range of the columns by, keeping each row's sum; where there are several
ranges, a second kernel puts them together. The backward does the same again, because shares in a sum add up only if its
terms are seen again to the last bit, and pulls on z as it goes: when a row's maximum moves, what its gradient has so
far moves with its sum. Then programs that own columns stream the samples by.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tensor_cores
from ._launch import Config, cdiv, fastest, launch
from .early_exit import balanced, early_order, margin, of_rows, of_rows_backward, squares_unless_far, steep, wants_look
from .elementary import INF, times
from .grids import Grid, configs, constants, grid, has_tensor_cores, kind_of
from .log_sum_exp import combine_ranges, highest, put_together, room_for_ranges, share_factor, summed
from .packing import Packed, Pairs, in_order, new, pack
from .pair_gradients import any_far, clear, columns_gradients, new_gradients, pull_columns
from .row_sums import joint_rows
from .tiles import (
    add_log_weights,
    inverse_kappa2,
    is_far,
    meets_own,
    minus_squares,
    offset,
    override,
    owned,
    passing,
    square_sums,
    step,
)


@triton.jit(do_not_specialize=["grad_stride", "S", "D", "splits"], do_not_specialize_on_alignment=["d_joint"])
def _combine_rows_backward(
    ms, totals, parts, d_joint, grad_stride, scale: tl.float64, order, m_out, factors, d_z, S, D, splits,
    BLOCK: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    """Puts the ranges of columns together: m and factor [S], the shares of a row, scale d_joint in all, being
    factor 2^(s - m); and d_z [S, D] from its parts [splits, S, D], each relative to its range's m."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < S
    m, total = combine_ranges(ms + i, totals + i, splits, S.to(tl.int64), inside)
    g = tl.load(d_joint + i * grad_stride, inside, other=0.0).to(m.dtype) * tl.full([], scale, m.dtype)
    factor = share_factor(g, total)
    tl.store(m_out + i, m, inside)
    tl.store(factors + i, factor, inside)
    if d_z is not None:
        for first in range(0, D, DK):
            d = first + tl.arange(0, DK)[None, :]
            mask = inside[:, None] & (d < D)
            x = tl.zeros([BLOCK, DK], m.dtype)
            for k in range(splits):
                m_k = tl.load(ms + S.to(tl.int64) * k + i, inside, other=0.0)
                part = tl.load(parts + (S.to(tl.int64) * k + i)[:, None] * D + d, mask, other=0.0)
                x += times(tl.exp2(m_k - m)[:, None], part)
            x = times(factor[:, None] * -inverse_kappa2(m.dtype), x)
            tl.store(d_z + i[:, None] * D + in_order(order, d, D), x.to(d_z.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["S", "N", "D", "blocks", "tiles", "one"])
def _joint_columns(
    samples, far_samples, planes, far_columns,
    c, log_w, own, own_low, own_high, log_w_own: tl.float64, log_w_next: tl.float64,
    ms, factors, margin: tl.float64, sums, shares, common_shares, S, N, D, blocks, tiles, one,
    TWO_LEVELS: tl.constexpr, OWN: tl.constexpr, NEXT: tl.constexpr, EARLY: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Writes, for each range of samples, sums [splits, 2, N, D] of r e and of r e^2; shares [splits, N], the sums of r;
    and common_shares [splits, N], of those r that pull on log_w. The first and the last may be None."""
    COLUMNS: tl.constexpr = RO * TO
    ROWS: tl.constexpr = RP * TP
    block = tl.program_id(0) % blocks
    split = (tl.program_id(0) // blocks).to(tl.int64)
    first_column = block.to(tl.int64) * COLUMNS
    column_lane, columns = owned(RO, TO)
    row_lane, rows = passing(RP, TP)
    row, column = row_lane + rows, column_lane + columns
    inside = column < tl.minimum(N - first_column, COLUMNS).to(tl.int32)
    ab = planes + (offset(first_column, D) + column_lane) * step(planes)
    far = is_far(far_columns, first_column)
    share = tl.zeros([RO, 1, TO, TP], samples.dtype.element_ty)
    common_share = tl.zeros_like(share)
    if sums is not None:
        far_sums = far | any_far(far_samples, S)
        to_e = sums + (2 * split * N + first_column + column_lane) * D
        apart = N.to(tl.int64) * D
        clear(to_e, columns * D, inside, D, one, RO, TO, TP)
        clear(to_e + apart, columns * D, inside, D, one, RO, TO, TP)
    begin, end = split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(S, ROWS))
    if EARLY:
        balance = tl.cast(D, tl.int32)
        strongest = tl.zeros([RO, 1, TO, 1], samples.dtype.element_ty)  # |r| of the column so far
        weight = tl.load(c + first_column + column_lane + columns)
        if OWN or NEXT:
            weight += tl.load(log_w + first_column + column_lane + columns)
    for k in range(begin, end):
        if EARLY:  # the samples that were drawn from the columns come first, where they are in their order
            tile = begin + (k + tl.maximum(first_column // ROWS, begin) - 2 * begin) % (end - begin)
        else:
            tile = k
        first_row = tl.full([], ROWS, tl.int64) * tile
        z = samples + offset(first_row, D) + row_lane
        there = row < tl.minimum(S - first_row, ROWS).to(tl.int32)
        meets = meets_own(own_low, own_high, first_row, first_column, N, OWN, NEXT, COLUMNS)
        if EARLY:
            looks = (far == 0) & (is_far(far_samples, first_row) == 0) & wants_look(balance, tile)
            if OWN or NEXT:
                looks = looks & (meets == 0)
            limit = tl.full([], margin, weight.dtype)
            if looks:
                pull = tl.abs(tl.load(factors + (first_row + rows) + row_lane, there, other=0.0))
                floor = tl.load(ms + (first_row + rows) + row_lane, there, other=INF) - tl.log2(pull)
                reached = tl.where(weight == -INF, -INF, weight - tl.log2(strongest))
                limit = steep(limit + tl.max(reached) - tl.min(tl.where(pull < INF, floor, -INF)))
            squares, near, d = squares_unless_far(
                z, rows, ab, columns, far, looks, limit, D, TWO_LEVELS, RO, RP, TO, TP, UNROLL
            )  # fmt: skip
            balance = balanced(balance, looks, near, d, D, TWO_LEVELS)
        else:
            near: tl.constexpr = True
            squares = square_sums(z, rows, ab, columns, far, D, TWO_LEVELS, RO, RP, TO, TP, UNROLL)
        if near:
            s = minus_squares(tl.load(c + first_column + column_lane + columns), squares)
            s = add_log_weights(
                s, log_w, own, log_w_own, log_w_next, meets, first_row + row_lane + rows, column_lane, columns,
                first_column, N, OWN, NEXT, COLUMNS,
            )  # fmt: skip
            p = tl.exp2(s - tl.load(ms + (first_row + rows) + row_lane, there, other=INF))
            r = p * tl.load(factors + (first_row + rows) + row_lane, there, other=0.0)
            part = summed(r, False)
            share += part
            if EARLY:
                strongest = tl.maximum(strongest, highest(tl.abs(r), True))
            if common_shares is not None:
                if meets:
                    common = override(
                        r, 0.0, 0.0, own, first_row + row_lane + rows, column_lane, columns, first_column, N, OWN,
                        NEXT, COLUMNS,
                    )  # fmt: skip
                    common_share += summed(common, False)
                else:
                    common_share += part
            if sums is not None:  # noqa: SIM102
                if tl.max(tl.where(tl.sum(tl.abs(r), 1, keep_dims=True) == 0, 0, 1)) != 0:
                    pull_columns(
                        r, z, rows, ab, columns, far, far_sums, to_e, apart, columns * D, inside, one, D, RO, TO, TP
                    )  # fmt: skip
    at = split * N + first_column + column
    tl.store(shares + at, tl.sum(share, 3, keep_dims=True), inside)
    if common_shares is not None:
        tl.store(common_shares + at, tl.sum(common_share, 3, keep_dims=True), inside)


def _operands(packed: Packed) -> tuple[Tensor | float | None, ...]:
    return packed.samples, packed.far_samples, packed.columns, packed.far_columns, *packed.weights


def agg_log_prob(pairs: Pairs, early_exit: bool, tf32x3: bool) -> Tensor:
    """The joint [S]. With `early_exit` tiles whose pairs are all too far to show may be left out; with `tf32x3` tensor
    cores may be used, less exactly."""
    z, mu, logvar, (_, _, own, *_) = pairs
    if tf32x3 and z.dtype != torch.float64 and has_tensor_cores():
        return tensor_cores.agg_log_prob(pairs)
    packed = pack(pairs, order=early_order(mu, logvar, early_exit))
    S, N, D = packed.S, packed.N, packed.D
    joint = new(packed, S)
    if S == 0:
        return joint
    exits = of_rows(packed, own)

    def run(config: Config) -> Tensor:
        g = grid(S, N, D, packed.dtype, z.device, kind_of(packed, reduce=False), **config)
        ms, totals = room_for_ranges(joint, g.splits, S)
        launch(
            *(joint_rows, (g.programs,), *_operands(packed), None, None, *exits),
            *(joint, ms, totals, S, N, D, g.blocks, g.splits, g.tiles, 1),
            **constants(packed, g, BACKWARD=False),
        )
        put_together(ms, totals, joint, S, 1, g.splits)
        return joint

    return fastest(run, configs(S, N, packed.dtype), "agg_log_prob", packed.dtype, *packed.overridden, S, N, D)


def shares_of_rows(
    packed: Packed, d_joint: Tensor, joint: Tensor, d_z: Tensor | None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Returns m and factor [S], the shares of row i, scale d_joint_i in all, being factor 2^(s_ij - m); writes d_z
    [S, D] where it is wanted."""
    S, N, D = packed.S, packed.N, packed.D
    m, factors = new(packed, S), new(packed, S)
    if S == 0:
        return m, factors
    g = grid(S, N, D, packed.dtype, d_joint.device, kind_of(packed, reduce=True))
    ms, totals = new(packed, g.splits, S), new(packed, g.splits, S)
    parts = None if d_z is None else new(packed, g.splits, S, D)
    launch(
        *(joint_rows, (g.programs,), *_operands(packed), joint, parts, *of_rows_backward(packed)),
        *(None, ms, totals, S, N, D, g.blocks, g.splits, g.tiles, 1),
        **constants(packed, g, BACKWARD=True),
    )
    launch(
        *(_combine_rows_backward, (cdiv(S, 32),), ms, totals, parts, d_joint, d_joint.stride(0), scale),
        *(packed.order, m, factors, d_z, S, D, g.splits),
        BLOCK=32,
        DK=32,
        num_warps=4,
    )
    return m, factors


def pull_on_columns(
    packed: Packed, g: Grid, m: Tensor, factors: Tensor, sums: Tensor | None, shares: Tensor, common: Tensor | None
) -> None:
    """Launches `_joint_columns`, which writes sums [splits, 2, N, D], shares and common shares [splits, N]."""
    own_apart = common is not None and any(packed.overridden)  # own pairs then are no part of what a column has
    early = packed.order is not None and not own_apart
    launch(
        *(_joint_columns, (g.programs,), *_operands(packed), m, factors, margin(packed, packed.S)),
        *(sums, shares, common, packed.S, packed.N, packed.D, g.blocks, g.tiles, 1),
        **constants(packed, g, EARLY=early),
    )


def agg_log_prob_backward(
    d_joint: Tensor,
    joint: Tensor | None,
    pairs: Pairs,
    wanted: Sequence[bool],
    early_exit: bool,
    tf32x3: bool,
) -> list[Tensor]:
    """The gradients; where `joint` is None, after the joint, which is computed first. `tf32x3` is for that alone."""
    if joint is None:
        joint = agg_log_prob(pairs, early_exit, tf32x3)
        return [joint, *agg_log_prob_backward(d_joint, joint, pairs, wanted, early_exit, tf32x3)]
    gradients = new_gradients(pairs, wanted)
    joint_gradients(gradients, d_joint, joint, pairs, early_exit)
    return [x for x in gradients if x is not None]


def joint_gradients(
    gradients: Sequence[Tensor | None],
    d_joint: Tensor,
    joint: Tensor,
    pairs: Pairs,
    early_exit: bool,
    scale: float = 1.0,
) -> None:
    """Writes those of the gradients that are not None, of scale d_joint."""
    d_z, d_mu, d_logvar, d_log_w = gradients
    _, mu, logvar, _ = pairs
    packed = pack(pairs, order=early_order(mu, logvar, early_exit))
    S, N, D = packed.S, packed.N, packed.D
    m, factors = shares_of_rows(packed, d_joint, joint, d_z, scale)
    if N > 0 and not (d_mu is None and d_logvar is None and d_log_w is None):
        g = grid(N, S, D, packed.dtype, joint.device, kind_of(packed, reduce=True))
        sums = None if d_mu is None and d_logvar is None else new(packed, g.splits, 2, N, D)
        shares = new(packed, g.splits, N)
        common = None if d_log_w is None else new(packed, g.splits, N)
        pull_on_columns(packed, g, m, factors, sums, shares, common)
        columns_gradients(packed, sums, shares, common, d_mu, d_logvar, d_log_w)
