"""cross_log_prob and log_prob_gauss: the density itself, pairwise and broadcast."""

import functools

import pytest
import torch
from conftest import Target
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    SEARCH_MARGIN,
    SIZES,
    Expected,
    Named,
    assert_accurate,
    cast,
    cross,
    draw,
    evaluate,
    flattened,
    log_normal,
    needing_gradients,
    samples,
)
from torch import Tensor
from torch.distributions import Independent, Normal

import fastvae


@functools.cache
def problem(device: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> tuple[Named, Expected]:
    inputs = samples(*sizes, dtype)
    return inputs, Expected(cross, inputs, ("z", "mu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (0, 5, 4), (5, 0, 4), (5, 4, 0)], ids=str)
def test_sizes(backend: Target, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs, expected = problem(backend.device, sizes, dtype)
    expected.check(evaluate(fastvae.cross_log_prob, inputs))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("n_samples", [None, 3])
def test_leading_axes(backend: Target, batch: tuple[int, ...], n_samples: int | None) -> None:
    N, D = 5, 4
    z = draw(*(() if n_samples is None else (n_samples,)), *batch, N, D, seed=3)

    def formula(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return cross(flattened(z, mu), mu, logvar)

    posteriors = {"mu": draw(*batch, N, D, seed=1), "logvar": draw(*batch, N, D, seed=2)}
    assert_accurate(fastvae.cross_log_prob, formula, needing_gradients({"z": z, **posteriors}))


@given(
    S=st.integers(1, 40),
    N=st.integers(1, 40),
    D=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    width=st.sampled_from([0.0, 1.0, 60.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_scale(
    backend: Target, S: int, N: int, D: int, scale: float, width: float, dtype: torch.dtype, seed: int
) -> None:
    if backend.leaves_out(seed):
        return
    mu = scale * (draw(N, D, seed=seed) / 4).clamp(-1, 1)
    logvar = width * (draw(N, D, seed=seed + 1) / 2).clamp(-1, 1)
    z = scale * (draw(S, D, seed=seed + 2) / 4).clamp(-1, 1)
    inputs = needing_gradients(cast({"z": z, "mu": mu, "logvar": logvar}, dtype))
    for result in evaluate(fastvae.cross_log_prob, inputs, upstream=torch.ones_like):
        assert not result.isnan().any()
    if dtype == torch.float64:  # where nothing overflows
        assert_accurate(fastvae.cross_log_prob, cross, inputs, ("z", "mu"), margin=SEARCH_MARGIN)


def test_agrees_with_torch_distributions(backend: Target) -> None:
    z, mu, logvar = (x.detach() for x in samples(31, 23, 4, torch.float64).values())
    posteriors = Independent(Normal(mu, (logvar / 2).exp()), 1)
    torch.testing.assert_close(fastvae.cross_log_prob(z, mu, logvar), posteriors.log_prob(z[:, None]))
    rows = (z[:23], mu, logvar)
    torch.testing.assert_close(fastvae.log_prob_gauss(*rows), posteriors.log_prob(z[:23]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shapes",
    [((7,), (7,), (7,)), ((5, 7), (7,), (5, 1)), ((3, 1, 7), (4, 7), (1,)), ((0, 7), (7,), (7,))],
    ids=str,
)
def test_log_prob_gauss_broadcasts(backend: Target, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    inputs = {n: draw(*s, seed=k) for k, (n, s) in enumerate(zip(("z", "mu", "logvar"), shapes, strict=True))}
    inputs = needing_gradients(cast(inputs, dtype))
    assert_accurate(fastvae.log_prob_gauss, lambda **x: log_normal(**x).sum(-1), inputs)
