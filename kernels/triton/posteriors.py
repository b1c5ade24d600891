"""The samples and the columns (posteriors) of the cross-evaluated kernels, packed once per call, and tiles of pairs.

Packed, 128 samples or columns make a panel, [D][128], so that neighbours in memory are neighbours in a panel and a
step in d is a constant. Columns have two numbers per dimension, side by side,

    a = kappa exp(-logvar / 2),   b = -(mu - centre) a,

so that t = (z - centre) a + b is one FMA, and the Gaussian's quadratic form in bits is a multiple of sum_d t^2:

    log2 q(z_i | x_j) = c_j - log2(e) / (2 kappa^2) sum_d t_ijd^2.

In float32, where a is rounded once from float64, kappa = sqrt(log2(e) / 2) and the multiple is 1. In float64, which
nothing wider is at hand to round from, kappa is 1.

b costs |b| eps / 2 of t, no more than a half-ulp change of the centred mu would. A panel of columns where some |b|
passes MAX_OFFSET, or a number is extreme or not finite, is `far`: b is -(mu - centre), and t = (z - centre + b) a takes
three operations and rounds as the broadcast formula does. A panel of samples is far where one is extreme or not
finite; that matters to gradients, where 0 t must be 0. Kernels look up which panels are far, tile by tile; a tile is
within one.

A tile is a tensor of pairs [RO, RP, TO, TP]. Triton spreads trailing axes over threads: where TO * TP is the number of
threads, a thread holds RO * RP pairs in registers, RO samples (or columns) of those that the program owns against RP of
those that pass by, and sums over passing ones end in TP neighbouring lanes.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.backends.contract import LogWeights, accumulation_dtype

from ._launch import INTERPRETED, Config, accumulator, cdiv, next_power_of_2

PANEL = tl.constexpr(128)
FOLD = tl.constexpr(128)  # squares are summed over so many dimensions at a time
MAX_OFFSET = tl.constexpr(128.0)
MODERATE = tl.constexpr(2.0**60)  # a and z - centre within it cannot overflow together
LOG2E = tl.constexpr(1.44269504088896340736)
LN2 = tl.constexpr(0.69314718055994530942)
LOG_2PI = tl.constexpr(1.83787706640934548356)
KAPPA = tl.constexpr(0.84932180028801904272)  # sqrt(log2(e) / 2), in float32
INV_KAPPA2 = tl.constexpr(1.38629436111989061883)  # 1 / kappa^2 = 2 ln 2, in float32
INF = tl.constexpr(math.inf)


# Packing.


@triton.jit
def largest(dtype: tl.constexpr):
    return tl.full([], 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38, dtype)


@triton.jit
def clip(x, low, high):
    """NaN stays NaN"""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def _to_finite(x, ACC: tl.constexpr):
    """float64 to ACC; what is finite stays so."""
    highest = largest(ACC).to(tl.float64)
    return tl.where(tl.abs(x) == INF, x, clip(x, -highest, highest)).to(ACC)


@triton.jit
def _centre(mu, row_stride, column_stride, d, N, D, ACC: tl.constexpr):
    """[DK]: the mean of up to 64 columns spread evenly, the largest and the smallest left out. Any centre will do that
    makes most offsets small; every program computes the same."""
    k = tl.arange(0, 64)
    n = tl.minimum(N, 64)
    j = k.to(tl.int64) * N // tl.maximum(n, 1)
    inside = (k < n)[:, None] & (d < D)[None, :]
    x = tl.load(mu + j[:, None] * row_stride + d[None, :] * column_stride, inside, other=0.0).to(ACC)
    total = tl.sum(x, 0)
    if n > 2:
        total -= tl.max(tl.where(inside, x, -INF), 0) + tl.min(tl.where(inside, x, INF), 0)
        n -= 2
    centre = total / n.to(ACC)
    return tl.where(tl.abs(centre) < MODERATE / 2, centre, 0.0)


@triton.jit
def _inverse_sigma(logvar, ACC: tl.constexpr):
    """a, rounded once; finite for finite inputs, so that 0 a is 0 and infinity a is infinity."""
    smallest: tl.constexpr = 2.2250738585072014e-308 if tl.float64 == ACC else 1.1754943508222875e-38
    a = tl.exp(logvar.to(tl.float64) * -0.5)
    if tl.float32 == ACC:
        a *= tl.full([], KAPPA, tl.float64)
    held = clip(a, tl.full([], smallest, tl.float64), largest(ACC).to(tl.float64))
    return tl.where(tl.abs(logvar) == INF, a, held).to(ACC)


@triton.jit
def _pack_columns(
    panel, mu, mu_row, mu_col, logvar, lv_row, lv_col, log_w, log_w_all, planes, marginal_c, c, log2_w, far, N, D,
    WEIGHTED: tl.constexpr, FOLDED: tl.constexpr, ACC: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    j = panel * PANEL + tl.arange(0, PANEL)
    at = (panel * PANEL * D + tl.arange(0, PANEL))[:, None]
    inside = j < N
    w = tl.full([PANEL], 0.0, tl.float64)
    if WEIGHTED:
        if log_w is None:
            w += log_w_all
        else:
            w = tl.load(log_w + j, inside, other=0.0).to(tl.float64)
    w *= tl.full([], LOG2E, tl.float64)
    unweighted = tl.where(inside, 0.0, -INF)

    sum_logvar = tl.zeros([PANEL], tl.float64)
    too_far = tl.zeros([PANEL, DK], tl.int32)
    for first in range(0, D, DK):
        d = first + tl.arange(0, DK)
        mask = inside[:, None] & (d < D)[None, :]
        centre = _centre(mu, mu_row, mu_col, d, N, D, ACC)[None, :]
        mean = tl.load(mu + j[:, None] * mu_row + d[None, :] * mu_col, mask, other=0.0).to(ACC)
        lv = tl.load(logvar + j[:, None] * lv_row + d[None, :] * lv_col, mask, other=0.0).to(tl.float64)
        a = _inverse_sigma(lv, ACC)
        b = (centre - mean) * a
        near = (tl.abs(b) <= MAX_OFFSET) & (a <= MODERATE)
        too_far |= tl.where(mask & (near == 0), 1, 0)
        plane = planes + 2 * (at + d[None, :] * PANEL)
        tl.store(plane, tl.where(mask, a, 1.0), (d < D)[None, :])
        tl.store(plane + 1, tl.where(mask, b, 0.0), (d < D)[None, :])
        if marginal_c is not None:
            c_d = (lv + LOG_2PI) * tl.full([], -0.5 * LOG2E, tl.float64)
            if FOLDED:
                c_d += w[:, None]
            c_d = tl.where(mask, _to_finite(c_d, ACC), unweighted.to(ACC)[:, None])
            tl.store(marginal_c + at + d[None, :] * PANEL, c_d, (d < D)[None, :])
        sum_logvar += tl.sum(lv, 1)

    is_far = tl.max(tl.max(too_far, 1), 0)
    tl.store(far + panel, is_far)
    if is_far != 0:
        for first in range(0, D, DK):
            d = first + tl.arange(0, DK)
            mask = inside[:, None] & (d < D)[None, :]
            centre = _centre(mu, mu_row, mu_col, d, N, D, ACC)[None, :]
            mean = tl.load(mu + j[:, None] * mu_row + d[None, :] * mu_col, mask, other=0.0).to(ACC)
            tl.store(planes + 2 * (at + d[None, :] * PANEL) + 1, centre - mean, mask)

    sum_c = (sum_logvar + tl.full([], LOG_2PI, tl.float64) * D) * tl.full([], -0.5 * LOG2E, tl.float64)
    if FOLDED:
        sum_c += w
    tl.store(c + j, tl.where(inside, _to_finite(sum_c, ACC), unweighted.to(ACC)))
    if log2_w is not None:
        tl.store(log2_w + j, tl.where(inside, _to_finite(w, ACC), unweighted.to(ACC)))


@triton.jit
def _pack_samples(
    panel, z, z_row, z_col, mu, mu_row, mu_col, own, samples, packed_own, own_low, own_high, far, S, N, D,
    ACC: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    i = panel * PANEL + tl.arange(0, PANEL)
    at = (panel * PANEL * D + tl.arange(0, PANEL))[:, None]
    inside = i < S
    too_far = tl.zeros([PANEL, DK], tl.int32)
    for first in range(0, D, DK):
        d = first + tl.arange(0, DK)
        mask = inside[:, None] & (d < D)[None, :]
        centre = _centre(mu, mu_row, mu_col, d, N, D, ACC)[None, :]
        x = tl.load(z + i[:, None] * z_row + d[None, :] * z_col, mask, other=0.0).to(ACC) - centre
        too_far |= tl.where(mask & ((tl.abs(x) <= MODERATE / 2) == 0), 1, 0)
        tl.store(samples + at + d[None, :] * PANEL, tl.where(mask, x, 0.0), (d < D)[None, :])
    tl.store(far + panel, tl.max(tl.max(too_far, 1), 0))
    if own is not None:
        column = tl.load(own + i, inside, other=-1)
        drawn = (column >= 0) & (column < N)
        tl.store(packed_own + i, tl.where(drawn, column, -2))  # so that the next one is no column either
        tl.store(own_low + panel, tl.min(tl.where(drawn, column, N), 0))
        tl.store(own_high + panel, tl.max(tl.where(drawn, column, -2), 0))


@triton.jit(do_not_specialize=["S", "N", "D", "column_panels"])
def _pack(
    z, z_row, z_col, mu, mu_row, mu_col, logvar, lv_row, lv_col, log_w, log_w_all: tl.float64, own,
    samples, packed_own, own_low, own_high, far_samples, planes, marginal_c, c, log2_w, far_columns,
    S, N, D, column_panels,
    WEIGHTED: tl.constexpr, FOLDED: tl.constexpr, ACC: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    """Panels of columns, then panels of samples."""
    panel = tl.program_id(0).to(tl.int64)
    if panel < column_panels:
        _pack_columns(
            panel, mu, mu_row, mu_col, logvar, lv_row, lv_col, log_w, log_w_all, planes, marginal_c, c, log2_w,
            far_columns, N, D, WEIGHTED, FOLDED, ACC, DK,
        )  # fmt: skip
    else:
        _pack_samples(
            panel - column_panels, z, z_row, z_col, mu, mu_row, mu_col, own, samples, packed_own, own_low, own_high,
            far_samples, S, N, D, ACC, DK,
        )  # fmt: skip


class Packed(NamedTuple):
    """Everything in the accumulation dtype and in bits; S and N rounded up to panels, where the weights are 0."""

    S: int
    N: int
    D: int
    samples: Tensor  # [S / 128, D, 128], centred
    far_samples: Tensor  # [S / 128] int32
    columns: Tensor  # [N / 128, D, 128] of pairs (a, b), as one int64 in float32
    far_columns: Tensor  # [N / 128] int32
    c: Tensor  # [N], with log_w where it is the same for all samples
    marginal_c: Tensor | None  # [N / 128, D, 128], likewise
    log_w: Tensor | None  # [N], where it is not
    own: Tensor | None  # [S] int64, -2 for none; None also where own columns are nothing special
    own_low: Tensor | None  # [S / 128] int64, the smallest own column of the panel; N for none
    own_high: Tensor | None  # [S / 128] int64, the largest; -2 for none
    log_w_own: float  # in bits
    log_w_next: float

    @property
    def dtype(self) -> torch.dtype:
        return self.samples.dtype

    @property
    def weights(self) -> tuple[Tensor | float | None, ...]:
        """As kernels take them."""
        return self.c, self.log_w, self.own, self.own_low, self.own_high, self.log_w_own, self.log_w_next

    @property
    def overridden(self) -> tuple[bool, bool]:
        """Whether own columns, and those after them, have weights of their own."""
        return not math.isnan(self.log_w_own), not math.isnan(self.log_w_next)


def new(packed: Packed, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=packed.dtype, device=packed.samples.device)


def pack(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights | None, marginals: bool = False) -> Packed:
    """One launch. z [S, D], mu and logvar [N, D], strided as they like; no weights: a weight of 1 for all."""
    (S, D), N = z.shape, mu.shape[0]
    dtype = accumulation_dtype(z.dtype)
    row_panels, column_panels = cdiv(S, PANEL.value), cdiv(N, PANEL.value)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=z.device)

    overrides = [math.nan] * 2
    if weights is not None and weights.own is not None:
        overrides = [math.nan if w is None else w * LOG2E.value for w in (weights.log_w_own, weights.log_w_next)]
    overridden = not all(map(math.isnan, overrides))
    log_w = None if weights is None or weights.log_w is None else weights.log_w.contiguous()
    own = weights.own.contiguous() if overridden and weights is not None and weights.own is not None else None
    planes = empty(column_panels, D, PANEL.value, 2)
    packed = Packed(
        S,
        N,
        D,
        empty(row_panels, D, PANEL.value),
        empty(row_panels, dtype=torch.int32),
        planes.view(torch.int64) if dtype == torch.float32 else planes,
        empty(column_panels, dtype=torch.int32),
        empty(column_panels * PANEL.value),
        empty(column_panels, D, PANEL.value) if marginals else None,
        empty(column_panels * PANEL.value) if overridden else None,
        *(empty(n, dtype=torch.int64) if overridden else None for n in (row_panels * PANEL.value, *(row_panels,) * 2)),
        *overrides,
    )
    arguments = (
        *(z, *z.stride(), mu, *mu.stride(), logvar, *logvar.stride()),
        *(log_w, 0.0 if weights is None else weights.common(N), own),
        *(packed.samples, packed.own, packed.own_low, packed.own_high, packed.far_samples),
        *(planes, packed.marginal_c, packed.c, packed.log_w, packed.far_columns),
        *(S, N, D, column_panels, weights is not None, not overridden, accumulator(z.dtype)),
        min(16, next_power_of_2(max(D, 1))),
    )
    if row_panels + column_panels:
        _pack[(row_panels + column_panels,)](*arguments, num_warps=8)
    return packed


# Tiles.


@triton.jit
def owned(RO: tl.constexpr, TO: tl.constexpr):
    """Which of its RO * TO samples (or columns) a pair has: that of its thread [1, 1, TO, 1], which an address has in a
    register, plus a constant [RO, 1, 1, 1], which it has as an offset."""
    return tl.arange(0, TO)[None, None, :, None], (tl.arange(0, RO) * TO)[:, None, None, None]


@triton.jit
def passing(RP: tl.constexpr, TP: tl.constexpr):
    """[1, 1, 1, TP] and [1, RP, 1, 1]"""
    return tl.arange(0, TP)[None, None, None, :], (tl.arange(0, RP) * TP)[None, :, None, None]


@triton.jit
def offset(first, D):
    """Of element `first` of dimension 0 in packed samples or columns; `first` is int64."""
    return first // PANEL * PANEL * D + first % PANEL


@triton.jit
def step(planes):
    """The elements of a column in `planes`: one, or two where a pair does not fit into one."""
    return 1 if planes.dtype.element_ty == tl.int64 else 2


@triton.jit
def is_far(far, first):
    return tl.load(far + first // PANEL) != 0


@triton.jit
def minus_squares(c, squares):
    """c - log2(e) / (2 kappa^2) squares"""
    if squares.dtype == tl.float64:
        s = tl.fma(squares, tl.full([], -0.5 * LOG2E, tl.float64), c)
    else:
        s = c - squares
    return s


@triton.jit
def minus_square(c, t):
    """The same of one t, to the last bit in every kernel."""
    if t.dtype == tl.float64:
        s = minus_squares(c, t * t)
    else:
        s = tl.fma(t * -1.0, t, c)  # -t would be 0 - t, an instruction
    return s


@triton.jit
def inverse_kappa2(dtype: tl.constexpr):
    return tl.full([], 1.0 if dtype == tl.float64 else INV_KAPPA2, dtype)


@triton.jit
def load_pair(planes, columns):
    """a and b"""
    if planes.dtype.element_ty == tl.int64:
        both = tl.load(planes + columns)
        a = (both & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        b = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        a = tl.load(planes + 2 * columns)
        b = tl.load(planes + 2 * columns + 1)
    return a, b


@triton.jit
def _squares(
    z, rows, planes, columns, far, n,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros([RO, RP, TO, TP], z.dtype.element_ty)
    if far:
        for _ in range(0, n):
            a, b = load_pair(planes, columns)
            t = (tl.load(z + rows) + b) * a
            acc = tl.fma(t, t, acc)
            z += PANEL
            planes += PANEL * step(planes)
    else:
        for _ in tl.range(0, n, loop_unroll_factor=UNROLL):
            a, b = load_pair(planes, columns)
            t = tl.fma(tl.load(z + rows), a, b)
            acc = tl.fma(t, t, acc)
            z += PANEL
            planes += PANEL * step(planes)
    return acc


@triton.jit
def square_sums(
    z, rows, planes, columns, far, D: tl.constexpr,
    RO: tl.constexpr, RP: tl.constexpr, TO: tl.constexpr, TP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """sum_d t^2 of a tile, from pointers to dimension 0 of its thread's first sample and column, and the constants that
    make the others of these (`owned`, `passing`). The same bits for a pair in every tile that it may be in."""
    if D <= FOLD:
        total = _squares(z, rows, planes, columns, far, D, RO, RP, TO, TP, UNROLL)
    else:
        total = _squares(z, rows, planes, columns, far, FOLD, RO, RP, TO, TP, UNROLL)
        for d in range(FOLD, D, FOLD):
            z += FOLD * PANEL
            planes += FOLD * PANEL * step(planes)
            total += _squares(z, rows, planes, columns, far, tl.minimum(D - d, FOLD), RO, RP, TO, TP, UNROLL)
    return total


@triton.jit
def meets_own(
    own_low, own_high, first_row, first_column, N, OWN: tl.constexpr, NEXT: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Whether an own column of a tile's samples, or the next one, may be among its columns: by the range of the own
    columns of the panel, which is narrow where neighbours were drawn from neighbours."""
    if OWN or NEXT:
        low = tl.load(own_low + first_row // PANEL)
        high = tl.load(own_high + first_row // PANEL)
        meets = (low < first_column + COLUMNS) & (high + 1 >= first_column)
        meets |= (high == N - 1) & (first_column == 0)
    else:
        meets = False
    return meets


@triton.jit
def _within(j, first_column, COLUMNS: tl.constexpr):
    """Where in a tile column j is, as an int32; -1 for elsewhere."""
    return tl.where((j >= first_column) & (j < first_column + COLUMNS), j - first_column, -1).to(tl.int32)


@triton.jit
def override(
    common, own_one, next_one, own, first_row, row, first_column, column, N,
    OWN: tl.constexpr, NEXT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`common`, but what belongs at own columns and those after them there."""
    drawn_from = tl.load(own + first_row + row)
    if NEXT:
        following = tl.where(drawn_from == N - 1, 0, drawn_from + 1)
        common = tl.where(column == _within(following, first_column, COLUMNS), next_one, common)
    if OWN:
        common = tl.where(column == _within(drawn_from, first_column, COLUMNS), own_one, common)
    return common


@triton.jit
def add_log_weights(
    s, log_w, own, log_w_own, log_w_next, meets, first_row, row, first_column, column, N,
    OWN: tl.constexpr, NEXT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """To a tile's log densities, where they are not in them yet."""
    if OWN or NEXT:
        w = tl.load(log_w + first_column + column)
        if meets:
            w_own, w_next = tl.full([], log_w_own, s.dtype), tl.full([], log_w_next, s.dtype)
            s += override(w, w_own, w_next, own, first_row, row, first_column, column, N, OWN, NEXT, COLUMNS)
        else:
            s += w
    return s


# Launch configurations.


class Grid(NamedTuple):
    """Programs own blocks of samples (or columns), and take one of `splits` ranges of what passes by."""

    config: Config  # RO, RP, TO, TP, UNROLL and the launch options
    blocks: int  # in all dimensions, where each has its own
    splits: int
    tiles: int  # that pass by in one range

    @property
    def programs(self) -> int:
        return self.blocks * self.splits


THREADS = 256


@functools.cache
def _target(driver: Any) -> tuple[str, int]:
    """Backend and threads in a warp"""
    target = driver.get_current_target()
    return target.backend, target.warp_size


def multiprocessors(device: torch.device) -> int:
    """How many to fill; an H200's where there is no GPU to ask, and few for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if INTERPRETED and device.type == "cpu" else 132


Tile = tuple[int, int, int, int, int]  # RO, RP, TO, TP, UNROLL


def _grid(tile: Tile, owned: int, passing: int, copies: int, steps: int, device: torch.device) -> Grid:
    sms, per_sm = multiprocessors(device), 2
    RO, RP, TO, TP, unroll = tile
    if cdiv(owned, RO * TO) * cdiv(passing, RP * TP) * copies < sms:
        RO, RP, TO, TP, unroll = SMALL
    while RO > 1 and 2 * owned <= RO * TO:
        RO //= 2
    backend, warp = ("", 32) if INTERPRETED else _target(triton.runtime.driver.active)
    config = {"RO": RO, "RP": RP, "TO": TO, "TP": TP, "UNROLL": unroll, "num_warps": THREADS // warp}
    if backend == "cuda":
        config["maxnreg"] = 65536 // THREADS // per_sm
    blocks, tiles = cdiv(owned, RO * TO), cdiv(passing, RP * TP)
    splits = _splits(blocks * copies, tiles, steps, per_sm * sms)
    return Grid(config, blocks * copies, splits, max(1, cdiv(tiles, splits)))


SMALL = (2, 4, 8, 32, 4)  # 16 x 128 pairs, for problems that have few tiles


def grid(
    owned: int, passing: int, D: int, dtype: torch.dtype, device: torch.device, reduce: bool, tile: Tile | None = None
) -> Grid:
    """For `owned` samples against `passing` columns, or the other way round; `reduce`: whether each dimension is summed
    over what passes by, across lanes, which should then be few.

    The register tile is 8 x 8 or 4 x 16 pairs, so that a step in d loads 16 to 20 words for 128 FMAs and 128 registers
    hold it: two programs of 256 threads on a multiprocessor. Half as many pairs where they are summed in two levels, a
    quarter of float64."""
    if tile is None and dtype == torch.float64:
        tile = (4, 4, 32, 8, 1)
    elif tile is None:
        split = 2 if FOLD.value < D else 1
        tile = (4, 16 // split, 32, 8, 1) if reduce else (8, 8 // split, 16, 16, 2)
    return _grid(tile, owned, passing, 1, D + 8, device)


def configs(owned: int, passing: int, dtype: torch.dtype) -> list[Config]:
    """Tiles for `grid` to be timed by `_launch.fastest`: its own choice, and others for large problems."""
    large = owned * passing >= 1 << 22 and dtype != torch.float64
    others = ((4, 16, 32, 8, 1), (4, 8, 32, 8, 2), (8, 4, 16, 16, 2), (8, 8, 16, 16, 1)) if large else ()
    return [{"tile": tile} for tile in (None, *others)]


def grid_per_dimension(owned: int, passing: int, D: int, dtype: torch.dtype, device: torch.device, pull: bool) -> Grid:
    """The same with programs for each dimension alone; `pull`: whether they sum gradients. An exponential takes as long
    as eight FMAs: what is left to save is what is done once for a row and a tile, so many columns pass at a time."""
    tile = (4, 4 if dtype == torch.float64 else 8 if pull else 16, 32, 8, 1)
    return _grid(tile, owned, passing, D, 6, device)


@functools.cache
def _splits(blocks: int, tiles: int, steps: int, slots: int) -> int:
    """Into how many ranges to split `tiles`, so that the last wave of programs on `slots` is a full one as nearly as
    may be. None shorter than 256 steps in d, so that little problems need no second kernel to put ranges together."""
    most = min(tiles, tiles * steps // 256, cdiv(4 * slots, max(blocks, 1)))

    def time(splits: int) -> float:
        return cdiv(blocks * splits, slots) * (cdiv(tiles, splits) + 0.5)

    return min(range(1, most + 1), key=time, default=1)
