"""The Triton kernels, kernels/triton/: on CUDA tensors, or on CPU tensors in Triton's interpreter.

The functions of the kernel contract are found by name, `op` and `op_backward` in the module
`fastvae.kernels.triton.op`, the first time that they are called for; so this module can be imported, and say that it
is not available, where Triton is not. They run on the current stream of their tensors' device, whichever device is
current. Triton's interpreter is slow, and for tests: the whole process is in it, or is not, by whether
`TRITON_INTERPRET=1` was set when Triton was first imported.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import installed
from .settings import WrongSetting

OPS = ("kl_gauss", "sample_gauss", "cross_log_prob", "agg_log_prob", "agg_log_prob_marginals")


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
    from fastvae.kernels.triton import _launch

    return _launch.INTERPRETED


def __getattr__(name: str) -> Callable[..., Any]:
    op = name.removesuffix("_backward")
    if op not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = _on_its_device(getattr(importlib.import_module(f"fastvae.kernels.triton.{op}"), name))
    globals()[name] = function
    return function


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: make that the tensors' own."""

    @functools.wraps(launch)
    def on_device(*arguments: Any) -> Any:
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        if device.type != "cuda":
            if not _interpreting():
                raise RuntimeError(
                    f"backend 'triton' computes on {device.type} tensors only in Triton's interpreter:"
                    " set TRITON_INTERPRET=1 before Triton is imported"
                )
            return launch(*arguments)
        if device.index == torch.cuda.current_device():
            return launch(*arguments)
        with torch.cuda.device(device):
            return launch(*arguments)

    return on_device
