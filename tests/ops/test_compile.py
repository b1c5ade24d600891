"""Compositions of ops under the compiler: shapes as the compiled function sees them, and values as in eager code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from support.helpers import draw
from support.host_simt import needed
from torch import Tensor

import fastvae
from fastvae.aggregate.estimators import ESTIMATORS

pytestmark = pytest.mark.usefixtures("fresh_compiler")
Step = Callable[[Tensor, Tensor], Tensor]


def readme(mu: Tensor, logvar: Tensor) -> Tensor:
    z = fastvae.reparameterize(mu, logvar)
    entropy = fastvae.agg_entropy(z, mu, logvar, dataset_size=60_000)
    return (z**2).sum() / z.shape[0] + fastvae.kl_gauss(mu, logvar) - 0.1 * entropy


def aggregate(mu: Tensor, logvar: Tensor) -> Tensor:
    return fastvae.agg_log_prob(fastvae.reparameterize(mu, logvar, seed=1), mu, logvar).mean()


def several_samples(mu: Tensor, logvar: Tensor) -> Tensor:
    sampled: Any = fastvae.sample_gauss(mu, logvar, 3)
    z, log_q, log_p, kl = sampled
    bound = fastvae.iw_elbo(-z.square().sum(-1), log_p, log_q)
    return (bound + kl).sum() / z.shape[1] + fastvae.agg_log_prob(z, mu, logvar).mean()


def one_sample(mu: Tensor, logvar: Tensor) -> Tensor:
    sampled: Any = fastvae.sample_gauss(mu, logvar)
    z, log_q, log_p, kl = sampled
    return (
        ((log_q - log_p) * kl).sum() / len(z)
        + z.T.matmul(z).diagonal().sum()
        + fastvae.log_prob_gauss(z, mu, logvar).mean()
    )


def decomposition(mu: Tensor, logvar: Tensor) -> Tensor:
    z = fastvae.reparameterize(mu, logvar)
    terms = fastvae.kl_decomposition(z, mu, logvar, dataset_size=1000, estimator="mss")
    return terms.mi + 2 * terms.tc + (terms.dim_kl / z.shape[-1]).sum()


def matrix(mu: Tensor, logvar: Tensor) -> Tensor:
    z = fastvae.reparameterize(mu, logvar, 2)
    log_q = fastvae.cross_log_prob(z, mu, logvar)
    return log_q.softmax(1).square().sum() / log_q.shape[0] + fastvae.kl_gauss(mu, logvar, free_bits=0.1)


def leading_axes(mu: Tensor, logvar: Tensor) -> Tensor:
    mu, logvar = mu[:, None], logvar[:, None]  # [B, 1, D]
    z = fastvae.reparameterize(mu, logvar)
    return (z * fastvae.kl_gauss(mu, logvar, reduction="none")).sum() / z.shape[0] + fastvae.mmd(z[:, 0], mu[:, 0])


STEPS: tuple[Step, ...] = (
    readme,
    aggregate,
    several_samples,
    one_sample,
    decomposition,
    matrix,
    leading_axes,
)


def entropy_by(estimator: str) -> Step:
    size = None if estimator in ("uniform", "loo") else 1000
    return lambda mu, logvar: fastvae.agg_entropy(1.1 * mu, mu, logvar, estimator=estimator, dataset_size=size)


def posteriors(B: int) -> tuple[Tensor, Tensor]:
    return draw(B, 3, seed=1).requires_grad_(), draw(B, 3, seed=2).requires_grad_()


def loss_and_gradients(step: Step, B: int) -> list[Tensor]:
    inputs = posteriors(B)
    torch.manual_seed(0)
    loss = step(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_close(ours: list[Tensor], eager: list[Tensor]) -> None:
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # gradients meet in another order


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_compositions(step: Step, dynamic: bool) -> None:
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B in (4, 7):
        assert_close(loss_and_gradients(compiled, B), loss_and_gradients(step, B))


@pytest.mark.parametrize("step", [*STEPS, *map(entropy_by, ESTIMATORS)])
def test_ten_batch_sizes_are_compiled_for_at_most_twice(step: Step) -> None:
    """Compilation is once for the first batch size, and once for all others."""
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    for B in range(4, 14):
        assert_close(loss_and_gradients(compiled, B), loss_and_gradients(step, B))
    assert graphs.frame_count <= 2


def test_inductor_with_dynamic_sizes() -> None:
    needed("c++")
    compiled = torch.compile(decomposition, fullgraph=True, dynamic=True)
    for B in (4, 7):
        assert_close(loss_and_gradients(compiled, B), loss_and_gradients(decomposition, B))


@pytest.mark.parametrize("n_samples", [None, 1, 2])
def test_shapes_inside(n_samples: int | None) -> None:
    """The graph has the shapes that eager code has, in whatever rank mu comes."""

    def sizes(mu: Tensor, logvar: Tensor) -> list[tuple[int, ...]]:
        return [tuple(r.shape) for r in fastvae.sample_gauss(mu, logvar, n_samples, seed=3) if r is not None]

    for shape in ((8, 3), (3,), (2, 5, 3)):
        x = draw(*shape)
        assert torch.compile(sizes, fullgraph=True, backend="eager")(x, x) == sizes(x, x)
