"""The contract's functions by the C++ library for CPUs."""

import ctypes
import mmap
from collections.abc import Sequence
from ctypes import c_int, c_void_p
from typing import Any

import torch
from torch import Tensor

from . import c_interface as c
from . import composed, interruption
from .contract import TERMS, Pairs, accumulation_dtype, kl_scale, kl_shape
from .native_library import kernels
from .native_library import status as status  # of this backend
from .settings import exact_skip

HUGE_PAGES_FROM = 2**22  # bytes

_HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it
_MADVISE = None
if _HUGE_PAGES is not None:
    _MADVISE = ctypes.CDLL(None).madvise
    _MADVISE.argtypes = (c_void_p, ctypes.c_size_t, c_int)


def _run(kernel: Any, *arguments: Any) -> None:
    try:
        while status := kernel(*arguments, torch.get_num_threads()):
            interruption.settle(status)
    except BaseException:
        interruption.forget()
        raise


def _in_huge_pages(out: Tensor) -> Tensor:
    """A new tensor, for which the system is asked for huge pages where it is large: half of the time of writing fresh
    memory goes into its page faults, and huge pages have few."""
    if out.nbytes >= HUGE_PAGES_FROM and _MADVISE is not None:
        begin = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        _MADVISE(begin, out.data_ptr() + out.nbytes - begin, _HUGE_PAGES)  # advice, which it may refuse
    return out


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return _in_huge_pages(torch.empty(shape, dtype=dtype, device="cpu"))


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
        kernels(dtype).kl_gauss,
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
        kernels(dtype).kl_gauss_backward,
        *(grad.data_ptr(), grad_row, grad_col, kl_scale(reduction, B, D)),
        *(mu.data_ptr(), mu_row, logvar.data_ptr(), logvar_row),
        *(c.ptr(prior_mu), prior_mu_row, c.ptr(prior_logvar), prior_logvar_row),
        *(B, D),
        *map(c.ptr, outputs),
    )
    return _asked(outputs, likes)


def sample_gauss(
    mu: Tensor, logvar: Tensor, seed: Tensor, n_samples: int, outputs: Sequence[bool], reduction: str
) -> list[Tensor]:
    sample_dtype = mu.dtype
    dtype = accumulation_dtype(sample_dtype)
    B, D = mu.shape
    mu, mu_row = c.rows(mu, dtype, B)
    logvar, logvar_row = c.rows(logvar, dtype, B)
    shapes = ((n_samples, B, D), (n_samples, B), (n_samples, B), kl_shape(reduction, B, D), (n_samples, B, D))
    results = [_empty(*s, dtype=dtype) if want else None for s, want in zip(shapes, outputs, strict=True)]
    _run(
        kernels(dtype).sample_gauss,
        *(mu.data_ptr(), mu_row, logvar.data_ptr(), logvar_row),
        *(seed.data_ptr(), n_samples, B, D),
        *(c.REDUCTION_CODE.get(reduction, 3), kl_scale(reduction, B, D)),
        *map(c.ptr, results),
    )
    if results[0] is not None:
        results[0] = c.cast(results[0], sample_dtype)
    return [r for r in results if r is not None]


def sample_gauss_backward(
    upstream: Sequence[Tensor | None],
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor | None,
    eps: Tensor | None,
    n_samples: int,
    reduction: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    likes = (mu, logvar)
    dtype = accumulation_dtype(mu.dtype)
    B, D = mu.shape
    outputs = _outputs(likes, dtype, wanted)
    mu, mu_row = c.rows(mu, dtype, B)
    logvar, logvar_row = c.rows(logvar, dtype, B)
    grads, eps = [c.dense(g, dtype) for g in upstream], c.dense(eps, dtype)
    _run(
        kernels(dtype).sample_gauss_backward,
        *map(c.ptr, grads),
        *(int(reduction == "sample"), kl_scale(reduction, B, D)),
        *(mu.data_ptr(), mu_row, logvar.data_ptr(), logvar_row),
        *(c.ptr(seed), c.ptr(eps), n_samples, B, D),
        *map(c.ptr, outputs),
    )
    return _asked(outputs, likes)


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    dtype = accumulation_dtype(logits.dtype)
    B, (R, M) = x.shape[0], logits.shape
    x, x_row = c.rows(x, dtype, B)
    logits, logits_row = c.rows(logits, dtype, R)
    log_p = _empty(R, dtype=dtype)
    _run(
        kernels(dtype).bernoulli_log_prob,
        *(x.data_ptr(), x_row, logits.data_ptr(), logits_row),
        *(B, R, M),
        log_p.data_ptr(),
    )
    return log_p


def bernoulli_log_prob_backward(grad: Tensor, x: Tensor, logits: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    of_x, of_logits = wanted
    gradients = composed.bernoulli_log_prob_backward(None, grad, x, logits, (True, False)) if of_x else []
    if not of_logits:
        return gradients
    dtype = accumulation_dtype(logits.dtype)
    likes = (logits,)
    B, (R, M) = x.shape[0], logits.shape
    outputs = _outputs(likes, dtype, (True,))
    x, x_row = c.rows(x, dtype, B)
    logits, logits_row = c.rows(logits, dtype, R)
    grad = c.cast(grad, dtype)
    _run(
        kernels(dtype).bernoulli_log_prob_backward,
        *(grad.data_ptr(), grad.stride(0)),
        *(x.data_ptr(), x_row, logits.data_ptr(), logits_row),
        *(B, R, M),
        *map(c.ptr, outputs),
    )
    return [*gradients, *_asked(outputs, likes)]


def _dense(pairs: Pairs) -> tuple[torch.dtype, list[Tensor | None]]:
    """The dtype to compute in, and z, mu and logvar in it."""
    dtype = accumulation_dtype(pairs.z.dtype)
    return dtype, [c.dense(x, dtype) for x in pairs[:3]]


def cross_log_prob(pairs: Pairs) -> Tensor:
    dtype, inputs = _dense(pairs)
    S, N, D = pairs.sizes
    out = _empty(S, N, dtype=dtype)
    _run(kernels(dtype).cross_log_prob, *map(c.ptr, inputs), S, N, D, out.data_ptr())
    return out


def cross_log_prob_backward(grad: Tensor, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]:
    dtype, inputs = _dense(pairs)
    outputs = _outputs(pairs[:3], dtype, wanted)
    inputs = [c.dense(grad, dtype), *inputs]
    _run(kernels(dtype).cross_log_prob_backward, *map(c.ptr, inputs), *pairs.sizes, *map(c.ptr, outputs))
    return _asked(outputs, pairs[:3])


def agg_log_prob(pairs: Pairs) -> Tensor:
    dtype, inputs = _dense(pairs)
    S, N, D = pairs.sizes
    _alive, log_weights = c.log_weights(pairs.weights, dtype, N)
    joint = _empty(S, dtype=dtype)
    _run(kernels(dtype).agg_log_prob, *map(c.ptr, inputs), *log_weights, S, N, D, joint.data_ptr(), exact_skip())
    return joint


def agg_log_prob_marginals(pairs: Pairs) -> tuple[Tensor, Tensor]:
    dtype, inputs = _dense(pairs)
    S, N, D = pairs.sizes
    _alive, log_weights = c.log_weights(pairs.weights, dtype, N)
    joint, marginals = _empty(S, dtype=dtype), _empty(S, D, dtype=dtype)
    _run(
        kernels(dtype).agg_log_prob_marginals,
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
    pairs: Pairs,
    wanted: Sequence[bool],
    again: Sequence[Tensor | None] = (),
    options: Sequence[int] = (),
) -> list[Tensor]:
    """Returns the gradients, by the kernel of that name.

    Args:
        results: the upstream gradients and the forward's results, in the kernel's order.
        again: results of the forward that the kernel writes before the gradients.
        options: the kernel's arguments after them.
    """
    dtype, inputs = _dense(pairs)
    S, N, D = pairs.sizes
    _alive, log_weights = c.log_weights(pairs.weights, dtype, N)
    likes = pairs.inputs
    outputs = _outputs(likes, dtype, wanted)
    inputs = [*(c.dense(r, dtype) for r in results), *inputs]
    outputs_of_kernel = map(c.ptr, (*again, *outputs))
    _run(getattr(kernels(dtype), kernel_name), *map(c.ptr, inputs), *log_weights, S, N, D, *outputs_of_kernel, *options)
    return _asked(outputs, likes)


def agg_log_prob_backward(d_joint: Tensor, joint: Tensor | None, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]:
    again = _empty(pairs.z.shape[0], dtype=accumulation_dtype(pairs.z.dtype)) if joint is None else None
    gradients = _aggregate_backward("agg_log_prob_backward", (d_joint,), pairs, wanted, (again,), (exact_skip(),))
    return gradients if again is None else [again, *gradients]


def agg_log_prob_marginals_backward(
    upstream: Sequence[Tensor | None],
    joint: Tensor,
    marginals: Tensor,
    pairs: Pairs,
    wanted: Sequence[bool],
) -> list[Tensor]:
    return _aggregate_backward("agg_log_prob_marginals_backward", (*upstream, joint, marginals), pairs, wanted)


def agg_entropy(pairs: Pairs) -> Tensor:
    dtype, inputs = _dense(pairs)
    S, N, D = pairs.sizes
    _alive, log_weights = c.log_weights(pairs.weights, dtype, N)
    entropy = _empty(dtype=dtype)
    _run(kernels(dtype).agg_entropy, *map(c.ptr, inputs), *log_weights, S, N, D, entropy.data_ptr(), exact_skip())
    return entropy


def agg_entropy_backward(d_entropy: Tensor, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]:
    return _aggregate_backward("agg_entropy_backward", (d_entropy,), pairs, wanted, options=(exact_skip(),))


def kl_decomposition(pairs: Pairs) -> list[Tensor]:
    dtype, inputs = _dense(pairs)
    S, N, D = pairs.sizes
    _alive, log_weights = c.log_weights(pairs.weights, dtype, N)
    results = [_empty(D, dtype=dtype) if name == "dim_kl" else _empty(dtype=dtype) for name in TERMS]
    results += [_empty(S, dtype=dtype), _empty(S, D, dtype=dtype)]
    results[c.FACTORIZATION].zero_()
    outputs = map(c.ptr, c.without_factorization(results))
    _run(kernels(dtype).kl_decomposition, *map(c.ptr, inputs), *log_weights, S, N, D, *outputs)
    return results


def kl_decomposition_backward(
    upstream: Sequence[Tensor | None],
    joint: Tensor,
    marginals: Tensor,
    pairs: Pairs,
    wanted: Sequence[bool],
) -> list[Tensor]:
    given = (*c.without_factorization(upstream), joint, marginals)
    return _aggregate_backward("kl_decomposition_backward", given, pairs, wanted)
