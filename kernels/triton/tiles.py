"""Tiles of pairs: what every kernel does with the packed samples and columns that meet in one.

A tile is a tensor of pairs [RO, RP, TO, TP]. Triton spreads trailing axes over threads: where TO * TP is the number of
threads, a thread holds RO * RP pairs in registers, RO samples (or columns) of those that the program owns against RP of
those that pass by, and sums over passing ones end in TP neighbouring lanes.
"""

import triton
import triton.language as tl

from .elementary import LOG2E
from .packing import PANEL

FOLD = tl.constexpr(128)  # squares are summed over so many dimensions at a time: TWO_LEVELS is whether there are more
INV_KAPPA2 = tl.constexpr(1.38629436111989061883)  # 1 / kappa^2 = 2 ln 2, in float32


@triton.jit
def owned(RO: tl.constexpr, TO: tl.constexpr):
    """The index of a pair's sample (or column) among the program's own RO * TO, as a sum: that of its thread
    [1, 1, TO, 1], which addresses keep in a register, and a constant [RO, 1, 1, 1], which is part of the
    instruction."""
    return tl.arange(0, TO)[None, None, :, None], (tl.arange(0, RO) * TO)[:, None, None, None]


@triton.jit
def passing(RP: tl.constexpr, TP: tl.constexpr):
    """The index of a pair's passing one among RP * TP, likewise: [1, 1, 1, TP] and [1, RP, 1, 1]."""
    return tl.arange(0, TP)[None, None, None, :], (tl.arange(0, RP) * TP)[None, :, None, None]


@triton.jit
def offset(first, D):
    """The place of element `first` (int64) of dimension 0 in packed samples or columns."""
    return first // PANEL * PANEL * D + first % PANEL


@triton.jit
def step(planes):
    """The elements in `planes` of a column and a dimension: one, or two where a and b do not fit into one."""
    return 1 if planes.dtype.element_ty == tl.int64 else 2


@triton.jit
def is_far(far, first):
    """Whether the panel of element `first` is far."""
    return tl.load(far + first // PANEL) != 0


@triton.jit
def minus_squares(c, squares):
    """The log-density in bits, c - log2(e) / (2 kappa^2) squares."""
    if squares.dtype == tl.float64:
        s = tl.fma(squares, tl.full([], -0.5 * LOG2E, tl.float64), c)
    else:
        s = c - squares
    return s


@triton.jit
def minus_square(c, t):
    """The same from the t of one dimension, to the last bit in every kernel."""
    if t.dtype == tl.float64:
        s = minus_squares(c, t * t)
    else:
        s = tl.fma(t * -1.0, t, c)  # -t would be 0 - t, an instruction
    return s


@triton.jit
def inverse_kappa2(dtype: tl.constexpr):
    """1 / kappa^2"""
    return tl.full([], 1.0 if dtype == tl.float64 else INV_KAPPA2, dtype)


@triton.jit
def load_pair(planes, columns):
    """The a and b of columns."""
    if planes.dtype.element_ty == tl.int64:
        both = tl.load(planes + columns)
        a = (both & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        b = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        a = tl.load(planes + 2 * columns)
        b = tl.load(planes + 2 * columns + 1)
    return a, b


@triton.jit
def far_t(z, a, b, far_columns):
    """The t of a pair where something is far: fma(z, a, b), or (z + b) a where the columns are."""
    return tl.fma(z + tl.where(far_columns, b, 0.0), a, tl.where(far_columns, 0.0, b))


@triton.jit
def squares_of(acc, z, rows, planes, columns, far, n, UNROLL: tl.constexpr):
    """Adds the squares of n more dimensions to `acc`."""
    if far:
        for _ in range(0, n):
            a, b = load_pair(planes, columns)
            t = (tl.load(z + rows) + b) * a
            acc = tl.fma(t, t, acc)
            z += PANEL
            planes += PANEL * step(planes)
    elif UNROLL == 1:
        for _ in range(0, n):
            a, b = load_pair(planes, columns)
            t = tl.fma(tl.load(z + rows), a, b)
            acc = tl.fma(t, t, acc)
            z += PANEL
            planes += PANEL * step(planes)
    else:  # from k, as pointers that are carried from step to step would cost moves, and barriers in the last steps
        for k in tl.range(0, n, loop_unroll_factor=UNROLL):
            a, b = load_pair(planes + k * (PANEL * step(planes)), columns)
            t = tl.fma(tl.load(z + k * PANEL + rows), a, b)
            acc = tl.fma(t, t, acc)
    return acc


@triton.jit
def square_sums(
    z, rows, planes, columns, far, D, TWO_LEVELS: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums t^2 over d for a tile, from pointers to dimension 0 of the thread's first sample and column, and the
    constants that lead to its others (`owned`, `passing`). A pair has the same bits in every tile that it may be in."""
    zeros = tl.zeros([RO, RP, TO, TP], z.dtype.element_ty)
    if not TWO_LEVELS:
        total = squares_of(zeros, z, rows, planes, columns, far, D, UNROLL)
    else:
        total = squares_of(zeros, z, rows, planes, columns, far, FOLD, UNROLL)
        for d in range(FOLD, D, FOLD):
            z += FOLD * PANEL
            planes += FOLD * PANEL * step(planes)
            total += squares_of(zeros, z, rows, planes, columns, far, tl.minimum(D - d, FOLD), UNROLL)
    return total


@triton.jit
def meets_own(
    own_low, own_high, first_row, first_column, N, OWN: tl.constexpr, NEXT: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Whether an own column of a tile's samples, or the one after it, may be among the tile's columns. It goes by the
    range of the panel's own columns, which is narrow where neighbours were drawn from neighbours."""
    if OWN or NEXT:
        low = tl.load(own_low + first_row // PANEL)
        high = tl.load(own_high + first_row // PANEL)
        meets = (low < first_column + COLUMNS) & (high + 1 >= first_column)
        meets |= (high == N - 1) & (first_column == 0)
    else:
        meets = False
    return meets


@triton.jit
def _place(j, first_column, lane, COLUMNS: tl.constexpr):
    """The place of column j in a tile, int32, counted from the thread's first column `lane`; negative for elsewhere."""
    there = j - first_column
    return tl.where((there >= 0) & (there < COLUMNS), there, -1).to(tl.int32) - lane


@triton.jit
def override(
    common, own_one, next_one, own, row, lane, columns, first_column, N,
    OWN: tl.constexpr, NEXT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Values of a tile's pairs: own_one where the column is the sample's own, next_one where it is the one after that,
    and `common` elsewhere.

    `row` [S] are the samples' indices in all. The thread's columns in the tile are `lane`, its first, plus the
    constants `columns`: comparisons are with these constants, so that no register holds the indices of a tile's
    columns."""
    drawn_from = tl.load(own + row)
    if NEXT:
        following = tl.where(drawn_from == N - 1, 0, drawn_from + 1)
        common = tl.where(columns == _place(following, first_column, lane, COLUMNS), next_one, common)
    if OWN:
        common = tl.where(columns == _place(drawn_from, first_column, lane, COLUMNS), own_one, common)
    return common


@triton.jit
def add_log_weights(
    s, log_w, own, log_w_own, log_w_next, meets, row, lane, columns, first_column, N,
    OWN: tl.constexpr, NEXT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds the log-weights to a tile's log-densities s, unless they are in c already."""
    if OWN or NEXT:
        w = tl.load(log_w + (first_column + columns) + lane)
        if meets:
            w_own, w_next = tl.full([], log_w_own, s.dtype), tl.full([], log_w_next, s.dtype)
            s += override(w, w_own, w_next, own, row, lane, columns, first_column, N, OWN, NEXT, COLUMNS)
        else:
            s += w
    return s
