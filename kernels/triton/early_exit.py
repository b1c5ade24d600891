"""Early exit: a tile stops at a dimension by which every pair in it is known to be too far to show in the results,
before the other dimensions and the exponentials. docs/beyond-brute-force.md derives the bounds, and
kernels/cpu/early_exit.h has the same for smaller tiles.

Sums of squares only grow, so that a pair's term is at most 2^(cw_j - squares so far). With `reach` what the columns of
a panel can come to, and `floor` what its rows' sums are all known to be, a tile stops when the least of its squares
passes reach - floor + margin; all in bits. A look at a tile is one reduction over a program, after every LOOK
dimensions. Each program counts what its looks save and cost, in dimensions, from D on, and while they don't pay it
looks at one tile in 16.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch
from .elementary import INF, LOG2E, largest
from .packing import PANEL, Packed, new
from .tiles import FOLD, far_t, load_pair, minus_squares, offset, squares_of, step

LOOK = tl.constexpr(16)  # dimensions between looks
MIN_COLUMNS = 1024  # fewer are not worth a look


@triton.jit
def steep(bits):
    """The squares Q above which a pair pulls on a gradient by less than 2^-bits: 2^-Q max(1, Q) <= 2^(3.1 - 15/16 Q)"""
    return (bits + 3.1) * (16 / 15)


@triton.jit
def wants_look(balance, tile):
    return (balance >= 0) | (tile % 16 == 0)


@triton.jit
def balanced(balance, looked, near, d, D, TWO_LEVELS: tl.constexpr):
    """The balance of what looks saved and cost, in dimensions, after a tile that stopped at dimension d, or did not
    (`near`): its exponentials take as long as 7 dimensions, a look as long as 2."""
    between: tl.constexpr = FOLD if TWO_LEVELS else LOOK
    change = tl.where(near, 0, D - d + 7) - 2 * tl.cdiv(d, between)
    return tl.where(looked, tl.clamp((balance + change).to(tl.float32), D * -4.0, D * 16.0).to(tl.int32), balance)


@triton.jit
def squares_unless_far(
    z, rows, planes, columns, far, looks, limit, D, TWO_LEVELS: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The sums of squares, as `tiles.square_sums` has them to the same bits; whether any pair's is up to `limit`; and
    the dimension that was come to. Where `looks`, it stops as soon as none is."""
    squares = tl.zeros([RO, RP, TO, TP], z.dtype.element_ty)
    d = tl.full([], 0, tl.int32)
    near = d == 0
    if TWO_LEVELS:
        between = tl.full([], FOLD, tl.int32)
    else:
        between = tl.where(looks, LOOK, D)
    while near & (d < D):
        n = tl.minimum(D - d, between)
        z_d, planes_d = z + d * PANEL, planes + d * (PANEL * step(planes))
        if TWO_LEVELS:
            squares += squares_of(tl.zeros_like(squares), z_d, rows, planes_d, columns, far, n, UNROLL)
        else:
            squares = squares_of(squares, z_d, rows, planes_d, columns, far, n, UNROLL)
        d += n
        if looks:
            near = (tl.min(squares) > limit) == 0
    return squares, near, d


@triton.jit
def _reach(panel, planes, far_columns, c, log_w, reach, steepest, least, N, D):
    """Writes the bounds of a panel of columns: `reach`, its largest c + log_w, and `steepest`, its largest c + log_w +
    log2 of the column's largest a, both infinite where the panel may not be left out; and log2 of its `least` a."""
    j = panel * PANEL + tl.arange(0, PANEL)
    cw = tl.load(c + j)
    if log_w is not None:
        cw += tl.load(log_w + j)
    weighs = (j < N) & (cw != -INF)
    planes += offset(j, D) * step(planes)
    narrow, wide = tl.zeros_like(cw), tl.zeros_like(cw) + INF
    for _ in range(0, D):
        a, _b = load_pair(planes, 0)
        narrow, wide = tl.maximum(narrow, a), tl.minimum(wide, a)
        planes += PANEL * step(planes)
    unknown = (tl.load(far_columns + panel) != 0) | (tl.max(tl.where(weighs & (cw != cw), 1, 0), 0) != 0)
    unknown |= tl.max(tl.where(weighs, 1, 0), 0) == 0
    tl.store(reach + panel, tl.where(unknown, INF, tl.max(tl.where(weighs, cw, -INF), 0)))
    tl.store(steepest + panel, tl.where(unknown, INF, tl.max(tl.where(weighs, cw + tl.log2(narrow), -INF), 0)))
    tl.store(least + panel, tl.log2(tl.min(tl.where(j < N, wide, INF), 0)))


@triton.jit
def _likely(panel, samples, planes, far_columns, c, log_w, own, log_w_own, terms, S, N, D, OWN: tl.constexpr):
    """Writes log2 of w_ij q(z_i | x_j) for the column that each sample was drawn from, or column i mod N where that is
    not said: any column's term bounds the sum from below. The most negative number where it is not finite."""
    i = panel * PANEL + tl.arange(0, PANEL)
    j = i % N
    if own is not None:
        drawn_from = tl.load(own + i, i < S, other=-1)
        known = (drawn_from >= 0) & (drawn_from < N)
        j = tl.where(known, drawn_from, j)
    z = samples + offset(i, D)
    planes += offset(j, D) * step(planes)
    far = tl.load(far_columns + j // PANEL) != 0
    squares = tl.zeros([PANEL], samples.dtype.element_ty)
    for _ in range(0, D):
        a, b = load_pair(planes, 0)
        t = far_t(tl.load(z), a, b, far)
        squares = tl.fma(t, t, squares)
        z += PANEL
        planes += PANEL * step(planes)
    s = minus_squares(tl.load(c + j), squares)
    if log_w is not None:
        w = tl.load(log_w + j)
        if OWN:
            w = tl.where(known, tl.full([], log_w_own, w.dtype), w)
        s += w
    tl.store(terms + i, tl.where(tl.abs(s) < INF, s, -largest(s.dtype)), i < S)


@triton.jit(do_not_specialize=["S", "N", "D", "column_panels"])
def _bounds(
    samples, planes, far_columns, c, log_w, own, log_w_own: tl.float64, reach, steepest, least, terms,
    S, N, D, column_panels, OWN: tl.constexpr,
):  # fmt: skip
    """Runs over panels of columns, then over panels of samples, where their likely terms are wanted."""
    panel = tl.program_id(0).to(tl.int64)
    if panel < column_panels:
        _reach(panel, planes, far_columns, c, log_w, reach, steepest, least, N, D)
    elif terms is not None:
        _likely(
            panel - column_panels, samples, planes, far_columns, c, log_w, own, log_w_own, terms, S, N, D, OWN
        )  # fmt: skip


@triton.jit(do_not_specialize=["panels"])
def _subtract_least(steepest, least, panels, BLOCK: tl.constexpr):
    """Subtracts the least of all panels' log2 a from each panel's bound; one program."""
    k = tl.arange(0, BLOCK)
    lowest = tl.full([BLOCK], INF, least.dtype.element_ty)
    for first in range(0, panels, BLOCK):
        lowest = tl.minimum(lowest, tl.load(least + first + k, first + k < panels, other=INF))
    lowest = tl.min(lowest, 0)
    for first in range(0, panels, BLOCK):
        inside = first + k < panels
        tl.store(steepest + first + k, tl.load(steepest + first + k, inside, other=0.0) - lowest, inside)


@triton.jit
def _spread(mu, mu_row, mu_col, logvar, lv_row, lv_col, d, N, D):
    """The spread of columns in dimensions d, [DK]: var(mu) / sigma^2 of 64 spread evenly, sigma^2 a geometric mean."""
    j = (tl.arange(0, 64).to(tl.int64) * N // 64)[:, None]
    d = d.to(tl.int64)
    inside = (d < D)[None, :]
    x = tl.load(mu + j * mu_row + d[None, :] * mu_col, inside, other=0.0).to(tl.float32)
    lv = tl.load(logvar + j * lv_row + d[None, :] * lv_col, inside, other=0.0).to(tl.float32)
    x -= tl.sum(x, 0)[None, :] / 64
    spread = tl.sum(x * x, 0) * tl.exp(tl.sum(lv, 0) / -64)
    return tl.where(spread >= 0, spread, 0.0)  # NaN tells nothing apart


@triton.jit(
    do_not_specialize=["mu_row", "mu_col", "lv_row", "lv_col", "N", "D"],
    do_not_specialize_on_alignment=["mu", "logvar"],
)
def _order(mu, mu_row, mu_col, logvar, lv_row, lv_col, order, N, D, DK: tl.constexpr):
    """Writes order [D]: dimensions that tell columns apart come first. A program finds the places of DK of them."""
    d = tl.program_id(0) * DK + tl.arange(0, DK)
    mine = _spread(mu, mu_row, mu_col, logvar, lv_row, lv_col, d, N, D)[:, None]
    place = tl.zeros([DK], tl.int32)
    for first in range(0, D, DK):
        e = first + tl.arange(0, DK)
        other = _spread(mu, mu_row, mu_col, logvar, lv_row, lv_col, e, N, D)[None, :]
        before = (other > mine) | ((other == mine) & (e[None, :] < d[:, None]))
        place += tl.sum(tl.where(before & (e < D)[None, :], 1, 0), 1)
    tl.store(order + place, d, d < D)


def early_order(mu: Tensor, logvar: Tensor, early_exit: bool) -> Tensor | None:
    """The order in which dimensions are taken, [D] int32; None where no tile may stop, because early exit is not asked
    for or would not pay."""
    N, D = mu.shape
    if not early_exit or N < MIN_COLUMNS or 2 * LOOK.value > D:
        return None
    order = torch.empty(D, dtype=torch.int32, device=mu.device)
    launch(_order, (cdiv(D, 16),), mu, *mu.stride(), logvar, *logvar.stride(), order, N, D, DK=16, num_warps=4)
    return order


Exits = tuple[Tensor | None, Tensor | None, float]  # likely terms [S], reach [N / 128], and the margin


def _launch_bounds(packed: Packed, own: Tensor | None, samples: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    reach, steepest, least = (new(packed, *packed.far_columns.shape) for _ in range(3))
    terms = new(packed, packed.S) if samples else None
    panels = packed.far_columns.numel()
    launch(
        *(_bounds, (panels + (packed.far_samples.numel() if samples else 0),)),
        *(packed.samples, packed.columns, packed.far_columns, packed.c, packed.log_w, own, packed.log_w_own),
        *(reach, steepest, least, terms, packed.S, packed.N, packed.D, panels),
        OWN=packed.overridden[0],
        num_warps=4,
    )
    return reach, steepest, least, terms


def margin(packed: Packed, n: int) -> float:
    """The bits by which a term must be below a sum to be left out, so that n of them come to e^-18 of it, or e^-40."""
    return (40 if packed.dtype == torch.float64 else 18) * LOG2E.value + math.log2(max(n, 1))


def of_rows(packed: Packed, own: Tensor | None) -> Exits:
    """The exits of the forward; none where `packed` has no order."""
    if packed.order is None:
        return None, None, 0.0
    reach, _, _, terms = _launch_bounds(packed, None if own is None else own.contiguous(), True)
    return terms, reach, margin(packed, packed.N)


def of_rows_backward(packed: Packed) -> Exits:
    """The exits of the backward, where rows know their sums. A column pulls on z by its largest 1 / sigma at most, and
    what is left out pulls less than the widest column could."""
    if packed.order is None:
        return None, None, 0.0
    _, steepest, least, _ = _launch_bounds(packed, None, False)
    launch(_subtract_least, (1,), steepest, least, least.numel(), BLOCK=1024, num_warps=4)
    return None, steepest, margin(packed, packed.N)
