"""The samples and the columns (posteriors) of the cross-evaluated kernels, packed once per call.

Packed, 128 samples or columns make a panel, [D][128], so that neighbours in memory are neighbours in a panel and a
step in d is a constant. Columns have two numbers per dimension, side by side,

    a = kappa exp(-logvar / 2),   b = -(mu - centre) a,

so that t = (z - centre) a + b is one FMA, and the Gaussian's quadratic form in bits is a multiple of sum_d t^2:

    log2 q(z_i | x_j) = c_j - log2(e) / (2 kappa^2) sum_d t_ijd^2.

In float32, where a is rounded once from float64, kappa = sqrt(log2(e) / 2) and the multiple is 1. In float64, which
nothing wider is at hand to round from, kappa is 1.

b costs |b| eps / 2 of t, no more than a half-ulp change of the centred mu would. A panel of columns where some |b|
passes a limit, or a number is extreme or not finite, is `far`: b is -(mu - centre), and t = (z - centre + b) a takes
three operations and rounds as the broadcast formula does. A panel of samples is far where one is extreme or not
finite; that matters to gradients, where 0 t must be 0. Kernels look up which panels are far, tile by tile; a tile is
within one.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import accumulation_dtype, accumulator, cdiv, launch, nowhere, resources, target
from .elementary import INF, LOG2E, largest

PANEL = tl.constexpr(128)
LOG_2PI = tl.constexpr(1.83787706640934548356)
KAPPA = tl.constexpr(0.84932180028801904272)  # sqrt(log2(e) / 2), in float32


@triton.jit
def clip(x, low, high):
    """Clips x to [low, high]; NaN stays NaN."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def _to_finite(x, ACC: tl.constexpr):
    """Converts float64 to ACC; finite numbers stay finite."""
    highest = largest(ACC).to(tl.float64)
    return tl.where(tl.abs(x) == INF, x, clip(x, -highest, highest)).to(ACC)


@triton.jit
def _centre(mu, row_stride, column_stride, d, N, D, ACC: tl.constexpr, MODERATE: tl.constexpr):
    """The centre of the columns in dimensions d, [DK]: the mean of up to 64 of them spread evenly, without the largest
    and the smallest. Any centre will do that makes most offsets small; every program computes the same one."""
    k = tl.arange(0, 64)
    n = tl.minimum(N, 64)
    j = k.to(tl.int64) * tl.maximum(N, 64) // 64
    inside = (k < n)[:, None] & (d < D)[None, :]
    x = tl.load(mu + j[:, None] * row_stride + d[None, :] * column_stride, inside, other=0.0).to(ACC)
    total = tl.sum(x, 0)
    if n > 2:
        total -= tl.max(tl.where(inside, x, -INF), 0) + tl.min(tl.where(inside, x, INF), 0)
        n -= 2
    centre = total / n.to(ACC)
    return tl.where(tl.abs(centre) < MODERATE / 2, centre, 0.0)


@triton.jit
def in_order(order, d, D):
    """The dimension of the tensors that packed dimension d is."""
    if order is not None:
        d = tl.load(order + d, d < D, other=0)
    return d.to(tl.int64)  # times a stride


@triton.jit
def _inverse_sigma(logvar, ACC: tl.constexpr):
    """The a of columns, rounded once; finite for finite inputs, so that 0 a is 0 and infinity a is infinity."""
    smallest: tl.constexpr = 2.2250738585072014e-308 if tl.float64 == ACC else 1.1754943508222875e-38
    a = tl.exp(logvar.to(tl.float64) * -0.5)
    if tl.float32 == ACC:
        a *= tl.full([], KAPPA, tl.float64)
    held = clip(a, tl.full([], smallest, tl.float64), largest(ACC).to(tl.float64))
    return tl.where(tl.abs(logvar) == INF, a, held).to(ACC)


@triton.jit
def _pack_columns(
    panel, mu, mu_row, mu_col, logvar, lv_row, lv_col, log_w, log_w_all, order, planes, marginal_c, c, log2_w, far,
    N, D, folded, ACC: tl.constexpr, MAX_OFFSET: tl.constexpr, MODERATE: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    j = panel * PANEL + tl.arange(0, PANEL)
    at = (panel * PANEL * D + tl.arange(0, PANEL))[:, None]
    inside = j < N
    w = tl.full([PANEL], 0.0, tl.float64)
    if log_w is None:
        w += log_w_all
    else:
        w = tl.load(log_w + j, inside, other=0.0).to(tl.float64)
    w *= tl.full([], LOG2E, tl.float64)
    unweighted = tl.where(inside, 0.0, -INF)
    in_c = tl.where(folded != 0, w, 0.0)

    sum_logvar = tl.zeros([PANEL], tl.float64)
    too_far = tl.zeros([PANEL, DK], tl.int32)
    for first in range(0, D, DK):
        d = first + tl.arange(0, DK)
        mask = inside[:, None] & (d < D)[None, :]
        e = in_order(order, d, D)
        centre = _centre(mu, mu_row, mu_col, e, N, D, ACC, MODERATE)[None, :]
        mean = tl.load(mu + j[:, None] * mu_row + e[None, :] * mu_col, mask, other=0.0).to(ACC)
        lv = tl.load(logvar + j[:, None] * lv_row + e[None, :] * lv_col, mask, other=0.0).to(tl.float64)
        a = _inverse_sigma(lv, ACC)
        b = (centre - mean) * a
        near = (tl.abs(b) <= MAX_OFFSET) & (a <= MODERATE)
        too_far |= tl.where(mask & (near == 0), 1, 0)
        plane = planes + 2 * (at + d[None, :] * PANEL)
        tl.store(plane, tl.where(mask, a, 1.0), (d < D)[None, :])
        tl.store(plane + 1, tl.where(mask, b, 0.0), (d < D)[None, :])
        if marginal_c is not None:
            c_d = (lv + LOG_2PI) * tl.full([], -0.5 * LOG2E, tl.float64)
            c_d += in_c[:, None]
            c_d = tl.where(mask, _to_finite(c_d, ACC), unweighted.to(ACC)[:, None])
            tl.store(marginal_c + at + d[None, :] * PANEL, c_d, (d < D)[None, :])
        sum_logvar += tl.sum(lv, 1)

    is_far = tl.max(tl.max(too_far, 1), 0)
    tl.store(far + panel, is_far)
    if is_far != 0:
        for first in range(0, D, DK):
            d = first + tl.arange(0, DK)
            mask = inside[:, None] & (d < D)[None, :]
            e = in_order(order, d, D)
            centre = _centre(mu, mu_row, mu_col, e, N, D, ACC, MODERATE)[None, :]
            mean = tl.load(mu + j[:, None] * mu_row + e[None, :] * mu_col, mask, other=0.0).to(ACC)
            tl.store(planes + 2 * (at + d[None, :] * PANEL) + 1, centre - mean, mask)

    sum_c = (sum_logvar + tl.full([], LOG_2PI, tl.float64) * D) * tl.full([], -0.5 * LOG2E, tl.float64)
    sum_c += in_c
    tl.store(c + j, tl.where(inside, _to_finite(sum_c, ACC), unweighted.to(ACC)))
    if folded == 0:
        tl.store(log2_w + j, tl.where(inside, _to_finite(w, ACC), unweighted.to(ACC)))


@triton.jit
def _pack_samples(
    panel, z, z_row, z_col, mu, mu_row, mu_col, own, order, samples, packed_own, own_low, own_high, far,
    S, N, D, folded, ACC: tl.constexpr, MODERATE: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    i = panel * PANEL + tl.arange(0, PANEL)
    at = (panel * PANEL * D + tl.arange(0, PANEL))[:, None]
    inside = i < S
    too_far = tl.zeros([PANEL, DK], tl.int32)
    for first in range(0, D, DK):
        d = first + tl.arange(0, DK)
        mask = inside[:, None] & (d < D)[None, :]
        e = in_order(order, d, D)
        centre = _centre(mu, mu_row, mu_col, e, N, D, ACC, MODERATE)[None, :]
        x = tl.load(z + i[:, None] * z_row + e[None, :] * z_col, mask, other=0.0).to(ACC) - centre
        too_far |= tl.where(mask & ((tl.abs(x) <= MODERATE / 2) == 0), 1, 0)
        tl.store(samples + at + d[None, :] * PANEL, tl.where(mask, x, 0.0), (d < D)[None, :])
    tl.store(far + panel, tl.max(tl.max(too_far, 1), 0))
    if folded == 0:
        column = tl.load(own + i, inside, other=-1)
        drawn = (column >= 0) & (column < N)
        tl.store(packed_own + i, tl.where(drawn, column, -2))  # so that the next one is no column either
        tl.store(own_low + panel, tl.min(tl.where(drawn, column, N), 0))
        tl.store(own_high + panel, tl.max(tl.where(drawn, column, -2), 0))


_SIZES = ["z_row", "z_col", "mu_row", "mu_col", "lv_row", "lv_col", "S", "N", "D", "folded", "column_panels"]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["z", "mu", "logvar", "log_w", "own"])
def _pack(
    z, z_row, z_col, mu, mu_row, mu_col, logvar, lv_row, lv_col, log_w, log_w_all: tl.float64, own,
    order, samples, packed_own, own_low, own_high, far_samples, planes, marginal_c, c, log2_w, far_columns,
    S, N, D, folded, column_panels,
    ACC: tl.constexpr, MAX_OFFSET: tl.constexpr, MODERATE: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    """Packs panels of columns, then panels of samples. Weights are `folded` into c, or else log2_w and own columns are
    written."""
    panel = tl.program_id(0).to(tl.int64)
    if panel < column_panels:
        _pack_columns(
            panel, mu, mu_row, mu_col, logvar, lv_row, lv_col, log_w, log_w_all, order, planes, marginal_c, c, log2_w,
            far_columns, N, D, folded, ACC, MAX_OFFSET, MODERATE, DK,
        )  # fmt: skip
    else:
        _pack_samples(
            panel - column_panels, z, z_row, z_col, mu, mu_row, mu_col, own, order, samples, packed_own, own_low,
            own_high, far_samples, S, N, D, folded, ACC, MODERATE, DK,
        )  # fmt: skip


class Limits(NamedTuple):
    """The limits beyond which a panel is far."""

    MAX_OFFSET: float  # |mu - centre| / sigma, but for kappa
    MODERATE: float  # of a, and twice |z - centre|: t^2 cannot overflow within it


DIRECT = Limits(128.0, 2.0**30)


# The log-weights of pairs in nats: log_w [N] of the columns, or log_w_all of every column, or -log N where both are
# None; own [S] int64, the column that a sample was drawn from, or none where it is outside [0, N); log_w_own of own
# columns, and log_w_next of those after them modulo N, where these are not None.
LogWeights = tuple[Tensor | None, float | None, Tensor | None, float | None, float | None]
UNWEIGHTED: LogWeights = (None, 0.0, None, None, None)
Pairs = tuple[Tensor, Tensor, Tensor, LogWeights]  # z [S, D], mu and logvar [N, D] of any strides, and the weights


class Packed(NamedTuple):
    """Samples and columns as kernels take them, in the accumulation dtype; logarithms in bits. S and N are rounded up
    to whole panels, and the columns past N have weight 0."""

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
    order: Tensor | None  # [D] int32, which dimension of the tensors each packed one is; None: the same
    log_w_own: float  # in bits
    log_w_next: float

    @property
    def dtype(self) -> torch.dtype:
        return self.samples.dtype

    @property
    def weights(self) -> tuple[Tensor | float | None, ...]:
        """The arguments of kernels that say how pairs are weighted."""
        return self.c, self.log_w, self.own, self.own_low, self.own_high, self.log_w_own, self.log_w_next

    @property
    def overridden(self) -> tuple[bool, bool]:
        """Whether own columns, and those after them, have weights of their own."""
        return not math.isnan(self.log_w_own), not math.isnan(self.log_w_next)


def new(packed: Packed, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=packed.dtype, device=packed.samples.device)


def pack(pairs: Pairs, marginals: bool = False, limits: Limits = DIRECT, order: Tensor | None = None) -> Packed:
    """Packs samples and columns in one launch."""
    z, mu, logvar, weights = pairs
    (S, D), N = z.shape, mu.shape[0]
    dtype = accumulation_dtype(z.dtype)
    row_panels, column_panels = cdiv(S, PANEL.value), cdiv(N, PANEL.value)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=z.device)

    log_w, log_w_all, own, *overrides = weights
    if log_w_all is None:
        log_w_all = -math.log(N) if N else -math.inf
    log_w_own, log_w_next = (math.nan if w is None or own is None else w * LOG2E.value for w in overrides)
    overridden = not (math.isnan(log_w_own) and math.isnan(log_w_next))
    n_owns = row_panels * PANEL.value, row_panels, row_panels
    packed_own, own_low, own_high = (empty(n, dtype=torch.int64) if overridden else None for n in n_owns)
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
        packed_own,
        own_low,
        own_high,
        order,
        log_w_own,
        log_w_next,
    )
    # A tensor that it neither writes nor reads is an empty one and not None: one kernel serves both.
    no_number, no_index = nowhere(dtype, z.device), nowhere(torch.int64, z.device)
    arguments = (
        *(z, *z.stride(), mu, *mu.stride(), logvar, *logvar.stride()),
        *(None if log_w is None else log_w.contiguous(), log_w_all),
        *(no_index if own is None or not overridden else own.contiguous(), order, packed.samples),
        *(no_index if x is None else x for x in (packed.own, packed.own_low, packed.own_high)),
        *(packed.far_samples, planes, packed.marginal_c, packed.c),
        *(no_number if packed.log_w is None else packed.log_w, packed.far_columns),
        *(S, N, D, int(not overridden), column_panels),
    )
    constants = {"ACC": accumulator(z.dtype), **limits._asdict(), "DK": 8}
    if row_panels + column_panels:
        options = resources(target(), 256, 128 if dtype == torch.float32 else 168)
        launch(_pack, (row_panels + column_panels,), *arguments, **constants, **options)
    return packed
