"""How an op is declared: once with torch.library, so that it is opaque but legal to the compiler.

The autograd Functions stand outside and call these ops, which is faster than giving the ops autograd formulas
of their own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..backends import backend_for

_library = torch.library.Library("fastvae", "DEF")


def declare(schema: str, fake: Callable[..., Any], compute: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Define `schema` in the namespace fastvae, and return the function that calls it; `fake` gives its results'
    shapes.

    `compute(backend, *arguments)` runs it on the backend of its tensors' device; by default that calls the
    backend's function of the op's name.
    """
    name = schema.partition("(")[0]

    def run(*arguments: Any) -> Any:
        for first in arguments:
            if first is not None:  # a tensor, by the schemas
                break
        backend = backend_for(first.device)
        return compute(backend, *arguments) if compute else getattr(backend, name)(*arguments)

    return _past_the_dispatcher(run, _define(schema, fake, run))


def declare_random(schema: str, fake: Callable[..., Any], draw: Callable[..., Any]) -> Callable[..., Any]:
    """Define an op that draws from torch's generators: not to be cached, merged or dropped by the compiler."""
    return _past_the_dispatcher(draw, _define(schema, fake, draw, torch.Tag.nondeterministic_seeded))


def _past_the_dispatcher(run: Callable[..., Any], op: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `run` where nobody else needs to see the call, else the op: the dispatcher takes 5 us of the 10 us that a
    small KL takes. Such a call's Python counts, so the questions are asked in one place."""

    def call(*arguments: Any) -> Any:
        ordinary = _ORDINARY.issuperset(map(type, arguments))
        if ordinary and not (_are_functorch_transforms_active() or is_in_torch_dispatch_mode() or is_compiling()):
            return run(*arguments)
        return op(*arguments)

    return call


def seen_by_others(x: Tensor) -> bool:
    """Whether x may have no values to look at: under the compiler, in a function transform, as a fake tensor."""
    others = is_compiling() or _are_functorch_transforms_active() or is_in_torch_dispatch_mode()
    return others or type(x) not in _ORDINARY


_ORDINARY = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, tuple, list))


def _define(schema: str, fake: Callable[..., Any], run: Callable[..., Any], *tags: torch.Tag) -> Any:
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"fastvae::{name}", fake, lib=_library)
    return getattr(torch.ops.fastvae, name).default


class Function(torch.autograd.Function):
    """An autograd Function to be run by `call`, whose eager calls skip the argument binding that `apply` does for
    `setup_context` through `inspect.signature`: 20 us, three times the rest. Positional arguments only."""

    @classmethod
    def call(cls, *args: Any) -> Any:
        if not (is_compiling() or _are_functorch_transforms_active()):
            return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
        distinct: list[Any] = []  # the compiler takes no tensor twice
        for x in args:
            again = isinstance(x, Tensor) and any(x is y for y in distinct)
            distinct.append(x.view_as(x) if again else x)
        return cls.apply(*distinct)


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("fastvae offers first derivatives only: a gradient of its gradients was asked for")


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """For a Function's backward that has no derivative of its own: asking for one raises. torch's decorator of this
    name stays silent, and gives zero, where the upstream gradient is a constant."""

    @functools.wraps(backward)
    def first_order(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled() or is_compiling() or _are_functorch_transforms_active():
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        given = [g.detach().requires_grad_() for g in gradients if g is not None]
        refusing = iter(_FirstOrderOnly.apply(*given) if given else ())
        return tuple(None if g is None else next(refusing) for g in gradients)

    return first_order


def empty_gradients(inputs: tuple[Tensor | None, ...], wanted: list[bool]) -> list[Tensor]:
    """The fake result of a backward op: a gradient for each input that wants one."""
    return [torch.empty_like(x) for x, want in zip(inputs, wanted, strict=True) if want and x is not None]


def spread(gradients: Sequence[Tensor | None], wanted: Sequence[bool], n_inputs: int) -> tuple[Tensor | None, ...]:
    """What an op returned, at the places of those that were wanted; None elsewhere."""
    remaining = iter(gradients)
    found = [next(remaining) if want else None for want in wanted]
    return (*found, *[None] * (n_inputs - len(found)))
