"""Second derivatives, forward-mode ones and gradients in batches: numerically, in half precision, at the borders, in
bounded memory. test_transforms.py has the ways to ask for them."""

import subprocess
import sys
from collections.abc import Callable, Iterable

import pytest
import torch
from conftest import Target
from support.helpers import HALVES, draw, normals
from support.host_simt import ROOT
from support.ops import FUSED, OPS, op_named
from support.transforms import of_tensors, outputs, tuples
from torch import Tensor
from torch.autograd import functional, gradcheck, gradgradcheck

import fastvae


def total(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([x.sum() for x in tensors]).sum()


@pytest.mark.parametrize("name", OPS)
def test_gradcheck_of_all_kinds(backend: Target, name: str) -> None:
    op = op_named(name, torch.float64, 3, 2, 2)
    inputs = list(op.inputs.values())

    fast = of_tensors(op.fast, list(op.inputs))
    kinds = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(fast, inputs, fast_mode=backend.slow, **kinds)
    assert gradgradcheck(fast, inputs, fast_mode=backend.slow, check_batched_grad=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", FUSED)
def test_a_graph_that_is_not_used_changes_nothing(backend: Target, name: str) -> None:
    """A graph that is not used changes nothing, as where the penalty is on another part of the model."""
    op = op_named(name)
    inputs = list(op.inputs.values())
    results = outputs(of_tensors(op.fast, list(op.inputs)), *inputs)
    upstream = [torch.ones_like(r) for r in results]
    plain = torch.autograd.grad(results, inputs, upstream, retain_graph=True)
    with_graph = torch.autograd.grad(results, inputs, upstream, create_graph=True)
    for a, b in zip(plain, with_graph, strict=True):
        assert torch.equal(a, b.detach())


def second(f: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(total(g.double() ** 2 for g in gradients), leaves)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_draws_the_noise_again(backend: Target, dtype: torch.dtype) -> None:
    """Far from the origin nothing of the noise is left in z, and (z - mu) / sigma is none."""
    mu, logvar = (300 + draw(4, 3, seed=1)).to(dtype), (draw(4, 3, seed=2) - 3).to(dtype)
    upstream = draw(2, 4, 3, seed=3)
    eps = normals(2, 4, 3, dtype=torch.float64, seed=7)
    found = second(lambda m, v: (fastvae.reparameterize(m, v, 2, seed=7).double() * upstream).sum(), mu, logvar)
    # d/dlogvar of (sum eps sigma g / 2)^2, g being upstream in the dtype of z
    g, sigma = upstream.to(dtype).double(), torch.exp(0.5 * logvar.double())
    expected = 2 * (0.5 * sigma * (g * eps).sum(0)) ** 2 * 0.5
    assert not found[0].any()
    assert found[1].dtype == dtype
    torch.testing.assert_close(found[1].double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("name", FUSED)
def test_float32(backend: Target, name: str) -> None:
    op = op_named(name, torch.float32)

    def loss(f: Callable[..., object]) -> Callable[..., Tensor]:
        of = of_tensors(f, list(op.inputs))
        return lambda *x: total(o.double().square().log1p() for o in outputs(of, *x))

    found = second(loss(op.fast), *op.inputs.values())
    expected = second(loss(op.formula), *(x.detach().double() for x in op.inputs.values()))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6 * float(b.abs().max()))


def test_where_the_posterior_is_the_prior(backend: Target) -> None:
    """Where gradients are 0 their derivatives are not: those of the KL are 1 / prior_sigma^2 and 1/2."""
    zeros, logvar = torch.zeros(2, 3, dtype=torch.float64), torch.full((2, 3), 0.5, dtype=torch.float64)

    def kl(mu: Tensor, logvar: Tensor) -> Tensor:
        return fastvae.kl_gauss(mu, logvar, None, torch.full((3,), 0.5, dtype=torch.float64), reduction="sum")

    (d_mu_mu, mixed), (_, d_logvar_logvar) = functional.hessian(kl, (zeros, logvar))
    torch.testing.assert_close(d_mu_mu.reshape(6, 6), torch.eye(6, dtype=torch.float64) * torch.tensor(-0.5).exp())
    torch.testing.assert_close(d_logvar_logvar.reshape(6, 6), torch.eye(6, dtype=torch.float64) / 2)
    assert not mixed.any()


@pytest.mark.parametrize("name", FUSED)
def test_upstream_gradients_of_zero_have_derivatives(backend: Target, name: str) -> None:
    """`functional.jvp` goes backward twice, at first from zeros."""
    op = op_named(name)
    x = tuple(t.detach() for t in op.inputs.values())

    found = functional.jvp(tuples(of_tensors(op.fast, list(op.inputs))), x, x)[1]
    expected = torch.func.jvp(tuples(of_tensors(op.formula, list(op.inputs))), x, x)[1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [fastvae.agg_log_prob, lambda *x, **w: fastvae.agg_log_prob_marginals(*x, **w)[1]])
def test_rows_whose_weights_are_all_zero(backend: Target, function: Callable[..., Tensor]) -> None:
    z, mu, logvar = (draw(n, 2, seed=n) for n in (3, 1, 1))
    # The first sample has its own column alone, of weight 0.
    own = torch.tensor([0, -1, -1])

    def loss(*x: Tensor) -> Tensor:
        log_q = function(*x, weights=fastvae.ColumnWeights(torch.zeros(1, dtype=torch.float64), own, -torch.inf))
        return log_q.where(log_q > -torch.inf, 0).square().sum()

    for gradient in second(loss, z, mu, logvar):
        assert gradient.isfinite().all()
    assert not second(loss, z, mu, logvar)[0][0].any()
    for hessian in torch.func.hessian(loss)(z, mu, logvar), functional.hessian(lambda z: loss(z, mu, logvar), z):
        assert hessian.isfinite().all()
        assert hessian[1:, :, 1:].any()


@pytest.mark.parametrize("name", FUSED)
def test_extremes_are_finite(backend: Target, name: str) -> None:
    op = op_named(name)
    wide = [40 * x.detach() if "logvar" in key else 1e3 * x.detach() for key, x in op.inputs.items()]

    leaves = [x.requires_grad_() for x in wide]
    value = total(outputs(of_tensors(op.fast, list(op.inputs)), *leaves))
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    for g in torch.autograd.grad(total(gradients), leaves):
        assert g.isfinite().all()


MEMORY = """
import resource, torch, fastvae
z, mu, logvar = (torch.randn(4000, 16) for _ in range(3))
def product(n):
    x = [x[:n].detach().requires_grad_() for x in (z, mu, logvar)]
    g = torch.autograd.grad(fastvae.agg_log_prob(*x).sum(), x, create_graph=True)
    torch.autograd.grad(sum((y ** 2).sum() for y in g), x)
product(100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
product(4000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the unit of ru_maxrss is another")
def test_memory_of_a_second_derivative_is_bounded() -> None:
    """[S, N, D] is 1 GB here, and the formula makes a dozen of it."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 700
