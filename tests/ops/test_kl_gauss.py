"""kl_gauss: every reduction, priors of every shape, free bits, and that a KL is never negative."""

import functools
import math

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
    Named,
    assert_accurate,
    assert_rounded_once,
    cast,
    draw,
    evaluate,
    gaussians,
    kl,
    lay_out,
    needing_gradients,
)
from torch import Tensor

import fastvae

REDUCE = {
    "none": lambda x: x,
    "sample": lambda x: x.sum(-1),
    "dim": lambda x: x.flatten(0, -2).mean(0) if x.ndim > 1 else x,
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "batchmean": lambda x: x.sum(-1).mean(),
}
SIZES = ((1, 1), (3, 512), (31, 10), (97, 33), (123, 129), (507, 2), (1271, 64))
PRIORS = {
    "none": (None, None),
    "[D]": ((-1,), (-1,)),
    "[B, D]": ((0, -1), (0, -1)),
    "[1]": ((1,), (1,)),
    "scalar": ((), ()),
    "[B, 1]": ((0, 1), (1, 1)),
    "mu only": ((-1,), None),
    "logvar only": (None, (0, -1)),
}


def with_prior(B: int, D: int, prior: str, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = gaussians(B, D, dtype)
    for n, (name, shape) in enumerate(zip(("prior_mu", "prior_logvar"), PRIORS[prior], strict=True)):
        if shape is not None:
            inputs[name] = draw(*({0: B, -1: D}.get(s, s) for s in shape), seed=n).to(dtype)
    return needing_gradients(inputs)


def formula(reduction: str, mu: Tensor, logvar: Tensor, **prior: Tensor) -> Tensor:
    zero = torch.zeros_like(mu)
    return REDUCE[reduction](kl(mu, logvar, prior.get("prior_mu", zero), prior.get("prior_logvar", zero)))


@functools.cache
def problem(
    device: str, B: int, D: int, reduction: str, prior: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Expected]:
    inputs = with_prior(B, D, prior, dtype)
    return inputs, Expected(functools.partial(formula, reduction), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(backend: Target, sizes: tuple[int, int], reduction: str, dtype: torch.dtype) -> None:
    inputs, expected = problem(backend.device, *sizes, reduction, "none", dtype)
    expected.check(evaluate(functools.partial(fastvae.kl_gauss, reduction=reduction), inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("prior", PRIORS)
def test_priors(backend: Target, prior: str, reduction: str, dtype: torch.dtype) -> None:
    inputs, expected = problem(backend.device, 31, 37, reduction, prior, dtype)
    expected.check(evaluate(functools.partial(fastvae.kl_gauss, reduction=reduction), inputs))


@pytest.mark.parametrize("shape", [(10,), (2, 3, 5), (2, 0, 5), (0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("prior", [(), (1,), None], ids=str)
def test_leading_axes(backend: Target, shape: tuple[int, ...], reduction: str, prior: tuple[int, ...] | None) -> None:
    mu, logvar = draw(*shape, seed=1), draw(*shape, seed=2)
    prior_mu, prior_logvar = (draw(*(shape if prior is None else prior), seed=s) for s in (3, 4))
    inputs = needing_gradients({"mu": mu, "logvar": logvar, "prior_mu": prior_mu, "prior_logvar": prior_logvar})
    fast = functools.partial(fastvae.kl_gauss, reduction=reduction)
    assert_accurate(fast, functools.partial(formula, reduction), inputs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("prior", [(), (1,), (9,), (7, 1), (5, 7, 1), (5, 1, 9), (7, 9), (5, 7, 9)], ids=str)
def test_gradients_of_what_is_broadcast_are_rounded_once(
    backend: Target, prior: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = {"mu": draw(5, 7, 9, seed=1), "logvar": draw(5, 7, 9, seed=2)}
    inputs |= {"prior_mu": draw(*prior, seed=3), "prior_logvar": draw(*prior, seed=4)}
    assert_rounded_once(fastvae.kl_gauss, needing_gradients(inputs), dtype)


@pytest.mark.parametrize("reduction", REDUCE)
def test_gradcheck(backend: Target, reduction: str) -> None:
    inputs = with_prior(4, 3, "[B, 1]", torch.float64)
    fast = functools.partial(fastvae.kl_gauss, reduction=reduction)
    assert torch.autograd.gradcheck(fast, tuple(inputs.values()), fast_mode=backend.slow)


@pytest.mark.parametrize("reduction", ["dim", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_free_bits(backend: Target, reduction: str, dtype: torch.dtype) -> None:
    """A dimension whose batch mean is below lambda counts as lambda, and nothing pulls at it."""
    inputs, bits = with_prior(31, 10, "[D]", dtype), 1.0

    def clamped(**x: Tensor) -> Tensor:
        dims = formula("none", **x).mean(0).clamp(min=bits)
        return dims if reduction == "dim" else dims.sum() * {"sum": 31, "mean": 0.1, "batchmean": 1}[reduction]

    dims = formula("none", **inputs).mean(0)
    assert (dims < bits).any()
    assert (dims > bits).any()
    assert_accurate(functools.partial(fastvae.kl_gauss, reduction=reduction, free_bits=bits), clamped, inputs)
    evaluated = evaluate(functools.partial(fastvae.kl_gauss, reduction=reduction, free_bits=bits), inputs)
    assert (evaluated[1][:, dims < bits] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_anchors(backend: Target, dtype: torch.dtype) -> None:
    ones, zeros = torch.ones(4, 10, dtype=dtype), torch.zeros(4, 10, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert fastvae.kl_gauss(ones, zeros).item() == pytest.approx(5.0, rel=4 * eps)
    assert fastvae.kl_gauss(ones, ones).item() == pytest.approx(8.5914091422952, rel=max(4 * eps, 1e-13))
    assert fastvae.kl_gauss(zeros, zeros).item() == 0


def test_agrees_with_torch_distributions(backend: Target) -> None:
    from torch.distributions import Independent, Normal, kl_divergence

    inputs: Named = {name: x.detach() for name, x in with_prior(31, 10, "[B, D]", torch.float64).items()}
    q = Independent(Normal(inputs["mu"], (inputs["logvar"] / 2).exp()), 1)
    p = Independent(Normal(inputs["prior_mu"], (inputs["prior_logvar"] / 2).exp()), 1)
    torch.testing.assert_close(fastvae.kl_gauss(**inputs, reduction="sample"), kl_divergence(q, p))


magnitudes = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e3, 1e6])
widths = st.sampled_from([0.0, 1e-6, 1.0, 20.0, 60.0])


@given(
    B=st.integers(1, 40),
    D=st.integers(1, 40),
    scale=magnitudes,
    width=widths,
    prior=st.sampled_from(list(PRIORS)),
    reduction=st.sampled_from(list(REDUCE)),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from((*DTYPES, torch.bfloat16)),
    seed=st.integers(0, 2**20),
)
def test_never_negative_and_never_nan(
    backend: Target,
    B: int,
    D: int,
    scale: float,
    width: float,
    prior: str,
    reduction: str,
    layout: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """|mu| to 1e6 and logvar from -60 to 60; in float32 an overflow to inf is allowed, a NaN is not."""
    inputs = with_prior(B, D, prior, torch.float64)
    for n, (name, x) in enumerate(inputs.items()):
        x = draw(*x.shape, seed=seed + n)
        inputs[name] = width * (x / 2).clamp(-1, 1) if "logvar" in name else scale * (x / 4).clamp(-1, 1)
    inputs = needing_gradients(lay_out(cast(inputs, dtype), layout))
    fast = functools.partial(fastvae.kl_gauss, reduction=reduction)
    results = evaluate(fast, inputs, upstream=torch.ones_like)  # of one sign: inf - inf is nobody's fault
    assert (results[0] >= 0).all()
    assert not any(r.isnan().any() for r in results)
    if dtype == torch.float64:  # where nothing overflows
        assert_accurate(fast, functools.partial(formula, reduction), inputs, margin=SEARCH_MARGIN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_next_to_the_prior(backend: Target, dtype: torch.dtype) -> None:
    """The KL next to the prior, where exp(x) - 1 - x would be all rounding error: expm1(x) - x loses no more than a few
    ulps of x."""
    logvar = torch.logspace(-9, 0, 20_000, dtype=torch.float64)
    logvar = torch.cat((logvar, -logvar)).reshape(-1, 100).to(dtype)
    zero = torch.zeros_like(logvar)
    elements, d_logvar = evaluate(
        lambda logvar: fastvae.kl_gauss(zero, logvar, reduction="none"),
        needing_gradients({"logvar": logvar}),
        upstream=torch.ones_like,
    )
    assert (elements >= 0).all()
    allowed = 4 * torch.finfo(dtype).eps * logvar.detach().double().abs()
    exact = kl(*(x.detach().double() for x in (zero, logvar, zero, zero)))
    assert ((elements.double() - exact).abs() <= allowed).all()
    assert ((d_logvar.double() - 0.5 * torch.expm1(logvar.detach().double())).abs() <= allowed).all()


@given(
    B=st.integers(1, 20),
    D=st.integers(1, 20),
    scale=magnitudes,
    width=widths,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_zero_at_the_prior_and_only_there(
    backend: Target, B: int, D: int, scale: float, width: float, dtype: torch.dtype, seed: int
) -> None:
    mu, logvar = (scale * draw(B, D, seed=seed)).to(dtype), (width * draw(B, D, seed=seed + 1) / 4).to(dtype)
    logvar = logvar.clamp(-60, 60)
    assert (fastvae.kl_gauss(mu, logvar, mu, logvar, reduction="none") == 0).all()
    sigma = torch.exp(logvar / 2)
    away = mu + sigma * torch.where(mu < 0, -1, 1)  # by one sigma, where mu is not too large for it to show
    shows = (away - mu).abs() > 0.5 * sigma
    assert (fastvae.kl_gauss(away, logvar, mu, logvar, reduction="none") > 0)[shows].all()
    wider = logvar + 64 * math.sqrt(torch.finfo(dtype).eps) * logvar.abs().clamp(min=1)
    assert (fastvae.kl_gauss(mu, wider, mu, logvar, reduction="none") > 0).all()
