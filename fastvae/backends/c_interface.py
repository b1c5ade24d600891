"""The C interfaces of kernels/include/, as ctypes calls them, and what the backends that do so have in common."""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import installed
from .contract import TERMS, LogWeights
from .settings import WrongSetting, setting

INTERFACE = 0x553B30A  # FASTVAE_INTERFACE of kernels/include/fastvae.h
ROWS = (c_void_p, c_int64)  # a tensor whose rows may be strided
SIZES = (c_int64,) * 3  # S, N, D or L, B, D or B, R, M
WEIGHTS = (c_void_p, c_double, c_void_p, c_double, c_double)
FACTORIZATION = TERMS.index("prior_factorization")  # which no kernel computes: that of N(0, I) is 0
REDUCTION_CODE = {"none": 0, "sample": 1, "dim": 2}  # others: 3, a scalar


def _pointers(n: int) -> tuple[type, ...]:
    return (c_void_p,) * n


# What the headers declare, to which tests/backends/test_c_interface.py holds it: the parameters that the same kernel
# has in both, before those that only one of them has; then what only one has.
_ELEMENTWISE: dict[str, tuple[type, ...]] = {
    "kl_gauss": (*ROWS * 4, *SIZES[:2], c_int, c_double, c_void_p),
    "kl_gauss_backward": (*ROWS, c_int64, c_double, *ROWS * 4, *SIZES[:2], *_pointers(4)),
    "sample_gauss": (*ROWS * 2, c_void_p, *SIZES, c_int, c_double, *_pointers(5)),
    "sample_gauss_backward": (*_pointers(4), c_int64, c_double, *ROWS * 2, *_pointers(2), *SIZES, *_pointers(2)),
}

_BERNOULLI: dict[str, tuple[type, ...]] = {
    "bernoulli_log_prob": (*ROWS * 2, *SIZES, c_void_p),
    "bernoulli_log_prob_backward": (*ROWS * 3, *SIZES, c_void_p),
}


def _of_pairs(pairs: tuple[type, ...], n_of_results: int) -> dict[str, tuple[type, ...]]:
    """Those of the ops of pairs. `pairs`: z, mu, logvar; `n_of_results`: the results that the marginals' backward takes
    after the upstream gradients."""
    weighted = (*pairs, *WEIGHTS, *SIZES)
    return {
        "cross_log_prob": (*pairs, *SIZES, c_void_p),
        "cross_log_prob_backward": (c_void_p, *pairs, *SIZES, *_pointers(3)),
        "agg_log_prob": (*weighted, c_void_p, c_int),
        "agg_log_prob_backward": (c_void_p, *weighted, *_pointers(5), c_int),
        "agg_log_prob_marginals": (*weighted, *_pointers(2)),
        "agg_log_prob_marginals_backward": (*_pointers(2 + n_of_results), *weighted, *_pointers(4)),
        "agg_entropy": (*weighted, c_void_p, c_int),
        "agg_entropy_backward": (c_void_p, *weighted, *_pointers(4), c_int),
        "kl_decomposition": (*weighted, *_pointers(9)),
        "kl_decomposition_backward": (*_pointers(6 + n_of_results), *weighted, *_pointers(4)),
    }


# Of fastvae.h the table of kernels, in its order, without their last parameter, `threads`.
KERNELS = _ELEMENTWISE | _BERNOULLI | _of_pairs(_pointers(3), 2)
# Of fastvae_cuda.h the functions fastvae_cuda_<op>_workspace, without the dtype before and `backward` after these.
CUDA_WORKSPACES: dict[str, tuple[type, ...]] = {
    "kl_gauss": (*SIZES[:2], c_int),
    "sample_gauss": (c_int64, c_int),
    "cross_log_prob": SIZES,
    "agg_log_prob": SIZES,
    "agg_log_prob_marginals": SIZES,
    "agg_entropy": SIZES,
    "kl_decomposition": SIZES,
}
# And the functions fastvae_cuda_<name>, without the dtype before and the stream after these.
CUDA_FUNCTIONS = {name: (*kinds, c_void_p, c_int64) for name, kinds in (_ELEMENTWISE | _of_pairs(ROWS * 3, 0)).items()}


def load(library: str, variable: str, interface: str, build: Callable[[], str]) -> ctypes.CDLL:
    """The package's shared library, or another build of it where the environment variable names one.

    Args:
        interface: the name of the function that says the number of the library's interface.
        build: gives the command that builds it, where there is something to say of it.

    Raises:
        OSError: there is none, it does not load, or its interface is not the one that this package calls.
        WrongSetting: the same holds for the library that the environment variable names.
    """
    named = setting(variable)
    if named:
        try:
            return _load(named, interface, build)
        except OSError as error:
            raise WrongSetting(f"{variable}={named}: {error}; correct it, or unset {variable}") from error
    path = installed.find(library)
    if path is None:
        raise OSError(installed.why_not(build()))
    return _load(path, interface, build)


def _load(path: str | Path, interface: str, build: Callable[[], str]) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    number = getattr(lib, interface)() if hasattr(lib, interface) else "none"
    if number != INTERFACE:
        raise OSError(
            f"the interface number of {path} is {number} and that of the imported package, {installed.PACKAGE}, is"
            f" {INTERFACE}, so they are of different revisions; build it again, by `{build()}`"
        )
    return lib


# Small calls are mostly Python: what follows avoids torch calls that would change nothing.


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def dense(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else cast(x, dtype).contiguous()


def ptr(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def rows(x: Tensor, dtype: torch.dtype, n_rows: int) -> tuple[Tensor, int]:
    """The tensor with contiguous rows, and its row stride; one row serves all as stride 0."""
    x = cast(x, dtype)
    (n, D), (row, column) = x.shape, x.stride()
    if (column != 1 and D > 1) or (row == 0 and n > 1):
        x = x.contiguous()
        row = D
    return x, 0 if n == 1 != n_rows else row


def optional_rows(x: Tensor | None, dtype: torch.dtype, n_rows: int) -> tuple[Tensor | None, int]:
    return (None, 0) if x is None else rows(x, dtype, n_rows)


def log_weights(weights: LogWeights, dtype: torch.dtype, n_columns: int) -> tuple[list[Tensor | None], list[Any]]:
    """Returns the tensors to keep alive during the call, and the arguments of FASTVAE_WEIGHTS."""
    log_w, own = dense(weights.log_w, dtype), dense(weights.own, torch.int64)
    nan = float("nan")
    arguments = [
        ptr(log_w),
        weights.common(n_columns),
        ptr(own),
        nan if weights.log_w_own is None else weights.log_w_own,
        nan if weights.log_w_next is None else weights.log_w_next,
    ]
    return [log_w, own], arguments


def without_factorization(terms: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What kernels have of the terms of the KL, and of what comes after them."""
    return [*terms[:FACTORIZATION], *terms[FACTORIZATION + 1 :]]
