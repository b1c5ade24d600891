"""Checks of arguments, whose errors name the argument, what was expected and what came; and conversions to common
dtypes and shapes."""

import math
import numbers
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends.contract import accumulation_dtype
from .modes import is_traced

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOST_SAMPLES = 2**40  # more than fit into any memory, few enough for their bytes to be counted in 64 bits


def check_tensor(name: str, x: Any, *, min_ndim: int = 1) -> None:
    """Check for a dense floating-point tensor of at least `min_ndim` axes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    check_dense(name, x)
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim < min_ndim:
        raise ValueError(f"{name}: expected at least {min_ndim} axes, got shape {tuple(x.shape)}")


def check_indices(name: str, x: Any) -> None:
    """Check for a dense int64 tensor."""
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected an int64 tensor, got {got}")
    check_dense(name, x)


def check_dense(name: str, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested one" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def check_values(name: str, x: Tensor) -> None:
    """Check that the tensor has values: one on the meta device has none."""
    if x.is_meta:
        raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {x.device}")


def check_same_shape(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.shape != like.shape:
        raise ValueError(f"{name}: expected the shape of {like_name}, {tuple(like.shape)}, got {tuple(x.shape)}")


def check_posterior(mu: Any, logvar: Any, *, min_ndim: int = 1) -> None:
    """Check that mu and logvar are floating-point tensors of one shape on one device."""
    check_tensor("mu", mu, min_ndim=min_ndim)
    check_tensor("logvar", logvar, min_ndim=min_ndim)
    check_same_shape("logvar", logvar, "mu", mu)
    check_device("logvar", logvar, "mu", mu)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {_shown(value)}")


def check_flag(name: str, value: Any) -> bool:
    """Check for True or False, and return it as a Python bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {_shown(value)}")
    return bool(value)


def check_axis(dim: int, x: Tensor) -> int:
    """Check that x has an axis `dim`, and return its number as a Python int."""
    if isinstance(dim, bool) or not isinstance(dim, numbers.Integral):
        raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim: expected an axis from {-x.ndim} to {x.ndim - 1} of shape {tuple(x.shape)}, got {dim}")
    return int(dim)


# Callers use what these checks return, not the argument: numbers of NumPy, fractions and tensors have an arithmetic of
# their own, which may overflow, change dtypes, or be unknown to later code.


def check_count(name: str, value: Any, *, least: int = 0, most: int = 2**63 - 1) -> int:
    """Check for an integer from `least` to `most`; return a Python int, or the compiler's symbolic one as it is."""
    if isinstance(value, torch.SymInt):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor) and is_traced():
        raise RuntimeError(f"{name}: a size cannot be recorded by torch.jit.trace; expected torch.export.export")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    count = int(value)
    if count < least:
        raise ValueError(f"{name}: expected at least {least}, got {_shown(count)}")
    if count > most:
        raise ValueError(f"{name}: expected at most {most}, got {_shown(count)}")
    return count


def check_seed(name: str, value: Any) -> int:
    """Check for a seed that torch.Generator.manual_seed takes, and return it as a Python int."""
    return check_count(name, value, least=-(2**63), most=2**64 - 1)


def drawn_seed(seed: Any) -> int:
    """The seed, checked; for None one from torch's generator of the CPU, so that `torch.manual_seed` governs."""
    if seed is None:
        return int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    return check_seed("seed", seed)


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    finite: bool = False,
) -> float:
    """Check for a number, not NaN, from `least` to `most` and larger than `above`; return a Python float."""
    if type(value) is float or isinstance(value, (torch.SymFloat, torch.SymInt)):
        number: Any = value
    else:
        if isinstance(value, Tensor) and value.ndim == 0 and not (value.requires_grad or value.is_meta):
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{name}: expected a number that a float can hold, got {_shown(value)}") from None
    # Where there is no bound nothing is compared, as the compiler makes a guard of each comparison.
    inside = number == number and (least == -math.inf or number >= least) and (most == math.inf or number <= most)
    if inside and (above == -math.inf or number > above) and not (finite and abs(number) > sys.float_info.max):
        return number
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound, none in ((">=", least, -math.inf), (">", above, -math.inf), ("<=", most, math.inf))
        if bound != none
    ]
    expected = " ".join(("a finite number" if finite else "a number", " and ".join(bounds))).rstrip()
    raise ValueError(f"{name}: expected {expected}, got {number}")


def _shown(value: Any) -> str:
    """A short repr for a message; of a huge integer only the size, as Python refuses to print too many digits."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def promote(*tensors: Tensor | None) -> list[Tensor | None]:
    """Convert all tensors to the widest of their dtypes."""
    dtypes = {x.dtype for x in tensors if x is not None}
    if len(dtypes) == 1:
        return list(tensors)
    common = dtypes.pop()
    for dtype in dtypes:
        common = torch.promote_types(common, dtype)
    return [None if x is None else x.to(common) for x in tensors]


def accumulated(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert all tensors to their common accumulation dtype. This is done once and early, as what is rounded before it
    is promoted stays rounded, and a gradient that comes back in parts is rounded once for each part."""
    return tuple(x.to(accumulation_dtype(x.dtype)) for x in promote(*tensors) if x is not None)


def as_rows(x: Tensor) -> Tensor:
    """Reshape [..., D] to [B, D]; a vector becomes one row."""
    if x.ndim == 2:
        return x
    return x[None] if x.ndim == 1 else x.flatten(0, -2)
