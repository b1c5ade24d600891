"""sample_gauss and reparameterize, given the noise that they draw; the noise itself is test_philox.py's."""

import itertools
from typing import Any

import pytest
import torch
from conftest import Target
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    SEARCH_MARGIN,
    Expected,
    assert_accurate,
    assert_same,
    cast,
    draw,
    evaluate,
    gaussians,
    needing_gradients,
    normals,
    sample,
    tensors,
)
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

import fastvae

OUTPUTS = ("z", "log_q", "log_p", "kl")
SIZES = (
    (1, 1, 1),
    (3, 1, 2),
    (1, 3, 512),
    (2, 31, 10),
    (7, 97, 33),
    (1, 123, 129),
    (3, 507, 2),
    (1, 1271, 64),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(backend: Target, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    L, B, D = sizes
    eps = normals(L, B, D, dtype=dtype, seed=3)
    assert_accurate(
        lambda mu, logvar: fastvae.sample_gauss(mu, logvar, L, seed=3),
        lambda mu, logvar: sample(mu, logvar, eps),
        gaussians(B, D, dtype),
    )


@pytest.mark.parametrize("asked", [c for n in range(1, 5) for c in itertools.combinations(OUTPUTS, n)], ids=str)
def test_any_outputs(backend: Target, asked: tuple[str, ...]) -> None:
    """Outputs asked for are what they are when all are, with their gradients; the others are None."""
    inputs = gaussians(5, 7, torch.float32)
    eps = normals(3, 5, 7, dtype=torch.float32, seed=3)
    everything = fastvae.sample_gauss(**inputs, n_samples=3, seed=3)
    given = fastvae.sample_gauss(**inputs, n_samples=3, outputs=asked, seed=3)
    assert tuple(name for name in OUTPUTS if getattr(given, name) is not None) == asked
    assert_same([getattr(given, name) for name in asked], [getattr(everything, name) for name in asked])

    def fast(**x: Any) -> list[Tensor]:
        result = fastvae.sample_gauss(**x, n_samples=3, outputs=asked, seed=3)
        return [getattr(result, name) for name in asked]

    def formula(**x: Tensor) -> list[Tensor]:
        return [result for name, result in zip(OUTPUTS, sample(**x, eps=eps), strict=True) if name in asked]

    assert_accurate(fast, formula, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("asked", [("kl",), ("z", "kl"), OUTPUTS], ids=str)
def test_reductions(backend: Target, asked: tuple[str, ...], reduction: str, dtype: torch.dtype) -> None:
    L, B, D = 3, 131, 7
    eps = normals(L, B, D, dtype=dtype, seed=3)
    scale = {"sum": 1, "mean": 1 / (B * D), "batchmean": 1 / B}[reduction]

    def fast(**x: Any) -> list[Tensor]:
        result = fastvae.sample_gauss(**x, n_samples=L, outputs=asked, reduction=reduction, seed=3)
        return [getattr(result, name) for name in asked]

    def formula(**x: Tensor) -> list[Tensor]:
        *others, kl = sample(**x, eps=eps)
        return [r for name, r in zip(OUTPUTS, (*others, scale * kl.sum()), strict=True) if name in asked]

    assert_accurate(fast, formula, gaussians(B, D, dtype))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (2, 97, 33), (1, 40_000, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_a_kl_that_is_a_number(backend: Target, reduction: str, sizes: tuple[int, int, int]) -> None:
    """A KL that is one number, beside z, and alone."""
    L, B, D = sizes
    eps = normals(L, B, D, dtype=torch.float32, seed=3)
    scale = {"sum": 1, "mean": 1 / (B * D), "batchmean": 1 / B}[reduction]

    def fast(**x: Any) -> list[Tensor]:
        result = fastvae.sample_gauss(**x, n_samples=L, outputs=("z", "kl"), reduction=reduction, seed=3)
        return [getattr(result, name) for name in ("z", "kl")]

    def formula(**x: Tensor) -> list[Tensor]:
        z, _, _, kl = sample(**x, eps=eps)
        return [z, kl.sum() * scale]

    inputs = gaussians(B, D, torch.float32)
    assert_accurate(fast, formula, inputs)
    alone = fastvae.sample_gauss(**inputs, n_samples=L, outputs=("kl",), reduction=reduction)
    assert_same(tensors(alone.kl), fast(**inputs)[1:])


def test_no_outputs(backend: Target) -> None:
    assert fastvae.sample_gauss(**gaussians(5, 7, torch.float32), outputs=()) == (None,) * 4


def test_gradients_are_total_at_fixed_noise(backend: Target) -> None:
    inputs = gaussians(31, 10, torch.float32)
    sampled: Any = fastvae.sample_gauss(**inputs, n_samples=3, seed=3)
    d_mu, d_logvar = torch.autograd.grad(sampled.log_q.sum(), list(inputs.values()), materialize_grads=True)
    assert (d_mu == 0).all()
    assert (d_logvar == -1.5).all()  # -1/2 for each of three samples


@pytest.mark.parametrize("shape", [(10,), (2, 3, 5), (2, 0, 5), (0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("n_samples", [None, 0, 1, 3])
def test_leading_axes(backend: Target, shape: tuple[int, ...], n_samples: int | None) -> None:
    L = 1 if n_samples is None else n_samples
    eps = normals(L, *shape, dtype=torch.float64, seed=3)
    inputs = needing_gradients({"mu": draw(*shape, seed=1), "logvar": draw(*shape, seed=2)})

    def formula(mu: Tensor, logvar: Tensor) -> list[Tensor]:
        *samples, kl = sample(mu, logvar, eps)
        return [*(x[0] if n_samples is None else x for x in samples), kl]

    def fast(mu: Tensor, logvar: Tensor) -> Any:
        return fastvae.sample_gauss(mu, logvar, n_samples, seed=3)

    assert_accurate(fast, formula, inputs)
    assert_same([fastvae.reparameterize(**inputs, n_samples=n_samples, seed=3)], [fast(**inputs).z])


def test_agrees_with_torch_distributions(backend: Target) -> None:
    inputs = {name: x.detach() for name, x in gaussians(31, 10, torch.float64).items()}
    z, log_q, log_p, kl = fastvae.sample_gauss(**inputs, n_samples=3)
    q = Independent(Normal(inputs["mu"], (inputs["logvar"] / 2).exp()), 1)
    p = Independent(Normal(torch.zeros(10).double(), torch.ones(10).double()), 1)
    torch.testing.assert_close(log_q, q.log_prob(z))
    torch.testing.assert_close(log_p, p.log_prob(z))
    torch.testing.assert_close(kl, kl_divergence(q, p))


@given(
    L=st.integers(1, 4),
    B=st.integers(1, 30),
    D=st.integers(1, 30),
    scale=st.sampled_from([0.0, 1.0, 1e6]),
    width=st.sampled_from([0.0, 1.0, 60.0]),
    dtype=st.sampled_from((*DTYPES, torch.bfloat16)),
    seed=st.integers(-(2**63), 2**64 - 1),
)
def test_finite_inputs_never_give_nan(
    backend: Target, L: int, B: int, D: int, scale: float, width: float, dtype: torch.dtype, seed: int
) -> None:
    mu = scale * (draw(B, D, seed=seed % 1000) / 4).clamp(-1, 1)
    logvar = width * (draw(B, D, seed=seed % 1000 + 1) / 2).clamp(-1, 1)
    inputs = needing_gradients(cast({"mu": mu, "logvar": logvar}, dtype))
    eps = normals(L, B, D, dtype=dtype, seed=seed)
    results = evaluate(lambda **x: fastvae.sample_gauss(**x, n_samples=L, seed=seed), inputs)
    assert not any(r.isnan().any() for r in results)
    if dtype == torch.float64:  # where nothing overflows
        Expected(lambda **x: sample(**x, eps=eps), inputs, margin=SEARCH_MARGIN).check(results)


# Where seeds come from.


def test_manual_seed_governs_and_calls_differ(backend: Target) -> None:
    inputs = gaussians(31, 10, torch.float32)
    torch.manual_seed(5)
    first, second = fastvae.reparameterize(**inputs), fastvae.reparameterize(**inputs)
    torch.manual_seed(5)
    sampled: Any = fastvae.sample_gauss(**inputs)
    assert_same([sampled.z], [first])
    assert_same([fastvae.reparameterize(**inputs)], [second])
    assert not (first == second).any()


def test_generator(backend: Target) -> None:
    inputs = gaussians(31, 10, torch.float32)
    generator = torch.Generator(backend.device)
    before = torch.random.get_rng_state()
    first = fastvae.reparameterize(**inputs, generator=generator.manual_seed(5))
    second = fastvae.reparameterize(**inputs, generator=generator)
    assert_same([fastvae.reparameterize(**inputs, generator=generator.manual_seed(5))], [first])
    assert not (first == second).any()
    assert_same([torch.random.get_rng_state()], [before])


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_draws_what_eager_code_draws(backend: Target) -> None:
    inputs = gaussians(31, 10, torch.float32)

    def twice(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        return fastvae.reparameterize(mu, logvar), fastvae.reparameterize(mu, logvar)

    torch.manual_seed(5)
    eager = evaluate(twice, inputs)
    torch.manual_seed(5)
    assert_same(evaluate(torch.compile(twice, fullgraph=True, backend="aot_eager"), inputs), eager)
    assert not (eager[0] == eager[1]).any()
