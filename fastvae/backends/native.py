"""The C++ library for CPUs, through ctypes: see kernels/include/fastvae.h, which this file mirrors."""

import ctypes
import functools
import mmap
import os
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from importlib.resources import as_file, files
from typing import Any

import torch  # first, because the library takes its OpenMP runtime from torch
from torch import Tensor

from . import exact_skip
from .contract import LogWeights, accumulation_dtype, kl_scale, kl_shape

LIBRARY = "libfastvae_cpu.so"
HUGE_PAGES_FROM = 2**22  # bytes

_HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it
_MADVISE = None
if _HUGE_PAGES is not None:
    _MADVISE = ctypes.CDLL(None).madvise
    _MADVISE.argtypes = (c_void_p, ctypes.c_size_t, c_int)

_ROWS = (c_void_p, c_int64)  # a tensor whose rows may be strided
_PRIORS = (*_ROWS, *_ROWS)
_WEIGHTS = (c_void_p, c_double, c_void_p, c_double, c_double)
_SNDS = (c_int64, c_int64, c_int64)


def _pointers(n: int) -> tuple[type, ...]:
    return (c_void_p,) * n


class Kernels(ctypes.Structure):
    """The table of kernels of one instruction set and dtype."""

    _fields_ = [
        (name, ctypes.CFUNCTYPE(c_int, *parameters, c_int))  # the last one: threads
        for name, parameters in (
            ("kl_gauss", (*_ROWS, *_ROWS, *_PRIORS, c_int64, c_int64, c_int, c_double, c_void_p)),
            (
                "kl_gauss_backward",
                (*_ROWS, c_int64, c_double, *_ROWS, *_ROWS, *_PRIORS, c_int64, c_int64, *_pointers(4)),
            ),
            ("sample_gauss", (*_ROWS, *_ROWS, c_void_p, *_SNDS, *_pointers(4))),
            ("sample_gauss_backward", (*_pointers(4), *_ROWS, *_ROWS, c_void_p, *_SNDS, *_pointers(2))),
            ("cross_log_prob", (*_pointers(3), *_SNDS, c_void_p)),
            ("cross_log_prob_backward", (*_pointers(4), *_SNDS, *_pointers(3))),
            ("agg_log_prob", (*_pointers(3), *_WEIGHTS, *_SNDS, c_void_p, c_int)),
            ("agg_log_prob_backward", (*_pointers(4), *_WEIGHTS, *_SNDS, *_pointers(5), c_int)),
            ("agg_log_prob_marginals", (*_pointers(3), *_WEIGHTS, *_SNDS, *_pointers(2))),
            ("agg_log_prob_marginals_backward", (*_pointers(7), *_WEIGHTS, *_SNDS, *_pointers(4))),
        )
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The shared library, loaded once; `FASTVAE_LIBRARY` names another build of it, for the sanitizers."""
    with as_file(files("fastvae") / LIBRARY) as path:
        lib = ctypes.CDLL(os.environ.get("FASTVAE_LIBRARY") or str(path))
    lib.fastvae_version.restype = c_char_p
    lib.fastvae_instruction_sets.restype = c_char_p
    lib.fastvae_kernels_for.restype = POINTER(Kernels)
    lib.fastvae_kernels_for.argtypes = (c_char_p, c_int)
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


def _run(kernel: Any, *arguments: Any) -> None:
    if kernel(*arguments, torch.get_num_threads()):
        raise MemoryError("fastvae: no memory for the kernel's workspace")


# Small calls are mostly Python: what follows avoids torch calls that would change nothing.


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def _dense(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else _cast(x, dtype).contiguous()


def _ptr(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _rows(x: Tensor, dtype: torch.dtype, n_rows: int) -> tuple[Tensor, int]:
    """The tensor with contiguous rows, and its row stride; one row serves all as stride 0."""
    x = _cast(x, dtype)
    (n, D), (row, column) = x.shape, x.stride()
    if (column != 1 and D > 1) or (row == 0 and n > 1):
        x = x.contiguous()
        row = D
    return x, 0 if n == 1 != n_rows else row


def _prior_rows(x: Tensor | None, dtype: torch.dtype, n_rows: int) -> tuple[Tensor | None, int]:
    return (None, 0) if x is None else _rows(x, dtype, n_rows)


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


_REDUCTION_CODE = {"none": 0, "sample": 1, "dim": 2}  # others: 3, a scalar


def kl_gauss(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, reduction: str
) -> Tensor:
    dtype = accumulation_dtype(mu.dtype)
    B, D = mu.shape
    mu, mu_row = _rows(mu, dtype, B)
    logvar, logvar_row = _rows(logvar, dtype, B)
    prior_mu, prior_mu_row = _prior_rows(prior_mu, dtype, B)
    prior_logvar, prior_logvar_row = _prior_rows(prior_logvar, dtype, B)
    out = _empty(*kl_shape(reduction, B, D), dtype=dtype)
    _run(
        _kernels(dtype).kl_gauss,
        *(mu.data_ptr(), mu_row, logvar.data_ptr(), logvar_row),
        *(_ptr(prior_mu), prior_mu_row, _ptr(prior_logvar), prior_logvar_row),
        *(B, D, _REDUCTION_CODE.get(reduction, 3), kl_scale(reduction, B, D)),
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
    mu, mu_row = _rows(mu, dtype, B)
    logvar, logvar_row = _rows(logvar, dtype, B)
    prior_mu, prior_mu_row = _prior_rows(prior_mu, dtype, B)
    prior_logvar, prior_logvar_row = _prior_rows(prior_logvar, dtype, B)
    grad = _cast(grad, dtype)
    if reduction in ("none", "dim") and grad.stride(-1) not in (0, 1):
        grad = grad.contiguous()
    grad_row = grad.stride(0) if reduction in ("none", "sample") else 0
    grad_col = grad.stride(-1) if reduction in ("none", "dim") else 0
    _run(
        _kernels(dtype).kl_gauss_backward,
        *(grad.data_ptr(), grad_row, grad_col, kl_scale(reduction, B, D)),
        *(mu.data_ptr(), mu_row, logvar.data_ptr(), logvar_row),
        *(_ptr(prior_mu), prior_mu_row, _ptr(prior_logvar), prior_logvar_row),
        *(B, D),
        *map(_ptr, outputs),
    )
    return _asked(outputs, likes)


def sample_gauss(mu: Tensor, logvar: Tensor, seed: Tensor, n_samples: int, outputs: Sequence[bool]) -> list[Tensor]:
    sample_dtype = mu.dtype
    dtype = accumulation_dtype(sample_dtype)
    B, D = mu.shape
    mu, mu_row = _rows(mu, dtype, B)
    logvar, logvar_row = _rows(logvar, dtype, B)
    shapes = ((n_samples, B, D), (n_samples, B), (n_samples, B), (B,))
    results = [_empty(*s, dtype=dtype) if want else None for s, want in zip(shapes, outputs, strict=True)]
    _run(
        _kernels(dtype).sample_gauss,
        *(mu.data_ptr(), mu_row, logvar.data_ptr(), logvar_row),
        *(seed.data_ptr(), n_samples, B, D),
        *map(_ptr, results),
    )
    if results[0] is not None:
        results[0] = _cast(results[0], sample_dtype)
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
    mu, mu_row = _rows(mu, dtype, B)
    logvar, logvar_row = _rows(logvar, dtype, B)
    grads = [_dense(g, dtype) for g in (d_z, d_log_q, d_log_p, d_kl)]
    _run(
        _kernels(dtype).sample_gauss_backward,
        *map(_ptr, grads),
        *(mu.data_ptr(), mu_row, logvar.data_ptr(), logvar_row),
        *(seed.data_ptr(), n_samples, B, D),
        *map(_ptr, outputs),
    )
    return _asked(outputs, likes)


def _cross(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[torch.dtype, list[Tensor | None], tuple[int, int, int]]:
    dtype = accumulation_dtype(z.dtype)
    return dtype, [_dense(x, dtype) for x in (z, mu, logvar)], (z.shape[0], *mu.shape)


def cross_log_prob(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    dtype, inputs, (S, N, D) = _cross(z, mu, logvar)
    out = _empty(S, N, dtype=dtype)
    _run(_kernels(dtype).cross_log_prob, *map(_ptr, inputs), S, N, D, out.data_ptr())
    return out


def cross_log_prob_backward(
    grad: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    dtype, inputs, sizes = _cross(z, mu, logvar)
    outputs = _outputs((z, mu, logvar), dtype, wanted)
    inputs = [_dense(grad, dtype), *inputs]
    _run(_kernels(dtype).cross_log_prob_backward, *map(_ptr, inputs), *sizes, *map(_ptr, outputs))
    return _asked(outputs, (z, mu, logvar))


def _weights(weights: LogWeights, dtype: torch.dtype, n_columns: int) -> tuple[list[Tensor | None], list[Any]]:
    """(tensors to keep alive, the arguments of FASTVAE_WEIGHTS)"""
    log_w, own = _dense(weights.log_w, dtype), _dense(weights.own, torch.int64)
    nan = float("nan")
    arguments = [
        _ptr(log_w),
        weights.common(n_columns),
        _ptr(own),
        nan if weights.log_w_own is None else weights.log_w_own,
        nan if weights.log_w_next is None else weights.log_w_next,
    ]
    return [log_w, own], arguments


def agg_log_prob(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights) -> Tensor:
    dtype, inputs, (S, N, D) = _cross(z, mu, logvar)
    _alive, log_weights = _weights(weights, dtype, N)
    joint = _empty(S, dtype=dtype)
    _run(_kernels(dtype).agg_log_prob, *map(_ptr, inputs), *log_weights, S, N, D, joint.data_ptr(), exact_skip())
    return joint


def agg_log_prob_marginals(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights) -> tuple[Tensor, Tensor]:
    dtype, inputs, (S, N, D) = _cross(z, mu, logvar)
    _alive, log_weights = _weights(weights, dtype, N)
    joint, marginals = _empty(S, dtype=dtype), _empty(S, D, dtype=dtype)
    _run(
        _kernels(dtype).agg_log_prob_marginals,
        *map(_ptr, inputs),
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
    _alive, log_weights = _weights(weights, dtype, mu.shape[0])
    likes = (z, mu, logvar, weights.log_w)
    outputs = _outputs(likes, dtype, wanted)
    inputs = [*(_dense(r, dtype) for r in results), *inputs]
    outputs_of_kernel = map(_ptr, (*again, *outputs))
    _run(getattr(_kernels(dtype), kernel_name), *map(_ptr, inputs), *log_weights, *sizes, *outputs_of_kernel, *options)
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
