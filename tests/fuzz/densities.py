"""The surfaces of mixtures, priors and likelihoods."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from calls import Call, Draw, surface
from support.helpers import LOG_2PI, aggregate, kl, log_normal
from torch import Tensor

import fastvae
from fastvae.models import likelihoods


def close(name: str, got: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    got, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (got, wanted))
    error = ((got - wanted).abs() / (1 + wanted.abs())).max()
    assert error < tolerance, f"{name}: {got.flatten()[:3].tolist()} where {wanted.flatten()[:3].tolist()} is right"


# Mixtures.


def mixture(draw: Draw, K: int, D: int) -> dict[str, Tensor]:
    return {
        "weights": torch.softmax(torch.randn(K, generator=draw.generator, dtype=torch.float64), 0),
        "means": draw.normal(K, D).double(),
        "variances": draw.normal(K, D, scale=0.3).double().clamp(-9, 9).exp(),
    }


def iterated(
    x: Tensor, weights: Tensor, means: Tensor, variances: Tensor, max_iter: int, reg_covar: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EM by its formulas: the parameters, and the smallest share N_k that a component ever had."""
    least = x.new_tensor(len(x))
    for _ in range(max_iter):
        r = (weights.log() + log_normal(x[:, None], means, variances.log()).sum(-1)).softmax(1)  # [S, K]
        n = r.sum(0)[:, None]  # [K, 1]
        least = torch.minimum(least, n.min())
        means = r.T @ x / n
        variances = (r.T[..., None] * (x - means[:, None]) ** 2).sum(1) / n + reg_covar
        weights = n[:, 0] / len(x)
    return weights, means, variances, least


@surface
def gaussian_mixture_from_a_start(draw: Draw) -> Call:
    K, D = draw.sizes(2, least=1, most=30)
    S = K + draw.choice((1, 16, 97))
    x = draw.normal(S, D, scale=1.5).clamp(-1e4, 1e4)  # near enough for every log p(x) to be finite
    given = {"x": x, "q": draw.probabilities(S, K), **mixture(draw, K, D)}
    if given["x"].dtype != torch.float64:  # a result is as exact as the points
        given = {name: value.float() if value.dtype == torch.float64 else value for name, value in given.items()}
    arguments: dict[str, Any] = {
        **given,
        "n_components": K,
        "max_iter": draw.choice((1, 2)),
        "reg_covar": draw.choice((1e-6 if given["x"].dtype == torch.float64 else 1e-3, 0.1)),
        "tol": 0.0,
    }

    def function(x: Any, q: Any, weights: Any, means: Any, variances: Any, n_components: Any, **options: Any) -> Any:
        fitted = fastvae.GaussianMixture(n_components, init=(weights, means, variances), **options).fit(x)
        scores = [
            fitted.score(x),
            fitted.complete_log_likelihood(x, q),
            fitted.elbo(x, q),
            fitted.bic(x) / S,
            fitted.aic(x) / S,
        ]
        parameters = [
            fitted.weights_,
            fitted.means_,
            fitted.variances_,
            fitted.score_samples(x),
            fitted.predict_proba(x),
        ]
        return [*parameters, torch.tensor(scores, dtype=torch.float64, device="cpu")]

    def formula(
        x: Tensor,
        q: Tensor,
        weights: Tensor,
        means: Tensor,
        variances: Tensor,
        max_iter: int,
        reg_covar: float,
        **_: Any,
    ) -> list[Tensor]:
        weights, means, variances = iterated(x, weights, means, variances, max_iter, reg_covar)[:3]
        log_joint = weights.log() + log_normal(x[:, None], means, variances.log()).sum(-1)  # [S, K]
        log_p, r = log_joint.logsumexp(1), log_joint.softmax(1)
        complete, n_free = (q * log_joint).sum(1).mean(), 2 * means.numel() + K - 1
        bound = complete - torch.special.xlogy(q, q).sum(1).mean()
        deviance = -2 * log_p.mean()
        scores = [log_p.mean(), complete, bound, deviance + n_free * math.log(S) / S, deviance + 2 * n_free / S]
        return [weights, means, variances, log_p, r, torch.stack(scores)]

    # The formulas know nothing of components that start anew where their share is no more than rounding.
    start = {name: given[name].double() for name in ("x", "weights", "means", "variances")}
    least = iterated(**start, max_iter=arguments["max_iter"], reg_covar=arguments["reg_covar"])[-1]
    known = not draw.extreme and least > (1e-12 if x.dtype == torch.float64 else 1e-4)
    return Call(
        function,
        arguments,
        formula if known else None,
        differentiable=False,
        costly=("max_iter",),
        roundings=1000,  # as EM takes differences of its own
    )


@surface
def gaussian_mixture(draw: Draw) -> Call:
    K, D = draw.sizes(2, least=1, most=30)
    x = draw.normal(K + draw.choice((0, 3, 97)), D)
    arguments = {
        "x": x,
        "n_components": K,
        "tol": draw.choice((0.0, 1e-3)),
        "max_iter": draw.choice((1, 5)),
        "n_init": draw.choice((1, 2)),
        "init": draw.choice(("kmeans++", "random")),
        "reg_covar": draw.choice((1e-6, 1e-3)),
        "seed": draw.choice((0, 7, -3, 2**40, None)),
        "n": draw.choice((1, 7)),
    }

    def function(x: Any, n_components: Any, n: Any, **options: Any) -> Any:
        fitted = fastvae.GaussianMixture(n_components, **options).fit(x)
        drawn, labels = fitted.sample(n, seed=options["seed"])
        return fitted, drawn, labels, fitted.predict(x), fitted.partial_fit(x).score(x)

    def check(result: Any, arguments: dict[str, Any]) -> None:
        fitted, drawn, labels, predicted, score = result
        close("weights_", fitted.weights_.sum(), 1.0)
        for name in ("means_", "variances_", "lower_bounds_"):
            assert torch.as_tensor(getattr(fitted, name)).isfinite().all(), f"{name} is not finite"
        assert (fitted.variances_ > 0).all(), "variances_"
        x = arguments["x"].double()
        log_p = aggregate(x, fitted.means_, fitted.variances_.log(), fitted.weights_.log())[0]
        close("score", score, log_p.mean())
        assert drawn.shape == (arguments["n"], D), "the shape of a sample"
        for at in (labels, predicted):
            assert ((at >= 0) & (at < K)).all(), "a component that is none"

    costly = ("max_iter", "n_init", "n")
    checked = None if draw.extreme else check
    return Call(function, arguments, check=checked, costly=costly, draws=arguments["seed"] is None)


# Priors and likelihoods.


def density(draw: Draw, make: Any, formula: Any, D: int, parameters: dict[str, Any]) -> Call:
    """A prior's log-density, marginals and, where it has one, KL; and the shape of a sample."""
    rows = draw.sizes(draw.choice((1, 2)), most=60)
    z = draw.normal(*rows, D)
    z = z.float() if z.dtype == torch.float64 else z  # what parameters are is of the prior's own dtype, float32

    def function(z: Any, n: Any, **parameters: Any) -> Any:
        prior = make(**parameters)
        return prior.log_prob(z), prior.marginal_log_prob(z), prior.sample(n).shape

    def of_dims(z: Tensor, n: int, **parameters: Any) -> list[Tensor]:
        joint, marginals = formula(z.reshape(math.prod(rows), D), **parameters)
        return [joint.reshape(rows), marginals.reshape(*rows, D)]

    def check(result: Any, arguments: dict[str, Any]) -> None:
        assert result[2] == (arguments["n"], D), "the shape of a sample"

    arguments = {"z": z, **parameters, "n": draw.choice((0, 1, 5))}
    return Call(
        function, arguments, of_dims, check, differentiable=False, draws=True, own_device=True, roundings=20
    )  # as z and means are not centred


@surface
def standard_normal(draw: Draw) -> Call:
    def formula(z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        return (marginals := -0.5 * (z**2 + LOG_2PI)).sum(-1), marginals

    D = draw.choice((1, 3, 16))
    return density(draw, fastvae.StandardNormal, formula, D, {"dim": D})


@surface
def diagonal_gaussian(draw: Draw) -> Call:
    D = draw.choice((1, 3, 16))
    mu, logvar = (x.float() for x in draw.posteriors(D).values())
    # These are no arguments, so that nothing asks whether the formula holds for values that are extreme.
    mu, logvar = mu.clamp(-1e4, 1e4), logvar.clamp(-60, 60)

    def make(dim: Any) -> fastvae.DiagonalGaussian:
        prior = fastvae.DiagonalGaussian(dim)
        with torch.no_grad():
            prior.mu.copy_(mu)
            prior.logvar.copy_(logvar)
        return prior

    def formula(z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        return (marginals := log_normal(z, mu.to(z), logvar.to(z))).sum(-1), marginals

    return density(draw, make, formula, D, {"dim": D})


@surface
def kl_of_a_prior(draw: Draw) -> Call:
    B, D = draw.sizes(2, least=1)
    reduction = draw.choice(("batchmean", "dim", "sample"))
    own = {name: x.float().clamp(-60, 60) for name, x in draw.posteriors(D).items()} if draw.chance(0.5) else None

    def function(mu: Any, logvar: Any, reduction: Any, free_bits: Any) -> Any:
        prior: Any = fastvae.StandardNormal(D)
        if own is not None:
            prior = fastvae.DiagonalGaussian(D)
            with torch.no_grad():
                prior.mu.copy_(own["mu"])
                prior.logvar.copy_(own["logvar"])
        return prior.kl(mu, logvar, reduction=reduction, free_bits=free_bits)

    def formula(mu: Tensor, logvar: Tensor, reduction: str, free_bits: float) -> list[Tensor]:
        prior = (torch.zeros_like(mu),) * 2 if own is None else [x.to(mu) for x in own.values()]
        elements = kl(mu, logvar, *prior)
        dims = elements.mean(0).clamp(min=free_bits)
        return [{"batchmean": dims.sum(), "dim": dims, "sample": elements.sum(1)}[reduction]]

    free_bits = 0.0 if reduction == "sample" else draw.choice((0.0, 0.5))
    arguments = {**draw.posteriors(B, D), "reduction": reduction, "free_bits": free_bits}
    return Call(function, arguments, formula, own_device=True)


@surface
def mixture_prior(draw: Draw) -> Call:
    K, D = draw.sizes(2, least=1, most=100)

    def formula(z: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        return aggregate(z, means, variances.log(), weights.log())

    parameters = {name: x.float() for name, x in mixture(draw, K, D).items()}
    return density(draw, fastvae.MixturePrior.from_parameters, formula, D, parameters)


@surface
def mixture_prior_as_made(draw: Draw) -> Call:
    K, D = draw.sizes(2, least=1, most=100)
    arguments = {"n_components": K, "dim": D, "n": draw.choice((0, 1, 5))}

    def function(n_components: Any, dim: Any, n: Any) -> Any:
        prior = fastvae.MixturePrior(n_components, dim)
        return prior.sample(n), prior.log_prob(prior.mu)

    return Call(function, arguments, costly=("n", "dim", "n_components"), draws=True, own_device=True)


@surface
def vamp_prior(draw: Draw) -> Call:
    K, D = draw.sizes(2, least=1, most=100)
    to_mu, to_logvar = (torch.randn(4, D, generator=draw.generator) for _ in range(2))

    def make(**options: Any) -> fastvae.VampPrior:
        return fastvae.VampPrior(encoder=lambda u: (u @ to_mu.to(u), u @ to_logvar.to(u)), **options)

    def formula(z: Tensor, n_components: int, x: Tensor, limits: Any) -> tuple[Tensor, Tensor]:
        u = x if limits is None else x.clamp(*limits)
        return aggregate(z, u @ to_mu.to(u), u @ to_logvar.to(u))

    x = draw.normal(K, 4, scale=0.5).float()
    return density(draw, make, formula, D, {"n_components": K, "x": x, "limits": draw.choice((None, (-0.5, 0.5)))})


def data(draw: Draw, *shape: int) -> tuple[Tensor, str, dict[str, Any]]:
    """x, the likelihood that it has a probability under, and its options."""
    kind, n = draw.choice(("bernoulli", "binomial", "gaussian")), draw.choice((1, 16, 255))
    if kind == "gaussian":
        return draw.normal(*shape).float(), kind, {"variance": draw.choice((0.25, 1.0, 3)), "learned": draw.chance(0.5)}
    counts = draw.integers(0, 2 if kind == "bernoulli" else n + 1, *shape)
    return counts.float(), kind, {"total_count": n} if kind == "binomial" else {}


def log_likelihood(
    kind: str, x: Tensor, output: Tensor, total_count: int = 1, variance: float = 1.0, **_: Any
) -> Tensor:
    if kind == "gaussian":
        return -0.5 * ((x - output) ** 2 / variance + math.log(2 * math.pi * variance))
    n = torch.tensor(float(total_count), dtype=torch.float64)
    x64 = x.double()
    choose = torch.lgamma(n + 1) - torch.lgamma(x64 + 1) - torch.lgamma(n - x64 + 1)
    return choose.to(output.dtype) + x * F.logsigmoid(output) + (n.to(output.dtype) - x) * F.logsigmoid(-output)


@surface
def likelihood(draw: Draw) -> Call:
    shape = draw.sizes(2)
    x, kind, options = data(draw, *shape)

    def function(x: Any, output: Any, **options: Any) -> Any:
        made = {"bernoulli": likelihoods.Bernoulli, "binomial": likelihoods.Binomial, "gaussian": likelihoods.Gaussian}
        made = made[kind](**options)
        made.check(x)
        return made.log_prob(x, output), made.mean(output).shape, made.sample(output).shape

    def formula(x: Tensor, output: Tensor, **options: Any) -> list[Tensor]:
        return [log_likelihood(kind, x, output, **options)]

    output = draw.normal(*shape)
    output = output.float() if options.get("learned") else output  # as the parameter is
    arguments = {"x": x, "output": output, **options}
    return Call(function, arguments, formula, differentiable=False, draws=True, own_device=True)
