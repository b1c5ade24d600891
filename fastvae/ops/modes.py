"""What torch is doing while a function is called: who must see its ops, and whether values can be looked at."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _has_storage
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

in_a_transform = _are_functorch_transforms_active  # of torch.func

_PLAIN = (Tensor, torch.nn.Parameter)
_OTHERS = frozenset((type(None), bool, int, float, str, tuple, list))


def seen_by_others() -> bool:
    """Whether the compiler, a function transform or a dispatch mode is active: these must see every call of an op, so
    that calls go through the dispatcher."""
    return is_compiling() or _are_functorch_transforms_active() or is_in_torch_dispatch_mode()


def in_forward_mode() -> bool:
    """Whether tensors may have tangents by `torch.autograd.forward_ad`."""
    return forward_ad._current_level >= 0


def have_tangents(arguments: Sequence[Any]) -> bool:
    """Whether a tensor has a tangent, which takes 5 us to see. Torch has one level of them, which the compiler enters
    without `forward_ad` knowing."""
    if not (in_forward_mode() or in_a_transform()):
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x, level=0).tangent is not None for x in arguments)


def is_traced() -> bool:
    """Whether torch.jit.trace records."""
    return _get_tracing_state() is not None


def is_known(x: Tensor) -> bool:
    """Whether x has values to look at, which no function transform has a hand in, if one is active."""
    return (
        type(x) in _PLAIN
        and x.device.type != "meta"
        and not (is_compiling() or is_in_torch_dispatch_mode() or is_traced() or is_functorch_wrapped_tensor(x))
    )


def has_values(x: Tensor) -> bool:
    """The same where what comes of x is looked at too, and so no function transform may be active."""
    return is_known(x) and not in_a_transform()


def are_ordinary(arguments: Sequence[Any]) -> bool:
    """Whether a backend can read the arguments. It cannot read a tensor of a subclass, a view that is negated when
    read (the imaginary part of a conjugate), or a tensor that stands for zeros or a batch and has no memory."""
    for x in arguments:
        kind = type(x)
        if kind in _PLAIN:
            if x.is_neg() or x._is_zerotensor() or not _has_storage(x):
                return False
        elif kind not in _OTHERS:
            return False
    return True
