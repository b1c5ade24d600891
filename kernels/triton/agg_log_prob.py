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

from fastvae.backends import precision
from fastvae.backends.contract import LogWeights

from . import tensor_cores
from ._launch import Config, cdiv, empty_like, fastest
from .elementary import INF, times
from .grids import Grid, configs, grid, has_tensor_cores
from .log_sum_exp import (
    across_lanes,
    add_terms,
    combine_ranges,
    combine_rows,
    hint,
    log_of,
    nothing,
    share_factor,
    summed,
)
from .packing import Packed, new, pack
from .pair_gradients import clear, columns_gradients, pull_columns, pull_samples
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


@triton.jit
def joint_sums(
    block, split, samples, far_samples, planes, far_columns, c, log_w, own, own_low, own_high, log_w_own, log_w_next,
    known, d_z, S, N, tiles, one,
    D: tl.constexpr, OWN: tl.constexpr, NEXT: tl.constexpr, BACKWARD: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """m and total [RO, 1, TO, 1] of a block of samples over a range of columns. `known`: the result, in the backward;
    d_z: where the pull on z is to be gathered, [splits, S, D], or None."""
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
    if d_z is not None:
        far_rows = is_far(far_samples, first_row)
        to = d_z + (split.to(tl.int64) * S + first_row + row_lane) * D
        clear(to, rows * D, inside, D, RO, TO, TP, one)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(N, COLUMNS))):
        first_column = tl.full([], COLUMNS, tl.int64) * tile
        ab = planes + (offset(first_column, D) + column_lane) * step(planes)
        far = is_far(far_columns, first_column)
        squares = square_sums(z, rows, ab, columns, far, D, RO, RP, TO, TP, UNROLL)
        meets = meets_own(own_low, own_high, first_row, first_column, N, OWN, NEXT, COLUMNS)
        s = minus_squares(tl.load(c + first_column + column_lane + columns), squares)
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
    known, d_z, joint, ms, totals, S, N, blocks, tiles, one,
    D: tl.constexpr, OWN: tl.constexpr, NEXT: tl.constexpr, BACKWARD: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """joint [S], or where that is None m and total of each range, [splits, S]."""
    block = program % blocks
    split = program // blocks
    m, total = joint_sums(
        block, split, samples, far_samples, planes, far_columns, c, log_w, own, own_low, own_high, log_w_own,
        log_w_next, known, d_z, S, N, tiles, one, D, OWN, NEXT, BACKWARD, RO, RP, TO, TP, UNROLL,
    )  # fmt: skip
    lane, rows = owned(RO, TO)
    i = block.to(tl.int64) * (RO * TO) + lane + rows
    if joint is not None:
        tl.store(joint + i, log_of(m, total), i < S)
    else:
        tl.store(ms + split.to(tl.int64) * S + i, m, i < S)
        tl.store(totals + split.to(tl.int64) * S + i, total, i < S)


@triton.jit(do_not_specialize=["S", "N", "blocks", "tiles", "one"])
def _joint_rows(
    samples, far_samples, planes, far_columns,
    c, log_w, own, own_low, own_high, log_w_own: tl.float64, log_w_next: tl.float64,
    known, d_z, joint, ms, totals, S, N, blocks, tiles, one,
    D: tl.constexpr, OWN: tl.constexpr, NEXT: tl.constexpr, BACKWARD: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    joint_program(
        tl.program_id(0), samples, far_samples, planes, far_columns, c, log_w, own, own_low, own_high, log_w_own,
        log_w_next, known, d_z, joint, ms, totals, S, N, blocks, tiles, one, D, OWN, NEXT, BACKWARD,
        RO, RP, TO, TP, UNROLL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["grad_stride", "S", "splits"])
def _combine_rows_backward(
    ms, totals, parts, d_joint, grad_stride, m_out, factors, d_z, S, splits,
    D: tl.constexpr, BLOCK: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    """Shares are factor 2^(s - m), with those [S]; d_z [S, D] from its parts, each relative to its range's m."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < S
    m, total = combine_ranges(ms + i, totals + i, splits, S.to(tl.int64), inside)
    g = tl.load(d_joint + i * grad_stride, inside, other=0.0).to(m.dtype)
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
            tl.store(d_z + i[:, None] * D + d, x.to(d_z.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["S", "N", "blocks", "tiles", "one"])
def _joint_columns(
    samples, far_samples, planes, far_columns,
    c, log_w, own, own_low, own_high, log_w_own: tl.float64, log_w_next: tl.float64,
    ms, factors, sums, shares, common_shares, S, N, blocks, tiles, one,
    D: tl.constexpr, OWN: tl.constexpr, NEXT: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """sums [splits, 2, N, D] of r t and r t^2, shares [splits, N] of r, and of those r that pull on log_w; of ranges of
    samples. Sums and the last may be None."""
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
        to_t = sums + (2 * split * N + first_column + column_lane) * D
        to_t2 = to_t + N.to(tl.int64) * D
        clear(to_t, columns * D, inside, D, RO, TO, TP, one)
        clear(to_t2, columns * D, inside, D, RO, TO, TP, one)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(S, ROWS))):
        first_row = tl.full([], ROWS, tl.int64) * tile
        z = samples + offset(first_row, D) + row_lane
        squares = square_sums(z, rows, ab, columns, far, D, RO, RP, TO, TP, UNROLL)
        meets = meets_own(own_low, own_high, first_row, first_column, N, OWN, NEXT, COLUMNS)
        s = minus_squares(tl.load(c + first_column + column_lane + columns), squares)
        s = add_log_weights(
            s, log_w, own, log_w_own, log_w_next, meets, first_row + row_lane + rows, column_lane, columns,
            first_column, N, OWN, NEXT, COLUMNS,
        )  # fmt: skip
        there = row < tl.minimum(S - first_row, ROWS).to(tl.int32)
        p = tl.exp2(s - tl.load(ms + first_row + row_lane + rows, there, other=INF))
        r = p * tl.load(factors + first_row + row_lane + rows, there, other=0.0)
        part = summed(r, False)
        share += part
        if common_shares is not None:
            if meets:
                common = override(
                    r, 0.0, 0.0, own, first_row + row_lane + rows, column_lane, columns, first_column, N, OWN, NEXT,
                    COLUMNS,
                )  # fmt: skip
                common_share += summed(common, False)
            else:
                common_share += part
        if sums is not None:  # noqa: SIM102
            if tl.max(tl.where(tl.sum(tl.abs(r), 1, keep_dims=True) == 0, 0, 1)) != 0:
                far_rows = is_far(far_samples, first_row)
                pull_columns(
                    r, z, rows, ab, columns, far, far_rows, to_t, to_t2, columns * D, inside, one, D, RO, TO, TP
                )  # fmt: skip
    at = split * N + first_column + column
    tl.store(shares + at, tl.sum(share, 3, keep_dims=True), inside)
    if common_shares is not None:
        tl.store(common_shares + at, tl.sum(common_share, 3, keep_dims=True), inside)


def _operands(packed: Packed) -> tuple[Tensor | float | None, ...]:
    return packed.samples, packed.far_samples, packed.columns, packed.far_columns, *packed.weights


def agg_log_prob(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights) -> Tensor:
    if precision.current() == "tf32x3" and z.dtype != torch.float64 and has_tensor_cores():
        return tensor_cores.agg_log_prob(z, mu, logvar, weights)
    packed = pack(z, mu, logvar, weights)
    S, N, D = packed.S, packed.N, packed.D
    joint = new(packed, S)
    if S == 0:
        return joint

    def run(config: Config) -> Tensor:
        g = grid(S, N, D, packed.dtype, z.device, False, any(packed.overridden), **config)
        ms, totals = (None, None) if g.splits == 1 else (new(packed, g.splits, S), new(packed, g.splits, S))
        _joint_rows[(g.programs,)](
            *_operands(packed),
            *(None, None, joint if g.splits == 1 else None, ms, totals, S, N, g.blocks, g.tiles, 1),
            *(D, *packed.overridden, False),
            **g.config,
        )
        if ms is not None:
            combine_rows[(cdiv(S, 128),)](ms, totals, joint, S, 1, g.splits, 128, num_warps=4)
        return joint

    return fastest(run, configs(S, N, packed.dtype), "agg_log_prob", packed.dtype, *packed.overridden, S, N, D)


def shares_of_rows(packed: Packed, d_joint: Tensor, joint: Tensor, d_z: Tensor | None) -> tuple[Tensor, Tensor]:
    """m and factor [S], the shares of row i being factor 2^(s_ij - m); writes d_z [S, D] where it is wanted."""
    S, N, D = packed.S, packed.N, packed.D
    m, factors = new(packed, S), new(packed, S)
    if S == 0:
        return m, factors
    g = grid(S, N, D, packed.dtype, d_joint.device, reduce=True)
    ms, totals = new(packed, g.splits, S), new(packed, g.splits, S)
    parts = None if d_z is None else new(packed, g.splits, S, D)
    _joint_rows[(g.programs,)](
        *_operands(packed),
        *(joint, parts, None, ms, totals, S, N, g.blocks, g.tiles, 1),
        *(D, *packed.overridden, True),
        **g.config,
    )
    _combine_rows_backward[(cdiv(S, 32),)](
        *(ms, totals, parts, d_joint, d_joint.stride(0), m, factors, d_z, S, g.splits, D, 32, 32), num_warps=4
    )
    return m, factors


def pull_on_columns(
    packed: Packed, g: Grid, m: Tensor, factors: Tensor, sums: Tensor | None, shares: Tensor, common: Tensor | None
) -> None:
    """Writes sums [splits, 2, N, D], shares [splits, N], and those that pull on log_w."""
    _joint_columns[(g.programs,)](
        *_operands(packed),
        *(m, factors, sums, shares, common, packed.S, packed.N, g.blocks, g.tiles, 1),
        *(packed.D, *packed.overridden),
        **g.config,
    )


def agg_log_prob_backward(
    d_joint: Tensor,
    joint: Tensor | None,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    weights: LogWeights,
    wanted: Sequence[bool],
) -> list[Tensor]:
    if joint is None:
        joint = agg_log_prob(z, mu, logvar, weights)
        return [joint, *agg_log_prob_backward(d_joint, joint, z, mu, logvar, weights, wanted)]
    packed = pack(z, mu, logvar, weights)
    S, N, D = packed.S, packed.N, packed.D
    gradients = [
        empty_like(x) if want and x is not None else None
        for x, want in zip((z, mu, logvar, weights.log_w), wanted, strict=True)
    ]
    d_z, d_mu, d_logvar, d_log_w = gradients
    m, factors = shares_of_rows(packed, d_joint, joint, d_z)
    if N > 0 and not (d_mu is None and d_logvar is None and d_log_w is None):
        g = grid(N, S, D, packed.dtype, z.device, reduce=True)
        sums = None if d_mu is None and d_logvar is None else new(packed, g.splits, 2, N, D)
        shares = new(packed, g.splits, N)
        common = None if d_log_w is None else new(packed, g.splits, N)
        pull_on_columns(packed, g, m, factors, sums, shares, common)
        columns_gradients(packed, sums, shares, common, d_mu, d_logvar, d_log_w)
    return [x for x in gradients if x is not None]
