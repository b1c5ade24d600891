"""Arguments: checks, each raising an error that names the argument, what came and what was expected, and common
dtypes and shapes."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, x: Any, *, min_ndim: int = 1) -> None:
    """A floating-point tensor of at least `min_ndim` axes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim < min_ndim:
        raise ValueError(f"{name}: expected at least {min_ndim} axes, got shape {tuple(x.shape)}")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {x.device}")


def check_same_shape(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.shape != like.shape:
        raise ValueError(f"{name}: expected the shape of {like_name}, {tuple(like.shape)}, got {tuple(x.shape)}")


def check_posterior(mu: Any, logvar: Any, *, min_ndim: int = 1) -> None:
    """mu and logvar: floating-point tensors of one shape on one device."""
    check_tensor("mu", mu, min_ndim=min_ndim)
    check_tensor("logvar", logvar, min_ndim=min_ndim)
    check_same_shape("logvar", logvar, "mu", mu)
    check_device("logvar", logvar, "mu", mu)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: Any, *, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_number(name: str, value: Any, *, least: float = -math.inf) -> None:
    """A number that is not NaN and not below `least`."""
    if type(value) is float and value >= least:
        return
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not value >= least:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number >= {least}, got {value}")


def promote(*tensors: Tensor | None) -> list[Tensor | None]:
    """All in the widest of their dtypes."""
    dtypes = {x.dtype for x in tensors if x is not None}
    if len(dtypes) == 1:
        return list(tensors)
    common = dtypes.pop()
    for dtype in dtypes:
        common = torch.promote_types(common, dtype)
    return [None if x is None else x.to(common) for x in tensors]


def as_rows(x: Tensor) -> Tensor:
    """[..., D] as [B, D]; a vector is one row."""
    if x.ndim == 2:
        return x
    return x[None] if x.ndim == 1 else x.flatten(0, -2)
