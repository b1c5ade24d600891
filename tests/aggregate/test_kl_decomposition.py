"""kl_decomposition: its terms by every estimator, held to brute force, to each other and to what they mean."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Target
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    LOG_2PI,
    SEARCH_MARGIN,
    Expected,
    Named,
    assert_accurate,
    cast,
    draw,
    evaluate,
    log_normal,
    samples,
)
from test_estimators import NORMALIZED, batches, weight_matrix
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae import KLDecomposition, kl_decomposition
from fastvae.aggregate.estimators import ESTIMATORS
from fastvae.backends import backend_for

DATA = Path(__file__).parents[1] / "data"
ANCHORS = json.loads((DATA / "anchors.json").read_text())
DIFFERENTIABLE = ("mi", "agg_kl", "tc", "dim_kl", "prior_factorization", "kl", "entropy")


@pytest.fixture
def arrays(backend: Target) -> Named:
    with np.load(DATA / "anchors.npz") as archive:
        return {name: torch.from_numpy(archive[name]).to(torch.get_default_device()) for name in archive.files}


class Correlated(nn.Module):
    """A Gaussian prior that is no product over dimensions."""

    def __init__(self, scale: Tensor):
        super().__init__()
        self.scale = scale

    def log_prob(self, z: Tensor) -> Tensor:
        assert z.ndim == 2
        return MultivariateNormal(torch.zeros_like(z[0]), scale_tril=self.scale.tril()).log_prob(z)

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        assert z.ndim == 2
        return log_normal(z, torch.zeros_like(z[0]), (self.scale.tril() ** 2).sum(1).log())


class Giving(fastvae.StandardNormal):
    """N(0, I), but for a method that gives something else, whatever z is."""

    def __init__(self, **results: Any):
        super().__init__()
        for method, result in results.items():
            setattr(self, method, lambda z, result=result: result)


def mixing(D: int) -> Tensor:
    return (torch.eye(D).double() + 0.5 * draw(D, D, seed=40).tril(-1)).requires_grad_()


def formula(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    log_w: Tensor,  # [S, N]
    own: Tensor,
    prior: Correlated | None = None,
    analytic: bool = False,
) -> dict[str, Tensor]:
    """The terms as estimators.py lists them, broadcast."""
    pairs = log_normal(z[:, None], mu, logvar)  # [S, N, D]
    conditional = log_normal(z, mu[own], logvar[own]).sum(-1)
    if analytic:
        conditional = -0.5 * (logvar[own] + LOG_2PI + 1).sum(-1)
    joint = torch.logsumexp(log_w.to(z) + pairs.sum(-1), 1)
    marginals = torch.logsumexp(log_w.to(z)[..., None] + pairs, 1)
    prior_marginals = -0.5 * (LOG_2PI + z**2) if prior is None else prior.marginal_log_prob(z)
    prior_joint = prior_marginals.sum(-1) if prior is None else prior.log_prob(z)
    return {
        "mi": (conditional - joint).mean(),
        "agg_kl": (joint - prior_joint).mean(),
        "tc": (joint - marginals.sum(-1)).mean(),
        "dim_kl": (marginals - prior_marginals).mean(0),
        "prior_factorization": (prior_joint - prior_marginals.sum(-1)).mean(),
        "kl": (conditional - prior_joint).mean(),
        "entropy": -joint.mean(),
    }


def differentiable(terms: KLDecomposition | dict[str, Tensor]) -> list[Tensor]:
    return [(terms if isinstance(terms, dict) else terms._asdict())[name] for name in DIFFERENTIABLE]


def telescoped(terms: KLDecomposition) -> Tensor:
    return terms.mi + terms.tc + terms.dim_kl.sum() - terms.prior_factorization


# Anchors: brute force that shares nothing with the library.


@pytest.mark.parametrize("estimator", ["full", *(e for e in ESTIMATORS if e != "loo")])
def test_anchors(backend: Target, arrays: Named, estimator: str) -> None:
    """A population of 1,536 posteriors, and a batch of 96 of them."""
    N, full = ANCHORS["population"]["dataset_size"], estimator == "full"
    expected, B = (ANCHORS["full"], N) if full else (ANCHORS["batch"][estimator], ANCHORS["population"]["B"])
    kind = "uniform" if full else estimator
    inputs = {name: arrays[name][:B] for name in ("z", "mu", "logvar")}
    terms = kl_decomposition(**inputs, estimator=kind, dataset_size=N)
    for name, anchor in {"mi": "mi", "tc": "tc", "dim_kl": "dwkl", "kl": "kl_mc", "entropy": "entropy"}.items():
        value = torch.tensor(expected[anchor], dtype=torch.float64)
        torch.testing.assert_close(getattr(terms, name), value, rtol=0, atol=1e-9)
    entropy = fastvae.agg_entropy(**inputs, estimator=kind, dataset_size=N)
    assert entropy.item() == pytest.approx(expected["entropy"], abs=1e-9)
    assert terms.estimator == kind
    assert terms.saturation.item() == pytest.approx(math.exp(expected["mi"]) / B)
    weights = fastvae.estimator_weights(estimator=kind, n_columns=B, dataset_size=N, own=torch.arange(B))
    joint, marginals = fastvae.agg_log_prob_marginals(**inputs, weights=weights)
    torch.testing.assert_close(joint, arrays["full_log_qz" if full else f"batch_{kind}_log_qz"], rtol=0, atol=1e-9)
    if full:
        torch.testing.assert_close(marginals, arrays["full_log_qzd"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_anchors_in_float32(backend: Target, arrays: Named, estimator: str) -> None:
    inputs = {name: arrays[name][:96].float() for name in ("z", "mu", "logvar")}
    log_w = weight_matrix(estimator, 96, 1536).log()
    assert_accurate(
        lambda **x: differentiable(kl_decomposition(**x, estimator=estimator, dataset_size=1536)),
        lambda **x: differentiable(formula(**x, log_w=log_w, own=torch.arange(96))),
        inputs,
        ("z", "mu"),
    )


@functools.cache
def in_float32(device: torch.device) -> Expected:
    """The whole population's terms, by the rule: gigabytes when broadcast with gradients, so without."""
    with np.load(DATA / "anchors.npz") as archive:
        inputs = {n: torch.from_numpy(archive[n]).float().to(device) for n in ("z", "mu", "logvar")}
    N = len(inputs["z"])
    log_w = torch.full((N, 1), -math.log(N), dtype=torch.float64, device=device)
    return Expected(
        lambda **x: differentiable(formula(**x, log_w=log_w, own=torch.arange(N, device=device))), inputs, ("z", "mu")
    )


def test_anchors_of_the_whole_population_in_float32(backend: Target, arrays: Named) -> None:
    expected = in_float32(torch.get_default_device())
    for name, anchor in {"mi": "mi", "tc": "tc", "kl": "kl_mc", "entropy": "entropy"}.items():
        exact = expected.exact[DIFFERENTIABLE.index(name)].item()
        assert exact == pytest.approx(ANCHORS["full"][anchor], abs=1e-6)  # of inputs rounded to float32
    expected.check(differentiable(kl_decomposition(*(arrays[n].float() for n in ("z", "mu", "logvar")))))


def test_anchors_of_the_kl(backend: Target, arrays: Named) -> None:
    posteriors = {name: arrays[name] for name in ("mu", "logvar")}
    elements = fastvae.kl_gauss(**posteriors, reduction="none")
    torch.testing.assert_close(elements, arrays["kl"], rtol=0, atol=1e-9)
    assert fastvae.kl_gauss(**posteriors).item() == pytest.approx(ANCHORS["kl_mean"], abs=1e-9)


# Against the formulas.


@pytest.mark.parametrize(
    ("estimator", "analytic"), [*((e, False) for e in (None, *ESTIMATORS)), ("uniform", True), ("loo", True)]
)
@pytest.mark.parametrize("shape", ["[B, D]", "[L, B, D]", "[S, D]"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_terms(backend: Target, shape: str, estimator: str | None, dtype: torch.dtype, analytic: bool) -> None:
    B, N, L = 11, 60, 1 if shape == "[B, D]" else 3
    S = 20 if shape == "[S, D]" else L * B
    own = torch.arange(S) % B
    log_w = weight_matrix(estimator or "stratified", B, N)[own].log()
    options: dict[str, Any] = {"dataset_size": N, "estimator": estimator, "analytic_conditional": analytic}

    def fast(z: Tensor, **x: Any) -> list[Tensor]:
        given = own if shape == "[S, D]" else None
        z = z.reshape(L, B, -1) if shape == "[L, B, D]" else z
        return differentiable(kl_decomposition(z, **x, **options, own=given))

    inputs = samples(S, B, 5, dtype)
    expected = Expected(
        lambda **x: differentiable(formula(**x, log_w=log_w, own=own, analytic=analytic)), inputs, ("z", "mu")
    )
    if dtype == torch.float64:
        # All rows share a few log-weights, so that rounding these does not average out, and the tc is off by it as
        # often as there are dimensions: by 1.4e-15 in the formula and 1.8e-15 here (against long doubles), while the
        # error in float32, by which the rule goes, is as it happens.
        expected.tolerance[DIFFERENTIABLE.index("tc")] *= SEARCH_MARGIN
    expected.check(evaluate(fast, inputs))


@pytest.mark.parametrize("estimator", ["uniform", "stratified", "loo"])
def test_a_prior_that_does_not_factorize(backend: Target, estimator: str) -> None:
    own = torch.arange(20) % 11
    log_w = weight_matrix(estimator, 11, 60)[own].log()
    inputs = {**samples(20, 11, 5, torch.float64), "scale": mixing(5)}

    def terms(scale: Tensor, **x: Any) -> KLDecomposition:
        prior: Any = Correlated(scale)  # which has no sample: not needed here
        return kl_decomposition(**x, estimator=estimator, dataset_size=60, own=own, prior=prior)

    def expected(scale: Tensor, **x: Any) -> list[Tensor]:
        return differentiable(formula(**x, log_w=log_w, own=own, prior=Correlated(scale)))

    assert_accurate(lambda **x: differentiable(terms(**x)), expected, inputs, ("z", "mu"))
    assert terms(**inputs).prior_factorization.abs() > 0.1
    torch.testing.assert_close(telescoped(terms(**inputs)), terms(**inputs).kl, rtol=0, atol=1e-12)


def test_a_prior_that_is_the_aggregate_posterior(backend: Target, arrays: Named) -> None:
    """A prior that is the aggregate posterior: agg_kl and dim_kl are 0, its factorization is the total correlation."""
    z, mu, logvar = (arrays[name] for name in ("z", "mu", "logvar"))

    class Aggregate:
        def log_prob(self, z: Tensor) -> Tensor:
            return fastvae.agg_log_prob(z, mu, logvar)

        def marginal_log_prob(self, z: Tensor) -> Tensor:
            return fastvae.agg_log_prob_marginals(z, mu, logvar)[1]

    terms = kl_decomposition(z, mu, logvar, prior=Aggregate())  # type: ignore[arg-type]
    zero = torch.zeros(8, dtype=torch.float64)
    torch.testing.assert_close(terms.agg_kl, zero[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(terms.dim_kl, zero, rtol=0, atol=1e-12)
    assert terms.prior_factorization.item() == pytest.approx(ANCHORS["full"]["tc"], abs=1e-9)
    assert terms.kl.item() == pytest.approx(ANCHORS["full"]["mi"], abs=1e-9)


def test_standard_normal_is_the_default_prior(backend: Target) -> None:
    inputs = {n: x.detach() for n, x in samples(11, 11, 5, torch.float64).items()}
    default, given = (kl_decomposition(**inputs, prior=p) for p in (None, fastvae.StandardNormal()))
    for a, b in zip(default[:-1], given[:-1], strict=True):  # the default's terms are computed in one call
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_leading_axes_are_batches(backend: Target) -> None:
    """The terms are the means of theirs, with one sample or several of each posterior."""
    z, mu, logvar = draw(3, 2, 11, 5, seed=1), draw(2, 11, 5, seed=2), draw(2, 11, 5, seed=3)
    for together, each in (
        (kl_decomposition(z[0], mu, logvar, estimator="loo"), [z[0], mu, logvar]),
        (kl_decomposition(z, mu, logvar, estimator="loo"), [z.movedim(1, 0), mu, logvar]),
    ):
        parts = [kl_decomposition(*x, estimator="loo") for x in zip(*each, strict=True)]
        for name in DIFFERENTIABLE:
            torch.testing.assert_close(getattr(together, name), sum(getattr(p, name) for p in parts) / 2)


# What the terms mean.


@given(batch=batches, estimator=st.sampled_from(ESTIMATORS), dtype=st.sampled_from(DTYPES))
def test_the_terms_add_up(
    backend: Target, batch: tuple[int, int, float, int], estimator: str, dtype: torch.dtype
) -> None:
    B, D, scale, seed = batch
    inputs = {n: x.detach() for n, x in samples(B, B, D, dtype, scale, seed).items()}
    terms = kl_decomposition(**inputs, estimator=estimator, dataset_size=60)
    log_p = -0.5 * (LOG_2PI + inputs["z"].double() ** 2).sum(-1)
    conditional = log_normal(**{n: x.double() for n, x in inputs.items()}).sum(-1)
    sizes = (terms.mi, terms.tc, terms.dim_kl, log_p.abs().max(), conditional.abs().max())
    slack = 16 * torch.finfo(dtype).eps * sum(t.abs().sum() for t in sizes)
    assert (telescoped(terms) - terms.kl).abs() <= slack
    assert (terms.kl - (conditional - log_p).mean()).abs() <= slack


def test_batches_are_a_sandwich_of_the_mi(backend: Target, arrays: Named) -> None:
    """The MI lies, in expectation, between the uniform estimate and the one that leaves the own column out."""
    inputs = {n: arrays[n].reshape(16, 96, 8) for n in ("z", "mu", "logvar")}
    below, above = (kl_decomposition(**inputs, estimator=e).mi.item() for e in ("uniform", "loo"))
    assert below < ANCHORS["full"]["mi"] - 0.5
    assert above > ANCHORS["full"]["mi"] + 0.5


def test_full_data_mi_is_between_zero_and_its_bounds(backend: Target, arrays: Named) -> None:
    """The MI of the full data is in [0, min(log N, Div)], up to the Monte Carlo error of its mean."""
    inputs = {n: arrays[n] for n in ("z", "mu", "logvar")}
    mi = fastvae.log_prob_gauss(**inputs) - fastvae.agg_log_prob(**inputs)
    error = 4 * (mi.std() / math.sqrt(len(mi))).item()
    div = fastvae.kl_gauss(arrays["mu"], arrays["logvar"]).item()
    assert -error <= kl_decomposition(**inputs).mi.item() <= min(math.log(len(mi)), div) + error


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_identical_posteriors_at_the_prior_have_nothing_to_tell(backend: Target, estimator: str) -> None:
    B, N = 31, 60
    zeros = torch.zeros(B, 7, dtype=torch.float64)
    terms = kl_decomposition(draw(B, 7), zeros, zeros, estimator=estimator, dataset_size=N)
    row_sum = 0.0 if estimator in NORMALIZED else -math.log(N)
    expected = {"mi": -row_sum, "tc": -6 * row_sum, "kl": 0.0, "agg_kl": row_sum, "prior_factorization": 0.0}
    for name, value in expected.items():
        assert getattr(terms, name).item() == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(terms.dim_kl, zeros[0] + row_sum, rtol=0, atol=1e-12)


def test_the_closed_form_of_the_conditional_is_its_mean(backend: Target, arrays: Named) -> None:
    mu, logvar = (arrays[n][:96] for n in ("mu", "logvar"))
    z = fastvae.reparameterize(mu, logvar, 1000, seed=0)
    sampled, closed = (kl_decomposition(z, mu, logvar, analytic_conditional=a) for a in (False, True))
    error = math.sqrt(8 / 2 / z[..., 0].numel())  # log q(z|x) has variance D / 2
    assert abs(sampled.mi - closed.mi) < 4 * error
    assert sampled.mi != closed.mi
    far = kl_decomposition(z[0], 100 * mu, logvar - 20, analytic_conditional=True)
    assert far.mi > math.log(96)  # the ceiling holds for the sampled form only


# How it computes.


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, list | tuple) else [output]:
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return output


@pytest.mark.parametrize("own", [False, True])
def test_one_pass_and_nothing_of_samples_by_posteriors(
    backend: Target, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    S = N = 700
    inputs, calls = samples(S, N, 3, torch.float32), list[str]()
    module = backend_for(inputs["z"].device)
    names = ["agg_log_prob", "agg_log_prob_marginals", "cross_log_prob", "agg_log_prob_marginals_backward"]
    for name in [*names, "kl_decomposition", "kl_decomposition_backward"]:
        kernel = getattr(module, name, None)
        if kernel is None:
            continue

        def noted(*arguments: Any, name: str = name, kernel: Any = kernel) -> Any:
            calls.append(name)
            return kernel(*arguments)

        monkeypatch.setattr(module, name, noted)
    with Largest() as largest:
        terms = kl_decomposition(**inputs, estimator="loo", own=torch.arange(S) if own else None)
        (terms.mi + terms.tc + terms.dim_kl.sum()).backward()
    whole = "agg_log_prob_marginals" if own or not hasattr(module, "kl_decomposition") else "kl_decomposition"
    assert calls == [whole, f"{whole}_backward"]
    if backend.backend == "native":  # the reference computes in chunks of up to 64 MiB
        assert largest.elements <= S * 3


@pytest.mark.parametrize("analytic", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(backend: Target, estimator: str, analytic: bool) -> None:
    inputs, own = samples(5, 4, 3, torch.float64), torch.tensor([0, 2, 2, 3, 0])
    options: dict[str, Any] = {"estimator": estimator, "dataset_size": 60, "analytic_conditional": analytic}

    def terms(z: Tensor, mu: Tensor, logvar: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        prior: Any = Correlated(scale)
        return tuple(differentiable(kl_decomposition(z, mu, logvar, own=own, prior=prior, **options)))

    torch.autograd.gradcheck(terms, (*inputs.values(), mixing(3)), fast_mode=backend.slow)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("shape", "dynamic"), [("[B, D]", False), ("[L, B, D]", True), ("[S, D]", True)])
def test_compile(shape: str, dynamic: bool) -> None:
    prior = fastvae.StandardNormal()

    def terms(z: Tensor, mu: Tensor, logvar: Tensor) -> list[Tensor]:
        own = torch.arange(z.shape[0]) % mu.shape[0] if shape == "[S, D]" else None
        first = kl_decomposition(z, mu, logvar, dataset_size=60, own=own, estimator="mss")
        second = kl_decomposition(z, mu, logvar, own=own, prior=prior, analytic_conditional=True)
        assert (first.estimator, second.estimator) == ("mss", "uniform")
        return differentiable(first) + differentiable(second)

    compiled = torch.compile(terms, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B, D in ((11, 5), (9, 4)):
        inputs = samples({"[B, D]": B, "[L, B, D]": 3 * B, "[S, D]": 20}[shape], B, D, torch.float64)
        if shape == "[L, B, D]":
            inputs["z"] = inputs["z"].detach().view(3, B, D).requires_grad_()
        for ours, eager in zip(evaluate(compiled, inputs), evaluate(terms, inputs), strict=True):
            ulps = 4e-15 if dynamic else 0  # of the logarithm of a symbolic batch size, log2 times ln 2
            torch.testing.assert_close(ours, eager, rtol=ulps, atol=ulps)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_sample_of_no_column_gives_nan_where_values_are_not_looked_at() -> None:
    inputs = {n: x.detach() for n, x in samples(5, 4, 3, torch.float64).items()}
    compiled = torch.compile(kl_decomposition, fullgraph=True, backend="aot_eager")
    for nowhere in (-1, 4):
        terms = compiled(**inputs, own=torch.tensor([0, 1, nowhere, 3, 0]))
        assert terms.mi.isnan()
        assert terms.tc.isfinite()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_half_precision_sums_in_float32(backend: Target, estimator: str) -> None:
    inputs = cast(samples(11, 11, 5, torch.float64), torch.bfloat16)
    own, log_w = torch.arange(11), weight_matrix(estimator, 11, 60).log()
    results = evaluate(lambda **x: differentiable(kl_decomposition(**x, estimator=estimator, dataset_size=60)), inputs)
    assert [r.dtype for r in results] == [torch.float32] * len(DIFFERENTIABLE) + [torch.bfloat16] * 3
    exact = evaluate(lambda **x: differentiable(formula(**x, log_w=log_w, own=own)), cast(inputs, torch.float64))
    for got, wanted in zip(results[: len(DIFFERENTIABLE)], exact, strict=False):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    mixed = inputs | {"mu": inputs["mu"].detach().double()}
    assert {t.dtype for t in differentiable(kl_decomposition(**mixed))} == {torch.float64}


@pytest.mark.parametrize(
    ("error", "named", "changed"),
    [
        (TypeError, "z", {"z": None}),
        (TypeError, "mu", {"mu": [[0.0]]}),
        (ValueError, "logvar", {"logvar": torch.zeros(4, 2)}),
        (ValueError, "z", {"z": torch.zeros(4, 2)}),
        (ValueError, "own", {"z": torch.zeros(5, 3)}),  # for the uniform estimator too
        (ValueError, "own", {"own": torch.tensor([0, 1, 2, -1])}),
        (ValueError, "own", {"own": torch.tensor([0, 1, 2, 4])}),
        (ValueError, "own", {"own": torch.arange(3)}),
        (TypeError, "own", {"own": [0, 1, 2, 3]}),
        (ValueError, "estimator", {"estimator": "LOO"}),
        (ValueError, "dataset_size", {"estimator": "mss"}),
        (ValueError, "dataset_size", {"estimator": "loo", "dataset_size": 3}),
        (TypeError, "prior", {"prior": torch.zeros(3)}),
        (TypeError, "prior", {"prior": torch.distributions.Normal(0.0, 1.0)}),
        (TypeError, "prior", {"prior": fastvae.StandardNormal}),
        (ValueError, "prior", {"prior": Giving(log_prob=torch.zeros(4, 3))}),
        (ValueError, "prior", {"prior": Giving(log_prob=torch.zeros(4, 1))}),  # would broadcast to [4, 4]
        (ValueError, "prior", {"prior": Giving(log_prob=torch.zeros(()))}),
        (TypeError, "prior", {"prior": Giving(log_prob=0.0)}),
        (ValueError, "prior", {"prior": Giving(marginal_log_prob=torch.zeros(4))}),
        (ValueError, "prior", {"prior": Giving(marginal_log_prob=torch.zeros(4, 1))}),
    ],
    ids=str,
)
def test_errors(error: type[Exception], named: str, changed: dict[str, Any]) -> None:
    good = {name: torch.zeros(4, 3) for name in ("z", "mu", "logvar")}
    with pytest.raises(error, match=rf"^{named}: .*expected"):
        kl_decomposition(**{**good, **changed})
