"""Active units: the latent dimensions that the data move."""

from typing import Any

import torch
from torch import Tensor

from ..aggregate.posteriors import open_posteriors
from ..ops.checks import check_count, check_flag, check_number


@torch.no_grad()
def active_units(
    source: Any,
    data: Any = None,
    *,
    threshold: float = 0.01,
    batch_size: int = 4096,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Tensor:
    """Which latent dimensions are active: the posterior's mean varies over the data by more than `threshold`.

    Args:
        source, data: the posteriors, or a VAE or an encoder and its examples, as in `kl_decomposition_dataset`.
        threshold: for the variance of each dimension's mean; the usual one is 0.01.
        batch_size: how many rows of an array are encoded, and how many posteriors read, at once.
        device: where to encode and compute; None for where a module's parameters, or else the posteriors, are.
        progress: show a progress bar on stderr, tqdm's where it is installed.

    Returns:
        `[D]` bool; `.sum()` counts the active units.

    Raises:
        TypeError, ValueError: as in `kl_decomposition_dataset`; fewer than two posteriors, means that are not finite,
            or a negative threshold.

    Source: Burda et al. 2016, section 5.2.

    Example:
        >>> active = fastvae.active_units(vae.eval(), DataLoader(examples, 256))
        >>> print(f"{active.sum()} of {len(active)} units are active")
    """
    threshold = check_number("threshold", threshold, least=0.0)
    batch_size = check_count("batch_size", batch_size, least=1)
    progress = check_flag("progress", progress)
    posteriors = open_posteriors(source, data, batch_size=batch_size, device=device, progress=progress, least=2)
    N, D = posteriors.mu.shape
    total = torch.zeros(D, dtype=torch.float64, device=posteriors.device)
    squares = torch.zeros_like(total)
    batches = [slice(first, first + batch_size) for first in range(0, N, batch_size)]
    for rows in batches:
        total += posteriors.means(rows).sum(0, dtype=torch.float64)
    if not total.isfinite().all():
        raise ValueError("source: expected finite means, got NaN or infinity")
    for rows in batches:
        squares += (posteriors.means(rows) - total / N).square().sum(0)
    return squares / (N - 1) > threshold
