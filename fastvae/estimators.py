"""Estimators of the aggregate posterior q(z) = E_x q(z|x) from a mini-batch, its entropy, and the terms of the KL.

Each estimator is a choice of weights in log q(z_i) = log sum_j w_ij q(z_i | x_j), with B columns from a data set
of N examples and M = B − 1:

    estimator    own column   next column       every other      row sum   source
    uniform      1/B          1/B               1/B              1         Zheng, eq. 24
    stratified   1/N          (N−1)/(N·M)       (N−1)/(N·M)      1         Zheng, eq. 29; Esmaeili et al. 2019
    mss          1/N          (N−M)/(N·M)       1/M              1         Chen et al. 2018, appendix
    mws          1/(B·N)      1/(B·N)           1/(B·N)          1/N       Chen et al. 2018 (biased)
    loo          0            1/M               1/M              1         leave-one-out; Poole et al. 2019

The KL of the posteriors from the prior, in the mean over samples z_i drawn from posterior own(i) (Zheng, eq. 17-21):

    kl = mi + agg_kl,    agg_kl = tc + sum_d dim_kl_d − prior_factorization

    mi                     mean log q(z_i|x_i) − log q(z_i)
    agg_kl                 mean log q(z_i) − log p(z_i)
    tc                     mean log q(z_i) − sum_d log q_d(z_id)
    dim_kl_d               mean log q_d(z_id) − log p_d(z_id)
    prior_factorization    mean log p(z_i) − sum_d log p_d(z_id)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .ops._checks import check_choice, check_count, promote
from .ops.aggregate import ColumnWeights, agg_log_prob, agg_log_prob_marginals, log_prob_gauss
from .priors import Prior

ESTIMATORS = ("uniform", "stratified", "mss", "mws", "loo")


class KLDecomposition(NamedTuple):
    """The KL of the posteriors from the prior, term by term, in nats: scalars but for `dim_kl` `[D]`.

    Attributes:
        mi: I_enc(x; z), the mutual information of data and latents.
        agg_kl: KL(q(z) ‖ p(z)), of the aggregate posterior from the prior.
        tc: the total correlation, KL(q(z) ‖ prod_d q_d(z_d)).
        dim_kl: KL(q_d(z_d) ‖ p_d(z_d)) of each dimension.
        prior_factorization: E_q(z) log p(z) / prod_d p_d(z_d); 0 for a prior that is a product over dimensions.
        kl: mi + agg_kl, the mean KL(q(z|x) ‖ p(z)).
        entropy: H(q(z)).
        saturation: exp(mi) / n_columns, without gradient; near 1 where a `uniform` mi has hit its ceiling, log B.
        estimator: the name of the estimator of q(z) that made these.
    """

    mi: Tensor
    agg_kl: Tensor
    tc: Tensor
    dim_kl: Tensor
    prior_factorization: Tensor
    kl: Tensor
    entropy: Tensor
    saturation: Tensor
    estimator: str


def estimator_weights(
    estimator: str | None, n_columns: int, dataset_size: int | None = None, own: Tensor | None = None
) -> ColumnWeights:
    """The column weights of an estimator of log q(z).

    Args:
        estimator: `"uniform"`, `"stratified"`, `"mss"`, `"mws"` or `"loo"`; None for uniform without
            `dataset_size` and stratified with it.
        n_columns: B, the number of posteriors cross-evaluated.
        dataset_size: N, the number of examples in the data set; at least B. `uniform` and `loo` do without it.
        own: `[S]` int64, the column each sample was drawn from. `stratified`, `mss` and `loo` need it; −1, for a
            sample drawn from none of them, is for `uniform` and `mws` only: rows of the others would not add up to 1.

    Returns:
        ColumnWeights for `agg_log_prob` and `agg_log_prob_marginals`.

    Raises:
        TypeError: `own` is not an int64 tensor.
        ValueError: an unknown estimator; `stratified`, `mss` or `mws` without `dataset_size`; a `dataset_size`
            below `n_columns`; one column with `loo`, or with `stratified` or `mss` and a larger data set, such as a
            last batch of one example, which `DataLoader(drop_last=True)` leaves out; own columns missing, or −1
            among them where the estimator needs them (on CPU tensors).

    Example:
        >>> weights = fastvae.estimator_weights("mss", len(mu), 60_000, own=torch.arange(len(mu)))
        >>> log_qz = fastvae.agg_log_prob(z, mu, logvar, weights=weights)
    """
    estimator = check_estimator(estimator, dataset_size)
    check_count("n_columns", n_columns, least=1)
    if dataset_size is not None and dataset_size < n_columns:
        raise ValueError(f"dataset_size: expected at least the batch's {n_columns} posteriors, got {dataset_size}")
    if own is not None and not (isinstance(own, Tensor) and own.dtype == torch.int64):
        got = own.dtype if isinstance(own, Tensor) else type(own).__name__
        raise TypeError(f"own: expected an int64 tensor, got {got}")
    B, N, M = n_columns, dataset_size, n_columns - 1
    if estimator == "uniform":
        return ColumnWeights(-math.log(B), own)
    if estimator != "mws":
        _check_drawn(own, B)
        if M == 0 and (estimator == "loo" or N != 1):
            of = "" if N is None else f" of {N}"
            raise ValueError(
                f"estimator: {estimator!r} cannot be had from a batch of one posterior{of}; expected at least 2, so"
                " give the DataLoader drop_last=True"
            )
    if estimator == "loo":
        return ColumnWeights(-math.log(M), own, -math.inf)
    assert N is not None
    if estimator == "mws":
        return ColumnWeights(-math.log(B * N), own)
    if M == 0:
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
        estimator: `"uniform"`, `"stratified"`, `"mss"`, `"mws"` or `"loo"` (see `estimator_weights`); None for
            uniform without `dataset_size` and stratified with it. A mini-batch `uniform` estimate treats the
            batch as the whole data set: it is too low by up to log(N / B).
        own: `[S]` int64, the column each sample was drawn from; may be None where z is `[B, D]` or `[L, B, D]`.

    Returns:
        A scalar in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: as in `estimator_weights`, −1 in `own` among it, or shapes or devices do not match.

    Source: Zheng, eq. 24, 25 and 29.

    Example:
        >>> z = fastvae.reparameterize(mu, logvar)
        >>> loss = loss - 0.1 * fastvae.agg_entropy(z, mu, logvar, dataset_size=60_000)
    """
    log_qz = agg_log_prob(z, mu, logvar, weights=_sample_weights(z, mu, dataset_size, estimator, own))
    return -log_qz.mean()


def kl_decomposition(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    dataset_size: int | None = None,
    estimator: str | None = None,
    own: Tensor | None = None,
    prior: Prior | None = None,
    analytic_conditional: bool = False,
    method: str = "auto",
    tol: float | None = None,
) -> KLDecomposition:
    """The mean KL(q(z|x) ‖ p(z)) in nats, taken apart into mutual information, total correlation, dimension-wise KL
    and prior factorization. Differentiable, from one pass over all pairs of samples and posteriors.

    The terms add up, to rounding, for every estimator: kl = mi + tc + sum(dim_kl) − prior_factorization, which is
    the Monte Carlo KL, the mean of log q(z_i|x_i) − log p(z_i).

    Args:
        z, mu, logvar, dataset_size, estimator: as in `agg_entropy`. A mini-batch `uniform` mi never exceeds
            log B, whatever the posteriors: it saturates, and `saturation` says how much. In expectation the true
            mi lies between `uniform` and `loo`.
        own: `[S]` int64, the column each sample was drawn from; may be None where z is `[B, D]` or `[L, B, D]`,
            else needed for every estimator.
        prior: p(z), an object with `log_prob(z)` and `marginal_log_prob(z)`; None for N(0, I).
        analytic_conditional: take mean log q(z_i|x_i) from its closed form, −½ sum_d (log 2 pi e + logvar), in
            place of its value at the samples. The variance of mi is then lower only where the posteriors overlap
            much (else both of its terms vary together, and the sampled one is better); mi may exceed log B, and
            kl is no longer the Monte Carlo KL.
        method, tol: of log q_d(z_id), as in `agg_log_prob_marginals`.

    Returns:
        KLDecomposition, in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an input is not a floating-point tensor, or `prior` lacks a method.
        ValueError: as in `estimator_weights`, or shapes or devices do not match, those that `prior` gives among
            them; `own` is missing, or names no column (on CPU tensors; on a GPU, and under the compiler, the result
            is then NaN).

    Source: Zheng, eq. 17-21; Chen et al. 2018; Esmaeili et al. 2019.

    Example:
        >>> terms = fastvae.kl_decomposition(z, mu, logvar, dataset_size=60_000)
        >>> loss = nell + terms.mi + 6 * terms.tc + terms.dim_kl.sum()
    """
    check_prior(prior)
    estimator = check_estimator(estimator, dataset_size)
    weights = _sample_weights(z, mu, dataset_size, estimator, own)
    if weights is not None:
        _check_drawn(weights.own, mu.shape[-2])
    joint, marginals = agg_log_prob_marginals(z, mu, logvar, weights=weights, method=method, tol=tol)
    n_columns = mu.shape[-2]  # joint: [*batch, S], marginals: [*batch, S, D]
    z, mu, logvar = promote(z, mu, logvar)  # type: ignore[assignment]
    if z.ndim > mu.ndim:
        z = z.movedim(0, -3).flatten(-3, -2)  # [*batch, S, D]
    if own is not None:
        mu, logvar = _own_rows(own, mu), _own_rows(own, logvar)
    elif z.shape[-2] > n_columns:
        mu, logvar = (x.tile(z.shape[-2] // n_columns, 1) for x in (mu, logvar))
    if analytic_conditional:
        conditional = -0.5 * (logvar.to(joint.dtype) + (math.log(2 * math.pi) + 1)).sum(-1).mean()
    else:
        conditional = log_prob_gauss(z, mu, logvar).flatten()
    return decompose(
        z.flatten(0, -2), conditional, joint.flatten(), marginals.flatten(0, -2), prior, estimator, n_columns
    )


def decompose(
    z: Tensor,  # [S, D]
    conditional: Tensor,  # log q(z_i|x_i) [S], or its mean
    joint: Tensor,  # log q(z_i) [S]
    marginals: Tensor,  # log q_d(z_id) [S, D]
    prior: Prior | None,
    estimator: str,
    n_columns: int,
) -> KLDecomposition:
    """The terms of the KL from the log-densities at the samples; None is the prior N(0, I)."""
    if prior is None:
        prior_marginals = -0.5 * (z.to(joint.dtype) ** 2 + math.log(2 * math.pi))
        prior_joint = prior_marginals.sum(-1)
    else:
        prior_joint = check_log_prob("log_prob", prior.log_prob(z), z.shape[:1])
        prior_marginals = check_log_prob("marginal_log_prob", prior.marginal_log_prob(z), z.shape)
    mi = (conditional - joint).mean()
    agg_kl = (joint - prior_joint).mean()
    return KLDecomposition(
        mi=mi,
        agg_kl=agg_kl,
        tc=(joint - marginals.sum(-1)).mean(),
        dim_kl=(marginals - prior_marginals).mean(0),
        prior_factorization=(prior_joint - prior_marginals.sum(-1)).mean(),
        kl=mi + agg_kl,
        entropy=-joint.mean(),
        saturation=mi.detach().exp() / n_columns,
        estimator=estimator,
    )


def check_estimator(estimator: str | None, dataset_size: int | None) -> str:
    """The estimator's name; raises what `estimator_weights` does, as far as that can be known without a batch."""
    if estimator is None:
        estimator = "uniform" if dataset_size is None else "stratified"
    check_choice("estimator", estimator, ESTIMATORS)
    if dataset_size is not None:
        check_count("dataset_size", dataset_size, least=1)
    elif estimator not in ("uniform", "loo"):
        raise ValueError(f"dataset_size: expected the size of the data set for {estimator!r}, got None")
    return estimator


def check_prior(prior: Prior | None) -> None:
    if prior is None:
        return
    if isinstance(prior, type):
        raise TypeError(f"prior: expected an object, such as {prior.__name__}(), got the class")
    if not (hasattr(prior, "log_prob") and hasattr(prior, "marginal_log_prob")):
        raise TypeError(f"prior: expected an object with log_prob and marginal_log_prob, got {type(prior).__name__}")


def check_log_prob(method: str, log_p: Tensor, shape: torch.Size) -> Tensor:
    """What a method of a prior gave, which must not broadcast to something else."""
    if not isinstance(log_p, Tensor):
        raise TypeError(f"prior: expected a tensor from {method}, got {type(log_p).__name__}")
    if log_p.shape != shape:
        raise ValueError(f"prior: expected {tuple(shape)} from {method}, got {tuple(log_p.shape)}")
    return log_p


def _check_drawn(own: Tensor | None, n_columns: int) -> None:
    """Every sample has a column that it was drawn from; values are looked at on a CPU only."""
    if own is None:
        raise ValueError("own: expected the column each sample was drawn from, as z has not one of each, got None")
    eager = own.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager and own.numel() > 0 and own.min() < 0:
        raise ValueError(f"own: expected columns from 0 to {n_columns - 1}, got values from {int(own.min())}")


def _own_rows(own: Tensor, x: Tensor) -> Tensor:
    """x `[..., N, D]` to `[..., S, D]`, the row that each sample was drawn from; NaN where there is none."""
    known = (own >= 0) & (own < x.shape[-2])
    return x[..., own.where(known, 0), :].where(known[:, None], math.nan)


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
