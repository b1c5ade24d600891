"""Expectation maximization for Gaussian mixtures with diagonal covariances, without the responsibilities.

    E-step  r_ik = w_k N(x_i; mu_k, var_k) / p(x_i),    p(x) = sum_k w_k N(x; mu_k, var_k)
    M-step  N_k = sum_i r_ik,  w_k = N_k / S,  mu_k ← sum_i r_ik x_i / N_k,  var_k ← sum_i r_ik (x_i − mu_k)² / N_k

The sums of the M-step are the gradients of sum_i log p(x_i), so r `[S, K]` is never formed:

    g_w = N_k,    g_mu = sum_i r_ik (x_i − mu_k) / var_k,    g_logvar = ½ sum_i r_ik ((x_i − mu_k)² / var_k − 1)

and with delta_k = var_k g_mu / N_k:    mu_k ← mu_k + delta_k,    var_k ← var_k (1 + 2 g_logvar / N_k) − delta_k².

The last difference cancels where the new width is far below the old one, or below the distance that the mean has moved.
The sums of such components are taken about their new means instead, in float64. Where float32 could not place a mean to
a small part of its width, the whole step is taken in float64.

Source: Basics VAE, eq. 10 to 14; Dempster et al. 1977.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import accumulation_dtype
from ..ops.agg_log_prob import agg_log_prob, mixture_sums
from ..ops.cross_log_prob import cross_log_prob
from ..ops.pairs import ColumnWeights

__all__ = ["Mixture", "Moments", "log_joint", "log_prob", "moments"]

CANCELLED = 1e-4  # a variance is computed again where it is this small a part of the terms that it is the difference of
MISPLACED = 1e-3  # how far off rounding may put a mean, in widths
CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**26}  # of a chunk of points, and of what is computed from it


class Mixture(NamedTuple):
    """A mixture's parameters, in float64."""

    weights: Tensor  # [K], adding up to 1
    means: Tensor  # [K, D]
    variances: Tensor  # [K, D]


class Moments(NamedTuple):
    """The moments of each component's share of the points, in float64. A component whose share is no more than rounding
    is empty: n is 0, and it keeps its mean and variance."""

    n: Tensor  # N_k [K]
    means: Tensor  # [K, D]
    variances: Tensor  # [K, D]
    log_likelihood: Tensor  # mean log p(x_i) of the mixture that made the shares, a scalar


def chunks(x: Tensor, dtype: torch.dtype, columns: int = 1) -> Iterator[Tensor]:
    """Chunks `[R, D]` of the points `[S, D]`, in a dtype, with R so small that `[R, columns]` is in bounds too."""
    row_bytes = max(columns, x.shape[1]) * dtype.itemsize
    for part in x.split(max(1, CHUNK_BYTES.get(x.device.type, 2**26) // row_bytes)):
        yield part.to(dtype)


def kernel_arguments(mixture: Mixture, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(mu, logvar, log_w) of the mixture for points of a dtype, in float32 where that is accurate enough."""
    weights, means, variances = mixture
    dtype = accumulation_dtype(dtype)
    spacing = torch.finfo(dtype).eps * means.abs()
    if (spacing > MISPLACED * variances.sqrt()).any():
        dtype = torch.float64
    return means.to(dtype), variances.log().to(dtype), weights.log().to(dtype)


def log_prob(x: Tensor, mixture: Mixture) -> Tensor:
    """The log-densities log p(x_i), `[S]`."""
    mu, logvar, log_w = kernel_arguments(mixture, x.dtype)
    parts = [agg_log_prob(part, mu, logvar, weights=ColumnWeights(log_w)) for part in chunks(x, mu.dtype)]
    return torch.cat(parts).to(accumulation_dtype(x.dtype))


def log_joint(x: Tensor, mixture: Mixture) -> Iterator[Tensor]:
    """Yield log w_k N(x_i; mu_k, var_k), `[R, K]` for some rows at a time."""
    mu, logvar, log_w = kernel_arguments(mixture, x.dtype)
    for part in chunks(x, mu.dtype, len(mu)):
        yield log_w + cross_log_prob(part, mu, logvar)


def moments(x: Tensor, mixture: Mixture) -> Moments:
    """The E-step and the sums of the M-step, for x `[S, D]`, in O(S·K·D) time and O(K·D) memory."""
    mu, logvar, log_w = kernel_arguments(mixture, x.dtype)
    log_likelihood, n, d_mu, d_logvar = (
        torch.zeros(shape, dtype=torch.float64, device=x.device) for shape in ((), log_w.shape, mu.shape, mu.shape)
    )
    for part in chunks(x, mu.dtype):
        joint, *gradients = mixture_sums(part, mu, logvar, log_w)
        log_likelihood += joint.sum(dtype=torch.float64)
        for total, gradient in zip((n, d_mu, d_logvar), gradients, strict=True):
            total += gradient

    empty = n <= 10 * torch.finfo(mu.dtype).eps
    n = n.masked_fill(empty, 0.0)
    share = n.where(~empty, 1.0)[:, None]
    means, variances = mu.double(), logvar.double().exp()  # as the kernel had them
    delta = variances * d_mu / share
    narrow = variances * (1 + 2 * d_logvar / share) - delta**2
    cancelled = (narrow < CANCELLED * torch.maximum(variances, delta**2)).any(1)
    means, variances = (
        old.where(empty[:, None], new) for old, new in ((mixture.means, means + delta), (mixture.variances, narrow))
    )
    again = (cancelled & ~empty).nonzero()[:, 0]
    for _ in range(3):  # the first time leaves an error of eps times the distance that the mean has moved
        if len(again) == 0:
            break
        centres = means[again]
        n[again], means[again], variances[again] = _about(x, mixture, again, centres)
        again = again[(variances[again] < CANCELLED * (means[again] - centres) ** 2).any(1)]
    return Moments(n, means, variances, log_likelihood / len(x))


def _about(x: Tensor, mixture: Mixture, components: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, means, variances) of some components, `[C]` and `[C, D]`, by sums about `centres`, near their new means."""
    wide = kernel_arguments(mixture, torch.float64)
    mu, logvar, log_w = (argument[components] for argument in wide)
    n, first, second = torch.zeros_like(log_w), torch.zeros_like(centres), torch.zeros_like(centres)
    for part in chunks(x, torch.float64, len(components)):
        joint = agg_log_prob(part, *wide[:2], weights=ColumnWeights(wide[2]))
        r = (log_w + cross_log_prob(part, mu, logvar) - joint[:, None]).exp()  # [R, C]
        n += r.sum(0)
        for k, centre in enumerate(centres):
            off = part - centre
            first[k] += r[:, k] @ off
            second[k] += r[:, k] @ off**2
    share = n.clamp(min=torch.finfo(n.dtype).tiny)[:, None]
    return n, centres + first / share, second / share - (first / share) ** 2


def variance_within(x: Tensor, centres: Tensor) -> Tensor:
    """The mean of (x_i − the nearest of the centres `[K, D]`)², `[D]` in float64."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for part in chunks(x, torch.float64, len(centres)):
        total += (part - centres[distances(part, centres).argmin(1)]).square().sum(0)
    return total / len(x)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """The distances `[S, K]`, from differences, which matrix products would lose in rounding."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def variance(x: Tensor) -> Tensor:
    """The variance of the points in each dimension, `[D]` in float64."""
    mean = torch.stack([part.sum(0) for part in chunks(x, torch.float64)]).sum(0) / len(x)
    return variance_within(x, mean[None])


def seeds_far_apart(x: Tensor, n_components: int, generator: torch.Generator | None) -> Tensor:
    """The seeds of k-means++ (Arthur & Vassilvitskii 2007), `[K, D]` in float64: each is a point drawn in proportion to
    its squared distance from the nearest seed before it. O(S·K·D) time and O(S) memory; no seed comes twice while there
    are other points."""
    S = len(x)
    draws = torch.rand(n_components, dtype=torch.float64, generator=generator, device="cpu").to(x.device)
    chosen = (draws[0] * S).long()
    seeds = [x[chosen].double()]
    squared = torch.full((S,), torch.inf, dtype=torch.float64, device=x.device)  # distance from the nearest seed
    for draw in draws[1:]:
        distance = torch.cat([distances(part, seeds[-1][None])[:, 0] for part in chunks(x, torch.float64)])
        squared = torch.minimum(squared, distance.square_())
        cumulative = squared.cumsum(0)
        chosen = torch.searchsorted(cumulative, draw * cumulative[-1], right=True).clamp(max=S - 1)
        seeds.append(x[chosen].double())
    return torch.stack(seeds)


def seeds_anywhere(x: Tensor, n_components: int, generator: torch.Generator | None) -> Tensor:
    """Seeds that are any points, `[K, D]` in float64; none comes twice while there are other points."""
    order = torch.randperm(len(x), generator=generator, device="cpu").to(x.device)
    rows = distinct(x, n_components, order)
    return x[rows.repeat(-(-n_components // len(rows)))[:n_components]].double()


def distinct(x: Tensor, most: int, order: Tensor | None = None) -> Tensor:
    """Row numbers of distinct points, all or `most` of them, those that come first in `order`."""
    S, seen = len(x), 0
    while True:
        seen = min(S, max(most, 2 * seen))
        rows = torch.arange(seen, device=x.device) if order is None else order[:seen]
        points, which = x[rows].to(accumulation_dtype(x.dtype)).unique(dim=0, return_inverse=True)
        if len(points) >= most or seen == S:
            place = torch.arange(seen, device=x.device)
            first = torch.full((len(points),), seen, device=x.device).scatter_reduce(0, which, place, "amin")
            return rows[first.sort().values[:most]]
