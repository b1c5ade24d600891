"""The joint log sum_j w_ij prod_d q(z_id | x_j) with the marginals log sum_j w_ij q(z_id | x_j), never forming [S, N].

The marginals are bound by exponentials, the joint by multiplications: one launch has programs for both, so that they
fill each other's gaps. A program for a marginal owns a block of samples in one dimension and streams columns by, each
lane with a maximum and a sum of its own. In the backward the marginals' pull is added to the joint's
(agg_log_prob.py): on z from programs like the forward's, on the columns from programs that own columns in one
dimension.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from .agg_log_prob import joint_gradients, pull_on_columns, shares_of_rows
from .elementary import INF
from .grids import constants, grid, grid_per_dimension, kind_of
from .log_sum_exp import put_together, room_for_ranges, summed
from .marginal_rows import marginal_operands, marginal_program, marginal_shares_of_rows
from .packing import PANEL, Pairs, new, pack
from .pair_gradients import columns_gradients, held_finite, new_gradients
from .row_sums import joint_program
from .tiles import (
    add_log_weights,
    far_t,
    inverse_kappa2,
    is_far,
    load_pair,
    meets_own,
    minus_square,
    offset,
    override,
    owned,
    passing,
    step,
)


@triton.jit(
    do_not_specialize=[
        *("S", "N", "D", "joint_programs", "joint_blocks", "joint_splits", "joint_tiles"),
        *("blocks", "splits", "tiles", "one"),
    ]
)
def _joint_and_marginals(
    samples, far_samples, planes, far_columns,
    c, log_w, own, own_low, own_high, log_w_own: tl.float64, log_w_next: tl.float64, marginal_c,
    joint, joint_ms, joint_totals, marginals, ms, totals, S, N, D,
    joint_programs, joint_blocks, joint_splits, joint_tiles, blocks, splits, tiles, one,
    TWO_LEVELS: tl.constexpr, OWN: tl.constexpr, NEXT: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
    EACH_RO: tl.constexpr, EACH_RP: tl.constexpr, EACH_TO: tl.constexpr, EACH_TP: tl.constexpr,
):  # fmt: skip
    """Runs programs for the joint first, because they take longest, then those for the marginals."""
    program = tl.program_id(0)
    if program < joint_programs:
        joint_program(
            program, samples, far_samples, planes, far_columns, c, log_w, own, own_low, own_high, log_w_own,
            log_w_next, None, None, None, None, 0.0, joint, joint_ms, joint_totals, S, N, D, joint_blocks,
            joint_splits, joint_tiles, one, TWO_LEVELS, OWN, NEXT, False, RO, RP, TO, TP, UNROLL,
        )  # fmt: skip
    else:
        marginal_program(
            program - joint_programs, samples, far_samples, planes, far_columns, marginal_c, log_w, own, own_low,
            own_high, log_w_own, log_w_next, marginals, ms, totals, None, S, N, D, blocks, splits, tiles,
            OWN, NEXT, EACH_RO, EACH_RP, EACH_TO, EACH_TP,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["S", "N", "D", "blocks", "tiles"], do_not_specialize_on_alignment=["sums", "common_shares"]
)
def _marginal_columns(
    samples, far_samples, planes, far_columns,
    c, log_w, own, own_low, own_high, log_w_own: tl.float64, log_w_next: tl.float64,
    ms, factors, sums, common_shares, S, N, D, blocks, tiles, OWN: tl.constexpr, NEXT: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Writes, for each range of samples, sums [splits, 2, N, D] of r t and of r (t^2 - kappa^2), and common_shares
    [splits, D, N], of the r that pull on log_w. Each may be None."""
    block = tl.program_id(0) % blocks
    d = tl.program_id(0) // blocks % D
    split = (tl.program_id(0) // blocks // D).to(tl.int64)
    first_column = block.to(tl.int64) * (RO * TO)
    column_lane, columns = owned(RO, TO)
    row_lane, rows = passing(RP, TP)
    row, column = row_lane + rows, column_lane + columns
    at = offset(first_column, D) + d * PANEL + column_lane
    a, b = load_pair(planes + at * step(planes), columns)
    c_d = tl.load(c + at + columns)
    far = is_far(far_columns, first_column)
    r0 = tl.zeros([RO, 1, TO, TP], c_d.dtype)
    rt = tl.zeros_like(r0)
    rt2 = tl.zeros_like(r0)
    common_share = tl.zeros_like(r0)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(S, RP * TP))):
        first_row = tl.full([], RP * TP, tl.int64) * tile
        z = tl.load(samples + offset(first_row, D) + d * PANEL + row_lane + rows)
        if far | is_far(far_samples, first_row):
            t = far_t(z, a, b, far)
        else:
            t = tl.fma(z, a, b)
        meets = meets_own(own_low, own_high, first_row, first_column, N, OWN, NEXT, RO * TO)
        s = add_log_weights(
            minus_square(c_d, t), log_w, own, log_w_own, log_w_next, meets,
            first_row + row_lane + rows, column_lane, columns, first_column, N, OWN, NEXT, RO * TO,
        )  # fmt: skip
        there = row < tl.minimum(S - first_row, RP * TP).to(tl.int32)
        of_row = d.to(tl.int64) * S + first_row + row_lane
        p = tl.exp2(s - tl.load(ms + of_row + rows, there, other=INF))
        r = p * tl.load(factors + of_row + rows, there, other=0.0)
        part = summed(r, False)
        r0 += part
        if common_shares is not None:
            if meets:
                common = override(
                    r, 0.0, 0.0, own, first_row + row_lane + rows, column_lane, columns, first_column, N, OWN, NEXT,
                    RO * TO,
                )  # fmt: skip
                common_share += summed(common, False)
            else:
                common_share += part
        if sums is not None:
            if far | is_far(far_samples, first_row):
                t = held_finite(t)
            rt += summed(r * t, False)
            rt2 += summed(r * t * t, False)
    inside = column < tl.minimum(N - first_column, RO * TO).to(tl.int32)
    if sums is not None:
        to = sums + (2 * split * N + first_column + column) * D + d
        tl.store(to, tl.sum(rt, 3, keep_dims=True), inside)
        tl.store(to + N.to(tl.int64) * D, tl.sum(rt2 - r0 / inverse_kappa2(r0.dtype), 3, keep_dims=True), inside)
    if common_shares is not None:
        to = common_shares + (split * D + d) * N + first_column + column
        tl.store(to, tl.sum(common_share, 3, keep_dims=True), inside)


def agg_log_prob_marginals(pairs: Pairs) -> tuple[Tensor, Tensor]:
    packed = pack(pairs, marginals=True)
    S, N, D = packed.S, packed.N, packed.D
    joint, marginals = new(packed, S), new(packed, S, D)
    if S == 0:
        return joint, marginals
    kind = kind_of(packed, reduce=False)
    g, each = (choose(S, N, D, packed.dtype, joint.device, kind) for choose in (grid, grid_per_dimension))
    joint_parts, parts = room_for_ranges(joint, g.splits, S), room_for_ranges(marginals, each.splits, D, S)
    launch(
        *(_joint_and_marginals, (g.programs + each.programs,)),
        *(packed.samples, packed.far_samples, packed.columns, packed.far_columns, *packed.weights, packed.marginal_c),
        *(joint, *joint_parts, marginals, *parts, S, N, D),
        *(g.programs, g.blocks, g.splits, g.tiles, each.blocks, each.splits, each.tiles, 1),
        **constants(packed, g, **{f"EACH_{k}": each.config[k] for k in ("RO", "RP", "TO", "TP")}),
    )
    put_together(*joint_parts, joint, S, 1, g.splits)
    put_together(*parts, marginals, S, D, each.splits)
    return joint, marginals


def agg_log_prob_marginals_backward(
    upstream: Sequence[Tensor | None],
    joint: Tensor,
    marginals: Tensor,
    pairs: Pairs,
    wanted: Sequence[bool],
    early_exit: bool,
) -> list[Tensor]:
    """The gradients; where only the joint's are asked for, `early_exit` may leave out pairs."""
    gradients = new_gradients(pairs, wanted)
    marginals_gradients(gradients, upstream, joint, pairs, early_exit)
    return [x for x in gradients if x is not None]


def marginals_gradients(
    gradients: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    joint: Tensor,
    pairs: Pairs,
    early_exit: bool,
) -> None:
    """Writes those of the gradients that are not None."""
    d_joint, d_marginals = upstream
    d_z, d_mu, d_logvar, d_log_w = gradients
    if d_marginals is None or d_marginals.shape[1] == 0:
        d_joint = torch.zeros_like(joint) if d_joint is None else d_joint
        joint_gradients(gradients, d_joint, joint, pairs, early_exit)
        return
    packed = pack(pairs, marginals=True)
    S, N, D = packed.S, packed.N, packed.D
    joint_d_z: Tensor | None = None
    joint_shares: tuple[Tensor, Tensor] | None = None
    if d_joint is not None:
        if d_z is not None:
            joint_d_z = d_z if d_z.dtype == packed.dtype else new(packed, S, D)
        joint_shares = shares_of_rows(packed, d_joint, joint, joint_d_z)
    shares = marginal_shares_of_rows(packed, d_marginals, joint_d_z, d_z)
    if N > 0 and not (d_mu is None and d_logvar is None and d_log_w is None):
        kind = kind_of(packed, reduce=True)
        g, each = (choose(N, S, D, packed.dtype, joint.device, kind) for choose in (grid, grid_per_dimension))
        n = 0 if joint_shares is None else g.splits
        sums = None if d_mu is None and d_logvar is None else new(packed, n + each.splits, 2, N, D)
        total_shares = new(packed, n, N)
        common = None if d_log_w is None else new(packed, n + each.splits * D, N)
        if joint_shares is not None:
            pull_on_columns(packed, g, *joint_shares, sums, total_shares, common)
        OWN, NEXT = packed.overridden
        launch(
            *(_marginal_columns, (each.programs,), *marginal_operands(packed), *shares),
            *(None if x is None else x[n:] for x in (sums, common)),
            *(S, N, D, each.blocks, each.tiles),
            **{"OWN": OWN, "NEXT": NEXT, **each.config},
        )
        columns_gradients(packed, sums, total_shares, common, d_mu, d_logvar, d_log_w)
