"""The code that people write today: each a few lines from its formula, named for what it is. Natural-log units, uniform
weights 1/N. z is [S, D]; mu and logvar are [N, D], or [B, D]. Nothing here uses fastvae."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributions as dist
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
Marginals = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


# Over one batch.


def kl_formula(mu: Tensor, logvar: Tensor) -> Tensor:
    """The line in every VAE, over the batch."""
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / mu.shape[0]


def kl_distributions(mu: Tensor, logvar: Tensor) -> Tensor:
    return dist.kl_divergence(normal(mu, logvar), normal(torch.zeros_like(mu), torch.zeros_like(mu))).sum(-1).mean()


def reparameterize_formula(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)


def reparameterize_distributions(mu: Tensor, logvar: Tensor) -> Tensor:
    return normal(mu, logvar).rsample()


def z_and_kl_formula(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The two lines in every VAE: z [B, D], and the KL over the batch."""
    return reparameterize_formula(mu, logvar), kl_formula(mu, logvar)


def sample_formula(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z [B, D], log q(z|x), log p(z) and the KL, [B] each."""
    eps = torch.randn_like(mu)
    z = mu + eps * torch.exp(0.5 * logvar)
    log_q = -0.5 * (eps.square() + logvar + LOG_2PI).sum(-1)
    log_p = -0.5 * (z.square() + LOG_2PI).sum(-1)
    return z, log_q, log_p, -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(-1)


def sample_distributions(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, p = normal(mu, logvar), normal(torch.zeros_like(mu), torch.zeros_like(mu))
    z = q.rsample()
    return z, q.log_prob(z).sum(-1), p.log_prob(z).sum(-1), dist.kl_divergence(q, p).sum(-1)


def normal(mu: Tensor, logvar: Tensor) -> dist.Normal:
    return dist.Normal(mu, torch.exp(0.5 * logvar), validate_args=False)


# Between all samples and all posteriors.


def cross_broadcast(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z_i|x_j) [S, N] by way of [S, N, D]."""
    return -0.5 * ((z[:, None] - mu).square() * torch.exp(-logvar) + logvar + LOG_2PI).sum(-1)


def cross_gemm(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z_i|x_j) [S, N] by expanding the square into two matrix products: fast, and much less accurate."""
    precision = torch.exp(-logvar)
    constant = (mu.square() * precision + logvar + LOG_2PI).sum(-1)
    return -0.5 * (z.square() @ precision.T - 2 * z @ (mu * precision).T + constant)


def cross_distributions(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return dist.Independent(normal(mu, logvar), 1).log_prob(z[:, None])


def agg_broadcast(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z) [S]"""
    log_q = -0.5 * ((z[:, None] - mu).square() * torch.exp(-logvar) + logvar + LOG_2PI)
    return torch.logsumexp(log_q.sum(-1), 1) - math.log(mu.shape[0])


def agg_gemm(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z) [S]"""
    return torch.logsumexp(cross_gemm(z, mu, logvar), 1) - math.log(mu.shape[0])


def agg_distributions(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z) [S] of torch's mixture distribution."""
    columns = dist.Independent(normal(mu, logvar), 1)
    return dist.MixtureSameFamily(_uniform(mu, mu.shape[0]), columns, validate_args=False).log_prob(z)


def agg_keops(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z) [S] with KeOps, which compiles a kernel for the formula and streams over columns."""
    from pykeops.torch import LazyTensor

    z_i, mu_j = LazyTensor(z[:, None]), LazyTensor(mu[None])
    logvar_j, precision_j = LazyTensor(logvar[None]), LazyTensor(torch.exp(-logvar)[None])
    log_q = ((z_i - mu_j).square() * precision_j + logvar_j + LOG_2PI).sum(-1) * (-0.5)
    return log_q.logsumexp(dim=1)[:, 0] - math.log(mu.shape[0])


def agg_attention(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z) [S] as the log-sum-exp that attention has anyway: the expanded square as queries, keys and a bias."""
    from torch.nn.attention import flex_attention as flex

    precision = torch.exp(-logvar)
    bias = -0.5 * (mu.square() * precision + logvar + LOG_2PI).sum(-1)
    q, k = torch.cat((z.square(), z), -1)[None, None], torch.cat((-0.5 * precision, mu * precision), -1)[None, None]
    attend = torch.compile(flex.flex_attention, dynamic=False)
    _, lse = attend(q, k, k, score_mod=lambda score, b, h, i, j: score + bias[j], scale=1.0, return_lse=True)  # type: ignore
    return lse[0, 0] - math.log(mu.shape[0])


def agg_sklearn(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z) [S] of scikit-learn's mixture with these components; without gradient."""
    from sklearn.mixture import GaussianMixture

    N, D = mu.shape
    mixture = GaussianMixture(N, covariance_type="diag")
    mixture.weights_ = torch.full((N,), 1 / N, dtype=mu.dtype).numpy()
    mixture.means_, mixture.covariances_ = mu.numpy(), logvar.exp().numpy()
    mixture.precisions_cholesky_ = torch.exp(-0.5 * logvar).numpy()
    mixture.n_features_in_ = D
    return torch.from_numpy(mixture.score_samples(z.numpy()))


def marginals_broadcast(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """log q(z) [S] and log q_d(z_d) [S, D] by way of [S, N, D]."""
    log_q = -0.5 * ((z[:, None] - mu).square() * torch.exp(-logvar) + logvar + LOG_2PI)
    log_n = math.log(mu.shape[0])
    return torch.logsumexp(log_q.sum(-1), 1) - log_n, torch.logsumexp(log_q, 1) - log_n


def entropy_broadcast(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -agg_broadcast(z, mu, logvar).mean()


def entropy_gemm(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -agg_gemm(z, mu, logvar).mean()


def decomposition_broadcast(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mi, tc, dim_kl [D]) of samples z [B, D], each from its own posterior, by way of [B, B, D]."""
    joint, marginals = marginals_broadcast(z, mu, logvar)
    conditional = -0.5 * ((z - mu).square() * torch.exp(-logvar) + logvar + LOG_2PI).sum(-1)
    dim_kl = (marginals + 0.5 * (z.square() + LOG_2PI)).mean(0)
    return (conditional - joint).mean(), (joint - marginals.sum(-1)).mean(), dim_kl


def marginals_distributions(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The joint, and for each dimension a mixture of its own, [D, N] components."""
    columns = normal(mu.T, logvar.T)
    marginals = dist.MixtureSameFamily(_uniform(mu, *columns.batch_shape), columns, validate_args=False)
    return agg_distributions(z, mu, logvar), marginals.log_prob(z)


def marginals_keops(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The joint, and the dimensions as a batch of one-dimensional ones: KeOps' log-sum-exp is of scalars."""
    from pykeops.torch import LazyTensor

    def columns(x: Tensor) -> Any:
        return LazyTensor(x.T[:, None, :, None].contiguous())  # [D, 1, N, 1]

    z_i, logvar_j = LazyTensor(z.T[:, :, None, None].contiguous()), columns(logvar)
    log_q = ((z_i - columns(mu)).square() * columns(torch.exp(-logvar)) + logvar_j + LOG_2PI) * (-0.5)
    marginals = log_q.logsumexp(dim=2)[..., 0].T  # [S, D]
    return agg_keops(z, mu, logvar), marginals - math.log(mu.shape[0])


def matrix_product(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """A yardstick and no peer: a matrix product with as many FMAs as the joint, 2·S·N·D."""
    return torch.cat((z, z), 1) @ torch.cat((mu, logvar), 1).T


def _uniform(like: Tensor, *shape: int) -> dist.Categorical:
    return dist.Categorical(logits=like.new_zeros(shape), validate_args=False)


# Each size is compiled for by itself (dynamic=False): kernels for any size are slower.


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)


compiled_kl = compiled(kl_formula)
compiled_reparameterize = compiled(reparameterize_formula)
compiled_sample = compiled(sample_formula)
compiled_z_and_kl = compiled(z_and_kl_formula)
compiled_cross_broadcast = compiled(cross_broadcast)
compiled_cross_gemm = compiled(cross_gemm)
compiled_broadcast = compiled(agg_broadcast)
compiled_gemm = compiled(agg_gemm)
compiled_marginals = compiled(marginals_broadcast)
compiled_entropy_broadcast = compiled(entropy_broadcast)
compiled_entropy_gemm = compiled(entropy_gemm)
compiled_decomposition = compiled(decomposition_broadcast)


# Over a whole data set.


def decomposition(
    marginals: Marginals, z: Tensor, mu: Tensor, logvar: Tensor, most: int = 2**24
) -> tuple[Tensor, Tensor, Tensor]:
    """(mi, tc, dim_kl [D]) with z [S, D] drawn from the first S posteriors; `marginals` sees some rows at a time, that
    [rows, N, D] has at most `most` elements."""
    S, (N, D) = len(z), mu.shape
    rows = max(r for r in range(1, S + 1) if S % r == 0 and (r == 1 or r * N * D <= most))
    parts = [marginals(chunk, mu, logvar) for chunk in z.split(rows)]
    joint, each = torch.cat([j for j, _ in parts]).double(), torch.cat([m for _, m in parts]).double()
    conditional = normal(mu[:S], logvar[:S]).log_prob(z).sum(-1)
    dim_kl = (each + 0.5 * (z.double().square() + LOG_2PI)).mean(0)
    return (conditional - joint).mean(), (joint - each.sum(-1)).mean(), dim_kl
