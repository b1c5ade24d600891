"""Tests of what only agg_log_prob_marginals has: a joint and marginals that must fit together.

Sizes, weights, layouts and extremes are tested with agg_log_prob in test_agg_log_prob.py.
"""

from typing import Any

import pytest
import torch
from conftest import Target
from support.helpers import DTYPES, Expected, aggregate, assert_same, evaluate, samples
from torch import Tensor

import fastvae
from fastvae import ColumnWeights


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_one_of_the_two(backend: Target, asked: int, dtype: torch.dtype) -> None:
    """The other then has no upstream gradient at all."""
    inputs = samples(31, 23, 5, dtype)
    weights = ColumnWeights(-1.0, torch.arange(31) % 23, 0.5)
    expected = Expected(lambda **x: aggregate(**x, weights=weights)[asked], inputs, ("z", "mu"))
    expected.check(evaluate(lambda **x: fastvae.agg_log_prob_marginals(**x, weights=weights)[asked], inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_dimension_is_its_own_joint(backend: Target, dtype: torch.dtype) -> None:
    inputs = samples(97, 123, 1, dtype)

    def both(**x: Any) -> list[Tensor]:
        joint, marginals = fastvae.agg_log_prob_marginals(**x)
        return [joint, marginals[:, 0]]

    formula = Expected(lambda **x: [aggregate(**x)[0]] * 2, inputs, ("z", "mu"))
    formula.check(evaluate(both, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_marginal_knows_nothing_of_the_other_dimensions(backend: Target, dtype: torch.dtype) -> None:
    z, mu, logvar = (x.detach() for x in samples(31, 23, 7, dtype).values())
    before = fastvae.agg_log_prob_marginals(z, mu, logvar)[1]
    for x in (z, mu, logvar):
        x[:, 3] += 1.0
    after = fastvae.agg_log_prob_marginals(z, mu, logvar)[1]
    others = [0, 1, 2, 4, 5, 6]
    assert_same([after[:, others]], [before[:, others]])
    assert not (after[:, 3] == before[:, 3]).any()


def test_independent_dimensions_have_no_total_correlation(backend: Target) -> None:
    """The columns of a grid: joint = sum of the marginals."""
    grid = torch.cartesian_prod(torch.linspace(-1, 1, 5).double(), torch.linspace(0, 3, 7).double())
    z = samples(31, 35, 2, torch.float64)["z"].detach()
    joint, marginals = fastvae.agg_log_prob_marginals(z, grid, torch.full_like(grid, -0.5))
    torch.testing.assert_close(joint, marginals.sum(-1))


@pytest.mark.parametrize("method", ["direct", "table", "auto"])
def test_the_two_have_names(method: str) -> None:
    inputs = [x.detach() for x in samples(97, 23, 5, torch.float32).values()]
    result = fastvae.agg_log_prob_marginals(*inputs, method=method)
    assert isinstance(result, fastvae.AggregateLogProb)
    joint, marginals = result
    assert result.joint is joint
    assert result.marginals is marginals
    assert (joint.shape, marginals.shape) == ((97,), (97, 5))


@pytest.mark.parametrize("batch", [(2, 3), (0,), (3, 0)])
def test_the_two_have_names_for_batches(batch: tuple[int, ...]) -> None:
    z, mu, logvar = torch.zeros(*batch, 7, 4), torch.ones(*batch, 5, 4), torch.zeros(*batch, 5, 4)
    result = fastvae.agg_log_prob_marginals(z, mu, logvar)
    assert isinstance(result, fastvae.AggregateLogProb)
    assert (result.joint.shape, result.marginals.shape) == ((*batch, 7), (*batch, 7, 4))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_two_have_names_under_transforms(compiled: bool) -> None:
    z, mu, logvar = (x.detach() for x in samples(31, 23, 5, torch.float64).values())

    def correlation(z: Tensor) -> Tensor:
        log_q = fastvae.agg_log_prob_marginals(z, mu, logvar)
        return (log_q.joint - log_q.marginals.sum(-1)).mean()

    wanted = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(correlation(wanted), wanted)
    gradient: Any = torch.func.grad(correlation)
    whole: Any = fastvae.agg_log_prob_marginals
    if compiled:
        gradient, whole = (torch.compile(f, fullgraph=True, backend="eager") for f in (gradient, whole))
    torch.testing.assert_close(gradient(z), expected)
    assert isinstance(whole(z, mu, logvar), fastvae.AggregateLogProb)
