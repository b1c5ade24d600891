"""agg_entropy and kl_decomposition as each backend has them, of its own or put together (composed.py).

What the public functions make of them is in tests/aggregate/.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Target
from support.helpers import (
    DTYPES,
    HALVES,
    SEARCH_MARGIN,
    Named,
    aggregate,
    assert_accurate,
    cast,
    draw,
    needing_gradients,
    samples,
)
from support.ops import decomposed
from torch import Tensor

from fastvae import ColumnWeights, estimator_weights
from fastvae.aggregate.estimators import ESTIMATORS
from fastvae.backends import backend_for, composed, reference
from fastvae.backends.contract import COMPOSITIONS, TERMS, LogWeights, Pairs
from fastvae.ops.agg_entropy import agg_entropy_op
from fastvae.ops.kl_decomposition import kl_decomposition_op

WITH_GRADIENTS = [n for n, name in enumerate(TERMS) if name not in ("prior_factorization", "saturation")]
Weigh = Callable[[Tensor | None], ColumnWeights]  # from log_w [N], where it is wanted


@pytest.fixture(params=COMPOSITIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def weighing(kind: str, S: int, N: int) -> Weigh:
    own = torch.arange(S) % N
    if kind == "columns and own":
        return lambda log_w: ColumnWeights(0.0 if log_w is None else log_w, own, -0.5, 0.5)
    weights = estimator_weights(estimator=kind, n_columns=N, dataset_size=9 * N, own=own)
    return lambda log_w: weights


def fast(name: str, weigh: Weigh) -> Callable[..., list[Tensor]]:
    """The op's results that have gradients, of named tensors."""

    def call(z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor | None = None) -> list[Tensor]:
        common, own, log_w_own, log_w_next = weigh(log_w)
        all_alike = None if isinstance(common, Tensor) else common
        weights = LogWeights(log_w, all_alike, own, log_w_own, log_w_next)
        if name == "agg_entropy":
            return [agg_entropy_op(z, mu, logvar, *weights)]
        terms = kl_decomposition_op(z, mu, logvar, *weights)
        return [terms[n] for n in WITH_GRADIENTS]

    return call


def formula(name: str, weigh: Weigh) -> Callable[..., list[Tensor]]:
    def call(log_w: Tensor | None = None, **x: Tensor) -> list[Tensor]:
        joint, marginals = aggregate(**x, weights=weigh(log_w))
        return [-joint.mean()] if name == "agg_entropy" else decomposed(joint, marginals, **x)

    return call


def check(name: str, kind: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    weigh, inputs = weighing(kind, *sizes[:2]), samples(*sizes, dtype)
    if kind == "columns and own":
        inputs |= needing_gradients(cast({"log_w": draw(sizes[1], seed=22)}, dtype))
    # The terms of the KL are differences.
    margin = SEARCH_MARGIN if name == "kl_decomposition" else 1.0
    assert_accurate(fast(name, weigh), formula(name, weigh), inputs, ("z", "mu"), margin=margin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(12, 4, 3), (131, 131, 9), (5, 5, 0)], ids=str)
@pytest.mark.parametrize("kind", [*ESTIMATORS, "columns and own"])
def test_weights(backend: Target, name: str, kind: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(name, kind, sizes, dtype)


@pytest.mark.parametrize("sizes", [(20_000, 2, 1), (2100, 7, 40)], ids=str)
def test_sums_of_many_samples(backend: Target, name: str, sizes: tuple[int, int, int]) -> None:
    """Sums over more samples than one block takes, and over more dimensions than a warp has threads."""
    check(name, "uniform", sizes, torch.float32)


def contract(name: str, *arguments: Any) -> list[Tensor]:
    """What the backend's function gives."""
    results = composed.function(backend_for(torch.empty(0).device), name)(*arguments)
    return [results] if isinstance(results, Tensor) else list(results)


def pairs_of(inputs: Named) -> Pairs:
    z, mu, logvar = (inputs[key].detach() for key in ("z", "mu", "logvar"))
    own = torch.arange(len(z)) % max(len(mu), 1)
    return Pairs(z, mu, logvar, LogWeights(draw(len(mu), seed=22).to(z), None, own, -0.5, 0.5))


SUBSETS = [(), tuple(WITH_GRADIENTS), *itertools.combinations(WITH_GRADIENTS, 1), *itertools.combinations((0, 2, 5), 2)]


@pytest.mark.parametrize("given", SUBSETS, ids=lambda given: "+".join(TERMS[n] for n in given) or "none")
def test_terms_without_an_upstream_gradient(backend: Target, given: tuple[int, ...]) -> None:
    """Upstream gradients of some terms alone, of the kl alone too, which takes no pairs; and of each input alone."""
    pairs = pairs_of(samples(12, 4, 3, torch.float64))
    *terms, joint, marginals = composed.kl_decomposition(reference, pairs)
    upstream = [draw(*x.shape, seed=n) if n in given else None for n, x in enumerate(terms[:-1])]
    arguments = upstream, joint, marginals, pairs
    every = composed.kl_decomposition_backward(reference, *arguments, [True] * 4)
    for wanted in ([True] * 4, *([k == n for k in range(4)] for n in range(4))):
        got = contract("kl_decomposition_backward", *arguments, wanted)
        expected = [x for x, want in zip(every, wanted, strict=True) if want]
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(backend: Target, name: str, dtype: torch.dtype) -> None:
    """Results are in float32, and gradients in the inputs' dtype, two roundings from what they are in float64."""
    half = pairs_of(samples(12, 4, 3, dtype))
    half = half._replace(weights=half.weights._replace(log_w=None, log_w_all=-1.5))
    wide = half._replace(z=half.z.double(), mu=half.mu.double(), logvar=half.logvar.double())
    wanted = (True, True, True, False)
    expected = getattr(composed, name)(reference, wide)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    got = contract(name, half)
    torch.testing.assert_close(got, [x.float() for x in expected], rtol=1e-5, atol=1e-5)
    upstream: tuple[Any, ...] = (torch.ones(()),)
    if name == "kl_decomposition":
        terms, saved = (draw(*x.shape, seed=n) for n, x in enumerate(got[: len(TERMS) - 1])), got[-2:]
        upstream = (tuple(x.float() for x in terms), *saved)
    for gradient, exact in zip(
        contract(f"{name}_backward", *upstream, half, wanted),
        getattr(composed, f"{name}_backward")(reference, *upstream, wide, wanted),
        strict=True,
    ):
        assert gradient.dtype == dtype
        bound = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
        torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("N", [0, 4])
def test_no_samples(backend: Target, name: str, N: int) -> None:
    """The means are NaN, and pull on nothing."""
    pairs = pairs_of(samples(0, N, 3, torch.float64))
    results = contract(name, pairs)
    factorization = TERMS.index("prior_factorization")
    of_kernel = [x for n, x in enumerate(results[: len(TERMS)]) if n != factorization]
    assert all(x.isnan().all() for x in of_kernel)
    upstream: tuple[Any, ...] = (torch.ones((), dtype=torch.float64),)
    if name == "kl_decomposition":
        upstream = (tuple(map(torch.ones_like, results[: len(TERMS) - 1])), *results[-2:])
    gradients = contract(f"{name}_backward", *upstream, pairs, (True,) * 4)
    assert [x.shape for x in gradients] == [x.shape for x in pairs.inputs if x is not None]
    assert not any(x.any() for x in gradients)
