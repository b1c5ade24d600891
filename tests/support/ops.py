"""The ops as the tests call them. What is in `OPS` is tested by all tests of every op: errors, layouts, dtypes,
gradients, threads, graphs, the compiler. test_every_op.py fails where an op of the kernel contract is not."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae
from fastvae import ColumnWeights
from fastvae.ops.bernoulli_log_prob import bernoulli_log_prob as fused_bernoulli

from .helpers import (
    Named,
    Results,
    aggregate,
    cast,
    cross,
    draw,
    gaussians,
    kl,
    log_normal,
    needing_gradients,
    normals,
    sample,
    samples,
)


class Op(NamedTuple):
    """A function of named tensors, its formula, and inputs for it."""

    fast: Callable[..., Results]
    formula: Callable[..., Results]
    inputs: Named
    centred: tuple[str, ...] = ()


Make = Callable[[torch.dtype, int, int, int], Op]  # from a dtype, S, N and D
OPS: dict[str, Make] = {}
KERNELS: dict[str, str | None] = {}  # the op of the kernel contract that computes each; None: torch's own operations


def made_of(kernel: str | None) -> Callable[[Make], Make]:
    def known(make: Make) -> Make:
        OPS[make.__name__] = make
        KERNELS[make.__name__] = kernel
        return make

    return known


def op_named(name: str, dtype: torch.dtype = torch.float64, S: int = 5, N: int = 4, D: int = 3) -> Op:
    """An op of OPS in its fullest form: general priors, all outputs, per-column weights with both overrides."""
    return OPS[name](dtype, S, N, D)


@made_of("kl_gauss")
def kl_gauss(dtype: torch.dtype, S: int, N: int, D: int) -> Op:
    prior = {"prior_mu": draw(D, seed=20), "prior_logvar": draw(N, D, seed=21)}
    inputs = gaussians(N, D, dtype) | needing_gradients(cast(prior, dtype))
    return Op(fastvae.kl_gauss, lambda **x: kl(**x).sum() / N, inputs)


@made_of("sample_gauss")
def reparameterize(dtype: torch.dtype, S: int, N: int, D: int) -> Op:
    return _sampling(fastvae.reparameterize, 1, dtype, S, N, D)


@made_of("sample_gauss")
def sample_gauss(dtype: torch.dtype, S: int, N: int, D: int) -> Op:
    return _sampling(fastvae.sample_gauss, 4, dtype, S, N, D)


def _sampling(public: Callable[..., Results], n_results: int, dtype: torch.dtype, S: int, N: int, D: int) -> Op:
    eps = normals(S, N, D, dtype=dtype, seed=7)
    return Op(
        lambda mu, logvar: public(mu, logvar, S, seed=7),
        lambda mu, logvar: sample(mu, logvar, eps)[:n_results],
        gaussians(N, D, dtype),
    )


@made_of(None)
def log_prob_gauss(dtype: torch.dtype, S: int, N: int, D: int) -> Op:
    z, mu, logvar = samples(S, N, D, dtype).values()
    rows = {name: x.detach()[torch.arange(S) % N] for name, x in (("mu", mu), ("logvar", logvar))}
    return Op(fastvae.log_prob_gauss, lambda **x: log_normal(**x).sum(-1), needing_gradients({"z": z, **rows}))


@made_of("cross_log_prob")
def cross_log_prob(dtype: torch.dtype, S: int, N: int, D: int) -> Op:
    return Op(fastvae.cross_log_prob, cross, samples(S, N, D, dtype), ("z", "mu"))


@made_of("agg_log_prob")
def agg_log_prob(dtype: torch.dtype, S: int, N: int, D: int) -> Op:
    return _aggregating(fastvae.agg_log_prob, 1, dtype, S, N, D)


@made_of("agg_log_prob_marginals")
def agg_log_prob_marginals(dtype: torch.dtype, S: int, N: int, D: int) -> Op:
    return _aggregating(fastvae.agg_log_prob_marginals, 2, dtype, S, N, D)


def _aggregating(public: Callable[..., Results], n_results: int, dtype: torch.dtype, S: int, N: int, D: int) -> Op:
    def weights(z: Tensor, mu: Tensor, log_w: Tensor) -> ColumnWeights:
        own = torch.arange(len(z), device=z.device) % (len(mu) + 1) - 1  # the first is drawn from none
        return ColumnWeights(log_w, own, -0.5, 0.5)

    return Op(
        lambda z, mu, logvar, log_w: public(z, mu, logvar, weights=weights(z, mu, log_w)),
        lambda z, mu, logvar, log_w: aggregate(z, mu, logvar, log_w, weights(z, mu, log_w))[:n_results],
        samples(S, N, D, dtype) | needing_gradients(cast({"log_w": draw(N, seed=22)}, dtype)),
        ("z", "mu"),
    )


@made_of("agg_entropy")
def agg_entropy(dtype: torch.dtype, S: int, N: int, D: int) -> Op:
    mss = fastvae.estimator_weights(estimator="mss", n_columns=N, dataset_size=9 * N, own=torch.arange(N))
    return Op(
        lambda **x: fastvae.agg_entropy(**x, estimator="mss", dataset_size=9 * N),
        lambda **x: -aggregate(**x, weights=mss)[0].mean(),
        samples(N, N, D, dtype),
        ("z", "mu"),
    )


def decomposed(joint: Tensor, marginals: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> list[Tensor]:
    """The terms of the KL that have a gradient, sample i being from posterior i mod N."""
    own, zeros = torch.arange(len(z), device=z.device) % max(len(mu), 1), torch.zeros_like(z)
    conditional, prior = log_normal(z, mu[own], logvar[own]).sum(-1), log_normal(z, zeros, zeros)
    return [
        (conditional - joint).mean(),
        (joint - prior.sum(-1)).mean(),
        (joint - marginals.sum(-1)).mean(),
        (marginals - prior).mean(0),
        (conditional - prior.sum(-1)).mean(),
        -joint.mean(),
    ]


@made_of("kl_decomposition")
def kl_decomposition(dtype: torch.dtype, S: int, N: int, D: int) -> Op:
    mss = fastvae.estimator_weights(estimator="mss", n_columns=N, dataset_size=9 * N, own=torch.arange(N))

    def fast(z: Tensor, mu: Tensor, logvar: Tensor) -> list[Tensor]:
        terms = fastvae.kl_decomposition(z, mu, logvar, estimator="mss", dataset_size=9 * N)
        return [terms.mi, terms.agg_kl, terms.tc, terms.dim_kl, terms.kl, terms.entropy]

    return Op(fast, lambda **x: decomposed(*aggregate(**x, weights=mss), **x), samples(N, N, D, dtype), ("z", "mu"))


def bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """sum x l − log(1 + e^l), without what cancels."""
    positive = logits > 0
    away = torch.where(positive, logits, -logits)
    return ((x - positive.to(x.dtype)) * logits + F.logsigmoid(away)).sum(-1)


@made_of("bernoulli_log_prob")
def bernoulli_log_prob(dtype: torch.dtype, S: int, N: int, D: int) -> Op:
    inputs = cast({"x": draw(N, D, seed=23).sigmoid(), "logits": 3 * draw(2, N, D, seed=24)}, dtype)
    return Op(fused_bernoulli, bernoulli, needing_gradients(inputs))


FUSED = tuple(name for name, kernel in KERNELS.items() if kernel)
