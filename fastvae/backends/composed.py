"""Functions of the contract made of others of the same backend and torch's operations, for backends that have none of
their own (`Compositions` and `Likelihoods` in contract.py)."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import Pairs, accumulation_dtype
from .reference import LOG_2PI, inv_sigma, standardize, times


def function(backend: Any, name: str) -> Callable[..., Any]:
    """The backend's function of this name: its own, or the one of this module."""
    own = getattr(backend, name, None)
    return functools.partial(globals()[name], backend) if own is None else own


def agg_entropy(backend: Any, pairs: Pairs) -> Tensor:
    return -backend.agg_log_prob(pairs).mean()


def agg_entropy_backward(backend: Any, d_entropy: Tensor, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]:
    S = pairs.z.shape[0]
    _, *gradients = backend.agg_log_prob_backward((-d_entropy / S).expand(S), None, pairs, wanted)
    return gradients


def kl_decomposition(backend: Any, pairs: Pairs) -> list[Tensor]:
    joint, marginals = backend.agg_log_prob_marginals(pairs)
    z, t, _ = _standardized(pairs, joint.dtype)
    conditional = (-0.5 * (t * t + pairs.logvar.to(joint.dtype) + LOG_2PI)).sum(-1).flatten()
    prior_marginals = -0.5 * (z * z + LOG_2PI)
    found = terms(conditional, joint, marginals, prior_marginals.sum(-1), prior_marginals, len(pairs.mu))
    return [*found, joint, marginals]


def terms(
    conditional: Tensor,  # log q(z_i|x_i) [S], or its mean
    joint: Tensor,  # log q(z_i) [S]
    marginals: Tensor,  # log q_d(z_id) [S, D]
    prior_joint: Tensor,  # log p(z_i) [S]
    prior_marginals: Tensor,  # log p_d(z_id) [S, D]
    n_columns: int,
) -> list[Tensor]:
    """The terms of the KL, in the order of TERMS, from the log-densities at the samples."""
    mi = (conditional - joint).mean()
    return [
        mi,
        (joint - prior_joint).mean(),
        (joint - marginals.sum(-1)).mean(),
        (marginals - prior_marginals).mean(0),
        (prior_joint - prior_marginals.sum(-1)).mean(),
        (conditional - prior_joint).mean(),  # not mi + agg_kl: both may be infinite
        -joint.mean(),
        mi.detach().exp() / n_columns,
    ]


def kl_decomposition_backward(
    backend: Any,
    upstream: Sequence[Tensor | None],
    joint: Tensor,
    marginals: Tensor,
    pairs: Pairs,
    wanted: Sequence[bool],
) -> list[Tensor]:
    S, D = pairs.z.shape
    zero = joint.new_zeros(())
    # The factorization of N(0, I) is 0 whatever the inputs.
    g_mi, g_agg_kl, g_tc, g_dims, _, g_kl, g_entropy = (zero if g is None else g.to(joint.dtype) / S for g in upstream)
    d_joint = (g_agg_kl + g_tc - g_mi - g_entropy).expand(S).contiguous()
    d_marginals = (g_dims - g_tc).expand(S, D).contiguous()
    gradients = iter(backend.agg_log_prob_marginals_backward((d_joint, d_marginals), joint, marginals, pairs, wanted))
    z, t, inverse_sigma = _standardized(pairs, joint.dtype)
    g = g_mi + g_kl
    pull = times(g, t) * inverse_sigma  # [L, N, D]
    of_own = (
        lambda: times(g_agg_kl + g_kl + g_dims, z) - pull.flatten(0, 1),
        lambda: pull.sum(0),
        lambda: times(0.5 * g, t * t - 1).sum(0),
        lambda: zero,
    )
    return [
        (found := next(gradients)) + rest().to(found.dtype)
        for rest, x, want in zip(of_own, pairs.inputs, wanted, strict=True)
        if want and x is not None
    ]


def _standardized(pairs: Pairs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """z [S, D]; t = (z − mu) / sigma [L, N, D] of each sample under its own posterior; and 1 / sigma [N, D]."""
    z, mu, logvar = (x.to(dtype) for x in pairs[:3])
    by_posterior = z.unflatten(0, (-1, len(mu))) if len(mu) else z[None]
    return z, standardize(by_posterior, mu, logvar), inv_sigma(logvar)


# Likelihoods. With p = x − [l > 0], x l − log(1 + e^l) = p l − log(1 + e^−|l|), in which nothing cancels.


def bernoulli_log_prob(backend: Any, x: Tensor, logits: Tensor) -> Tensor:
    x, logits = _by_example(x, logits)
    terms = torch.gt(logits, 0, out=torch.empty_like(logits)).neg_().add_(x)  # p
    terms.mul_(logits).nan_to_num_(0, math.inf, -math.inf)  # where p is 0 infinite logits pull at nothing
    log_p = terms.add_(F.logsigmoid(logits.abs())).sum(-1)
    return (log_p + 0 * x.clamp(0, 1).sum(-1)).flatten()  # NaN where x is


def bernoulli_log_prob_backward(
    backend: Any, grad: Tensor, x: Tensor, logits: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    of_x, of_logits = _by_example(x, logits)
    grad = grad.view(*of_logits.shape[:-1], 1)
    candidates = (
        lambda: times(grad, of_logits).sum(0),
        lambda: (grad * (of_x - torch.sigmoid(of_logits))).flatten(0, 1),
    )
    pairs = zip(candidates, (x, logits), wanted, strict=True)
    return [gradient().to(like.dtype) for gradient, like, want in pairs if want]


def _by_example(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, M] and the logits that meet it, [L, B, M], in the accumulation dtype."""
    dtype = accumulation_dtype(logits.dtype)
    by_example = logits.unflatten(0, (-1, len(x))) if len(x) else logits[None]
    return x.to(dtype), by_example.to(dtype)
