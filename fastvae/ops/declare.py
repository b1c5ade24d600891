"""Declaration of ops: each once with torch.library, with a shape function, an autograd formula and a batching rule, so
that the compiler and function transforms know it as they know torch's own.

Values and first derivatives are the backends'. Every other derivative, forward-mode ones and those of gradients, is
that of the op's `formula`: what the reference computes, in torch's own operations, which torch differentiates.

Eager calls skip the dispatcher, which takes 5 us of the 10 us that a small KL takes: they go straight to the autograd
node, and from there to the backend. Whatever else needs to see a call (the compiler, a transform, a dispatch mode, a
tensor that is not an ordinary one) gets the op.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from ..backends import backend_for, reference
from .batching import Rule, in_autograds_batch, is_in_autograds_batch, one_by_one
from .modes import are_ordinary, have_tangents, in_a_transform, in_forward_mode, is_traced, seen_by_others
from .short import shortened

TEMPORARIES = 40  # of [R, N, D], that a derivative of a backward's formula has at a time

_library = torch.library.Library("fastvae", "DEF")


class Op:
    """An op in the namespace fastvae. A call computes the result, and records what its gradients need, if any.

    `run` has a backend compute it, from tensors without gradients; `compute` does so for usual arguments; `formula`
    computes the same in torch's operations.
    """

    def __init__(
        self,
        schema: str,
        fake: Callable[..., Any],
        compute: Callable[..., Any],
        run: Callable[..., Any],
        formula: Callable[..., Any],
        *tags: torch.Tag,
    ):
        self.name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        self.handle = getattr(torch.ops.fastvae, self.name).default
        self.compute, self.run, self.formula = compute, run, formula
        self.record = self.below_autograd
        self.rule = one_by_one(self.handle)

        def vmapped(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
            return self.rule(info.batch_size, in_dims, *arguments)

        _library.impl(self.name, run, "CompositeExplicitAutograd")  # on every device
        _library.impl(self.name, lambda *arguments: in_autograds_batch(self.rule, *arguments), "Batched")
        torch.library.register_fake(f"fastvae::{self.name}", fake, lib=_library)
        torch.library.register_vmap(f"fastvae::{self.name}", vmapped, lib=_library)

    def __call__(self, *arguments: Any) -> Any:
        if seen_by_others() or in_forward_mode():
            return self.handle(*arguments)
        if is_traced():
            return self.traced(*arguments)
        return self.record(*arguments)

    @functools.cached_property
    def short(self) -> Callable[..., Any]:
        """The call for arguments that `is_usual_call` has passed, of which nothing is asked again."""
        return shortened(self.name, self.function, self.compute)

    def traced(self, *arguments: Any) -> Any:
        """The call for torch.jit.trace, which records ops, but none with lists."""
        if any(isinstance(x, (tuple, list)) for x in arguments):
            raise RuntimeError(f"{self.name}: cannot be recorded by torch.jit.trace; expected torch.export.export")
        return self.handle(*arguments)

    def below_autograd(self, *arguments: Any) -> Any:
        """Compute the results without a graph: by `run` where it can read the arguments, or by the dispatcher."""
        if are_ordinary(arguments) and not seen_by_others():
            return self.run(*arguments)
        with _AutoDispatchBelowAutograd():
            if not in_a_transform():
                return self.handle(*arguments)
            # Transforms outside of this one differentiate this call. A Function's forward has turned that off for all.
            with torch.enable_grad(), _set_fwd_grad_enabled(True):
                return self.handle(*arguments)

    def differentiate(self, function: type[Function]) -> type[Function]:
        """Make a Function, with `setup_context` and `backward` for the op's arguments, the op's derivative."""

        def forward(*arguments: Any) -> Any:
            results = self.below_autograd(*arguments)
            return tuple(results) if isinstance(results, list) else results

        function.forward = staticmethod(forward)  # type: ignore
        lists = str(self.handle._schema.returns[0].type) == "List[Tensor]"

        def autograd(*arguments: Any) -> Any:
            """The op's kernel for autograd, for the dispatcher. Of nested transforms it sees one, and so is to record
            for one: the dispatcher calls it again for each."""
            if have_tangents(arguments):
                return self.formula(*arguments)
            with enable_single_level_autograd_function():
                results = self.record(*arguments)
            return list(results) if lists else results

        # Not Function.apply itself, which binds arguments through `inspect.signature`: 20 us, three times the rest.
        self.record = super(Function, function).apply  # type: ignore[misc]
        self.function = function
        _library.impl(self.name, autograd, "Autograd")
        return function

    def batch(self, rule: Rule) -> Rule:
        """Make `rule` the op's batching rule, as batching.py has them; without one the op is called one by one."""
        self.rule = rule
        return rule


class _Backward(Op):
    """An op that computes gradients, `wanted` being its last argument. Its own gradients are its formula's.

    Its results are what comes before the gradients, and these. Where arguments of the names `rows` have a row for each
    sample, so have what comes before and the gradients of these arguments: the formula then takes a chunk of the rows
    at a time, so that memory stays bounded.
    """

    def __init__(self, inputs: Sequence[str], rows: Sequence[str], *declaration: Any):
        super().__init__(*declaration)
        names = [argument.name for argument in self.handle._schema.arguments]
        self.inputs = [names.index(name) for name in inputs]
        self.rows = {names.index(name) for name in rows}

        @self.differentiate
        class OfFormula(Function):
            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                ctx.tensors = [place for place, x in enumerate(inputs) if isinstance(x, Tensor)]
                ctx.save_for_backward(*(inputs[place] for place in ctx.tensors))
                ctx.arguments = [None if isinstance(x, Tensor) else x for x in inputs]

            @staticmethod
            def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
                arguments = list(ctx.arguments)
                for place, x in zip(ctx.tensors, ctx.saved_tensors, strict=True):
                    arguments[place] = x
                return self.pulled_back(arguments, ctx.needs_input_grad, upstream)

    def __call__(self, *arguments: Any) -> Any:
        if not torch.is_grad_enabled() and not in_forward_mode():
            return self.below_autograd(*arguments)
        if any(is_in_autograds_batch(x) for x in arguments):  # the graph is that of the whole batch's call
            return self.handle(*arguments)
        return super().__call__(*arguments)

    def results(self, arguments: Sequence[Any]) -> list[int]:
        """The places of the arguments whose gradients are results, in order."""
        wanted = zip(self.inputs, arguments[-1], strict=True)
        return [place for place, want in wanted if want and arguments[place] is not None]

    def pulled_back(
        self, arguments: Sequence[Any], wanted: Sequence[bool], upstream: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments that are wanted, from those of the results."""
        places = [place for place, want in enumerate(wanted) if want]
        if not self.rows:
            return placed(_gradients(self.formula, arguments, places, upstream), wanted, len(wanted))
        results = self.results(arguments)
        before = len(upstream) - len(results)
        by_chunk: dict[int, list[Tensor]] = {place: [] for place in places if place in self.rows}
        added_up: dict[int, Tensor] = {}
        z, mu, *_ = (arguments[place] for place in self.inputs)
        for rows in reference.row_chunks(z, mu, TEMPORARIES):
            part = [x[rows] if place in self.rows and x is not None else x for place, x in enumerate(arguments)]
            above = [g[rows] for g in upstream[:before]]
            above += [g[rows] if place in self.rows else g for place, g in zip(results, upstream[before:], strict=True)]
            for place, gradient in zip(places, _gradients(self.formula, part, places, above), strict=True):
                if place in by_chunk:
                    by_chunk[place].append(gradient)
                else:
                    added_up[place] = added_up[place] + gradient if place in added_up else gradient
        whole = [torch.cat(by_chunk[place]) if place in by_chunk else added_up[place] for place in places]
        return placed(whole, wanted, len(wanted))


def _gradients(
    formula: Callable[..., Any], arguments: Sequence[Any], places: Sequence[int], upstream: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The gradients of a formula's results with respect to the arguments at these places."""
    with torch.enable_grad():
        inputs = {place: arguments[place].view_as(arguments[place]) for place in places}
        results = formula(*(inputs.get(place, x) for place, x in enumerate(arguments)))
    pairs = [(result, g) for result, g in zip(results, upstream, strict=True) if result.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs.values()]
    return torch.autograd.grad(
        *([result for result, _ in pairs], list(inputs.values()), [g for _, g in pairs]),
        create_graph=torch.is_grad_enabled(),
        materialize_grads=True,
    )


def declare(
    schema: str,
    fake: Callable[..., Any],
    compute: Callable[..., Any] | None = None,
    formula: Callable[..., Any] | None = None,
    kind: Callable[..., Any] = Op,
) -> Any:
    """Declare the op of a schema in the namespace fastvae; `fake` makes empty results of the right shapes.

    `compute(backend, *arguments)` runs it on the backend of its tensors' device; the default is the backend's
    function of the op's name. `formula(*arguments)` is what all derivatives are of that the op does not declare; the
    default is what the reference computes.
    """
    name = schema.partition("(")[0]
    by = compute or (lambda backend, *arguments: getattr(backend, name)(*arguments))

    def of_usual(*arguments: Any) -> Any:
        return by(backend_for(arguments[0].device), *arguments)

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
        return by(backend_for(first.device), *arguments)

    return kind(schema, fake, of_usual, run, formula or functools.partial(by, reference))


def declare_backward(
    schema: str,
    inputs: Sequence[str],
    compute: Callable[..., Any] | None = None,
    formula: Callable[..., Any] | None = None,
    rows: Sequence[str] = (),
    before: Callable[..., list[Tensor]] = lambda *_: [],
) -> _Backward:
    """Declare an op that computes the gradients of another, and whose own are those of its formula.

    Its last argument says which of `inputs`, which are arguments of the schema, want a gradient; the result has these,
    and what `before` makes room for comes before them. Of the arguments `rows` each row is of one sample, z being the
    first of `inputs` and mu the second.
    """

    def fake(*arguments: Any) -> list[Tensor]:
        return [*before(*arguments), *(torch.empty_like(arguments[place]) for place in op.results(arguments))]

    op: _Backward = declare(schema, fake, compute, formula, functools.partial(_Backward, inputs, rows))
    return op


def declare_random(schema: str, fake: Callable[..., Any], draw: Callable[..., Any]) -> Op:
    """Declare an op that draws from torch's generators: the compiler must not cache, merge or drop its calls."""
    return Op(schema, fake, draw, draw, draw, torch.Tag.nondeterministic_seeded)


def placed(gradients: Sequence[Tensor | None], wanted: Sequence[bool], n_inputs: int) -> tuple[Tensor | None, ...]:
    """One value for each of `n_inputs` places, from the values of the wanted ones, in order; None at the others.

    The places are an op's inputs, and the values their gradients; or the places are its outputs, and the values these
    outputs or their upstream gradients. Places after the end of `wanted` are not wanted.
    """
    remaining = iter(gradients)
    found = [next(remaining) if want else None for want in wanted]
    return (*found, *[None] * (n_inputs - len(found)))
