"""Estimators of the aggregate posterior q(z) = E_x q(z|x) from a mini-batch, and its entropy.

Each estimator is a choice of weights in log q(z_i) = log sum_j w_ij q(z_i | x_j), with B columns from a data set
of N examples and M = B − 1:

    estimator    own column   next column       every other      row sum   source
    uniform      1/B          1/B               1/B              1         Zheng, eq. 24
    stratified   1/N          (N−1)/(N·M)       (N−1)/(N·M)      1         Zheng, eq. 29; Esmaeili et al. 2019
    mss          1/N          (N−M)/(N·M)       1/M              1         Chen et al. 2018, appendix
    mws          1/(B·N)      1/(B·N)           1/(B·N)          1/N       Chen et al. 2018 (biased)
    loo          0            1/M               1/M              1         leave-one-out; Poole et al. 2019
"""

import math

import torch
from torch import Tensor

from ..backends.contract import LogWeights
from ..ops.agg_entropy import agg_entropy_op
from ..ops.checks import check_choice, check_count, check_indices, check_tensor
from ..ops.modes import is_known
from ..ops.pairs import ColumnWeights, checked, log, over_batches
from ..ops.short import is_usual_call

__all__ = ["ESTIMATORS", "agg_entropy", "estimator_weights"]

ESTIMATORS = ("uniform", "stratified", "mss", "mws", "loo")


def estimator_weights(
    *, estimator: str | None, n_columns: int, dataset_size: int | None = None, own: Tensor | None = None
) -> ColumnWeights:
    """The column weights of an estimator of log q(z).

    Args:
        estimator: `"uniform"`, `"stratified"`, `"mss"`, `"mws"` or `"loo"`; None for uniform without
            `dataset_size` and stratified with it.
        n_columns: B, the number of posteriors cross-evaluated.
        dataset_size: N, the number of examples in the data set; at least B. `uniform` and `loo` do without it.
        own: `[S]` int64, the column each sample was drawn from. `stratified`, `mss` and `loo` need it; −1, for a
            sample drawn from no column, is for `uniform` and `mws` only: the others' weights would not add up to 1.

    Returns:
        ColumnWeights for `agg_log_prob` and `agg_log_prob_marginals`.

    Raises:
        TypeError: `own` is not an int64 tensor, or a count not an integer.
        ValueError: an unknown estimator; `stratified`, `mss` or `mws` without `dataset_size`; a `dataset_size`
            below `n_columns`; one column with `loo`, or with `stratified` or `mss` and a larger data set, such as a
            last batch of one example, which `DataLoader(drop_last=True)` leaves out; `own` of another shape; `own`
            missing, or −1 in it, where the estimator needs it (values are checked on CPU tensors only).

    Example:
        >>> own = torch.arange(len(mu))
        >>> weights = fastvae.estimator_weights(estimator="mss", n_columns=len(mu), dataset_size=60_000, own=own)
        >>> log_qz = fastvae.agg_log_prob(z, mu, logvar, weights=weights)
    """
    estimator = check_estimator(estimator, dataset_size)
    B = check_count("n_columns", n_columns, least=1)
    if own is not None:
        check_indices("own", own)
        if own.ndim != 1:
            raise ValueError(f"own: expected shape [S], one column for each sample, got {tuple(own.shape)}")
    log_w, log_w_own, log_w_next = _log_weights(estimator, B, dataset_size)
    if estimator not in ("uniform", "mws"):
        check_drawn(own, B)
    return ColumnWeights(log_w, own, log_w_own, log_w_next)


def _log_weights(estimator: str, B: int, dataset_size: int | None) -> tuple[float, float | None, float | None]:
    """The log-weights of every column, and of the own and the next one where these have others. `estimator` and
    `dataset_size` are such that `check_estimator` passes them."""
    N = None if dataset_size is None else check_count("dataset_size", dataset_size)
    if N is not None and N < B:
        raise ValueError(f"dataset_size: expected at least the batch's {B} posteriors, got {N}")
    M = B - 1
    if estimator == "uniform":
        return -log(B), None, None
    if estimator != "mws" and M == 0 and (estimator == "loo" or N != 1):
        of = "" if N is None else f" of {N}"
        raise ValueError(
            f"estimator: {estimator!r} cannot be had from a batch of one posterior{of}; expected at least 2, so"
            " give the DataLoader drop_last=True"
        )
    if estimator == "loo":
        return -log(M), -math.inf, None
    assert N is not None
    if estimator == "mws":
        return -log(B * N), None, None
    if M == 0:
        return -math.inf, 0.0, None
    if estimator == "stratified":
        return log((N - 1) / (N * M)), -log(N), None
    return -log(M), -log(N), log((N - M) / (N * M))


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
        estimator: `"uniform"`, `"stratified"`, `"mss"`, `"mws"` or `"loo"` (see `estimator_weights`); None for
            uniform without `dataset_size` and stratified with it. A mini-batch `uniform` estimate treats the
            batch as the whole data set: it is too low by up to log(N / B).
        own: `[S]` int64, the column each sample was drawn from; may be None where z is `[B, D]` or `[L, B, D]`.

    Returns:
        A scalar in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an input is not a floating-point tensor, or as in `estimator_weights`.
        ValueError: as in `estimator_weights`, including −1 in `own`; no samples; or shapes or devices do not match.

    Source: Zheng, eq. 24, 25 and 29.

    Example:
        >>> z = fastvae.reparameterize(mu, logvar)
        >>> loss = loss - 0.1 * fastvae.agg_entropy(z, mu, logvar, dataset_size=60_000)
    """
    if own is None and is_usual_call(mu, logvar, z):
        return agg_entropy_op.short(
            z, mu, logvar, *usual_weights(z, check_estimator(estimator, dataset_size), dataset_size)
        )
    weights = sample_weights(z, mu, dataset_size, estimator, own)
    z, mu, logvar, log_weights = checked(z, mu, logvar, weights)
    entropy = over_batches(agg_entropy_op, z, mu, logvar, *log_weights)
    return entropy if z.ndim == 2 else entropy.mean()


def check_estimator(estimator: str | None, dataset_size: int | None) -> str:
    """Check and return the estimator's name, with those errors of `estimator_weights` that need no batch."""
    if estimator is None:
        estimator = "uniform" if dataset_size is None else "stratified"
    check_choice("estimator", estimator, ESTIMATORS)
    if dataset_size is not None:
        check_count("dataset_size", dataset_size, least=1)
    elif estimator not in ("uniform", "loo"):
        raise ValueError(f"dataset_size: expected the size of the data set for {estimator!r}, got None")
    return estimator


def check_drawn(own: Tensor | None, n_columns: int) -> None:
    """Check that every sample has a column that it was drawn from; values are looked at on a CPU only."""
    if own is None:
        raise ValueError("own: expected the column each sample was drawn from, as z has not one of each, got None")
    eager = own.device.type == "cpu" and is_known(own)
    if eager and own.numel() > 0 and own.min() < 0:
        raise ValueError(f"own: expected columns from 0 to {n_columns - 1}, got values from {int(own.min())}")


def usual_weights(z: Tensor, estimator: str, dataset_size: int | None) -> LogWeights:
    """The estimator's weights in a usual call (`is_usual_call`) with samples z `[B, D]`, one of each posterior."""
    log_w, log_w_own, log_w_next = _log_weights(estimator, len(z), dataset_size)
    own = None if log_w_own is None else torch.arange(len(z), device=z.device)
    return LogWeights(None, log_w, own, log_w_own, log_w_next)


def sample_weights(
    z: Tensor, mu: Tensor, dataset_size: int | None, estimator: str | None, own: Tensor | None
) -> ColumnWeights:
    """The estimator's weights, with the own columns that the shapes of z and mu imply."""
    check_tensor("mu", mu, min_ndim=2)
    check_tensor("z", z, min_ndim=2)
    N = mu.shape[-2]
    if N == 0:
        raise ValueError(f"mu: expected at least one posterior, got shape {tuple(mu.shape)}")
    if 0 in z.shape[:-1]:
        raise ValueError(f"z: expected at least one sample, got shape {tuple(z.shape)}")
    if own is None and (z.ndim == mu.ndim + 1 or z.shape[-2] == N):
        n_samples = z.shape[0] if z.ndim == mu.ndim + 1 else 1
        own = torch.arange(n_samples * N, device=z.device) % N
    return estimator_weights(estimator=estimator, n_columns=N, dataset_size=dataset_size, own=own)
