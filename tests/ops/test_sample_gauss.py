"""sample_gauss and reparameterize, given the noise that they draw; the noise itself is test_philox.py's."""

import functools
import itertools
from typing import Any

import pytest
import torch
from conftest import Target
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    HALVES,
    LAYOUTS,
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
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

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


# Noise that is kept.


def both_ways(call: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The results of a call and their gradients, the noise drawn again in the backward and kept for it."""
    drawn, kept = (evaluate(functools.partial(call, save_noise=keep), inputs) for keep in (False, True))
    return kept, drawn


@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kept_noise_changes_no_bits(backend: Target, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    L, B, D = sizes
    for n_samples in {L, None}:
        of_all = functools.partial(fastvae.sample_gauss, n_samples=n_samples, seed=3)
        assert_same(*both_ways(of_all, gaussians(B, D, dtype)))
        assert_same(
            *both_ways(functools.partial(fastvae.reparameterize, n_samples=n_samples, seed=3), gaussians(B, D, dtype))
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("asked", [c for n in range(1, 5) for c in itertools.combinations(OUTPUTS, n)], ids=str)
def test_kept_noise_of_any_outputs_and_layout(backend: Target, asked: tuple[str, ...], layout: str) -> None:
    inputs = needing_gradients(
        {name: LAYOUTS[layout](x.detach()) for name, x in gaussians(13, 8, torch.float32).items()}
    )
    for n_samples, reduction in ((None, "sample"), (3, "batchmean"), (0, "sum")):

        def call(**x: Any) -> list[Tensor]:
            result = fastvae.sample_gauss(**x, n_samples=n_samples, outputs=asked, reduction=reduction, seed=3)  # noqa: B023
            assert tuple(name for name in OUTPUTS if getattr(result, name) is not None) == asked
            return [getattr(result, name) for name in asked]

        assert_same(*both_ways(call, inputs))


def calls_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of the backend's function of that name, from now on."""
    module = fastvae.backends.backend_for(torch.device("cpu"))
    function, calls = getattr(module, name), []

    def noted(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(module, name, noted)
    return calls


def test_the_backward_reads_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no seed then; and nothing is kept where there is no backward."""
    with fastvae.use(backend="reference"):
        noise = normals(1, 5, 3, dtype=torch.float32, seed=3)
        forward, backward = (calls_of(name, monkeypatch) for name in ("sample_gauss", "sample_gauss_backward"))
        inputs = gaussians(5, 3, torch.float32)
        z = fastvae.reparameterize(**inputs, seed=3, save_noise=True)
        z.sum().backward()
        ((_, _, _, seed, eps, *_),) = backward
        assert seed is None
        assert_same([eps], [noise])
        with torch.no_grad():
            fastvae.reparameterize(**inputs, seed=3, save_noise=True)
        assert [outputs[4] for *_, outputs, _ in forward] == [True, False]


def loss(mu: Tensor, logvar: Tensor, n_samples: int | None, save_noise: bool) -> Tensor:
    z, log_q, log_p, kl = fastvae.sample_gauss(
        mu, logvar, n_samples, seed=3, reduction="batchmean", save_noise=save_noise
    )
    assert z is not None and log_q is not None and log_p is not None and kl is not None  # noqa: PT018
    return z.sin().sum() + (log_q * log_p).sum() + kl


TRANSFORMED: dict[str, Any] = {
    "hessian": lambda f, *x: torch.autograd.functional.hessian(f, x),
    "hessian, vectorized": lambda f, *x: torch.autograd.functional.hessian(f, x, vectorize=True),
    "func.hessian": lambda f, *x: torch.func.hessian(f, (0, 1))(*x),
    "jvp": lambda f, *x: torch.func.jvp(f, x, x),
    "jacrev": lambda f, *x: torch.func.jacrev(f, (0, 1))(*x),
    "vmap of grad": lambda f, *x: torch.func.vmap(torch.func.grad(f, (0, 1)))(*(t[None] + t[:2, None] for t in x)),
    "grad of vmap": lambda f, *x: torch.func.grad(
        lambda *t: torch.func.vmap(f)(*t).square().sum(), (0, 1)
    )(*(t[None] + t[:2, None] for t in x)),
}  # fmt: skip


@pytest.mark.parametrize("n_samples", [None, 2])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_kept_noise_in_transforms(backend: Target, name: str, n_samples: int | None) -> None:
    x = [x.detach() for x in gaussians(4, 3, torch.float64).values()]

    def with_noise(save_noise: bool) -> list[Tensor]:
        f = functools.partial(loss, n_samples=n_samples, save_noise=save_noise)
        return tree_leaves(TRANSFORMED[name](f, *x))

    torch.testing.assert_close(with_noise(True), with_noise(False))


@pytest.mark.parametrize("n_samples", [None, 2])
def test_kept_noise_of_problems_with_seeds_of_their_own(backend: Target, n_samples: int | None) -> None:
    """Each problem's noise is read, in one call of the backward for all."""
    x = [draw(3, 4, 2, seed=n) for n in (1, 2)]

    def of_all(save_noise: bool) -> list[Tensor]:
        def f(mu: Tensor, logvar: Tensor) -> Tensor:
            sampled: Any = fastvae.sample_gauss(mu, logvar, n_samples, reduction="sum", save_noise=save_noise)
            return sampled.z.sin().sum() + (sampled.log_q * sampled.log_p).sum() + sampled.kl

        torch.manual_seed(5)
        return tree_leaves(torch.func.vmap(torch.func.grad(f, (0, 1)), randomness="different")(*x))

    assert_same(of_all(True), of_all(False))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("n_samples", [None, 2])
def test_kept_noise_compiled_and_checkpointed(backend: Target, n_samples: int | None) -> None:
    inputs = gaussians(31, 10, torch.float32)

    def kept(mu: Tensor, logvar: Tensor) -> list[Tensor]:
        return [loss(mu, logvar, n_samples, True)]

    drawn = evaluate(lambda **x: [loss(**x, n_samples=n_samples, save_noise=False)], inputs)
    assert_same(evaluate(torch.compile(kept, fullgraph=True, backend="aot_eager"), inputs), drawn)
    assert_same(evaluate(lambda **x: checkpoint(kept, *x.values(), use_reentrant=False), inputs), drawn)
