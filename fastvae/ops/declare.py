"""Declaration of ops: each once with torch.library, with a shape function and an autograd formula, so that the compiler
and function transforms know it as they know torch's own.

Eager calls skip the dispatcher, which takes 5 us of the 10 us that a small KL takes: they go straight to the autograd
node, and from there to the backend. Whatever else needs to see a call (the compiler, a transform, a dispatch mode, a
tensor that is not an ordinary one) gets the op.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _AutoDispatchBelowAutograd, _has_storage
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..backends import backend_for

_library = torch.library.Library("fastvae", "DEF")


class Op:
    """An op in the namespace fastvae. A call computes the result, and records what its gradients need, if any."""

    def __init__(self, schema: str, fake: Callable[..., Any], run: Callable[..., Any], *tags: torch.Tag):
        self.name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, run, key)
        torch.library.register_fake(f"fastvae::{self.name}", fake, lib=_library)
        self.handle = getattr(torch.ops.fastvae, self.name).default
        self.run = run
        self.record = self.below_autograd

    def __call__(self, *arguments: Any) -> Any:
        return self.handle(*arguments) if seen_by_others() else self.record(*arguments)

    def below_autograd(self, *arguments: Any) -> Any:
        """Compute the results without a graph: by `run` where it can read the arguments, or by the dispatcher."""
        if _ordinary(arguments) and not seen_by_others():
            return self.run(*arguments)
        with _AutoDispatchBelowAutograd():
            if not _are_functorch_transforms_active():
                return self.handle(*arguments)
            with torch.enable_grad(), _set_fwd_grad_enabled(True):  # for the levels below: a Function turns it off
                return self.handle(*arguments)

    def differentiate(self, formula: type[Function]) -> type[Function]:
        """Make a Function, with `setup_context` and `backward` for the op's arguments, the op's autograd formula."""

        def forward(*arguments: Any) -> Any:
            results = self.below_autograd(*arguments)
            return tuple(results) if isinstance(results, list) else results

        def jvp(*arguments: Any) -> Any:
            raise RuntimeError(
                f"fastvae offers reverse-mode derivatives only: {self.name} was asked for forward-mode ones"
            )

        formula.forward, formula.jvp = staticmethod(forward), staticmethod(jvp)  # type: ignore
        lists = str(self.handle._schema.returns[0].type) == "List[Tensor]"

        def at_one_level(*arguments: Any) -> Any:  # of function transforms: the dispatcher tracks levels
            with enable_single_level_autograd_function():
                results = self.record(*arguments)
            return list(results) if lists else results

        # Not Function.apply itself, which binds arguments through `inspect.signature`: 20 us, three times the rest.
        self.record = super(Function, formula).apply  # type: ignore[misc]
        _library.impl(self.name, at_one_level, "Autograd")
        return formula


class _Backward(Op):
    """An op that computes gradients. Its own autograd formula raises, so that a second derivative is an error on every
    route, not a silent zero."""

    def __init__(self, schema: str, fake: Callable[..., Any], run: Callable[..., Any]):
        super().__init__(schema, fake, run)

        @self.differentiate
        class FirstOrderOnly(Function):
            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                pass

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
                raise RuntimeError("fastvae offers first derivatives only: a gradient of its gradients was asked for")

    def __call__(self, *arguments: Any) -> Any:
        return super().__call__(*arguments) if torch.is_grad_enabled() else self.below_autograd(*arguments)


def declare(schema: str, fake: Callable[..., Any], compute: Callable[..., Any] | None = None, kind: Any = Op) -> Op:
    """Declare the op of a schema in the namespace fastvae; `fake` makes empty results of the right shapes.

    `compute(backend, *arguments)` runs it on the backend of its tensors' device; the default is the backend's
    function of the op's name.
    """
    name = schema.partition("(")[0]

    def run(*arguments: Any) -> Any:
        first, empty = None, False
        for x in arguments:
            if isinstance(x, Tensor):
                first = x if first is None else first
                empty = empty or x.numel() == 0
        if empty:  # it may still have 2^40 rows, of no dimensions
            nothing = fake(*arguments)
            if not any(x.numel() for x in ([nothing] if isinstance(nothing, Tensor) else nothing)):
                return nothing
        assert first is not None
        backend = backend_for(first.device)
        return compute(backend, *arguments) if compute else getattr(backend, name)(*arguments)

    return kind(schema, fake, run)


def declare_backward(
    schema: str,
    inputs: tuple[str, ...],
    compute: Callable[..., Any] | None = None,
    before: Callable[..., list[Tensor]] = lambda *_: [],
) -> Op:
    """Declare an op that computes the gradients of another, and has none itself.

    Its last argument says which of `inputs`, which are arguments of the schema, want a gradient; the result has these,
    and what `before` makes room for comes before them.
    """
    names = [argument.split()[-1] for argument in schema.partition("(")[2].partition(")")[0].split(",")]
    places = [names.index(name) for name in inputs]

    def fake(*arguments: Any) -> list[Tensor]:
        found = [arguments[place] for place, want in zip(places, arguments[-1], strict=True) if want]
        return [*before(*arguments), *(torch.empty_like(x) for x in found if x is not None)]

    return declare(schema, fake, compute, _Backward)


def declare_random(schema: str, fake: Callable[..., Any], draw: Callable[..., Any]) -> Op:
    """Declare an op that draws from torch's generators: the compiler must not cache, merge or drop its calls."""
    return Op(schema, fake, draw, torch.Tag.nondeterministic_seeded)


def seen_by_others() -> bool:
    """Whether the compiler, a function transform or a dispatch mode is active: these must see every call of an op, so
    that calls go through the dispatcher."""
    return is_compiling() or _are_functorch_transforms_active() or is_in_torch_dispatch_mode()


def has_values(x: Tensor) -> bool:
    """Whether x has values to look at: not under the compiler, in a function transform, or where it is a fake."""
    return type(x) in _PLAIN and x.device.type != "meta" and not seen_by_others()


_PLAIN = (Tensor, torch.nn.Parameter)
_OTHERS = frozenset((type(None), bool, int, float, str, tuple, list))


def _ordinary(arguments: Sequence[Any]) -> bool:
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


def placed(gradients: Sequence[Tensor | None], wanted: Sequence[bool], n_inputs: int) -> tuple[Tensor | None, ...]:
    """One value for each of `n_inputs` places, from the values of the wanted ones, in order; None at the others.

    The places are an op's inputs, and the values their gradients; or the places are its outputs, and the values these
    outputs or their upstream gradients. Places after the end of `wanted` are not wanted.
    """
    remaining = iter(gradients)
    found = [next(remaining) if want else None for want in wanted]
    return (*found, *[None] * (n_inputs - len(found)))
