"""precision("tf32x3"): agg_log_prob on tensor cores, within its stated error where that is emulated; and no effect
elsewhere."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TRITON, Target, computing_on
from support.helpers import Named, assert_same, cross, draw, evaluate, log_weights
from support.ops import op_named
from torch import Tensor

import fastvae
from fastvae import ColumnWeights
from fastvae.backends import settings


@pytest.fixture(params=TRITON)
def tensor_cores(request: pytest.FixtureRequest) -> Iterator[Target]:
    with computing_on(TRITON[request.param]) as target:
        yield target


def error_bound(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The bound [S, N] of the docstring; the centre is the mean of up to 64 columns without the two extremes."""
    N, D = mu.shape
    columns = mu[torch.arange(min(N, 64)) * N // min(N, 64)].sort(0).values
    centre = (columns[1:-1] if N > 2 else columns).mean(0)
    u = ((z - centre).abs()[:, None] + (mu - centre).abs()) * torch.exp(-0.5 * logvar)
    return (1 + D / 8) * 2**-20 * (u * u).sum(-1) / 2


def with_sigma(D: int, width: float, dtype: torch.dtype, S: int = 70, N: int = 150) -> Named:
    """Posteriors of that log-variance about standard normal means, and samples of them."""
    mu = draw(N, D, seed=1)
    logvar = width + 0.3 * draw(N, D, seed=2)
    j = torch.arange(S) % N
    z = mu[j] + torch.exp(logvar[j] / 2) * draw(S, D, seed=3)
    return {"z": z.to(dtype), "mu": mu.to(dtype), "logvar": logvar.to(dtype)}


def errors(inputs: Named, weights: ColumnWeights | None = None) -> tuple[Tensor, Tensor]:
    """Returns the error of each row in the mode, and what it may be: the log-sum-exp of log-densities moved by their
    bounds, one way and the other, and what float32 errs anyway, by the rule in helpers.py."""
    with fastvae.precision("tf32x3"):
        got = fastvae.agg_log_prob(**inputs, weights=weights).double()
    wide = {key: x.double() for key, x in inputs.items()}
    S, N = len(inputs["z"]), len(inputs["mu"])
    terms, bound = cross(**wide) + log_weights(None, weights, S, N), error_bound(**wide)
    exact = terms.logsumexp(1)
    most = torch.maximum((terms + bound).logsumexp(1) - exact, exact - (terms - bound).logsumexp(1))
    eps = torch.finfo(torch.float32).eps
    return (got - exact).abs(), most + 8 * eps * (1 + exact.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("D", "width"), [(3, -2.0), (10, -4.0), (64, -4.0), (33, 1.0)])
def test_error_is_within_its_bound(tensor_cores: Target, D: int, width: float, dtype: torch.dtype) -> None:
    error, bound = errors(with_sigma(D, width, dtype))
    assert (error <= bound).all(), (error / bound).max()
    assert bound.max() < 0.1  # nats: the bound says something


def test_it_is_not_the_exact_form(tensor_cores: Target) -> None:
    """Products of rounded numbers hold the bound above, and not the exact form."""
    inputs = with_sigma(64, -4.0, torch.float32)
    exact = fastvae.agg_log_prob(**inputs)
    assert not (errors(inputs)[0] == 0).all()
    with fastvae.precision("tf32x3"):
        assert not torch.equal(fastvae.agg_log_prob(**inputs), exact)
    assert torch.equal(fastvae.agg_log_prob(**inputs), exact)


def test_weights(tensor_cores: Target) -> None:
    inputs = with_sigma(5, -2.0, torch.float32)
    own = torch.arange(70) * 7 % 151 - 1
    for weights in (ColumnWeights(draw(150, seed=4).float(), own, -0.5, 0.5), ColumnWeights(-1.5, own, -math.inf)):
        error, bound = errors(inputs, weights)
        assert (error <= bound).all()
    with fastvae.precision("tf32x3"):
        assert (fastvae.agg_log_prob(**inputs, weights=ColumnWeights(-math.inf)) == -math.inf).all()


def test_ranges_of_columns(tensor_cores: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvae.kernels.triton import grids

    monkeypatch.setattr(grids, "_splits", lambda *_: 2)
    error, bound = errors(with_sigma(7, -2.0, torch.float32))
    assert (error <= bound).all()


@pytest.mark.parametrize("far", [1e3, 1e12, 3e38, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("key", ["z", "mu"])
def test_what_is_far_or_not_finite_is_exact(tensor_cores: Target, key: str, far: float) -> None:
    """A panel with such a number is computed by the direct form, and so gives what the exact mode does."""
    inputs = with_sigma(5, -2.0, torch.float32)
    inputs[key][3, 1] = far
    exact = fastvae.agg_log_prob(**inputs)
    with fastvae.precision("tf32x3"):
        got = fastvae.agg_log_prob(**inputs)
    assert torch.equal(got.isnan(), exact.isnan())
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert (got[~exact.isnan()] <= 20).all()


def test_gradients_are_exact(tensor_cores: Target) -> None:
    inputs = {key: x.requires_grad_() for key, x in with_sigma(5, -2.0, torch.float32).items()}
    with fastvae.precision("tf32x3"):
        gradients = evaluate(fastvae.agg_log_prob, inputs)[1:]
    for ours, exact in zip(gradients, evaluate(fastvae.agg_log_prob, inputs)[1:], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_no_effect_elsewhere(backend: Target) -> None:
    """Results are the same in float64, of other functions, and on other backends."""
    names = ["agg_log_prob_marginals", "cross_log_prob", "kl_gauss"]
    cases = [op_named("agg_log_prob", torch.float64), *(op_named(name, torch.float32) for name in names)]
    if backend.backend != "triton":
        cases.append(op_named("agg_log_prob", torch.float32))
    for op in cases:
        exact = evaluate(op.fast, op.inputs)
        with fastvae.precision("tf32x3"):
            assert_same(evaluate(op.fast, op.inputs), exact)


def test_the_choice() -> None:
    assert settings.current.precision == "exact"
    with fastvae.precision("tf32x3"):
        assert settings.current.precision == "tf32x3"
        with fastvae.precision("exact"):
            assert settings.current.precision == "exact"
        assert settings.current.precision == "tf32x3"
    assert settings.current.precision == "exact"
    mistakes: tuple[Any, ...] = ("tf32", 3, None, ["exact"], np.array(["exact", "tf32x3"]))
    for wrong in mistakes:
        with pytest.raises(ValueError, match="precision: expected one of exact, tf32x3, got"):
            fastvae.precision(wrong)
        assert settings.current.precision == "exact"
