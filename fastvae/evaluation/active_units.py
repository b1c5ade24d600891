"""Active units: the latent dimensions that the data move."""

from torch import Tensor

from ..backends.contract import accumulation_dtype
from ..ops.checks import check_number, check_tensor, check_values


def active_units(mu: Tensor, threshold: float = 0.01) -> Tensor:
    """Which latent dimensions are active: the posterior's mean varies over the data by more than `threshold`.

    Args:
        mu: means of the posteriors of the data, `[N, D]`.
        threshold: for the variance of each dimension's mean; the usual one is 0.01.

    Returns:
        `[D]` bool; `.sum()` counts the active units.

    Raises:
        TypeError: `mu` is not a floating-point tensor, or `threshold` not a number.
        ValueError: fewer than two posteriors, means that are not finite, or a negative threshold.

    Source: Burda et al. 2016, section 5.2.

    Example:
        >>> active = fastvae.active_units(mu)
        >>> print(f"{active.sum()} of {len(active)} units are active")
    """
    check_tensor("mu", mu)
    threshold = check_number("threshold", threshold, least=0.0)
    if mu.ndim != 2 or len(mu) < 2:
        raise ValueError(f"mu: expected [N, D] with at least 2 posteriors, got shape {tuple(mu.shape)}")
    check_values("mu", mu)
    if not mu.isfinite().all():
        raise ValueError("mu: expected finite means, got NaN or infinity")
    return mu.detach().to(accumulation_dtype(mu.dtype)).var(0) > threshold
