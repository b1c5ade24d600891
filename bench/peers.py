"""What people write today, each a few lines from its formula, named for what it is. Natural-log units, uniform
weights 1/N. Nothing here uses fastvae."""

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def kl_formula(mu: Tensor, logvar: Tensor) -> Tensor:
    """The line in every VAE, over the batch."""
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / mu.shape[0]


def reparameterize_formula(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)


def agg_broadcast(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z) [S] by way of [S, N, D]."""
    log_q = -0.5 * ((z[:, None] - mu).square() * torch.exp(-logvar) + logvar + LOG_2PI)
    return torch.logsumexp(log_q.sum(-1), 1) - math.log(mu.shape[0])


def agg_gemm(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z) [S] by expanding the square into two matrix products: fast, and much less accurate."""
    precision = torch.exp(-logvar)
    constant = (mu.square() * precision + logvar + LOG_2PI).sum(-1)
    log_q = -0.5 * (z.square() @ precision.T - 2 * z @ (mu * precision).T + constant)
    return torch.logsumexp(log_q, 1) - math.log(mu.shape[0])


def marginals_broadcast(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """log q(z) [S] and log q_d(z_d) [S, D] by way of [S, N, D]."""
    log_q = -0.5 * ((z[:, None] - mu).square() * torch.exp(-logvar) + logvar + LOG_2PI)
    log_n = math.log(mu.shape[0])
    return torch.logsumexp(log_q.sum(-1), 1) - log_n, torch.logsumexp(log_q, 1) - log_n


def agg_keops(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z) [S] with KeOps, which compiles a kernel for the formula and streams over columns."""
    from pykeops.torch import LazyTensor

    z_i, mu_j = LazyTensor(z[:, None]), LazyTensor(mu[None])
    logvar_j, precision_j = LazyTensor(logvar[None]), LazyTensor(torch.exp(-logvar)[None])
    log_q = ((z_i - mu_j).square() * precision_j + logvar_j + LOG_2PI).sum(-1) * (-0.5)
    return log_q.logsumexp(dim=1)[:, 0] - math.log(mu.shape[0])


compiled_kl = torch.compile(kl_formula)
compiled_broadcast = torch.compile(agg_broadcast)
compiled_gemm = torch.compile(agg_gemm)
compiled_marginals = torch.compile(marginals_broadcast)
