"""Estimators of the aggregate posterior q(z) = E_x q(z|x) from a mini-batch, and its entropy.

Each estimator is a choice of weights in log q(z_i) = log sum_j w_ij q(z_i | x_j), with B columns from a data set
of N examples and M = B − 1:

    estimator    own column   next column       every other      row sum   source
    uniform      1/B          1/B               1/B              1         Zheng, eq. 24
    stratified   1/N          (N−1)/(N·M)       (N−1)/(N·M)      1         Zheng, eq. 29; Esmaeili et al. 2019
    mss          1/N          (N−M)/(N·M)       1/M              1         Chen et al. 2018, appendix
    mws          1/(B·N)      1/(B·N)           1/(B·N)          1/N       Chen et al. 2018 (biased)
"""

import math

import torch
from torch import Tensor

from .ops._checks import check_choice, check_count
from .ops.aggregate import ColumnWeights, agg_log_prob

ESTIMATORS = ("uniform", "stratified", "mss", "mws")


def estimator_weights(
    estimator: str | None, n_columns: int, dataset_size: int | None = None, own: Tensor | None = None
) -> ColumnWeights:
    """The column weights of an estimator of log q(z).

    Args:
        estimator: `"uniform"`, `"stratified"`, `"mss"` or `"mws"`; None for uniform without `dataset_size` and
            stratified with it.
        n_columns: B, the number of posteriors cross-evaluated.
        dataset_size: N, the number of examples in the data set; at least B.
        own: `[S]` int64, the column each sample was drawn from. `stratified` and `mss` need it.

    Returns:
        ColumnWeights for `agg_log_prob` and `agg_log_prob_marginals`.

    Raises:
        ValueError: an unknown estimator; `stratified`, `mss` or `mws` without `dataset_size`; a `dataset_size`
            below `n_columns`; one column of a larger data set with `stratified` or `mss`; own columns missing.

    Example:
        >>> weights = fastvae.estimator_weights("mss", len(mu), 60_000, own=torch.arange(len(mu)))
        >>> log_qz = fastvae.agg_log_prob(z, mu, logvar, weights=weights)
    """
    if estimator is None:
        estimator = "uniform" if dataset_size is None else "stratified"
    check_choice("estimator", estimator, ESTIMATORS)
    check_count("n_columns", n_columns, least=1)
    if dataset_size is None:
        if estimator != "uniform":
            raise ValueError(f"dataset_size: expected the size of the data set for {estimator!r}, got None")
    else:
        check_count("dataset_size", dataset_size, least=1)
        if dataset_size < n_columns:
            raise ValueError(f"dataset_size: expected at least the batch's {n_columns} posteriors, got {dataset_size}")
    B, N, M = n_columns, dataset_size, n_columns - 1
    if estimator == "uniform" or N is None:
        return ColumnWeights(-math.log(B), own)
    if estimator == "mws":
        return ColumnWeights(-math.log(B * N), own)
    if own is None:
        raise ValueError(f"own: expected the column each sample was drawn from for {estimator!r}, got None")
    if M == 0:
        if N > 1:
            raise ValueError(
                f"estimator: {estimator!r} cannot be estimated from one posterior of {N}; expected at least 2"
            )
        return ColumnWeights(-math.inf, own, 0.0)
    if estimator == "stratified":
        return ColumnWeights(math.log((N - 1) / (N * M)), own, -math.log(N))
    return ColumnWeights(-math.log(M), own, -math.log(N), math.log((N - M) / (N * M)))


def agg_entropy(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    dataset_size: int | None = None,
    estimator: str | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """Entropy of the aggregate posterior, H(q(z)) = −mean_i log q(z_i), in nats. Differentiable.

    Args:
        z: samples `[B, D]`, z_i drawn from posterior i; or `[L, B, D]`, L of each; or `[S, D]` with `own`.
        mu: means `[B, D]` of the posteriors.
        logvar: log sigma², the shape of `mu`.
        dataset_size: N, the number of examples in the data set the batch is from.
        estimator: `"uniform"`, `"stratified"`, `"mss"` or `"mws"` (see `estimator_weights`); None for uniform
            without `dataset_size` and stratified with it. A mini-batch `uniform` estimate treats the batch as
            the whole data set: it is too low by up to log(N / B).
        own: `[S]` int64, the column each sample was drawn from; None for i mod B where S is a multiple of B
            because z has one sample, or L, of each posterior.

    Returns:
        A scalar in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: as in `estimator_weights`, or shapes or devices do not match.

    Source: Zheng, eq. 24, 25 and 29.

    Example:
        >>> z = fastvae.reparameterize(mu, logvar)
        >>> loss = loss - 0.1 * fastvae.agg_entropy(z, mu, logvar, dataset_size=60_000)
    """
    log_qz = agg_log_prob(z, mu, logvar, weights=_sample_weights(z, mu, dataset_size, estimator, own))
    return -log_qz.mean()


def _sample_weights(
    z: Tensor, mu: Tensor, dataset_size: int | None, estimator: str | None, own: Tensor | None
) -> ColumnWeights | None:
    """The estimator's weights, with the own columns that the shapes of z and mu imply."""
    if not (isinstance(z, Tensor) and isinstance(mu, Tensor) and mu.ndim >= 2 and z.ndim >= 2):
        return None  # agg_log_prob names what is wrong
    N = mu.shape[-2]
    if N == 0:
        raise ValueError(f"mu: expected at least one posterior, got shape {tuple(mu.shape)}")
    if own is None and (z.ndim == mu.ndim + 1 or z.shape[-2] == N):
        n_samples = z.shape[0] if z.ndim == mu.ndim + 1 else 1
        own = torch.arange(n_samples * N, device=z.device) % N
    return estimator_weights(estimator, N, dataset_size, own)
