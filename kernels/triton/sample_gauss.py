"""Reparameterized samples and their densities in one pass, and the gradients at the same eps, drawn again or read.

The rows of a sample are counted l B + b, so that element e = (l B + b) D + d has the normal of index e. Where the rows
start at multiples of 4, each Philox block is computed once for its four elements; else once for each of them. Strides
and D are counted in units (`unit_of`).
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    LARGE,
    Config,
    accumulation_dtype,
    accumulator,
    add_up,
    blocks_of,
    cdiv,
    columns_of_partials,
    empty_like,
    fastest,
    in_units,
    launch,
    load_rows,
    one_row,
    rows,
    same_layout,
    sum_of_rows,
    tile,
    unit_of,
)
from .elementary import exp, exp_tail, expm1, times
from .philox import normals_of_elements, normals_of_groups

FULL = 1024  # programs that fill any GPU: with fewer tiles of [B, D], the backward splits L over programs


@triton.jit
def _normals(row, first_column, D, seed, ALIGNED: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    """eps of the rows [BB] (int64) and the columns from first_column [BB, BD]; seed is a number."""
    if ALIGNED:
        group = ((row * D + first_column) >> 2)[:, None] + tl.arange(0, BLOCK_D // 4)[None, :]
        eps = normals_of_groups(group, seed, ACC)
    else:
        eps = normals_of_elements((row * D + first_column)[:, None] + tl.arange(0, BLOCK_D)[None, :], seed, ACC)
    return eps


_SIZES = ["mu_stride", "logvar_stride", "B", "D", "column_blocks"]  # L, a model's, may be known to be 1


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["L"])
def _sample_gauss(
    mu, mu_stride, logvar, logvar_stride, seed, z, log_q, log_p, kl, noise, L, B, D, column_blocks,
    WRAPS: tl.constexpr, REDUCED: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr,
    ALONE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes z [L B, D], log_q and log_p [L B], kl [B] and the noise [L B, D], those not wanted None. With sums, a
    program has whole rows. Where the KL is REDUCED, kl has the sum of each program's rows among the first B,
    [B / BLOCK_B] in float64."""
    D = tl.cast(D, tl.int64) * UNIT
    if ALONE:
        column_blocks = 1
    SUMS: tl.constexpr = log_q is not None or log_p is not None or kl is not None
    program = tl.program_id(0)
    if SUMS:
        row_block, first, last = program, 0, column_blocks
    else:
        row_block, first, last = program // column_blocks, program % column_blocks, program % column_blocks + 1
    first_row, n_rows = row_block.to(tl.int64) * BLOCK_B, tl.cast(L, tl.int64) * B
    row = first_row + tl.arange(0, BLOCK_B)  # [BB]
    posterior = row
    if WRAPS:  # row % B, with as few divisions as possible
        posterior = first_row % B + tl.arange(0, BLOCK_B)
        if BLOCK_B > B:
            posterior = posterior % B
        else:
            posterior = tl.where(posterior >= B, posterior - B, posterior)
    q, p, k = tl.zeros([BLOCK_B], ACC), tl.zeros([BLOCK_B], ACC), tl.zeros([BLOCK_B], ACC)
    key = tl.load(seed)
    for block in range(first, last):
        first_column = tl.cast(block, tl.int64) * BLOCK_D
        column = first_column + tl.arange(0, BLOCK_D)
        inside = (row < n_rows)[:, None] & (column < D)[None, :]
        m = load_rows(mu, mu_stride, posterior, column, inside, ACC, UNIT)
        v = load_rows(logvar, logvar_stride, posterior, column, inside, ACC, UNIT)
        eps = _normals(row, first_column, D, key, ALIGNED, ACC, BLOCK_D)
        x = m + times(eps, exp(v, ACC, 0.5))
        if z is not None:
            tl.store(z + row[:, None] * D + column[None, :], x, inside)
        if noise is not None:
            tl.store(noise + row[:, None] * D + column[None, :], eps, inside)
        if log_q is not None:
            q += tl.sum(tl.where(inside, tl.fma(eps, eps, v), 0.0), 1)
        if log_p is not None:
            p += tl.sum(tl.where(inside, x * x, 0.0), 1)
        if kl is not None:
            k += tl.sum(tl.fma(m, m, exp_tail(v, exp(v, ACC), ACC)), 1)  # 0 outside
    constant = tl.full([BLOCK_B], 1.83787706640934548356, ACC) * D  # D log(2 pi)
    if log_q is not None:
        tl.store(log_q + row, -0.5 * (constant + q), row < n_rows)
    if log_p is not None:
        tl.store(log_p + row, -0.5 * (constant + p), row < n_rows)
    if kl is not None:
        if REDUCED:
            total = tl.sum(tl.where(row < B, 0.5 * k, 0.0).to(tl.float64))
            tl.store(kl + row_block, total, first_row < B)
        else:
            tl.store(kl + row, 0.5 * k, row < B)


@triton.jit(do_not_specialize=[*_SIZES, "samples", "kl_row"], do_not_specialize_on_alignment=["L", "d_kl"])
def _sample_gauss_backward(
    d_z, d_log_q, d_log_p, d_kl, kl_row, kl_scale: tl.float64, mu, mu_stride, logvar, logvar_stride, seed,
    noise, d_mu, d_logvar, L, B, D, samples, column_blocks,
    PART: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes d_mu and d_logvar [B, D]; or with PART, where the samples are split over programs of `samples` each,
    partial sums [parts, B, D] of d/dz and of d/dz eps. One of seed and noise is None. Upstream of row b's KL is
    kl_scale d_kl[b kl_row]."""
    D = tl.cast(D, tl.int64) * UNIT
    if ALONE:
        column_blocks = 1
    program = tl.program_id(0)
    row = (program // column_blocks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BB]
    first_column = (program % column_blocks).to(tl.int64) * BLOCK_D
    column = first_column + tl.arange(0, BLOCK_D)
    inside = (row < B)[:, None] & (column < D)[None, :]
    m = load_rows(mu, mu_stride, row, column, inside, ACC, UNIT)
    v = load_rows(logvar, logvar_stride, row, column, inside, ACC, UNIT)
    part = tl.program_id(1)
    by_z, by_sigma = tl.zeros([BLOCK_B, BLOCK_D], ACC), tl.zeros([BLOCK_B, BLOCK_D], ACC)
    by_log_q = tl.zeros([BLOCK_B], ACC)
    if noise is None:
        key = tl.load(seed)
    first, last = 0, L
    if PART:
        first, last = part * samples, tl.minimum(part * samples + samples, L)
    for l in range(first, last):  # noqa: E741
        sample = tl.cast(l, tl.int64) * B + row
        if d_z is not None or d_log_p is not None:
            if noise is None:
                eps = _normals(sample, first_column, D, key, ALIGNED, ACC, BLOCK_D)
            else:
                eps = tl.load(noise + sample[:, None] * D + column[None, :], inside, other=0.0)
            g = tl.zeros([BLOCK_B, BLOCK_D], ACC)
            if d_z is not None:
                g = tl.load(d_z + sample[:, None] * D + column[None, :], inside, other=0.0).to(ACC)
            if d_log_p is not None:
                z = m + times(eps, exp(v, ACC, 0.5))
                g -= times(tl.load(d_log_p + sample, row < B, other=0.0).to(ACC)[:, None], z)
            by_z += g
            by_sigma = tl.fma(g, eps, by_sigma)
        if d_log_q is not None and not PART:
            by_log_q += tl.load(d_log_q + sample, row < B, other=0.0).to(ACC)
    if not PART:
        g_kl = None if d_kl is None else _of_kl(d_kl, kl_row, kl_scale, row, row < B, ACC)[:, None]
        by_z, by_sigma = _gradients(by_z, by_sigma, by_log_q[:, None], g_kl, m, v, ACC)
    out = part.to(tl.int64) * B * D + row[:, None] * D + column[None, :]
    if d_mu is not None:
        tl.store(d_mu + out, by_z, inside)
    if d_logvar is not None:
        tl.store(d_logvar + out, by_sigma, inside)


@triton.jit
def _of_kl(d_kl, kl_row, kl_scale, row, inside, ACC: tl.constexpr):
    return tl.load(d_kl + row * kl_row, inside, other=0.0).to(ACC) * tl.full((), kl_scale, ACC)


@triton.jit
def _gradients(by_z, by_sigma, by_log_q, g_kl, m, v, ACC: tl.constexpr):
    """d_mu and d_logvar from the samples' sums of d/dz, of d/dz eps and of d_log_q, and from d_kl. sigma multiplies a
    sum and not its terms: it may overflow, and their signs differ."""
    d_mu = by_z
    d_logvar = times(0.5 * by_sigma, exp(v, ACC, 0.5)) - 0.5 * by_log_q
    if g_kl is not None:
        d_mu += times(g_kl, m)
        d_logvar += times(0.5 * g_kl, expm1(v, exp(v, ACC), ACC))
    return d_mu, d_logvar


@triton.jit(
    do_not_specialize=["kl_row", "mu_stride", "logvar_stride", "P", "L", "B", "D"],
    do_not_specialize_on_alignment=["d_kl"],
)
def _add_parts(
    by_z, by_sigma, d_log_q, d_kl, kl_row, kl_scale: tl.float64, mu, mu_stride, logvar, logvar_stride, d_mu, d_logvar,
    P, L, B, D,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the gradients [B, D] from partial sums [P, B, D], d_log_q and d_kl, of all of which some may be None."""
    n = tl.cast(B, tl.int64) * D
    element = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    inside = element < n
    row, column = element // D, element % D
    m = tl.load(mu + row * mu_stride + column, inside, other=0.0).to(ACC)
    v = tl.load(logvar + row * logvar_stride + column, inside, other=0.0).to(ACC)
    z, s, q = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    if by_z is not None:
        z = sum_of_rows(by_z, n, element, inside, P, BLOCK_P).to(ACC)
    if by_sigma is not None:
        s = sum_of_rows(by_sigma, n, element, inside, P, BLOCK_P).to(ACC)
    if d_log_q is not None:
        q = sum_of_rows(d_log_q, B, row, inside, L, BLOCK_P).to(ACC)
    g_kl = None if d_kl is None else _of_kl(d_kl, kl_row, kl_scale, row, inside, ACC)
    z, s = _gradients(z, s, q, g_kl, m, v, ACC)
    if d_mu is not None:
        tl.store(d_mu + element, z, inside)
    if d_logvar is not None:
        tl.store(d_logvar + element, s, inside)


def _aligned(D: int, L: int, flat: bool) -> bool:
    """Whether all rows start at multiples of 4. Where samples are one long row each, whose length depends on the batch,
    D must be a multiple of 4 all the same, unless there is a single sample."""
    return D % 4 == 0 or (flat and L == 1)


@functools.lru_cache
def _configs(n_rows: int, D: int, aligned: bool, dtype: torch.dtype, flat: bool) -> list[Config]:
    """A fixed tile, and others to try where there is enough work for the choice to matter."""
    if n_rows * D < LARGE:
        return [tile(n_rows, D, flat=flat)]
    # 16 elements for each thread, or fewer where 16 take so many registers that too few threads have room
    if dtype == torch.float64:
        sizes = [(512, 4), (1024, 4)]
    else:
        sizes = [(2048, 4), (1024, 4), (4096, 8)] if aligned else [(1024, 4), (512, 4)]
    return [tile(n_rows, D, *size, flat) for size in sizes]


def _constants(config: Config, aligned: bool, dtype: torch.dtype, unit: int, alone: bool) -> Config:
    of_rows = {"ALIGNED": aligned, "ACC": accumulator(dtype), "UNIT": unit, "ALONE": alone}
    return {**of_rows, **config, "enable_fp_fusion": False}


def sample_gauss(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    n_samples: int,
    outputs: Sequence[bool],
    reduction: str,
    kl_scale: float,
) -> list[Tensor]:
    B, D = mu.shape
    L = n_samples
    wide = accumulation_dtype(mu.dtype)
    reduced = outputs[3] and reduction != "sample"
    shapes = (((L, B, D), mu.dtype), *(((L, B), wide),) * 2, (() if reduced else (B,), wide), ((L, B, D), wide))
    results = [
        torch.empty(shape, dtype=dtype, device=mu.device) if want else None
        for (shape, dtype), want in zip(shapes, outputs, strict=True)
    ]
    *targets, kl, noise = results
    if L == 0:
        L, targets, noise = 1, [None, None, None], None  # the KL is still asked for
    inputs = (rows(mu, B), rows(logvar, B))
    unit = unit_of(mu.dtype, D, *(stride for _, stride in inputs))
    sums = any(t is not None for t in (*targets[1:], kl))
    flat = not sums and same_layout(B, mu, logvar)
    aligned = _aligned(D, L, flat)
    if flat:
        B, D, unit = one_row(B, D, unit, mu.dtype)

    def run(config: Config) -> list[Tensor]:
        down, across = blocks_of(L * B, D, config)
        partials = mu.new_empty((1, cdiv(B, config["BLOCK_B"]), 1), dtype=torch.float64) if reduced else None
        launch(
            *(_sample_gauss, (down if sums else down * across,), *in_units(inputs, unit), seed, *targets),
            *(kl if partials is None else partials, noise, L, B, D // unit, across),
            WRAPS=L > 1,
            REDUCED=reduced,
            **_constants(config, aligned, mu.dtype, unit, across == 1 and not flat),
        )
        if partials is not None and kl is not None:
            add_up(partials, [kl], kl_scale)
        return [r for r in results if r is not None]

    # The tile is the same with the noise as without, as the order of sums, and so their bits, may depend on it.
    configs = _configs(L * B, D, aligned, mu.dtype, flat)
    return fastest(run, configs, "sample_gauss", mu.dtype, *outputs[:4], L, B, D)


def sample_gauss_backward(
    upstream: Sequence[Tensor | None],
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor | None,
    eps: Tensor | None,
    n_samples: int,
    reduction: str,
    wanted: Sequence[bool],
    kl_scale: float,
) -> list[Tensor]:
    B, D = mu.shape
    L = n_samples
    of_z, of_log_q, of_log_p, eps = (None if x is None else x.contiguous() for x in (*upstream[:3], eps))
    of_kl = upstream[3], 0 if upstream[3] is None or reduction != "sample" else upstream[3].stride(0), kl_scale
    gradients = [empty_like(x) if want else None for x, want in zip((mu, logvar), wanted, strict=True)]
    inputs = (rows(mu, B), rows(logvar, B))
    unit = unit_of(mu.dtype, D, *(stride for _, stride in inputs))
    from_eps = of_z is not None or of_log_p is not None
    flat = all(g is None for g in upstream[1:]) and same_layout(B, mu, logvar)
    aligned = _aligned(D, L, flat)
    if flat:
        B, D, unit = one_row(B, D, unit, mu.dtype)

    def run(config: Config) -> list[Tensor]:
        down, across = blocks_of(B, D, config)
        tiles = down * across
        samples = max(1, cdiv(L, max(1, FULL // max(1, tiles))))  # of one program
        parts = max(1, cdiv(L, samples))
        targets: Sequence[Tensor | None] = gradients
        if parts > 1:
            wide = accumulation_dtype(mu.dtype)
            targets = [mu.new_empty((parts, B * D), dtype=wide) if want and from_eps else None for want in wanted]
        if from_eps or parts == 1:
            launch(
                *(_sample_gauss_backward, (tiles, parts), of_z, of_log_q, of_log_p, *of_kl, *in_units(inputs, unit)),
                *(seed, eps, *targets, L, B, D // unit, samples, across),
                PART=parts > 1,
                **_constants(config, aligned, mu.dtype, unit, across == 1 and not flat),
            )
        if parts > 1:
            block = columns_of_partials(B * D)
            launch(
                *(_add_parts, (cdiv(B * D, block["BLOCK_N"]),), *targets, of_log_q, *of_kl, *in_units(inputs, 1)),
                *(*gradients, parts, L, B, D),
                ACC=accumulator(mu.dtype),
                **block,
                enable_fp_fusion=False,
            )
        return [g for g in gradients if g is not None]

    return fastest(run, _configs(B, D, aligned, mu.dtype, flat), "sample_gauss_backward", mu.dtype, *wanted, L, B, D)
