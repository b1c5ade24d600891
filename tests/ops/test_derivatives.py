"""Second derivatives, and forward-mode ones, are refused on every route to them, not zero without a word."""

from collections.abc import Callable

import pytest
import torch
from conftest import Target
from support.ops import FUSED, op_named
from torch import Tensor
from torch.autograd import functional

import fastvae

pytestmark = pytest.mark.usefixtures("fresh_compiler")
Loss = Callable[[Tensor], Tensor]


def gradient(loss: Loss, mu: Tensor) -> tuple[Tensor, Tensor]:
    """mu as a leaf, and the gradient with respect to it, with a graph."""
    leaf = mu.clone().requires_grad_()
    return leaf, torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0]


def backward(loss: Loss, mu: Tensor) -> None:
    leaf, g = gradient(loss, mu)
    ((g**2).sum() + leaf.sum()).backward()


def inputs_only(loss: Loss, mu: Tensor) -> None:
    leaf, g = gradient(loss, mu)
    torch.autograd.grad((g**2).sum() + leaf.sum(), leaf)


def twice(loss: Loss, mu: Tensor) -> None:
    torch.func.grad(lambda x: (torch.func.grad(loss)(x) ** 2 + x).sum())(mu)


def compiled(route: Callable[[Loss, Tensor], None]) -> Callable[[Loss, Tensor], None]:
    """The route to a compiled function; "eager", as what the others give is torch's own refusal or silence."""
    return lambda loss, mu: route(torch.compile(loss, backend="eager", fullgraph=True), mu)


ROUTES: dict[str, Callable[[Loss, Tensor], object]] = {
    "backward": backward,
    "grad of inputs": inputs_only,
    "functional.hessian": functional.hessian,
    "functional.hvp": lambda loss, mu: functional.hvp(loss, mu, mu),
    "functional.vhp": lambda loss, mu: functional.vhp(loss, mu, mu),
    "func.grad of func.grad": twice,
    "func.vjp of func.grad": lambda loss, mu: torch.func.vjp(torch.func.grad(loss), mu)[1](mu),
    "func.jvp of func.grad": lambda loss, mu: torch.func.jvp(torch.func.grad(loss), (mu,), (mu,)),
    "func.jvp": lambda loss, mu: torch.func.jvp(loss, (mu,), (mu,)),
    "func.hessian": lambda loss, mu: torch.func.hessian(loss)(mu),
}
COMPILED: dict[str, Callable[[Loss, Tensor], object]] = {
    "backward of compiled": compiled(backward),
    "grad of inputs of compiled": compiled(inputs_only),
    "functional.hessian of compiled": compiled(functional.hessian),
    "compiled func.grad of func.grad": lambda loss, mu: torch.compile(lambda x: twice(loss, x), backend="eager")(mu),
    "compiled func.hessian": lambda loss, mu: torch.compile(torch.func.hessian(loss), backend="eager")(mu),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", FUSED)
def test_refused(backend: Target, name: str, route: str) -> None:
    refused(name, ROUTES[route])


@pytest.mark.parametrize("route", COMPILED)
@pytest.mark.parametrize("name", FUSED)
def test_refused_where_compiled(name: str, route: str) -> None:
    refused(name, COMPILED[route])


def refused(name: str, route: Callable[[Loss, Tensor], object]) -> None:
    op = op_named(name)
    others = {key: x.detach() for key, x in op.inputs.items() if key != "mu"}

    def loss(mu: Tensor) -> Tensor:
        outputs = op.fast(mu=mu, **others)
        return sum((o.sum() for o in ([outputs] if isinstance(outputs, Tensor) else outputs)), mu.new_zeros(()))

    with pytest.raises(RuntimeError, match=r"fastvae offers|making fake tensor call|Batching rule not implemented"):
        route(loss, op.inputs["mu"].detach())


@pytest.mark.parametrize("route", [backward, inputs_only, functional.hessian])
def test_refused_of_a_table(route: Callable[[Loss, Tensor], object]) -> None:
    z, logvar = torch.randn(3000, 2, dtype=torch.float64), torch.zeros(40, 2, dtype=torch.float64)

    def loss(mu: Tensor) -> Tensor:
        return fastvae.agg_log_prob_marginals(z, mu, logvar, method="table")[1].sum()

    with pytest.raises(RuntimeError, match="first derivatives only"):
        route(loss, torch.randn(40, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", FUSED)
def test_a_graph_that_is_not_used_changes_nothing(name: str) -> None:
    """A graph that is not used changes nothing, as where the penalty is on another part of the model."""
    op = op_named(name)
    inputs = list(op.inputs.values())
    outputs = op.fast(**op.inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    upstream = [torch.ones_like(o) for o in outputs]
    plain = torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)
    with_graph = torch.autograd.grad(outputs, inputs, upstream, create_graph=True)
    for a, b in zip(plain, with_graph, strict=True):
        assert torch.equal(a, b.detach())
