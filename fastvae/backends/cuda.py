"""The contract's functions by the CUDA C++ library, through ctypes: see kernels/include/fastvae_cuda.h.

It is built by `make cuda`, not by pip, and loaded when it is first asked about. A build that runs kernels on the host,
one thread at a time, is for tests; it computes on CPU tensors.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from . import c_interface as c
from . import installed
from .contract import TERMS, Pairs, accumulation_dtype, kl_scale, kl_shape
from .settings import exact_skip

LIBRARY = "libfastvae_cuda.so"
WHY_NOT = "libfastvae_cuda.txt"  # what a build that failed leaves instead

_OF_CAPTURE = (1900, 1901)  # FASTVAE_CUDA_ERROR + cudaErrorStreamCaptureUnsupported, cudaErrorStreamCaptureInvalidated
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@functools.cache
def library() -> ctypes.CDLL:
    """The shared library, loaded once; `FASTVAE_CUDA_LIBRARY` names another build of it."""
    lib = c.load(LIBRARY, "FASTVAE_CUDA_LIBRARY", "fastvae_cuda_interface", _build_command)
    for name, parameters in c.CUDA_FUNCTIONS.items():
        getattr(lib, f"fastvae_cuda_{name}").argtypes = (c_int, *parameters, c_void_p)
    for name, parameters in c.CUDA_WORKSPACES.items():
        function = getattr(lib, f"fastvae_cuda_{name}_workspace")
        function.restype, function.argtypes = c_int64, (c_int, *parameters, c_int)
    lib.fastvae_cuda_version.restype = c_char_p
    lib.fastvae_cuda_status_string.restype = c_char_p
    return lib


@functools.cache
def simulated() -> bool:
    """Whether the library runs kernels on the host."""
    return bool(library().fastvae_cuda_simulated())


@functools.cache
def status() -> tuple[bool, str]:
    """Whether the library loads and has a GPU to run on; what it is, or why not."""
    try:
        name = f"{LIBRARY} {library().fastvae_cuda_version().decode()}"
        on_host = simulated()
    except (OSError, AttributeError) as error:
        return False, _why_not_built() or f"{LIBRARY}: {error}"
    if on_host:
        return True, f"{name}, its kernels run on the host, for tests"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False, f"{name} is here, but no GPU that torch can use"
    return True, f"{name}, only by name: no measurement is committed that shows it faster than Triton"


def _why_not_built() -> str:
    """The reason that a failed build has left, or that there was no build; empty where there is a library."""
    if installed.find(LIBRARY):
        return ""
    reason = installed.find(WHY_NOT)
    return reason.read_text().strip() if reason else f"{LIBRARY} was not built; `{_build_command()}` builds it"


def _build_command() -> str:
    return installed.build_command("cmake.define.FASTVAE_CUDA=ON", in_a_checkout="make cuda")


@functools.cache
def _function(name: str) -> Callable[..., int]:
    return getattr(library(), f"fastvae_cuda_{name}")


@functools.lru_cache(maxsize=1024)
def _workspace_size(name: str, dtype: torch.dtype, *sizes: int) -> int:
    """The bytes of a workspace; remembered, as a training loop asks for the same again and again."""
    op = name.removesuffix("_backward")
    return _function(f"{op}_workspace")(_DTYPES[dtype], *sizes, op != name)


def _run(name: str, dtype: torch.dtype, device: torch.device, sizes: Sequence[int], *arguments: Any) -> None:
    """Calls a function of the library on the current stream of the device.

    Args:
        sizes: what the size of its workspace depends on; nothing for no workspace.
    """
    size = _workspace_size(name, dtype, *sizes) if sizes else 0
    # Memory that is freed to the same stream's next tensors
    memory = torch.empty(size, dtype=torch.uint8, device=device) if size else None
    arguments = (_DTYPES[dtype], *arguments, c.ptr(memory), size)
    if device.type != "cuda":
        if not simulated():
            raise RuntimeError(f"backend 'cuda' does not compute on {device.type} tensors")
        status = _function(name)(*arguments, None)
    elif device.index == torch.cuda.current_device():
        status = _function(name)(*arguments, _current_stream(device))
    else:
        with torch.cuda.device(device):
            status = _function(name)(*arguments, _current_stream(device))
    if status:
        raise RuntimeError(f"fastvae_cuda_{name}: {_meaning(status)} (status {status})")


def _current_stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)  # which makes no torch.cuda.Stream of it


def _meaning(status: int) -> str:
    meaning = library().fastvae_cuda_status_string(status).decode()
    return f"{meaning}; run the step once before it is captured" if status in _OF_CAPTURE else meaning


def _row_arguments(*rows: tuple[Tensor | None, int]) -> list[Any]:
    return [part for x, stride in rows for part in (c.ptr(x), stride)]


def _outputs(likes: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if want and x is not None else None
        for x, want in zip(likes, wanted, strict=True)
    ]


def _asked(outputs: Sequence[Tensor | None]) -> list[Tensor]:
    return [o for o in outputs if o is not None]


def kl_gauss(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, reduction: str
) -> Tensor:
    B, D = mu.shape
    rows = [c.optional_rows(x, mu.dtype, B) for x in (mu, logvar, prior_mu, prior_logvar)]
    out = torch.empty(kl_shape(reduction, B, D), dtype=accumulation_dtype(mu.dtype), device=mu.device)
    code, scale = c.REDUCTION_CODE.get(reduction, 3), kl_scale(reduction, B, D)
    sizes = () if reduction in ("none", "sample") else (B, D, code)  # of partial sums
    _run("kl_gauss", mu.dtype, mu.device, sizes, *_row_arguments(*rows), B, D, code, scale, out.data_ptr())
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
    B, D = mu.shape
    likes = (mu, logvar, prior_mu, prior_logvar)
    rows = [c.optional_rows(x, mu.dtype, B) for x in likes]
    outputs = _outputs(likes, wanted)
    grad = c.cast(grad, accumulation_dtype(mu.dtype))
    grad_row = grad.stride(0) if reduction in ("none", "sample") else 0
    grad_col = grad.stride(-1) if reduction in ("none", "dim") else 0
    _run(
        "kl_gauss_backward",
        mu.dtype,
        mu.device,
        (B, D, 0) if any(wanted[2:]) else (),  # for sums over the rows that share a prior
        *(grad.data_ptr(), grad_row, grad_col, kl_scale(reduction, B, D)),
        *_row_arguments(*rows),
        *(B, D),
        *map(c.ptr, outputs),
    )
    return _asked(outputs)


def sample_gauss(
    mu: Tensor, logvar: Tensor, seed: Tensor, n_samples: int, outputs: Sequence[bool], reduction: str
) -> list[Tensor]:
    B, D = mu.shape
    dtype = accumulation_dtype(mu.dtype)
    shapes = ((n_samples, B, D), (n_samples, B), (n_samples, B), kl_shape(reduction, B, D), (n_samples, B, D))
    results = [
        torch.empty(shape, dtype=dtype if n else mu.dtype, device=mu.device) if want else None
        for n, (shape, want) in enumerate(zip(shapes, outputs, strict=True))
    ]
    rows = [c.optional_rows(x, mu.dtype, B) for x in (mu, logvar)]
    code = c.REDUCTION_CODE.get(reduction, 3)
    _run(
        "sample_gauss",
        mu.dtype,
        mu.device,
        (B, code) if outputs[3] and reduction != "sample" else (),  # for the sum over rows
        *_row_arguments(*rows),
        *(seed.data_ptr(), n_samples, B, D, code, kl_scale(reduction, B, D)),
        *map(c.ptr, results),
    )
    return _asked(results)


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
    B, D = mu.shape
    sums = accumulation_dtype(mu.dtype)
    given = [c.dense(g, sums if n else mu.dtype) for n, g in enumerate(upstream)]
    eps = c.dense(eps, sums)
    outputs = _outputs((mu, logvar), wanted)
    rows = [c.optional_rows(x, mu.dtype, B) for x in (mu, logvar)]
    _run(
        "sample_gauss_backward",
        mu.dtype,
        mu.device,
        (),
        *map(c.ptr, given),
        *(int(reduction == "sample"), kl_scale(reduction, B, D)),
        *_row_arguments(*rows),
        *(c.ptr(seed), c.ptr(eps), n_samples, B, D),
        *map(c.ptr, outputs),
    )
    return _asked(outputs)


def _of_pairs(
    name: str,
    pairs: Pairs,
    outputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None] = (),
    options: Sequence[int] = (),
    weighted: bool = True,
) -> None:
    """Calls a function of pairs. `options`: its arguments after the outputs."""
    dtype, device, sizes = pairs.mu.dtype, pairs.mu.device, pairs.sizes
    sums = accumulation_dtype(dtype)
    dense = [c.dense(x, sums) for x in upstream]
    rows = [c.rows(x, dtype, x.shape[0]) for x in pairs[:3]]
    _alive, log_weights = c.log_weights(pairs.weights, sums, len(pairs.mu)) if weighted else ([], [])
    _run(
        name,
        dtype,
        device,
        sizes,
        *map(c.ptr, dense),
        *_row_arguments(*rows),
        *log_weights,
        *sizes,
        *map(c.ptr, outputs),
        *options,
    )


def _sums(pairs: Pairs, *shape: int) -> Tensor:
    """A result of that shape."""
    return torch.empty(shape, dtype=accumulation_dtype(pairs.mu.dtype), device=pairs.mu.device)


def cross_log_prob(pairs: Pairs) -> Tensor:
    out = _sums(pairs, *pairs.sizes[:2])
    _of_pairs("cross_log_prob", pairs, (out,), weighted=False)
    return out


def cross_log_prob_backward(grad: Tensor, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]:
    outputs = _outputs(pairs[:3], wanted)
    _of_pairs("cross_log_prob_backward", pairs, outputs, (grad,), weighted=False)
    return _asked(outputs)


def agg_log_prob(pairs: Pairs) -> Tensor:
    joint = _sums(pairs, pairs.z.shape[0])
    _of_pairs("agg_log_prob", pairs, (joint,), options=(exact_skip(otherwise=False),))
    return joint


def agg_log_prob_marginals(pairs: Pairs) -> tuple[Tensor, Tensor]:
    joint, marginals = _sums(pairs, pairs.z.shape[0]), _sums(pairs, *pairs.z.shape)
    _of_pairs("agg_log_prob_marginals", pairs, (joint, marginals))
    return joint, marginals


def _aggregate_backward(
    name: str,
    upstream: Sequence[Tensor | None],
    pairs: Pairs,
    wanted: Sequence[bool],
    again: Sequence[Tensor | None] = (),
    options: Sequence[int] = (),
) -> list[Tensor]:
    """Returns the gradients. `again`: results of the forward that are written before them."""
    outputs = _outputs(pairs.inputs, wanted)
    d_log_w = outputs[3]
    if d_log_w is not None:
        outputs[3] = d_log_w.to(accumulation_dtype(pairs.mu.dtype))
    _of_pairs(name, pairs, (*again, *outputs), upstream, options)
    if d_log_w is not None and outputs[3] is not None:
        outputs[3] = outputs[3].to(d_log_w.dtype)
    return _asked(outputs)


def agg_log_prob_backward(d_joint: Tensor, joint: Tensor | None, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]:
    again = _sums(pairs, pairs.z.shape[0]) if joint is None else None
    options = (exact_skip(otherwise=False),)
    gradients = _aggregate_backward("agg_log_prob_backward", (d_joint,), pairs, wanted, (again,), options)
    return gradients if again is None else [again, *gradients]


def agg_log_prob_marginals_backward(
    upstream: Sequence[Tensor | None],
    joint: Tensor,
    marginals: Tensor,
    pairs: Pairs,
    wanted: Sequence[bool],
) -> list[Tensor]:
    return _aggregate_backward("agg_log_prob_marginals_backward", upstream, pairs, wanted)


def agg_entropy(pairs: Pairs) -> Tensor:
    entropy = _sums(pairs)
    _of_pairs("agg_entropy", pairs, (entropy,), options=(exact_skip(otherwise=False),))
    return entropy


def agg_entropy_backward(d_entropy: Tensor, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]:
    options = (exact_skip(otherwise=False),)
    return _aggregate_backward("agg_entropy_backward", (d_entropy,), pairs, wanted, options=options)


def kl_decomposition(pairs: Pairs) -> list[Tensor]:
    S, _, D = pairs.sizes
    terms = [_sums(pairs, D) if name == "dim_kl" else _sums(pairs) for name in TERMS]
    terms[c.FACTORIZATION].zero_()
    results = [*terms, _sums(pairs, S), _sums(pairs, S, D)]
    _of_pairs("kl_decomposition", pairs, c.without_factorization(results))
    return results


def kl_decomposition_backward(
    upstream: Sequence[Tensor | None],
    joint: Tensor,
    marginals: Tensor,
    pairs: Pairs,
    wanted: Sequence[bool],
) -> list[Tensor]:
    return _aggregate_backward("kl_decomposition_backward", c.without_factorization(upstream), pairs, wanted)
