"""The kernels in plain PyTorch that reads like the maths: the fallback everywhere, and what the others are
tested against. Nothing larger than `CHUNK_BYTES` is formed at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import philox
from .contract import LogWeights, Pairs, accumulation_dtype, kl_scale

CHUNK_BYTES = 64 * 2**20
LOG_2PI = math.log(2 * math.pi)


def status() -> tuple[bool, str]:
    return True, "plain PyTorch, any device"


def _accumulate(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors in the dtype that the arithmetic is done in; None becomes a 0 that broadcasts."""
    like = next(t for t in tensors if t is not None)
    dtype = accumulation_dtype(like.dtype)
    return tuple(like.new_zeros((), dtype=dtype) if t is None else t.to(dtype) for t in tensors)


def _held_finite(x: Tensor) -> Tensor:
    """Clips x to finite numbers, so that 0 · x is 0 for finite inputs."""
    finite = torch.finfo(x.dtype).max
    return x.clamp(-finite, finite)


def inv_sigma(logvar: Tensor) -> Tensor:
    return _held_finite(torch.exp(-0.5 * logvar))


def standardize(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """t = (z − mu) / sigma"""
    return _held_finite((z - mu) * inv_sigma(logvar))


def times(g: Tensor, x: Tensor) -> Tensor:
    """g x, but 0 where g is 0 even if x overflowed: no gradient in, none out."""
    return g * x.where((g != 0) | (x.abs() < math.inf), 0)


def _gradients(
    candidates: Sequence[Callable[[], Tensor]], inputs: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor]:
    """The candidates that are wanted, each in its input's dtype; the others are not computed."""
    return [
        gradient().to(x.dtype)
        for gradient, x, want in zip(candidates, inputs, wanted, strict=True)
        if want and x is not None
    ]


# KL(N(mu, exp logvar) ‖ N(prior_mu, exp prior_logvar)), with Delta = logvar − prior_logvar and
# t = (mu − prior_mu) / prior_sigma: ½ (expm1(Delta) − Delta + t²)


def kl_gauss(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, reduction: str
) -> Tensor:
    B, D = mu.shape
    mu, logvar, prior_mu, prior_logvar = _accumulate(mu, logvar, prior_mu, prior_logvar)
    delta = logvar - prior_logvar
    t = standardize(mu, prior_mu, prior_logvar)
    kl = 0.5 * ((torch.expm1(delta) - delta).clamp(min=0) + t * t)  # [B, D]; the clamp removes rounding
    axes = {"none": (), "sample": (1,), "dim": (0,)}.get(reduction, (0, 1))
    return (kl.sum(axes) if axes else kl) * kl_scale(reduction, B, D)


def kl_gauss_backward(
    grad: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    reduction: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    B, D = mu.shape
    inputs: tuple[Any, ...] = (mu, logvar, prior_mu, prior_logvar)
    mu, logvar, m, v = _accumulate(*inputs)  # the priors keep their shapes
    g = grad * kl_scale(reduction, B, D)
    if reduction == "sample":
        g = g[:, None]
    t, inverse_sigma = standardize(mu, m, v), inv_sigma(v)

    def d_mu() -> Tensor:
        return times(mu - m, g * inverse_sigma * inverse_sigma)  # so that what overflows is the product alone

    def d_logvar() -> Tensor:
        return times(g, 0.5 * torch.expm1(logvar - v))

    def d_prior_mu() -> Tensor:
        return (-d_mu()).sum_to_size(inputs[2].shape)

    def d_prior_logvar() -> Tensor:
        return (-d_logvar() - times(g, 0.5 * t) * t).sum_to_size(inputs[3].shape)

    return _gradients((d_mu, d_logvar, d_prior_mu, d_prior_logvar), inputs, wanted)


# Sampling: z = mu + sigma · eps


def _noise(mu: Tensor, seed: Tensor, n_samples: int) -> Tensor:
    """The noise eps [L, B, D]."""
    shape = (n_samples, *mu.shape)
    return philox.standard_normal(seed, 0, math.prod(shape)).reshape(shape).to(accumulation_dtype(mu.dtype))


def sample_gauss(
    mu: Tensor, logvar: Tensor, seed: Tensor, n_samples: int, outputs: Sequence[bool], reduction: str
) -> list[Tensor]:
    return sampled(mu, logvar, _noise(mu, seed, n_samples), outputs, reduction)


def sampled(mu: Tensor, logvar: Tensor, eps: Tensor, outputs: Sequence[bool], reduction: str) -> list[Tensor]:
    dtype = mu.dtype
    mu, logvar = _accumulate(mu, logvar)
    z = mu + torch.exp(0.5 * logvar) * eps  # [L, B, D]
    results = {
        "z": lambda: z.to(dtype),
        "log_q": lambda: -0.5 * (LOG_2PI + logvar + eps * eps).sum(-1),
        "log_p": lambda: -0.5 * (LOG_2PI + z * z).sum(-1),
        "kl": lambda: kl_gauss(mu, logvar, None, None, reduction),
        "eps": lambda: eps,
    }
    return [result() for result, want in zip(results.values(), outputs, strict=True) if want]


def sample_gauss_backward(
    upstream: Sequence[Tensor | None],
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor | None,
    eps: Tensor | None,
    n_samples: int,
    reduction: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    if eps is None:
        assert seed is not None
        eps = _noise(mu, seed, n_samples)
    return sampled_backward(upstream, mu, logvar, eps, reduction, wanted)


def sampled_backward(
    upstream: Sequence[Tensor | None], mu: Tensor, logvar: Tensor, eps: Tensor, reduction: str, wanted: Sequence[bool]
) -> list[Tensor]:
    inputs = (mu, logvar)
    scale = kl_scale(reduction, *mu.shape)
    mu, logvar, d_z, d_log_q, d_log_p, d_kl = _accumulate(mu, logvar, *upstream)
    sigma = torch.exp(0.5 * logvar)
    d_z = d_z - times(d_log_p[..., None], mu + sigma * eps)  # d log_p / d z = −z

    def d_mu() -> Tensor:
        return d_z.sum(0) + times(scale * d_kl[..., None], mu)

    def d_logvar() -> Tensor:
        from_z = times(0.5 * (d_z * eps).sum(0), sigma)  # summed first: sigma may overflow, and eps has two signs
        from_log_q = d_log_q.expand(eps.shape[:2]).sum(0)[:, None]
        return from_z - 0.5 * from_log_q + times(0.5 * scale * d_kl[..., None], torch.expm1(logvar))

    return _gradients((d_mu, d_logvar), inputs, wanted)


# Cross-evaluation: log q(z_i | x_j) for all samples and all posteriors


class _Chunk:
    """A chunk of rows against all columns: t [R, N, D], log_q = log q(z_id | x_jd) [R, N, D]."""

    def __init__(self, rows: slice, z: Tensor, mu: Tensor, logvar: Tensor):
        self.rows = rows
        self.t = standardize(z[rows, None], mu, logvar)
        self.log_q = -0.5 * (self.t * self.t + logvar + LOG_2PI)

    def log_weights(self, weights: LogWeights) -> tuple[Tensor, Tensor]:
        """log w_ij [R, N], and where in it the common column weight stands (no override) [R, N]."""
        R, N, _ = self.t.shape
        if weights.log_w is not None:
            log_w = weights.log_w.to(self.t.dtype).expand(R, N)
        else:
            log_w = self.t.new_full((R, N), weights.common(N))
        column = torch.arange(N, device=self.t.device)
        common = torch.ones(R, N, dtype=torch.bool, device=self.t.device)
        if weights.own is not None:
            own = weights.own[self.rows, None]
            inside = (own >= 0) & (own < N)
            for value, override in (
                (weights.log_w_next, inside & (column == (own + 1) % N)),
                (weights.log_w_own, inside & (column == own)),  # own wins where both are one column
            ):
                if value is not None:
                    log_w = torch.where(override, value, log_w)
                    common = common & ~override
        return log_w, common


def _log_sum(terms: Tensor) -> Tensor:
    """log sum exp over columns, axis 1. Unlike torch.logsumexp, it has all derivatives; they are 0 of an empty sum."""
    if terms.shape[1] == 0:
        return torch.logsumexp(terms, 1)
    most = terms.detach().amax(1, keepdim=True)
    most = most.where(most.abs() < math.inf, 0)
    total = (terms - most).exp().sum(1)
    empty = total == 0
    return (total.masked_fill(empty, 1).log() + most.squeeze(1)).masked_fill(empty, -math.inf)


def row_chunks(z: Tensor, mu: Tensor, temporaries: int = 8) -> Iterator[slice]:
    """Goes through all rows of z in chunks whose [R, N, D] temporaries stay within the budget, if they are so many."""
    row_bytes = temporaries * max(1, mu.numel()) * accumulation_dtype(z.dtype).itemsize
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, max(1, z.shape[0]), step):
        yield slice(start, min(start + step, z.shape[0]))


def _chunks(z: Tensor, mu: Tensor, logvar: Tensor) -> Iterator[_Chunk]:
    return (_Chunk(rows, z, mu, logvar) for rows in row_chunks(z, mu))


def _responsibility(log_terms: Tensor, log_sum: Tensor) -> Tensor:
    """The share of each term in the sum over columns, axis 1; 0 where the sum is empty. From the terms alone, as
    exp(log_terms − log_sum) would inherit the rounding of log_sum."""
    empty = log_sum == -math.inf
    return torch.softmax(log_terms.masked_fill(empty, 0), 1).masked_fill(empty, 0)


class _PairGradients:
    """Sums c_ijd · ∂ log q(z_id | x_jd) into d_z, d_mu and d_logvar, those that are wanted. The sums are of e = t / up
    with up = max(1, 1 / sigma), as a sum of t² may overflow where one of (z − mu)², times 1 / sigma² later, does
    not."""

    def __init__(self, z: Tensor, mu: Tensor, logvar: Tensor, wanted: Sequence[bool]):
        self.z, self.mu, self.wanted = z, mu, wanted
        self.inv_sigma = inv_sigma(logvar)
        self.up = self.inv_sigma.clamp(min=1)
        self.d_z: list[Tensor] = []
        self.c, self.ce, self.cee = (torch.zeros_like(mu) for _ in range(3))

    def add(self, rows: slice, c: Tensor) -> None:
        """Adds a chunk's pairs with weights c [R, N, D], or [R, N, 1] where they are the same for every dimension."""
        want_z, want_mu, want_logvar, *_ = self.wanted
        e = _held_finite((self.z[rows, None] - self.mu) * self.inv_sigma.clamp(max=1))  # [R, N, D]
        ce = c * e
        if want_z:
            self.d_z.append(-(ce * self.inv_sigma * self.up).sum(1))
        if want_mu:
            self.ce = self.ce + ce.sum(0)
        if want_logvar:
            self.c = self.c + c.sum(0)
            self.cee = self.cee + (ce * e).sum(0)

    def gradients(self, inputs: Sequence[Tensor | None], *others: Tensor) -> list[Tensor]:
        def d_mu() -> Tensor:
            return self.ce * self.up * self.inv_sigma

        def d_logvar() -> Tensor:
            return 0.5 * (self.cee * self.up * self.up - self.c)

        candidates = (lambda: torch.cat(self.d_z), d_mu, d_logvar, *(lambda g=g: g for g in others))
        return _gradients(candidates, inputs, self.wanted)


def cross_log_prob(pairs: Pairs) -> Tensor:
    z, mu, logvar = _accumulate(*pairs[:3])
    return torch.cat([chunk.log_q.sum(-1) for chunk in _chunks(z, mu, logvar)])


def cross_log_prob_backward(grad: Tensor, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]:
    z, mu, logvar = _accumulate(*pairs[:3])
    total = _PairGradients(z, mu, logvar, wanted)
    for chunk in _chunks(z, mu, logvar):
        total.add(chunk.rows, grad[chunk.rows, :, None])
    return total.gradients(pairs[:3])


def agg_log_prob(pairs: Pairs) -> Tensor:
    z, mu, logvar = _accumulate(*pairs[:3])
    joint = []
    for chunk in _chunks(z, mu, logvar):
        log_w, _ = chunk.log_weights(pairs.weights)
        joint.append(_log_sum(log_w + chunk.log_q.sum(-1)))
    return torch.cat(joint)


def agg_log_prob_marginals(pairs: Pairs) -> tuple[Tensor, Tensor]:
    z, mu, logvar = _accumulate(*pairs[:3])
    joint, marginals = [], []
    for chunk in _chunks(z, mu, logvar):
        log_w, _ = chunk.log_weights(pairs.weights)
        joint.append(_log_sum(log_w + chunk.log_q.sum(-1)))
        marginals.append(_log_sum(log_w[..., None] + chunk.log_q))
    return torch.cat(joint), torch.cat(marginals)


def agg_log_prob_backward(d_joint: Tensor, joint: Tensor | None, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]:
    if joint is None:
        joint = agg_log_prob(pairs)
        return [joint, *agg_log_prob_backward(d_joint, joint, pairs, wanted)]
    return agg_log_prob_marginals_backward((d_joint, None), joint, None, pairs, wanted)


def agg_log_prob_marginals_backward(
    upstream: Sequence[Tensor | None],
    joint: Tensor,
    marginals: Tensor | None,
    pairs: Pairs,
    wanted: Sequence[bool],
) -> list[Tensor]:
    d_joint, d_marginals = upstream
    z, mu, logvar = _accumulate(*pairs[:3])
    total = _PairGradients(z, mu, logvar, wanted)
    d_log_w = mu.new_zeros(mu.shape[0])
    for chunk in _chunks(z, mu, logvar):
        log_w, common = chunk.log_weights(pairs.weights)
        rows = chunk.rows
        c = torch.zeros_like(log_w)[..., None]  # [R, N, 1 or D]: what log q(z_id | x_jd) is to be pulled by
        d_log_w_pairs = torch.zeros_like(log_w)  # [R, N]
        if d_joint is not None:
            share = _responsibility(log_w + chunk.log_q.sum(-1), joint[rows, None]) * d_joint[rows, None]
            c = c + share[..., None]
            d_log_w_pairs = d_log_w_pairs + share
        if d_marginals is not None and marginals is not None:
            shares = _responsibility(log_w[..., None] + chunk.log_q, marginals[rows, None])
            shares = shares * d_marginals[rows, None]
            c = c + shares
            d_log_w_pairs = d_log_w_pairs + shares.sum(-1)
        total.add(rows, c)
        d_log_w = d_log_w + torch.where(common, d_log_w_pairs, 0).sum(0)
    return total.gradients(pairs.inputs, d_log_w)
