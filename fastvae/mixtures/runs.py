"""Runs of EM for `GaussianMixture`, each from a start of its own: options and points, checked; the start; the steps."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._warnings import warn
from ..backends.contract import accumulation_dtype
from ..ops.checks import check_tensor, check_values, drawn_seed
from . import em
from .em import Mixture


class Options(NamedTuple):
    """The constructor's arguments, checked, as Python numbers."""

    n_components: int
    tol: float
    max_iter: int
    n_init: int
    init: str | Mixture
    reg_covar: float
    seed: int | None

    def generator(self) -> torch.Generator | None:
        """What draws the starts; None where the start is given."""
        return None if isinstance(self.init, Mixture) else torch.Generator("cpu").manual_seed(drawn_seed(self.seed))


class Run(NamedTuple):
    """A fit from one start."""

    mixture: Mixture
    trace: list[float]
    converged: bool
    n_reseeded: int


def run(x: Tensor, options: Options, generator: torch.Generator | None) -> Run:
    """Run EM from one start."""
    mixture = start(x, options, generator)
    trace: list[float] = []
    n_reseeded = 0
    for _ in range(options.max_iter):
        n, means, variances, log_likelihood = step(x, mixture)
        empty = (n == 0).nonzero()[:, 0]
        if len(empty):
            worst = em.log_prob(x, mixture).topk(len(empty), largest=False).indices
            n[empty], means[empty], variances[empty] = len(x) / len(n), x[worst].double(), em.variance(x)
            n_reseeded += len(empty)
        mixture = regularized(n / n.sum(), means, variances, x.dtype, options)
        trace.append(log_likelihood)
        if len(trace) > 1 and abs(trace[-1] - trace[-2]) < options.tol and not len(empty):
            return Run(mixture, trace, True, n_reseeded)
    return Run(mixture, trace, False, n_reseeded)


def start(x: Tensor, options: Options, generator: torch.Generator | None) -> Mixture:
    init, K, D = options.init, options.n_components, x.shape[1]
    if isinstance(init, Mixture):
        if init.means.shape[1] != D:
            raise ValueError(f"init: expected means [{K}, {D}], got shape {tuple(init.means.shape)}")
        return Mixture(*(parameter.to(x.device) for parameter in init))
    seeds = (em.seeds_far_apart if init == "kmeans++" else em.seeds_anywhere)(x, K, generator)
    variances = em.variance_within(x, seeds).expand(K, D)  # 0 where every point is a seed: then reg_covar is the width
    return regularized(seeds.new_full((K,), 1 / K), seeds, variances, x.dtype, options)


def regularized(weights: Tensor, means: Tensor, variances: Tensor, dtype: torch.dtype, options: Options) -> Mixture:
    """The mixture with `reg_covar` added; where that is 0, a variance too small for points of a dtype is an error."""
    variances = variances + options.reg_covar
    alike = variances <= (torch.finfo(dtype).eps * means) ** 2
    if options.reg_covar == 0 and alike.any():
        k, d = alike.nonzero()[0].tolist()
        raise ValueError(
            f"reg_covar: expected more than 0, or fewer components, as the points of component {k} are all the same"
            f" in dimension {d}, got {options.reg_covar}"
        )
    return Mixture(weights, means, variances)


def step(x: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor, Tensor, float]:
    """`em.moments`, with the log-likelihood as a Python float, which must be finite."""
    n, means, variances, log_likelihood = em.moments(x, mixture)
    value = log_likelihood.item()
    if not math.isfinite(value):
        raise ValueError(overflow(x, value))
    return n, means, variances, value


def overflow(x: Tensor, value: float) -> str:
    dtype = accumulation_dtype(x.dtype)
    return f"x: expected points near enough to some component for their log p(x) to be finite in {dtype}, got {value}"


def points_to_fit(x: Tensor, least: int) -> Tensor:
    """Check the points to fit to, and return them."""
    check_tensor("x", x)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected points [S, D], got shape {tuple(x.shape)}")
    x = finite_points(x, least)
    low, high = (bound.double() for bound in x.aminmax(dim=0))
    largest = (high - low).square().sum() + torch.maximum(low.abs(), high.abs()).sum()
    if not (len(x) * largest).isfinite():
        raise ValueError(
            f"x: expected points whose squared distances float64 can hold, got values from {low.min().item():.3g} to"
            f" {high.max().item():.3g}"
        )
    return x


def finite_points(x: Tensor, least: int) -> Tensor:
    """Check the values of the points, and return them."""
    check_values("x", x)
    if len(x) < least:
        raise ValueError(f"x: expected at least {least} point{'s' * (least > 1)}, got {len(x)}")
    if not x.isfinite().all():
        raise ValueError("x: expected finite points, got NaN or infinity")
    return x.detach()


def warn_if_few(x: Tensor, n_components: int) -> None:
    n = len(em.distinct(x, n_components))
    if n < n_components:
        warn(f"n_components: {n_components} components have only {n} distinct points to be at, so some are alike")


def checked_start(init: Any, K: int) -> Mixture:
    """Check the parameters to start from, and return them as a mixture."""
    if len(init) != 3 or not all(isinstance(parameter, Tensor) for parameter in init):
        raise TypeError("init: expected a name, or the tensors (weights [K], means [K, D], variances [K, D])")
    for parameter in init:
        check_tensor("init", parameter, min_ndim=0)
        check_values("init", parameter)
    weights, means, variances = (parameter.detach().double() for parameter in init)
    if weights.shape != (K,) or means.ndim != 2 or len(means) != K or variances.shape != means.shape:
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in init)
        raise ValueError(f"init: expected shapes ({K},), ({K}, D) and ({K}, D), got {shapes}")
    if not means.isfinite().all():
        raise ValueError("init: expected finite means, got NaN or infinity")
    if not ((variances > 0) & variances.isfinite()).all():
        raise ValueError(f"init: expected finite variances above 0, got {variances.min():.3g} to {variances.max():.3g}")
    total = weights.sum().item()
    if not ((weights >= 0).all() and abs(total - 1) <= 1e-3):
        raise ValueError(
            f"init: expected weights >= 0 that add up to 1, got {weights.min():.3g} and a sum of {total:.6g}"
        )
    return Mixture(weights / total, means, variances)
