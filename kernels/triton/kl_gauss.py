"""KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)) and its gradients, each in one pass over the inputs.

With x = logvar - prior_logvar and u = (mu - prior_mu) e^(-prior_logvar / 2): KL = ((e^x - 1 - x) + u^2) / 2.
Programs walk over tiles [BLOCK_B, BLOCK_D]; a prior that is one row has row stride 0, one that is not given is 0.
Sums over tiles are kept element by element of a tile and meet at the end: in a row, in the columns that a program
stays in, or altogether. Sums of several programs become partials in float64, which a second launch adds up. Strides and
D are counted in units (`unit_of`).
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
    empty_like,
    fastest,
    in_units,
    launch,
    load_rows,
    nowhere,
    one_row,
    rows,
    same_layout,
    tile,
    unit_of,
)
from .elementary import exp, exp_tail, expm1, times

# What is summed over. (A string: Triton looks up each global constant of a kernel again at every launch.)
_SUMS_OVER = {"none": "nothing", "sample": "rows", "dim": "columns"}  # else "all"

MAX_PROGRAMS = 2048  # that leave partial sums: enough to fill any GPU, few enough to add up in microseconds
ONE_PROGRAM = 16384  # elements that one program sums in less time than a second launch takes


@triton.jit
def _terms(
    mu, mu_stride, logvar, logvar_stride, prior_mu, prior_mu_stride, prior_logvar, prior_logvar_stride,
    row, column, inside, ACC: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """x, e^x, u / 2 before and after the division by prior_sigma, and 1 / prior_sigma of a tile; the halves keep
    differences of finite numbers finite. Outside of the tensors all inputs are 0, and so is the KL."""
    half_x = 0.5 * load_rows(logvar, logvar_stride, row, column, inside, ACC, UNIT)
    half_difference = 0.5 * load_rows(mu, mu_stride, row, column, inside, ACC, UNIT)
    inverse_sigma = tl.full(half_difference.shape, 1.0, ACC)
    if prior_mu is not None:
        half_difference -= 0.5 * load_rows(prior_mu, prior_mu_stride, row, column, inside, ACC, UNIT)
    if prior_logvar is not None:
        half_prior = 0.5 * load_rows(prior_logvar, prior_logvar_stride, row, column, inside, ACC, UNIT)
        half_x -= half_prior
        LARGEST: tl.constexpr = 1.7976931348623157e308 if ACC.is_fp64() else 3.4028234663852886e38
        inverse_sigma = tl.clamp(exp(-half_prior, ACC), 0.0, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    x = half_x + half_x
    return x, exp(x, ACC), half_difference, half_difference * inverse_sigma, inverse_sigma


_SIZES = ["mu_stride", "logvar_stride", "prior_mu_stride", "prior_logvar_stride", "B", "D", "column_blocks"]


@triton.jit(do_not_specialize=_SIZES)
def _kl_gauss(
    mu, mu_stride, logvar, logvar_stride, prior_mu, prior_mu_stride, prior_logvar, prior_logvar_stride,
    out, partials, B, D, scale: tl.float64, column_blocks,
    OVER: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes out, [B, D], [B], [D] or a number, by OVER. Where several programs share a sum, each writes its own part,
    before it is scaled, to partials, [programs / column_blocks, D] or [programs]."""
    D = tl.cast(D, tl.int64) * UNIT
    if ALONE:
        column_blocks = 1
    program = tl.program_id(0)
    if OVER == "rows":
        first, last, step = program * column_blocks, (program + 1) * column_blocks, 1
    else:  # the number of programs is a multiple of column_blocks where OVER is COLUMNS
        first, last, step = program, tl.cdiv(B, BLOCK_B) * column_blocks, tl.num_programs(0)
    row, column = tl.arange(0, BLOCK_B).to(tl.int64), tl.arange(0, BLOCK_D).to(tl.int64)
    total = tl.zeros([BLOCK_B, BLOCK_D], ACC)
    for i in range(first, last, step):
        row = (i // column_blocks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
        column = (i % column_blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (row < B)[:, None] & (column < D)[None, :]
        x, e_x, _, half_u, _ = _terms(
            mu, mu_stride, logvar, logvar_stride, prior_mu, prior_mu_stride, prior_logvar, prior_logvar_stride,
            row, column, inside, ACC, UNIT,
        )  # fmt: skip
        kl = tl.fma(2 * half_u, half_u, 0.5 * exp_tail(x, e_x, ACC))
        if OVER == "nothing":
            tl.store(out + row[:, None] * D + column[None, :], kl, inside)
        else:
            total += kl
    if OVER == "rows":
        row = program.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
        tl.store(out + row, tl.sum(total, 1), row < B)
    elif OVER == "columns":
        column = (program % column_blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        result = tl.sum(total, 0).to(tl.float64)
        if tl.num_programs(0) == column_blocks:
            result *= tl.full([BLOCK_D], scale, tl.float64)
            tl.store(out + column, result.to(out.dtype.element_ty), column < D)
        else:
            tl.store(partials + (program // column_blocks).to(tl.int64) * D + column, result, column < D)
    elif OVER == "all":
        result = tl.sum(total).to(tl.float64)
        if tl.num_programs(0) == 1:
            tl.store(out, (result * tl.full((), scale, tl.float64)).to(out.dtype.element_ty))
        else:
            tl.store(partials + program, result)


@triton.jit(
    do_not_specialize=[*_SIZES, "grad_row", "grad_column"],
    do_not_specialize_on_alignment=["mu_partials", "logvar_partials"],
)
def _kl_gauss_backward(
    mu, mu_stride, logvar, logvar_stride, prior_mu, prior_mu_stride, prior_logvar, prior_logvar_stride,
    grad, grad_row, grad_column, d_mu, d_logvar, d_prior_mu, d_prior_logvar, mu_partials, logvar_partials,
    B, D, scale: tl.float64, column_blocks,
    OVER: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes gradients [B, D], those not wanted None; partials [programs / column_blocks, D] of priors that are one
    row. Where OVER is nothing, grad has contiguous rows."""
    D = tl.cast(D, tl.int64) * UNIT
    if ALONE:
        column_blocks = 1
    program, step = tl.program_id(0), tl.num_programs(0)
    factor = tl.full((), scale, ACC)
    d_mu_total = tl.zeros([BLOCK_B, BLOCK_D], ACC)
    d_logvar_total = tl.zeros([BLOCK_B, BLOCK_D], ACC)
    for i in range(program, tl.cdiv(B, BLOCK_B) * column_blocks, step):
        row = (i // column_blocks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
        column = (i % column_blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (row < B)[:, None] & (column < D)[None, :]
        if OVER == "nothing":
            g = load_rows(grad, grad_row, row, column, inside, ACC, UNIT)
        elif OVER == "rows":
            g = tl.load(grad + row * grad_row, row < B, other=0.0)[:, None]
        elif OVER == "columns":
            g = tl.load(grad + column * grad_column, column < D, other=0.0)[None, :]
        else:
            g = tl.load(grad)
        g = g.to(ACC) * factor
        x, e_x, half_difference, half_u, inverse_sigma = _terms(
            mu, mu_stride, logvar, logvar_stride, prior_mu, prior_mu_stride, prior_logvar, prior_logvar_stride,
            row, column, inside, ACC, UNIT,
        )  # fmt: skip
        out = row[:, None] * D + column[None, :]
        # Factor by factor, so that what overflows is the product alone
        by_mu = times(half_difference, 2 * (g * inverse_sigma) * inverse_sigma)
        by_logvar = times(g, 0.5 * expm1(x, e_x, ACC))
        if d_mu is not None:
            tl.store(d_mu + out, by_mu, inside)
        if d_logvar is not None:
            tl.store(d_logvar + out, by_logvar, inside)
        if d_prior_mu is not None:
            tl.store(d_prior_mu + out, -by_mu, inside)
        if mu_partials is not None:
            d_mu_total -= tl.where(inside, by_mu, 0.0)
        by_prior = -tl.fma(times(g, 2 * half_u), half_u, by_logvar)
        if d_prior_logvar is not None:
            tl.store(d_prior_logvar + out, by_prior, inside)
        if logvar_partials is not None:
            d_logvar_total += tl.where(inside, by_prior, 0.0)
    column = (program % column_blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    partial = (program // column_blocks).to(tl.int64) * D + column
    if mu_partials is not None:
        tl.store(mu_partials + partial, tl.sum(d_mu_total, 0).to(tl.float64), column < D)
    if logvar_partials is not None:
        tl.store(logvar_partials + partial, tl.sum(d_logvar_total, 0).to(tl.float64), column < D)


@functools.lru_cache
def _configs(B: int, D: int, over: str, flat: bool) -> list[Config]:
    """A fixed tile, and others to try where there is enough work for the choice to matter."""
    if over == "all":  # the same one from a single program on
        sizes = [(4096, 8), (2048, 4)] if B * D >= LARGE else [(4096, 8)]
        return [tile(B, D, *size, flat) for size in sizes]
    if B * D <= ONE_PROGRAM and over == "columns":
        return [tile(B, D, 8192, 8)]
    others = ((1024, 4), (4096, 8)) if B * D >= LARGE else ()
    return [tile(B, D, flat=flat), *(tile(B, D, *other, flat) for other in others)]


def _programs(B: int, D: int, over: str, config: Config) -> tuple[int, int]:
    """The number of programs, and of blocks of columns, which divides it where programs keep to their columns."""
    down, across = blocks_of(B, D, config)
    if over == "rows":
        programs = down
    elif over == "nothing":
        programs = down * across
    elif B * D <= ONE_PROGRAM:
        programs = across if over == "columns" else 1
    elif over == "columns":
        programs = max(1, min(down * across, MAX_PROGRAMS) // across) * across
    else:
        programs = min(down * across, MAX_PROGRAMS)
    return programs, across


def _constants(config: Config, over: str, dtype: torch.dtype, unit: int, alone: bool) -> Config:
    of_rows = {"ACC": accumulator(dtype), "UNIT": unit, "ALONE": alone}
    return {"OVER": over, **of_rows, **config, "enable_fp_fusion": False}


def kl_gauss(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    reduction: str,
    shape: tuple[int, ...],
    scale: float,
) -> Tensor:
    """The reduced KL of that shape; `scale` multiplies its sums."""
    B, D = mu.shape
    over = _SUMS_OVER.get(reduction, "all")
    out = torch.empty(shape, dtype=accumulation_dtype(mu.dtype), device=mu.device)
    inputs = [rows(x, B) for x in (mu, logvar, prior_mu, prior_logvar)]
    unit = unit_of(mu.dtype, D, *(stride for _, stride in inputs))
    flat = over in ("nothing", "all") and same_layout(B, mu, logvar, prior_mu, prior_logvar)
    if flat:
        B, D, unit = one_row(B, D, unit, mu.dtype)

    def run(config: Config) -> Tensor:
        programs, across = _programs(B, D, over, config)
        P = programs // across if over == "columns" else programs  # partial sums of each result
        several = over in ("columns", "all") and P > 1
        partials = nowhere(torch.float64, mu.device)
        if several:
            partials = torch.empty((1, P, out.numel()), dtype=torch.float64, device=mu.device)
        launch(
            *(_kl_gauss, (programs,), *in_units(inputs, unit), out, partials, B, D // unit, scale, across),
            **_constants(config, over, mu.dtype, unit, across == 1 and not flat),
        )
        if several:
            add_up(partials, [out], scale)
        return out

    return fastest(run, _configs(B, D, over, flat), "kl_gauss", mu.dtype, over, B, D)


def kl_gauss_backward(
    grad: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    reduction: str,
    wanted: Sequence[bool],
    scale: float,
) -> list[Tensor]:
    B, D = mu.shape
    over = _SUMS_OVER.get(reduction, "all")
    likes = (mu, logvar, prior_mu, prior_logvar)
    gradients = [empty_like(x) if x is not None and want else None for x, want in zip(likes, wanted, strict=True)]
    # A prior that is one row for many has the sum of their gradients.
    summed = [g is not None and g.shape[0] == 1 != B for g in gradients]
    sums = [g for g, is_sum in zip(gradients, summed, strict=True) if is_sum and g is not None]
    inputs = [rows(x, B) for x in likes]
    strides = [stride for _, stride in inputs]
    if over == "nothing":
        grad, grad_row = rows(grad, B)
        strides.append(grad_row)
    unit = unit_of(mu.dtype, D, *strides)
    grad_row = grad_row // unit if over == "nothing" else grad.stride(0) if over == "rows" else 0
    grad_column = grad.stride(0) if over == "columns" else 0
    dense = over == "all" or (over == "nothing" and grad.is_contiguous())  # the upstream gradient
    flat = not sums and dense and same_layout(B, *likes)
    if flat:
        B, D, unit = one_row(B, D, unit, mu.dtype)

    def run(config: Config) -> list[Tensor]:
        programs, across = _programs(B, D, "columns" if sums else "nothing", config)
        targets = [*gradients, None, None]  # [B, D], and the partials of priors
        if sums:
            shape = (len(sums), programs // across, D)
            partials = torch.empty(shape, dtype=torch.float64, device=mu.device)
            remaining = iter(partials)
            targets[2:] = [None if s else g for g, s in zip(gradients[2:], summed[2:], strict=True)]
            targets += [next(remaining) if s else None for s in summed[2:]]
        launch(
            *(_kl_gauss_backward, (programs,), *in_units(inputs, unit), grad, grad_row, grad_column, *targets),
            *(B, D // unit, scale, across),
            **_constants(config, over, mu.dtype, unit, across == 1 and not flat),
        )
        if sums:
            add_up(partials, sums)
        return [g for g in gradients if g is not None]

    configs = _configs(B, D, "columns" if sums else "nothing", flat)
    return fastest(run, configs, "kl_gauss_backward", mu.dtype, over, len(sums), B, D)
