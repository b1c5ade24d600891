"""Sums over columns in memory and over those that are read some at a time, with what is known of them beforehand."""

import math

import pytest
import torch
from support.helpers import draw
from torch import Tensor

from fastvae.aggregate.columns import Columns, InMemory, Streamed
from fastvae.aggregate.marginals import log_densities
from fastvae.aggregate.posteriors import open_posteriors
from fastvae.backends.contract import LogWeights

S, N, D = 6000, 300, 3


@pytest.fixture
def posteriors() -> tuple[Tensor, Tensor]:
    return draw(N, D, seed=1), draw(N, D, seed=2) - 1


@pytest.fixture
def own() -> Tensor:
    """The column that each sample is of, and −1 for each seventh."""
    return (torch.arange(S) % N).where(torch.arange(S) % 7 > 0, -1)


@pytest.fixture
def z(posteriors: tuple[Tensor, Tensor]) -> Tensor:
    mu, logvar = (x[torch.arange(S) % N] for x in posteriors)
    return mu + torch.exp(logvar / 2) * draw(S, D, seed=3)


def streamed(posteriors: tuple[Tensor, Tensor], own: Tensor | None = None, batch_size: int = 41) -> Streamed:
    source = tuple(x.numpy() for x in posteriors)
    opened = open_posteriors(source)
    return Streamed(opened, own=own, batch_size=batch_size)


def both(posteriors: tuple[Tensor, Tensor], own: Tensor | None) -> list[Columns]:
    """The same columns, streamed and in memory."""
    weights = LogWeights(own=own, log_w_own=None if own is None else -math.inf)
    return [streamed(posteriors, own), InMemory(*posteriors, weights)]


@pytest.mark.parametrize("method", ["direct", "table"])
@pytest.mark.parametrize("leaving_out", [False, True])
def test_streamed_columns_are_those_in_memory(
    posteriors: tuple[Tensor, Tensor], z: Tensor, own: Tensor, method: str, leaving_out: bool
) -> None:
    """Streamed columns give what those in memory do, also where samples leave one out: marginals are in part direct."""
    got, expected = (
        log_densities(z, columns, method=method, tol=1e-12)
        for columns in both(posteriors, own if leaving_out else None)
    )
    direct = log_densities(z, both(posteriors, own if leaving_out else None)[1])
    for a, b, c in zip(got, expected, direct, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b.double(), rtol=0, atol=1e-11)
        torch.testing.assert_close(b, c, rtol=0, atol=1e-11)
    assert (expected[1] != direct[1]).any() == (method == "table")


def test_marginals_alone(posteriors: tuple[Tensor, Tensor], z: Tensor) -> None:
    for columns in both(posteriors, None):
        for method in ("direct", "table"):
            joint, marginals = log_densities(z, columns, method=method, joint=False)
            assert joint is None
            assert torch.equal(marginals, log_densities(z, columns, method=method)[1])


@pytest.mark.parametrize("method", ["direct", "table"])
def test_no_sum_is_below_its_floor(posteriors: tuple[Tensor, Tensor], z: Tensor, method: str) -> None:
    columns = streamed(posteriors)
    free, marginals = log_densities(z, columns, method=method)
    assert free is not None
    floor = free + torch.tensor([-1.0, 0.25, -math.inf]).repeat(S // 3)
    joint, same = log_densities(z, columns, method=method, floor=floor.float())
    assert joint is not None
    assert torch.equal(joint, torch.maximum(free, floor.float().double()))
    assert torch.equal(same, marginals)
    broken = posteriors[0].clone()
    broken[3] = math.nan
    joint, _ = log_densities(z, streamed((broken, posteriors[1])), method=method, floor=floor)
    assert joint is not None
    assert joint.isnan().all()


def test_each_column_is_read_once_whatever_is_made_of_it(posteriors: tuple[Tensor, Tensor]) -> None:
    seen: list[int] = []

    def evaluate(mu: Tensor, logvar: Tensor, *weights: object) -> list[Tensor]:
        seen.append(len(mu))
        return [mu.amax(0), logvar.amax(0)]

    sums = streamed(posteriors, batch_size=101).log_sum(evaluate)
    assert [len(x) for x in sums] == [D, D]
    assert seen == [101, 101, 98]
