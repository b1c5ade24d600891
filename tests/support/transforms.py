"""Torch's transforms, its compiler and its exporters: each from a function of tensors to a tensor or several, and these
tensors, to whatever it gives. The names are those of docs/transforms.md."""

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, func
from torch.autograd import forward_ad, functional
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from .helpers import tensors

Function = Callable[..., Any]
Transform = Callable[..., Any]


def of_tensors(f: Callable[..., Any], names: list[str]) -> Function:
    """A function of named tensors, as one of tensors in the order of these names."""
    return lambda *x: f(**dict(zip(names, x, strict=True)))


def outputs(f: Function, *x: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensors(f(*x)))


def loss_of(f: Function) -> Function:
    return lambda *x: sum(output.sin().sum() for output in outputs(f, *x))


def leaves(x: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in x]


def every(x: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(x)))


def stacked(x: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.stack([t, t.flip(0), t / 2]) for t in x]


def tuples(f: Function) -> Function:
    return lambda *x: outputs(f, *x)


def nth_derivative(f: Function, x: tuple[Tensor, ...], n: int) -> Any:
    x = tuple(leaves(x))
    value = loss_of(f)(*x)
    for _ in range(n):
        gradients = torch.autograd.grad(value, x, create_graph=True)
        value = sum((g**2).sum() for g in gradients)
    return gradients


def batched_gradients(f: Function, *x: Tensor) -> Any:
    x = tuple(leaves(x))
    first = outputs(f, *x)[0]
    upstream = torch.stack([torch.ones_like(first), first.detach()])
    return torch.autograd.grad(first, x, upstream, is_grads_batched=True)


def batched_gradients_with_a_graph(f: Function, *x: Tensor) -> Any:
    x = tuple(leaves(x))
    first = outputs(f, *x)[0].square()
    upstream = torch.stack([torch.ones_like(first), first.detach()])
    gradients = torch.autograd.grad(first, x, upstream, is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(torch.stack([(g**2).sum() for g in gradients]).sum(), x)


def jacobian_of_jacobian(f: Function, *x: Tensor) -> Any:
    def inner(*x: Tensor) -> tuple[Tensor, ...]:
        return functional.jacobian(
            lambda *x: outputs(f, *x)[0].flatten()[:3].square(), x, vectorize=True, create_graph=True
        )

    return functional.jacobian(inner, x, vectorize=True)


def tangents(f: Function, *x: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.cos()) for t in x]
        return [forward_ad.unpack_dual(output).tangent for output in outputs(f, *duals)]


def tangents_of_gradients(f: Function, *x: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.detach().cos()) for t in leaves(x)]
        return [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(loss_of(f)(*duals), duals)]


def gradients_of_tangents(f: Function, *x: Tensor) -> Any:
    x = tuple(leaves(x))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.detach().cos()) for t in x]
        return torch.autograd.grad(forward_ad.unpack_dual(loss_of(f)(*duals)).tangent, x)


def with_hooks(f: Function, *x: Tensor) -> Any:
    with save_on_cpu():
        return nth_derivative(f, x, 2)


def derivative_in_a_checkpoint(f: Function, *x: Tensor) -> Any:
    def penalty(*x: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss_of(f)(*x), x, create_graph=True)
        return torch.stack([(g**2).sum() for g in gradients]).sum()

    leaf = tuple(leaves(x))
    return torch.autograd.grad(checkpoint(penalty, *leaf, use_reentrant=False), leaf)


def checkpointed(f: Function, *x: Tensor) -> Any:
    x = tuple(leaves(x))
    return torch.autograd.grad(checkpoint(loss_of(f), *x, use_reentrant=False), x)


def linearized(f: Function, *x: Tensor) -> Any:
    return func.linearize(tuples(f), *x)[1](*x)


def vmap_one_by_one(f: Function, *x: Tensor) -> list[Any]:
    """Each argument alone in a batch, whose axis is the last."""
    batches = stacked(x)
    found = []
    for n in range(len(x)):
        arguments = [batches[i].movedim(0, -1) if i == n else t for i, t in enumerate(x)]
        found.append(func.vmap(tuples(f), in_dims=tuple(-1 if i == n else None for i in range(len(x))))(*arguments))
    return found


def vmap_twice(f: Function, *x: Tensor) -> Any:
    """The first argument in one batch, the others in another."""
    first, *others = stacked(x)
    inner = func.vmap(tuples(f), in_dims=(0, *[None] * len(others)))
    return func.vmap(inner, in_dims=(None, *[0] * len(others)))(first, *others)


def second_derivative_of_vmap(f: Function, *x: Tensor) -> Any:
    return nth_derivative(func.vmap(tuples(f)), tuple(stacked(x)), 2)


def gradient(f: Function) -> Function:
    return lambda *x: func.grad(loss_of(f), argnums=every(x))(*x)


def gradient_of_gradient(f: Function) -> Function:
    return lambda *x: func.grad(lambda *x: sum((g**2).sum() for g in gradient(f)(*x)), argnums=every(x))(*x)


EAGER: dict[str, Transform] = {
    "backward(create_graph=True), then backward()": lambda f, *x: nth_derivative(f, x, 2),
    "the same, a third time": lambda f, *x: nth_derivative(f, x, 3),
    "autograd.grad(is_grads_batched=True)": batched_gradients,
    "autograd.grad(is_grads_batched=True, create_graph=True), then backward()": batched_gradients_with_a_graph,
    "autograd.forward_ad": tangents,
    "autograd.forward_ad of autograd.grad": tangents_of_gradients,
    "autograd.grad of autograd.forward_ad": gradients_of_tangents,
    "autograd.functional.jvp": lambda f, *x: functional.jvp(tuples(f), x, x),
    "autograd.functional.jacobian": lambda f, *x: functional.jacobian(tuples(f), x),
    "autograd.functional.jacobian(vectorize=True)": lambda f, *x: functional.jacobian(tuples(f), x, vectorize=True),
    'the same with strategy="forward-mode"': lambda f, *x: functional.jacobian(
        tuples(f), x, vectorize=True, strategy="forward-mode"
    ),
    "autograd.functional.jacobian(vectorize=True) of itself": jacobian_of_jacobian,
    "autograd.functional.hvp": lambda f, *x: functional.hvp(loss_of(f), x, x),
    "autograd.functional.vhp": lambda f, *x: functional.vhp(loss_of(f), x, x),
    "autograd.functional.hessian": lambda f, *x: functional.hessian(loss_of(f), x),
    "autograd.functional.hessian(vectorize=True)": lambda f, *x: functional.hessian(loss_of(f), x, vectorize=True),
    "utils.checkpoint": checkpointed,
    "utils.checkpoint of autograd.grad(create_graph=True)": derivative_in_a_checkpoint,
    "the same as the first, within autograd.graph.save_on_cpu": with_hooks,
    "func.grad": lambda f, *x: gradient(f)(*x),
    "func.grad of func.grad": lambda f, *x: gradient_of_gradient(f)(*x),
    "func.vjp": lambda f, *x: func.vjp(loss_of(f), *x)[1](x[0].new_ones(())),
    "func.jvp": lambda f, *x: func.jvp(tuples(f), x, x),
    "func.linearize": linearized,
    "func.jacrev": lambda f, *x: func.jacrev(tuples(f), argnums=every(x))(*x),
    "func.jacfwd": lambda f, *x: func.jacfwd(tuples(f), argnums=every(x))(*x),
    "func.hessian": lambda f, *x: func.hessian(loss_of(f), argnums=every(x))(*x),
    "func.jacrev of func.jacfwd": lambda f, *x: func.jacrev(func.jacfwd(loss_of(f)))(*x),
    "func.jacfwd of func.jacfwd": lambda f, *x: func.jacfwd(func.jacfwd(loss_of(f)))(*x),
    "func.vmap": lambda f, *x: func.vmap(tuples(f))(*stacked(x)),
    "func.vmap over one argument": vmap_one_by_one,
    "func.vmap of func.vmap": vmap_twice,
    "func.vmap of func.grad": lambda f, *x: func.vmap(gradient(f))(*stacked(x)),
    "func.vmap of func.hessian": lambda f, *x: func.vmap(func.hessian(loss_of(f)))(*stacked(x)),
    "func.grad of func.vmap": lambda f, *x: gradient(func.vmap(tuples(f)))(*stacked(x)),
    "backward() twice through func.vmap": second_derivative_of_vmap,
}


Compiler = Callable[[Function], Function]
COMPILED: dict[str, Callable[..., Any]] = {  # of a compiler, a function and tensors
    "torch.compile": lambda c, f, *x: c(f)(*x),
    "torch.compile of func.grad": lambda c, f, *x: c(gradient(f))(*x),
    "torch.compile of func.grad of func.grad": lambda c, f, *x: c(gradient_of_gradient(f))(*x),
    "torch.compile of func.jvp": lambda c, f, *x: c(lambda *x: func.jvp(loss_of(f), x, x))(*x),
    "torch.compile of func.jacrev": lambda c, f, *x: c(func.jacrev(loss_of(f)))(*x),
    "torch.compile of func.hessian": lambda c, f, *x: c(func.hessian(loss_of(f)))(*x),
    "torch.compile of func.vmap": lambda c, f, *x: c(func.vmap(tuples(f)))(*stacked(x)),
    "torch.compile of func.vmap of func.grad": lambda c, f, *x: c(func.vmap(gradient(f)))(*stacked(x)),
    "backward() twice through torch.compile": lambda c, f, *x: nth_derivative(c(f), x, 2),
}


class Module(torch.nn.Module):
    def __init__(self, f: Function):
        super().__init__()
        self.f = f

    def forward(self, *x: Tensor) -> Any:
        return outputs(self.f, *x)


def exported(f: Function, *x: Tensor) -> Any:
    """Exported, saved, loaded and called."""
    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(f), x), file)
    file.seek(0)
    return torch.export.load(file).module()(*x)


def traced(f: Function, *x: Tensor) -> Any:
    """Traced at other values, saved, loaded and called."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Module(f), tuple(t / 2 for t in x), check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)(*x)


EXPORTED: dict[str, Transform] = {
    "torch.export.export, saved and loaded": exported,
    "torch.jit.trace, saved and loaded": traced,
}
