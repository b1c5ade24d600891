"""Divergences between distributions of which only samples are known."""

import math
from typing import Any

import torch
from torch import Tensor

from ..ops.agg_log_prob import agg_log_prob
from ..ops.checks import accumulated, check_device, check_number, check_tensor
from .estimators import estimator_weights


def mmd(z: Tensor, y: Tensor, bandwidth: float | None = None) -> Tensor:
    """The squared maximum mean discrepancy of the distributions that z and y are samples of, unbiased.

        mean_{i≠j} k(z_i, z_j) − 2 mean_ij k(z_i, y_j) + mean_{i≠j} k(y_i, y_j),   k(a, b) = exp(−|a − b|² / 2h²)

    Its expectation is 0 where the distributions are the same, so it may be negative. No matrix is formed: the mean of k
    over j is `agg_log_prob` of posteriors of one width. Differentiable.

    Args:
        z: samples `[n, D]`.
        y: samples `[m, D]` of the other distribution.
        bandwidth: h > 0; None for sqrt(D): two samples of N(0, I) are about sqrt(2D) apart, where k is then 1/e.

    Returns:
        A scalar in float32 (float64 for float64 inputs), a pure number.

    Raises:
        TypeError: z or y is not a floating-point tensor, or `bandwidth` not a number.
        ValueError: fewer than two samples, or of no dimensions; shapes or devices that do not match; a `bandwidth` not
            above 0, or so small that 1/h overflows.

    Source: Gretton et al. 2012, eq. 3.

    Example:
        >>> fastvae.mmd(z, prior.sample(len(z)))
    """
    for name, x in (("z", z), ("y", y)):
        check_tensor(name, x)
        check_device(name, x, "z", z)
        if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] != z.shape[-1] or x.shape[1] == 0:
            raise ValueError(f"{name}: expected [n, {z.shape[-1]}] with n >= 2, got shape {tuple(x.shape)}")
    h = check_bandwidth(bandwidth)
    h = math.sqrt(z.shape[1]) if h is None else h
    scale = 1 / h / math.sqrt(2 * math.pi)  # k(a, b) is then N(a; b, I / 2 pi), whose constant is 1
    z, y = accumulated(z, y)
    if scale > torch.finfo(z.dtype).max:
        raise ValueError(f"bandwidth: expected a number whose reciprocal {z.dtype} can hold, got {h}")
    z, y = z * scale, y * scale
    return _mean_kernel(z, z) - 2 * _mean_kernel(z, y) + _mean_kernel(y, y)


def _mean_kernel(z: Tensor, y: Tensor) -> Tensor:
    """mean_ij exp(−pi |z_i − y_j|²), over i ≠ j where y is z."""
    weights = None
    if z is y:
        weights = estimator_weights(estimator="loo", n_columns=len(z), own=torch.arange(len(z), device=z.device))
    logvar = torch.full_like(y, -math.log(2 * math.pi))
    return agg_log_prob(z, y, logvar, weights=weights).exp().mean()


def check_bandwidth(bandwidth: Any) -> float | None:
    return None if bandwidth is None else check_number("bandwidth", bandwidth, above=0.0, finite=True)
