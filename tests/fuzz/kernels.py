"""The surfaces made of kernels: ops, estimators, bounds and information."""

import math
from typing import Any

import torch
from calls import Call, Draw, surface
from support.helpers import LOG_2PI, accumulated, aggregate, cross, flattened, kl, log_normal, log_weights, sample
from support.ops import bernoulli
from torch import Tensor

import fastvae
from fastvae import ColumnWeights
from fastvae.aggregate.estimators import ESTIMATORS
from fastvae.backends.contract import REDUCTIONS
from fastvae.ops.bernoulli_log_prob import bernoulli_log_prob as fused_bernoulli


def promoted(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return accumulated(dtype)


@surface
def bernoulli_log_prob(draw: Draw) -> Call:
    shape = draw.sizes(draw.choice((1, 2, 2, 3)))
    lead = draw.choice(((), (1,), (3,), (2, 2)))
    arguments = {"x": draw.normal(*shape).sigmoid(), "logits": draw.normal(*lead, *shape, scale=3.0)}

    def formula(x: Tensor, logits: Tensor) -> list[Tensor]:
        return [bernoulli(x[..., None].flatten(1), logits[..., None].flatten(len(lead) + 1))]

    return Call(fused_bernoulli, arguments, formula)


@surface
def kl_gauss(draw: Draw) -> Call:
    reduction = draw.choice(REDUCTIONS)
    shape = draw.sizes(draw.choice((1, 2, 2, 3)), least=0 if reduction in ("none", "sample", "sum") else 1)
    D = shape[-1]
    priors = [None, (D,), (1,), tuple(shape), (1,) * (len(shape) - 1) + (D,)]
    given = {name: draw.choice(priors) for name in ("prior_mu", "prior_logvar")}
    free_bits = draw.choice((0.0, 0.0, 0.25)) if reduction not in ("none", "sample") else 0.0
    arguments = {
        **draw.posteriors(*shape),
        **{name: None if s is None else draw.normal(*s) for name, s in given.items()},
        "reduction": reduction,
        "free_bits": free_bits,
    }

    def formula(
        mu: Tensor, logvar: Tensor, prior_mu: Any, prior_logvar: Any, reduction: str, free_bits: float
    ) -> list[Tensor]:
        zero = torch.zeros_like(mu)
        elements = kl(
            mu, logvar, zero if prior_mu is None else prior_mu, zero if prior_logvar is None else prior_logvar
        )
        rows = math.prod(shape[:-1])
        dims = (elements.flatten(0, -2) if elements.ndim > 1 else elements[None]).sum(0) / max(rows, 1)
        dims = dims.clamp(min=free_bits) if free_bits else dims
        total = dims.sum()
        return [
            {
                "none": elements,
                "sample": elements.sum(-1),
                "dim": dims,
                "sum": total * rows,
                "mean": total / max(D, 1),
                "batchmean": total,
            }[reduction]
        ]

    return Call(fastvae.kl_gauss, arguments, formula)


def sampling(draw: Draw, function: Any, **options: Any) -> Call:
    shape = draw.sizes(draw.choice((1, 2, 2, 3)), most=5000)
    n_samples, seed = draw.choice((None, 1, 3, 0)), draw.choice((0, 7, -3, 2**64 - 1, 2**40))
    arguments = {**draw.posteriors(*shape), "n_samples": n_samples, "seed": seed, **options}
    zero = torch.zeros(shape, dtype=promoted(arguments["mu"], arguments["logvar"]))
    eps = fastvae.reparameterize(zero, zero, n_samples, seed=seed)

    def formula(mu: Tensor, logvar: Tensor, outputs: tuple[str, ...] = ("z",), **_: Any) -> list[Tensor]:
        names = ("z", "log_q", "log_p", "kl")
        return [x for name, x in zip(names, sample(mu, logvar, eps), strict=True) if name in outputs]

    return Call(function, arguments, formula)


@surface
def reparameterize(draw: Draw) -> Call:
    return sampling(draw, fastvae.reparameterize)


@surface
def sample_gauss(draw: Draw) -> Call:
    names = draw.sample(("z", "log_q", "log_p", "kl"), draw.randint(1, 4))
    return sampling(draw, fastvae.sample_gauss, outputs=tuple(names))


@surface
def log_prob_gauss(draw: Draw) -> Call:
    shape = draw.sizes(draw.choice((1, 2, 3)))

    def part() -> list[int]:
        """A shape that broadcasts to it; D stays."""
        return [1 if draw.chance(0.2) else n for n in shape[draw.randrange(len(shape)) : -1]] + shape[-1:]

    posteriors = {"mu": draw.normal(*part()), "logvar": draw.normal(*part())}
    return Call(
        fastvae.log_prob_gauss,
        {"z": draw.normal(*shape), **posteriors},
        lambda z, mu, logvar: [log_normal(z, mu, logvar).sum(-1)],
    )


def pairs(draw: Draw, least: int = 0) -> dict[str, Tensor]:
    """z with mu and logvar in one of the forms that they come in."""
    S, N, D = draw.sizes(3, least)
    form = draw.choice(("rows", "rows", "rows", "several", "batches"))
    posteriors = draw.posteriors(N, D)
    if form == "several":
        z = draw.samples(2 * N, **posteriors).unflatten(0, (2, N)) if N else draw.normal(2, 0, D)
    else:
        z = draw.samples(S, **posteriors)
    if form == "batches":
        z, posteriors = torch.stack((z, -z)), {name: torch.stack((x, -x)) for name, x in posteriors.items()}
    return {"z": z, **posteriors}


@surface
def cross_log_prob(draw: Draw) -> Call:
    def formula(z: Tensor, mu: Tensor, logvar: Tensor) -> list[Tensor]:
        return [cross(flattened(z, mu), mu, logvar)]

    return Call(fastvae.cross_log_prob, pairs(draw), formula, centred=("z", "mu"))


def aggregated(draw: Draw, name: str, n_results: int, **options: Any) -> Call:
    arguments: dict[str, Any] = pairs(draw)
    S, N = flattened(arguments["z"], arguments["mu"]).shape[-2], arguments["mu"].shape[-2]
    log_w: Any = draw.choice((None, -math.log(max(N, 1)), 0.0, "columns", "columns"))
    if log_w == "columns":
        log_w = draw.normal(N)
        log_w[draw.integers(0, N, int(N > 1 and draw.chance(0.3)))] = -math.inf
    own = None if log_w is None or draw.chance(0.3) else draw.integers(-1, N, S)
    numbers = (None, 0.0, -2.5, 0.75, -math.inf, *([700.0] if draw.extreme else []))
    arguments |= {"log_w": log_w, "own": own}
    arguments |= {n: None if own is None else draw.choice(numbers) for n in ("log_w_own", "log_w_next")}

    def function(
        z: Any, mu: Any, logvar: Any, log_w: Any, own: Any, log_w_own: Any, log_w_next: Any, **options: Any
    ) -> Any:
        weights = None if log_w is None else ColumnWeights(log_w, own, log_w_own, log_w_next)
        return getattr(fastvae, name)(z, mu, logvar, weights=weights, **options)

    def formula(
        z: Tensor, mu: Tensor, logvar: Tensor, log_w: Any, own: Any, log_w_own: Any, log_w_next: Any, **_: Any
    ) -> list[Tensor]:
        weights = None if log_w is None else ColumnWeights(log_w, own, log_w_own, log_w_next)
        given = log_w if isinstance(log_w, Tensor) else None
        return list(aggregate(flattened(z, mu), mu, logvar, given, weights)[:n_results])

    slack = 1e-6 if options.get("method", "direct") != "direct" else 0.0
    return Call(function, arguments | options, formula, centred=("z", "mu"), slack=slack, either=("log_w",))


@surface
def agg_log_prob(draw: Draw) -> Call:
    return aggregated(draw, "agg_log_prob", 1)


@surface
def agg_log_prob_marginals(draw: Draw) -> Call:
    tol = draw.choice((None, 1e-7, 1e-6))
    return aggregated(draw, "agg_log_prob_marginals", 2, method=draw.choice(("auto", "direct", "table")), tol=tol)


def matrix(estimator: str | None, B: int, N: int | None, own: Tensor) -> Tensor:
    """log w_ij [S, B] of an estimator, as its definition has it."""
    M, S = max(B - 1, 1), len(own)
    estimator = estimator or ("uniform" if N is None else "stratified")
    n = N or 1
    at_own, following, other = {
        "uniform": (1 / B, 1 / B, 1 / B),
        "stratified": (1 / n, (n - 1) / (n * M), (n - 1) / (n * M)),
        "mss": (1 / n, (n - M) / (n * M), 1 / M),
        "mws": (1 / (B * n),) * 3,
        "loo": (0.0, 1 / M, 1 / M),
    }[estimator]
    w, i = torch.full((S, B), other, dtype=torch.float64), torch.arange(S)
    w[i, (own + 1) % B] = following
    w[i, own] = at_own
    return w.log()


def estimated(draw: Draw) -> dict[str, Any]:
    """Samples, posteriors and the options of an estimator."""
    B, D = draw.sizes(2, least=2, most=600)
    L = draw.choice((None, 1, 3))
    posteriors = draw.posteriors(B, D)
    own = draw.integers(0, B, draw.choice((1, B, 2 * B + 1))) if L is None and draw.chance(0.4) else None
    z = draw.samples(len(own) if own is not None else (L or 1) * B, **posteriors)
    size = draw.choice((None, B, B + 1, 60_000, 10**12))
    estimator = draw.choice((None, *(ESTIMATORS if size else ("uniform", "loo"))))
    z = z if L is None else z.unflatten(0, (L, B))
    return {"z": z, **posteriors, "dataset_size": size, "estimator": estimator, "own": own}


def columns(z: Tensor, mu: Tensor, own: Tensor | None) -> Tensor:
    return torch.arange(flattened(z, mu).shape[-2]) % len(mu) if own is None else own


@surface
def agg_entropy(draw: Draw) -> Call:
    def formula(
        z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int | None, estimator: str | None, own: Any
    ) -> list[Tensor]:
        log_w = matrix(estimator, len(mu), dataset_size, columns(z, mu, own))
        return [-aggregate(flattened(z, mu), mu, logvar, log_w)[0].mean()]

    return Call(fastvae.agg_entropy, estimated(draw), formula, centred=("z", "mu"))


@surface
def estimator_weights(draw: Draw) -> Call:
    given = estimated(draw)
    B = len(given["mu"])
    own = torch.arange(B) if given["own"] is None else given["own"]
    arguments = {"estimator": given["estimator"], "n_columns": B, "dataset_size": given["dataset_size"], "own": own}
    return Call(
        fastvae.estimator_weights,
        arguments,
        lambda estimator, n_columns, dataset_size, own: [matrix(estimator, n_columns, dataset_size, own).exp()],
        tensors=lambda weights: [log_weights(None, weights, len(own), B).exp()],
        differentiable=False,
    )


def decomposed(z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor, own: Tensor, analytic: bool) -> list[Tensor]:
    """The differentiable terms of a KLDecomposition from N(0, I), in their order."""
    z = flattened(z, mu)
    joint, marginals = aggregate(z, mu, logvar, log_w)
    conditional = log_normal(z, mu[own], logvar[own]).sum(-1)
    if analytic:
        conditional = -0.5 * (logvar[own] + LOG_2PI + 1).sum(-1)
    prior = -0.5 * (z**2 + LOG_2PI)
    return [
        (conditional - joint).mean(),
        (joint - prior.sum(-1)).mean(),
        (joint - marginals.sum(-1)).mean(),
        (marginals - prior).mean(0),
        (prior.sum(-1) - prior.sum(-1)).mean(),
        (conditional - prior.sum(-1)).mean(),
        -joint.mean(),
    ]


@surface
def kl_decomposition(draw: Draw) -> Call:
    arguments = estimated(draw) | {"analytic_conditional": draw.chance(0.3), "prior": None, "method": "direct"}

    def formula(
        z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: Any, estimator: Any, own: Any,
        analytic_conditional: bool, **_: Any,
    ) -> list[Tensor]:  # fmt: skip
        at = columns(z, mu, own)
        return decomposed(z, mu, logvar, matrix(estimator, len(mu), dataset_size, at), at, analytic_conditional)

    return Call(
        fastvae.kl_decomposition,
        arguments,
        formula,
        tensors=lambda terms: list(terms[:7]),
        centred=("z", "mu"),
        roundings=20,
        differences=True,
    )
