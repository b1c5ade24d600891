"""The C++ library for CPUs, through ctypes: see kernels/include/fastvae.h, which this file mirrors."""

import ctypes
import functools
import mmap
import os
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from typing import Any

import torch  # first, because the library takes its OpenMP runtime from torch
from torch import Tensor

from . import c_interface as c
from . import exact_skip
from .contract import LogWeights, accumulation_dtype, kl_scale, kl_shape

LIBRARY = "libfastvae_cpu.so"
HUGE_PAGES_FROM = 2**22  # bytes

_HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it
_MADVISE = None
if _HUGE_PAGES is not None:
    _MADVISE = ctypes.CDLL(None).madvise
    _MADVISE.argtypes = (c_void_p, ctypes.c_size_t, c_int)


class Kernels(ctypes.Structure):
    """The table of kernels of one instruction set and dtype."""

    _fields_ = [
        (name, ctypes.CFUNCTYPE(c_int, *parameters, c_int))  # the last one: threads
        for name, parameters in (
            ("kl_gauss", (*c.ROWS, *c.ROWS, *c.ROWS, *c.ROWS, c_int64, c_int64, c_int, c_double, c_void_p)),
            (
                "kl_gauss_backward",
                (*c.ROWS, c_int64, c_double, *c.ROWS, *c.ROWS, *c.ROWS, *c.ROWS, c_int64, c_int64, *c.pointers(4)),
            ),
            ("sample_gauss", (*c.ROWS, *c.ROWS, c_void_p, *c.SIZES, *c.pointers(4))),
            ("sample_gauss_backward", (*c.pointers(4), *c.ROWS, *c.ROWS, c_void_p, *c.SIZES, *c.pointers(2))),
            ("cross_log_prob", (*c.pointers(3), *c.SIZES, c_void_p)),
            ("cross_log_prob_backward", (*c.pointers(4), *c.SIZES, *c.pointers(3))),
            ("agg_log_prob", (*c.pointers(3), *c.WEIGHTS, *c.SIZES, c_void_p, c_int)),
            ("agg_log_prob_backward", (*c.pointers(4), *c.WEIGHTS, *c.SIZES, *c.pointers(5), c_int)),
            ("agg_log_prob_marginals", (*c.pointers(3), *c.WEIGHTS, *c.SIZES, *c.pointers(2))),
            ("agg_log_prob_marginals_backward", (*c.pointers(7), *c.WEIGHTS, *c.SIZES, *c.pointers(4))),
        )
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The shared library, loaded once; `FASTVAE_LIBRARY` names another build of it, for the sanitizers."""
    lib = c.load(LIBRARY, "FASTVAE_LIBRARY", "fastvae_interface", "pip install .")
    lib.fastvae_version.restype = c_char_p
    lib.fastvae_instruction_sets.restype = c_char_p
    lib.fastvae_kernels_for.restype = POINTER(Kernels)
    lib.fastvae_kernels_for.argtypes = (c_char_p, c_int)
    lib.fastvae_take_visits.restype = None
    lib.fastvae_take_visits.argtypes = (POINTER(c_int64), POINTER(c_int64))
    return lib


def instruction_sets() -> list[str]:
    """Those compiled in that this CPU can run, best first."""
    return library().fastvae_instruction_sets().decode().split()


@functools.cache
def kernels_for(instruction_set: str, dtype: torch.dtype) -> Any:
    return library().fastvae_kernels_for(instruction_set.encode(), int(dtype == torch.float64)).contents


_instruction_set: str | None = None


def use_instruction_set(name: str | None) -> None:
    """Compute with one instruction set, or with the best (None); `FASTVAE_CPU_ISA` sets it from outside."""
    global _instruction_set
    available = instruction_sets()
    if name is not None and name not in available:
        raise ValueError(f"FASTVAE_CPU_ISA: expected one of {', '.join(available)}, got {name!r}")
    _instruction_set = name or available[0]
    _kernels.cache_clear()


@functools.cache
def _kernels(dtype: torch.dtype) -> Any:
    if _instruction_set is None:
        use_instruction_set(os.environ.get("FASTVAE_CPU_ISA") or None)
    return kernels_for(str(_instruction_set), dtype)


@functools.cache
def status() -> tuple[bool, str]:
    """Whether the library loads and this CPU can run it; what it runs on, or why not."""
    try:
        if not instruction_sets():
            return False, "this CPU has none of the instruction sets that the library was built for"
        _kernels(torch.float32)
    except (OSError, ValueError, AttributeError) as error:
        return False, f"{LIBRARY}: {error}"
    return True, f"{LIBRARY} {library().fastvae_version().decode()}, {_instruction_set}"


def take_visits() -> tuple[int, int]:
    """How many dimensions of pairs `agg_log_prob` visited since this was last called, its backward too, and how many
    there were: S·N·D for each pass over all pairs. A backward makes two, of which the first adds the rows up again."""
    visited, everything = c_int64(), c_int64()
    library().fastvae_take_visits(visited, everything)
    return visited.value, everything.value


def _run(kernel: Any, *arguments: Any) -> None:
    if kernel(*arguments, torch.get_num_threads()):
        raise MemoryError("fastvae: no memory for the kernel's workspace")


def _in_huge_pages(out: Tensor) -> Tensor:
    """A new tensor, for which the system is asked for huge pages where it is large: half of the time of writing fresh
    memory goes into its page faults, and huge pages have few."""
    if out.nbytes >= HUGE_PAGES_FROM and _MADVISE is not None:
        begin = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        _MADVISE(begin, out.data_ptr() + out.nbytes - begin, _HUGE_PAGES)  # advice, which it may refuse
    return out


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return _in_huge_pages(torch.empty(shape, dtype=dtype))


def _output(like: Tensor, dtype: torch.dtype) -> Tensor:
    if like.dtype is dtype and like.is_contiguous():
        return _in_huge_pages(torch.empty_like(like))
    return _empty(*like.shape, dtype=dtype)


def _outputs(likes: Sequence[Tensor | None], dtype: torch.dtype, wanted: Sequence[bool]) -> list[Tensor | None]:
    return [_output(x, dtype) if want and x is not None else None for x, want in zip(likes, wanted, strict=True)]


def _asked(outputs: Sequence[Tensor | None], likes: Sequence[Tensor | None]) -> list[Tensor]:
    """The outputs that were asked for, each in the dtype of the tensor it belongs to."""
    return [
        o if o.dtype is x.dtype else o.to(x.dtype)
        for o, x in zip(outputs, likes, strict=True)
        if o is not None and x is not None
    ]


def kl_gauss(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, reduction: str
) -> Tensor:
    dtype = accumulation_dtype(mu.dtype)
    B, D = mu.shape
    mu, mu_row = c.rows(mu, dtype, B)
    logvar, logvar_row = c.rows(logvar, dtype, B)
    prior_mu, prior_mu_row = c.optional_rows(prior_mu, dtype, B)
    prior_logvar, prior_logvar_row = c.optional_rows(prior_logvar, dtype, B)
    out = _empty(*kl_shape(reduction, B, D), dtype=dtype)
    _run(
        _kernels(dtype).kl_gauss,
        *(mu.data_ptr(), mu_row, logvar.data_ptr(), logvar_row),
        *(c.ptr(prior_mu), prior_mu_row, c.ptr(prior_logvar), prior_logvar_row),
        *(B, D, c.REDUCTION_CODE.get(reduction, 3), kl_scale(reduction, B, D)),
        out.data_ptr(),
    )
    return out


def kl_gauss_backward(
    grad: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    reduction: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    likes = (mu, logvar, prior_mu, prior_logvar)
    dtype = accumulation_dtype(mu.dtype)
    B, D = mu.shape
    outputs = _outputs(likes, dtype, wanted)
    mu, mu_row = c.rows(mu, dtype, B)
    logvar, logvar_row = c.rows(logvar, dtype, B)
    prior_mu, prior_mu_row = c.optional_rows(prior_mu, dtype, B)
    prior_logvar, prior_logvar_row = c.optional_rows(prior_logvar, dtype, B)
    grad = c.cast(grad, dtype)
    if reduction in ("none", "dim") and grad.stride(-1) not in (0, 1):
        grad = grad.contiguous()
    grad_row = grad.stride(0) if reduction in ("none", "sample") else 0
    grad_col = grad.stride(-1) if reduction in ("none", "dim") else 0
    _run(
        _kernels(dtype).kl_gauss_backward,
        *(grad.data_ptr(), grad_row, grad_col, kl_scale(reduction, B, D)),
        *(mu.data_ptr(), mu_row, logvar.data_ptr(), logvar_row),
        *(c.ptr(prior_mu), prior_mu_row, c.ptr(prior_logvar), prior_logvar_row),
        *(B, D),
        *map(c.ptr, outputs),
    )
    return _asked(outputs, likes)


def sample_gauss(mu: Tensor, logvar: Tensor, seed: Tensor, n_samples: int, outputs: Sequence[bool]) -> list[Tensor]:
    sample_dtype = mu.dtype
    dtype = accumulation_dtype(sample_dtype)
    B, D = mu.shape
    mu, mu_row = c.rows(mu, dtype, B)
    logvar, logvar_row = c.rows(logvar, dtype, B)
    shapes = ((n_samples, B, D), (n_samples, B), (n_samples, B), (B,))
    results = [_empty(*s, dtype=dtype) if want else None for s, want in zip(shapes, outputs, strict=True)]
    _run(
        _kernels(dtype).sample_gauss,
        *(mu.data_ptr(), mu_row, logvar.data_ptr(), logvar_row),
        *(seed.data_ptr(), n_samples, B, D),
        *map(c.ptr, results),
    )
    if results[0] is not None:
        results[0] = c.cast(results[0], sample_dtype)
    return [r for r in results if r is not None]


def sample_gauss_backward(
    d_z: Tensor | None,
    d_log_q: Tensor | None,
    d_log_p: Tensor | None,
    d_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    n_samples: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    likes = (mu, logvar)
    dtype = accumulation_dtype(mu.dtype)
    B, D = mu.shape
    outputs = _outputs(likes, dtype, wanted)
    mu, mu_row = c.rows(mu, dtype, B)
    logvar, logvar_row = c.rows(logvar, dtype, B)
    grads = [c.dense(g, dtype) for g in (d_z, d_log_q, d_log_p, d_kl)]
    _run(
        _kernels(dtype).sample_gauss_backward,
        *map(c.ptr, grads),
        *(mu.data_ptr(), mu_row, logvar.data_ptr(), logvar_row),
        *(seed.data_ptr(), n_samples, B, D),
        *map(c.ptr, outputs),
    )
    return _asked(outputs, likes)


def _cross(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[torch.dtype, list[Tensor | None], tuple[int, int, int]]:
    dtype = accumulation_dtype(z.dtype)
    return dtype, [c.dense(x, dtype) for x in (z, mu, logvar)], (z.shape[0], *mu.shape)


def cross_log_prob(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    dtype, inputs, (S, N, D) = _cross(z, mu, logvar)
    out = _empty(S, N, dtype=dtype)
    _run(_kernels(dtype).cross_log_prob, *map(c.ptr, inputs), S, N, D, out.data_ptr())
    return out


def cross_log_prob_backward(
    grad: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    dtype, inputs, sizes = _cross(z, mu, logvar)
    outputs = _outputs((z, mu, logvar), dtype, wanted)
    inputs = [c.dense(grad, dtype), *inputs]
    _run(_kernels(dtype).cross_log_prob_backward, *map(c.ptr, inputs), *sizes, *map(c.ptr, outputs))
    return _asked(outputs, (z, mu, logvar))


def agg_log_prob(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights) -> Tensor:
    dtype, inputs, (S, N, D) = _cross(z, mu, logvar)
    _alive, log_weights = c.log_weights(weights, dtype, N)
    joint = _empty(S, dtype=dtype)
    _run(_kernels(dtype).agg_log_prob, *map(c.ptr, inputs), *log_weights, S, N, D, joint.data_ptr(), exact_skip())
    return joint


def agg_log_prob_marginals(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights) -> tuple[Tensor, Tensor]:
    dtype, inputs, (S, N, D) = _cross(z, mu, logvar)
    _alive, log_weights = c.log_weights(weights, dtype, N)
    joint, marginals = _empty(S, dtype=dtype), _empty(S, D, dtype=dtype)
    _run(
        _kernels(dtype).agg_log_prob_marginals,
        *map(c.ptr, inputs),
        *log_weights,
        *(S, N, D),
        joint.data_ptr(),
        marginals.data_ptr(),
    )
    return joint, marginals


def _aggregate_backward(
    kernel_name: str,
    results: Sequence[Tensor | None],
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    weights: LogWeights,
    wanted: Sequence[bool],
    again: Sequence[Tensor | None] = (),
    options: Sequence[int] = (),
) -> list[Tensor]:
    """`results`: the upstream gradients and the forward's results, in the kernel's order; `again`: those of the results
    that the kernel writes before the gradients; `options`: what it takes after them."""
    dtype, inputs, sizes = _cross(z, mu, logvar)
    _alive, log_weights = c.log_weights(weights, dtype, mu.shape[0])
    likes = (z, mu, logvar, weights.log_w)
    outputs = _outputs(likes, dtype, wanted)
    inputs = [*(c.dense(r, dtype) for r in results), *inputs]
    outputs_of_kernel = map(c.ptr, (*again, *outputs))
    _run(getattr(_kernels(dtype), kernel_name), *map(c.ptr, inputs), *log_weights, *sizes, *outputs_of_kernel, *options)
    return _asked(outputs, likes)


def agg_log_prob_backward(
    d_joint: Tensor,
    joint: Tensor | None,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    weights: LogWeights,
    wanted: Sequence[bool],
) -> list[Tensor]:
    again = _empty(z.shape[0], dtype=accumulation_dtype(z.dtype)) if joint is None else None
    gradients = _aggregate_backward(
        "agg_log_prob_backward", (d_joint,), z, mu, logvar, weights, wanted, (again,), (exact_skip(),)
    )
    return gradients if again is None else [again, *gradients]


def agg_log_prob_marginals_backward(
    d_joint: Tensor | None,
    d_marginals: Tensor | None,
    joint: Tensor,
    marginals: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    weights: LogWeights,
    wanted: Sequence[bool],
) -> list[Tensor]:
    return _aggregate_backward(
        "agg_log_prob_marginals_backward",
        (d_joint, d_marginals, joint, marginals),
        z,
        mu,
        logvar,
        weights,
        wanted,
    )
