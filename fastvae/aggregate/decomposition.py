"""The KL of the posteriors from the prior, term by term, as means over samples z_i drawn from posterior own(i).

    kl = mi + agg_kl,    agg_kl = tc + sum_d dim_kl_d − prior_factorization

    mi                     mean log q(z_i|x_i) − log q(z_i)
    agg_kl                 mean log q(z_i) − log p(z_i)
    tc                     mean log q(z_i) − sum_d log q_d(z_id)
    dim_kl_d               mean log q_d(z_id) − log p_d(z_id)
    prior_factorization    mean log p(z_i) − sum_d log p_d(z_id)

The estimators of q(z) are those of `fastvae.estimators`; source: Zheng, eq. 17-21.
"""

import math
from typing import NamedTuple

from torch import Tensor

from ..backends import composed
from ..ops.checks import accumulated, check_flag, check_posterior
from ..ops.cross_log_prob import log_prob_gauss
from ..ops.kl_decomposition import kl_decomposition_op
from ..ops.pairs import checked
from ..ops.short import is_usual_call
from ..protocols import Prior, check_log_prob, check_prior
from .estimators import check_drawn, check_estimator, sample_weights, usual_weights
from .marginals import agg_log_prob_marginals, check_method, is_direct


class KLDecomposition(NamedTuple):
    """The KL of the posteriors from the prior, term by term, in nats: scalars, except `dim_kl` `[D]`.

    Attributes:
        mi: I_enc(x; z), the mutual information of data and latents.
        agg_kl: KL(q(z) ‖ p(z)), of the aggregate posterior from the prior.
        tc: the total correlation, KL(q(z) ‖ prod_d q_d(z_d)).
        dim_kl: KL(q_d(z_d) ‖ p_d(z_d)) of each dimension.
        prior_factorization: E_q(z) log p(z) / prod_d p_d(z_d); 0 for a prior that is a product over dimensions.
        kl: mi + agg_kl, the mean KL(q(z|x) ‖ p(z)).
        entropy: H(q(z)).
        saturation: exp(mi) / n_columns, without gradient; near 1 where a `uniform` mi has hit its ceiling, log B.
        estimator: the name of the estimator of q(z) that the terms are by.
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
    """The mean KL(q(z|x) ‖ p(z)) in nats, split into mutual information, total correlation, dimension-wise KL
    and prior factorization. Differentiable, from one pass over all pairs of samples and posteriors.

    The terms add up, to rounding, for every estimator: kl = mi + tc + sum(dim_kl) − prior_factorization, which is
    the Monte Carlo KL, the mean of log q(z_i|x_i) − log p(z_i).

    Args:
        z, mu, logvar, dataset_size, estimator: as in `agg_entropy`. A mini-batch `uniform` mi never exceeds
            log B, whatever the posteriors: it saturates, and `saturation` says how much. In expectation the true
            mi lies between `uniform` and `loo`.
        own: `[S]` int64, the column each sample was drawn from; needed for every estimator, except where z is
            `[B, D]` or `[L, B, D]`.
        prior: p(z), an object with `log_prob(z)` and `marginal_log_prob(z)`; None for N(0, I).
        analytic_conditional: take mean log q(z_i|x_i) from its closed form, −½ sum_d (log 2 pi e + logvar), in
            place of its value at the samples. The variance of mi is then lower only where the posteriors overlap
            much (otherwise its two terms vary together, and the sampled one is better); mi may exceed log B, and
            kl is no longer the Monte Carlo KL.
        method, tol: for log q_d(z_id), as in `agg_log_prob_marginals`.

    Returns:
        KLDecomposition, in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an input is not a floating-point tensor, `prior` lacks a method, or as in `estimator_weights`.
        ValueError: as in `estimator_weights`; no samples; shapes or devices do not match, including those of the
            prior's results; `own` is missing, or names no column (on CPU tensors; on a GPU, and under the compiler, the
            result is then NaN).

    Source: Zheng, eq. 17-21; Chen et al. 2018; Esmaeili et al. 2019.

    Example:
        >>> terms = fastvae.kl_decomposition(z, mu, logvar, dataset_size=60_000)
        >>> loss = nell + terms.mi + 6 * terms.tc + terms.dim_kl.sum()
    """
    check_prior(prior)
    analytic_conditional = check_flag("analytic_conditional", analytic_conditional)
    estimator = check_estimator(estimator, dataset_size)
    in_one_call = prior is None and own is None and not analytic_conditional
    if in_one_call and is_usual_call(mu, logvar, z):
        check_method(method, tol, z.dtype)
        if is_direct(z, mu, method):
            usual = usual_weights(z, estimator, dataset_size)
            *terms, _joint, _marginals = kl_decomposition_op.short(z, mu, logvar, *usual)
            return KLDecomposition._make([*terms, estimator])
    check_posterior(mu, logvar, min_ndim=2)
    weights = sample_weights(z, mu, dataset_size, estimator, own)
    check_drawn(weights.own, mu.shape[-2])
    z, mu, logvar = accumulated(z, mu, logvar)
    n_columns = mu.shape[-2]
    if in_one_call and mu.ndim == 2:
        check_method(method, tol, z.dtype)
        rows, _, _, log_weights = checked(z, mu, logvar, weights)
        if is_direct(rows, mu, method):
            *terms, _joint, _marginals = kl_decomposition_op(rows, mu, logvar, *log_weights)
            return KLDecomposition._make([*terms, estimator])
    joint, marginals = agg_log_prob_marginals(z, mu, logvar, weights=weights, method=method, tol=tol)
    # joint: [*batch, S], marginals: [*batch, S, D]
    if z.ndim > mu.ndim:
        z = z.movedim(0, -3).flatten(-3, -2)  # [*batch, S, D]
    if own is not None:
        mu, logvar = _own_rows(own, mu), _own_rows(own, logvar)
    elif z.shape[-2] > n_columns:
        mu, logvar = (x.tile(z.shape[-2] // n_columns, 1) for x in (mu, logvar))
    conditional = log_conditional(z, mu, logvar, analytic_conditional)
    return decompose(
        z.flatten(0, -2), conditional, joint.flatten(), marginals.flatten(0, -2), prior, estimator, n_columns
    )


def log_conditional(z: Tensor, mu: Tensor, logvar: Tensor, analytic: bool) -> Tensor:
    """log q(z_i|x_i) of samples `[..., D]` under their own posteriors, flat; or its mean from the closed form."""
    if analytic:
        return -0.5 * (logvar + (math.log(2 * math.pi) + 1)).sum(-1).mean()
    return log_prob_gauss(z, mu, logvar).flatten()


def decompose(
    z: Tensor,  # [S, D]
    conditional: Tensor,  # log q(z_i|x_i) [S], or its mean
    joint: Tensor,  # log q(z_i) [S]
    marginals: Tensor,  # log q_d(z_id) [S, D]
    prior: Prior | None,
    estimator: str,
    n_columns: int,
) -> KLDecomposition:
    """The terms of the KL from the log-densities at the samples; a `prior` of None is N(0, I)."""
    if prior is None:
        prior_marginals = -0.5 * (z.to(joint.dtype) ** 2 + math.log(2 * math.pi))
        prior_joint = prior_marginals.sum(-1)
    else:
        prior_joint = check_log_prob("log_prob", prior.log_prob(z), z.shape[:1])
        prior_marginals = check_log_prob("marginal_log_prob", prior.marginal_log_prob(z), z.shape)
    found = composed.terms(conditional, joint, marginals, prior_joint, prior_marginals, n_columns)
    return KLDecomposition._make([*found, estimator])


def _own_rows(own: Tensor, x: Tensor) -> Tensor:
    """The row of x `[..., N, D]` that each sample was drawn from, `[..., S, D]`; NaN where there is none."""
    known = (own >= 0) & (own < x.shape[-2])
    return x[..., own.where(known, 0), :].where(known[:, None], math.nan)
