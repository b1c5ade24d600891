"""The short way of usual calls, small ones above all, in which the kernels take a tenth of the time.

A usual call has its autograd Function computed without being asked anything again; and where the extension module
`fastvae._calls` was built (kernels/python/calls.c), forward and backward are in C. Functions there call those in Python
where something is unusual after all, an upstream gradient for one.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction

from ..backends import installed, interruption, native_library, settings
from ..backends.c_interface import INTERFACE
from .modes import are_ordinary, in_forward_mode, is_traced, seen_by_others

_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float64)


def is_usual_call(*tensors: Any) -> bool:
    """Whether a call of these tensors may take the short way: it is an eager one that nobody else has to see, and they
    are [n, D], of one shape, dtype and device, float32 or float64, not empty, and such that a backend can read them."""
    return not (seen_by_others() or in_forward_mode() or is_traced()) and _are_usual(*tensors)


def _are_usual_by_python(*tensors: Any) -> bool:
    first = tensors[0]
    for x in tensors:
        if type(x) not in _PLAIN or x.is_nested or x.layout is not torch.strided:
            return False
        if x.shape != first.shape or x.dtype is not first.dtype or x.device != first.device:
            return False
    if first.ndim != 2 or first.numel() == 0 or first.dtype not in _DTYPES:
        return False
    return are_ordinary(tensors)


_are_usual = _are_usual_by_python  # until the extension module is there


def shortened(name: str, function: type[Function], compute: Callable[..., Any]) -> Callable[..., Any]:
    """The apply of an op's Function for usual calls, which `compute` computes."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        results = compute(*arguments)
        results = tuple(results) if isinstance(results, list) else results
        function.setup_context(ctx, arguments, results)
        return results

    members = {
        "forward": staticmethod(_in_c(name, forward)),
        "backward": staticmethod(_in_c(f"{name}_backward", function.backward)),
        "setup_context": _SingleLevelFunction.setup_context,  # none: forward sees to it
    }
    # Not Function.apply itself, which binds arguments through `inspect.signature`: 20 us, three times the rest.
    return super(Function, type(f"Short{function.__name__}", (function,), members)).apply  # type: ignore[misc]


def _in_c(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in C that does what one in Python does; that one where there is none."""
    calls = module()
    return function if isinstance(calls, str) else calls.bind(name, function) or function


@functools.cache
def module() -> ModuleType | str:
    """The extension module, set up; or the reason why there is none."""
    global _are_usual
    settings.switch("FASTVAE_EXACT_SKIP")  # a wrong one is said at the first call
    if settings.switch("FASTVAE_CALLS") is False:
        return "FASTVAE_CALLS=0"
    if native_library.missing():
        return native_library.missing()
    path = installed.find("_calls.abi3.so")
    if path is None:
        return "it was not built, for which Python's headers are needed"
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return f"torch {torch.__version__} has no DLPack exchange API"
    try:
        loader = ExtensionFileLoader("fastvae._calls", str(path))
        calls: Any = importlib.util.module_from_spec(ModuleSpec(loader.name, loader, origin=loader.path))
    except ImportError as error:
        return f"{path}: {error}"
    calls.__file__ = str(path)
    if calls.interface != INTERFACE:
        return f"{path} is of another revision"
    calls.configure(
        *(capsule, *_PLAIN, settings, torch.empty_like, torch.get_num_threads),
        *(settings.exact_skip, _is_quiet, _settle),
    )
    native_library.when_chosen(lambda tables: calls.use(*map(ctypes.addressof, tables)))
    _are_usual = calls.are_usual
    return calls


def unpacked(ctx: Any) -> tuple[Tensor, ...]:
    """ctx.saved_tensors, which may be asked for once; the function in C has done so where it asks one in Python."""
    saved = ctx.__dict__.pop("unpacked", None)
    return ctx.saved_tensors if saved is None else saved


def _settle(status: int) -> None:
    """As `native` does after a kernel with this status."""
    try:
        interruption.settle(status)
    except BaseException:
        interruption.forget()
        raise


def _is_quiet() -> bool:
    """Whether a backward is only to compute gradients."""
    return not (torch.is_grad_enabled() or in_forward_mode() or seen_by_others())
