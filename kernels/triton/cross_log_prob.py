"""The matrix log q(z_i | x_j) [S, N], and its gradients, where the upstream gradient [S, N] is the pairs' weights."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import add_up, launch
from .elementary import LN2
from .grids import Kind, grid
from .log_sum_exp import summed
from .packing import UNWEIGHTED, Pairs, new, pack
from .pair_gradients import any_far, clear, columns_gradients, new_gradients, pull_columns, pull_samples
from .tiles import FOLD, INV_KAPPA2, is_far, minus_squares, offset, owned, passing, square_sums, step


@triton.jit
def _again(stride, tile):
    """The stride in int64, made to look as if it depended on the tile. Else the compiler would compute its products
    with a tile's rows once for all tiles, and they would take registers while d runs."""
    return stride.to(tl.int64) + tl.where(tile < 0, 1, 0)


@triton.jit(do_not_specialize=["S", "N", "D", "blocks", "tiles"])
def _cross_log_prob(
    samples, planes, far_columns, c, out, S, N, D, blocks, tiles,
    TWO_LEVELS: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    first_row = block.to(tl.int64) * RO * TO
    row_lane, rows = owned(RO, TO)
    column_lane, columns = passing(RP, TP)
    z = samples + offset(first_row, D) + row_lane
    inside_rows = row_lane + rows < tl.minimum(S - first_row, RO * TO).to(tl.int32)
    out += first_row * N
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(N, RP * TP))):
        first_column = tl.full([], RP * TP, tl.int64) * tile
        ab = planes + (offset(first_column, D) + column_lane) * step(planes)
        squares = square_sums(
            z, rows, ab, columns, is_far(far_columns, first_column), D, TWO_LEVELS, RO, RP, TO, TP, UNROLL
        )
        log_q = minus_squares(tl.load(c + (first_column + columns) + column_lane), squares)
        inside = inside_rows & (column_lane + columns < tl.minimum(N - first_column, RP * TP).to(tl.int32))
        at = (row_lane + rows) * _again(N, tile) + (first_column + columns) + column_lane
        tl.store(out + at, log_q * tl.full([], LN2, log_q.dtype), inside)


@triton.jit(do_not_specialize=["grad_row", "grad_column", "S", "N", "D", "blocks", "tiles", "one"])
def _cross_rows(
    samples, far_samples, planes, far_columns, grad, grad_row, grad_column, sums, S, N, D, blocks, tiles, one,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Writes sums [splits, S, D] of r t a over ranges of columns."""
    block = tl.program_id(0) % blocks
    split = (tl.program_id(0) // blocks).to(tl.int64)
    first_row = block.to(tl.int64) * RO * TO
    row_lane, rows = owned(RO, TO)
    column_lane, columns = passing(RP, TP)
    inside_rows = row_lane + rows < tl.minimum(S - first_row, RO * TO).to(tl.int32)
    z = samples + offset(first_row, D) + row_lane
    far_rows = is_far(far_samples, first_row)
    one_time = tl.full([], 1.0, samples.dtype.element_ty)
    to = sums + (split * S + first_row + row_lane) * D
    clear(to, rows * D, inside_rows, D, one, RO, TO, TP)
    grad += first_row * grad_row
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(N, RP * TP))):
        first_column = tl.full([], RP * TP, tl.int64) * tile
        ab = planes + (offset(first_column, D) + column_lane) * step(planes)
        inside = inside_rows & (column_lane + columns < tl.minimum(N - first_column, RP * TP).to(tl.int32))
        at = (row_lane + rows) * _again(grad_row, tile) + (first_column + column_lane + columns) * _again(
            grad_column, tile
        )
        r = tl.load(grad + at, inside, other=0.0)
        far = is_far(far_columns, first_column)
        pull_samples(
            r, one_time, z, rows, ab, columns, far, far_rows, to, rows * D, inside_rows, one, D, RO, TO, TP
        )  # fmt: skip


@triton.jit(do_not_specialize=["grad_row", "grad_column", "S", "N", "D", "blocks", "tiles", "one"])
def _cross_columns(
    samples, far_samples, planes, far_columns, grad, grad_row, grad_column, sums, shares, S, N, D, blocks, tiles, one,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Writes sums [splits, 2, N, D] of r e and r e^2, and shares [splits, N] of r, over ranges of samples."""
    block = tl.program_id(0) % blocks
    split = (tl.program_id(0) // blocks).to(tl.int64)
    first_column = block.to(tl.int64) * RO * TO
    column_lane, columns = owned(RO, TO)
    row_lane, rows = passing(RP, TP)
    inside_columns = column_lane + columns < tl.minimum(N - first_column, RO * TO).to(tl.int32)
    ab = planes + (offset(first_column, D) + column_lane) * step(planes)
    far_column = is_far(far_columns, first_column)
    far = far_column | any_far(far_samples, S)
    to_e = sums + (2 * split * N + first_column + column_lane) * D
    apart = N.to(tl.int64) * D
    clear(to_e, columns * D, inside_columns, D, one, RO, TO, TP)
    clear(to_e + apart, columns * D, inside_columns, D, one, RO, TO, TP)
    share = tl.zeros([RO, 1, TO, TP], samples.dtype.element_ty)
    grad += first_column * grad_column
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(S, RP * TP))):
        first_row = tl.full([], RP * TP, tl.int64) * tile
        z = samples + offset(first_row, D) + row_lane
        inside = inside_columns & (row_lane + rows < tl.minimum(S - first_row, RP * TP).to(tl.int32))
        at = (first_row + row_lane + rows) * _again(grad_row, tile) + (column_lane + columns) * _again(
            grad_column, tile
        )
        r = tl.load(grad + at, inside, other=0.0)
        share += summed(r, False)
        pull_columns(
            r, z, rows, ab, columns, far_column, far, to_e, apart, columns * D, inside_columns, one, D, RO, TO, TP
        )  # fmt: skip
    at = split * N + first_column + column_lane + columns
    tl.store(shares + at, tl.sum(share, 3, keep_dims=True), inside_columns)


def cross_log_prob(pairs: Pairs) -> Tensor:
    packed = pack((*pairs[:3], UNWEIGHTED))
    S, N, D = packed.S, packed.N, packed.D
    out = new(packed, S, N)
    if S and N:
        g = grid(S, N, D, packed.dtype, out.device, Kind(matrix=True))
        arguments = (packed.samples, packed.columns, packed.far_columns, packed.c, out, S, N, D, g.blocks, g.tiles)
        launch(_cross_log_prob, (g.programs,), *arguments, **{"TWO_LEVELS": FOLD.value < D, **g.config})
    return out


def cross_log_prob_backward(grad: Tensor, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]:
    packed = pack((*pairs[:3], UNWEIGHTED))
    S, N, D = packed.S, packed.N, packed.D
    d_z, d_mu, d_logvar = gradients = new_gradients(pairs, wanted)
    operands = (packed.samples, packed.far_samples, packed.columns, packed.far_columns, grad, *grad.stride())
    if d_z is not None and S > 0:
        g = grid(S, N, D, packed.dtype, grad.device, Kind(reduce=True, matrix=True))
        sums = new(packed, g.splits, S, D)
        launch(_cross_rows, (g.programs,), *operands, sums, S, N, D, g.blocks, g.tiles, 1, **g.config)
        scale = -1.0 if packed.dtype == torch.float64 else -INV_KAPPA2.value
        add_up(sums.view(1, g.splits, S * D), [d_z.view(-1)], scale)
    if N > 0 and not (d_mu is None and d_logvar is None):
        g = grid(N, S, D, packed.dtype, grad.device, Kind(reduce=True, matrix=True))
        sums, shares = new(packed, g.splits, 2, N, D), new(packed, g.splits, N)
        launch(_cross_columns, (g.programs,), *operands, sums, shares, S, N, D, g.blocks, g.tiles, 1, **g.config)
        columns_gradients(packed, sums, shares, None, d_mu, d_logvar, None)
    return [x for x in gradients if x is not None]
