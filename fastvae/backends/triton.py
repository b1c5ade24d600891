"""The Triton kernels, kernels/triton/: on CUDA tensors, or on CPU tensors in Triton's interpreter.

The functions of the kernel contract are made of the launchers `op` and `op_backward` in `fastvae.kernels.triton.op` the
first time that they are called for; so this module can be imported, and say that it is not available, where Triton is
not. They tell the launchers what is set, and run on the current stream of their tensors' device, whichever device is
current. Triton's interpreter is slow, and for tests: the whole process is in it, or is not, by whether
`TRITON_INTERPRET=1` was set when Triton was first imported.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import installed, settings
from .contract import COMPOSITIONS, OPS, Pairs, kl_scale, kl_shape
from .settings import WrongSetting, exact_skip, switch


@functools.cache
def status() -> tuple[bool, str]:
    """Whether Triton can launch here; what it runs on, or why not."""
    try:
        import triton
    except Exception as error:  # in whatever way it is broken
        return False, f"Triton cannot be imported: {error}"
    try:
        interpreting = _interpreting()
    except WrongSetting:
        raise
    except Exception as error:  # another version of Triton, or no kernels
        why = f"{type(error).__name__}: {error}"
        return False, f"the kernels of {installed.PACKAGE} cannot be imported with Triton {triton.__version__}: {why}"
    if interpreting:
        return True, f"Triton {triton.__version__}, in its interpreter (TRITON_INTERPRET=1), CPU tensors too"
    if not torch.cuda.is_available():
        return False, f"Triton {triton.__version__} is here, but no GPU that torch can use"
    return True, f"Triton {triton.__version__}, {torch.cuda.get_device_name()}"


@functools.cache
def _interpreting() -> bool:
    """Whether kernels run in the interpreter; the first call sets up what the launchers share."""
    from fastvae.kernels.triton import _launch

    _launch.AUTOTUNE = bool(switch("FASTVAE_AUTOTUNE")) and not _launch.INTERPRETED
    return _launch.INTERPRETED


def __getattr__(name: str) -> Callable[..., Any]:
    if name.removesuffix("_backward") not in (*OPS, *COMPOSITIONS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = _on_its_device(on_current_device(name))
    globals()[name] = function
    return function


def on_current_device(name: str) -> Callable[..., Any]:
    """The contract's function of that name, for tensors of the current device or, to compile its kernels, meta ones."""
    _interpreting()
    launch = getattr(importlib.import_module(f"fastvae.kernels.triton.{name.removesuffix('_backward')}"), name)
    further = _FURTHER.get(name)
    if further is None:
        return launch

    @functools.wraps(launch)
    def with_settings(*arguments: Any) -> Any:
        return launch(*arguments, *further(*arguments))

    return with_settings


# What some launchers take after the contract's arguments, from those and from what is set.


def _of_kl_gauss(mu: Tensor, logvar: Any, prior_mu: Any, prior_logvar: Any, reduction: str) -> tuple[Any, ...]:
    B, D = mu.shape
    return kl_shape(reduction, B, D), kl_scale(reduction, B, D)


def _of_kl_gauss_backward(
    grad: Any, mu: Tensor, logvar: Any, prior_mu: Any, prior_logvar: Any, reduction: str, wanted: Any
) -> tuple[float]:
    return (kl_scale(reduction, *mu.shape),)


def _of_sample_gauss(mu: Tensor, logvar: Any, seed: Any, n_samples: Any, outputs: Any, reduction: str) -> tuple[float]:
    return (kl_scale(reduction, *mu.shape),)


def _of_sample_gauss_backward(
    upstream: Any, mu: Tensor, logvar: Any, seed: Any, eps: Any, n_samples: Any, reduction: str, wanted: Any
) -> tuple[float]:
    return (kl_scale(reduction, *mu.shape),)


def _of_joint(*_: Any) -> tuple[bool, bool]:
    return exact_skip(otherwise=False), settings.current.precision == "tf32x3"


def _of_marginals_backward(*_: Any) -> tuple[bool]:
    return (exact_skip(otherwise=False),)


_FURTHER: dict[str, Callable[..., tuple[Any, ...]]] = {
    "kl_gauss": _of_kl_gauss,
    "kl_gauss_backward": _of_kl_gauss_backward,
    "sample_gauss": _of_sample_gauss,
    "sample_gauss_backward": _of_sample_gauss_backward,
    "agg_log_prob": _of_joint,
    "agg_log_prob_backward": _of_joint,
    "agg_log_prob_marginals_backward": _of_marginals_backward,
    "agg_entropy": _of_joint,
    "agg_entropy_backward": _of_joint,
    "kl_decomposition_backward": _of_marginals_backward,
}


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its tensors' device made the current one, on which Triton launches."""
    from fastvae.kernels.triton._replay import replay

    @functools.wraps(launch)
    def on_device(*arguments: Any) -> Any:
        first = next(x for x in arguments if isinstance(x, (Tensor, Pairs)))
        device = first.device if isinstance(first, Tensor) else first.z.device
        if device.type != "cuda":
            if not _interpreting():
                raise RuntimeError(
                    f"backend 'triton' computes on {device.type} tensors only in Triton's interpreter:"
                    " set TRITON_INTERPRET=1 before Triton is imported"
                )
            return launch(*arguments)
        if device.index == torch.cuda.current_device():
            return replay(launch, settings.current, *arguments)
        with torch.cuda.device(device):
            return replay(launch, settings.current, *arguments)

    return on_device
