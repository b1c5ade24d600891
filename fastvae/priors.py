"""Priors p(z) over the latents.

A prior has `log_prob`, `marginal_log_prob` and `sample`, and, where KL(q(z|x) ‖ p(z)) has a closed form,
`kl(mu, logvar)`, the batch mean, with the options of `kl_gauss`. Without it an objective takes the Monte
Carlo form, the mean of log q(z|x) − log p(z).
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from .backends.contract import accumulation_dtype
from .ops._checks import check_count, check_tensor
from .ops.kl import kl_gauss


class Prior(Protocol):
    """What `VAE` and the objectives ask of a prior, besides `kl` where that has a closed form."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), z `[S, D]` to `[S]`."""

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        """log p_d(z_d) of each dimension, z `[S, D]` to `[S, D]`."""

    def sample(self, n: int) -> Tensor:
        """`[n, D]`"""


class StandardNormal(nn.Module):
    """p(z) = N(0, I).

    Args:
        dim: D, the number of latent dimensions, which only `sample` needs. None takes it from the z that
            `log_prob` is given (a forward pass of the VAE does that) and keeps it in the state dict.

    Example:
        >>> prior = fastvae.StandardNormal(10)
        >>> z = prior.sample(64)  # [64, 10]
    """

    dim: Tensor  # a tensor, so that it is saved, and is no constant to the compiler

    def __init__(self, dim: int | None = None):
        super().__init__()
        if dim is not None:
            check_count("dim", dim, least=1)
        self.register_buffer("dim", torch.tensor(0 if dim is None else dim))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, `[..., D]` to `[...]`, in float32 (float64 for float64 inputs)."""
        return self.marginal_log_prob(z).sum(-1)

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        """log p_d(z_d) in nats, `[..., D]` to `[..., D]`, in float32 (float64 for float64 inputs)."""
        check_tensor("z", z)
        self.dim.fill_(z.shape[-1])
        z = z.to(accumulation_dtype(z.dtype))
        return -0.5 * (z * z + math.log(2 * math.pi))

    def kl(self, mu: Tensor, logvar: Tensor, *, reduction: str = "batchmean", free_bits: float = 0.0) -> Tensor:
        """KL(q(z|x) ‖ p(z)) in nats, by `kl_gauss`."""
        return kl_gauss(mu, logvar, reduction=reduction, free_bits=free_bits)

    def sample(self, n: int) -> Tensor:
        """`[n, D]`, from torch's generator.

        Raises:
            ValueError: a negative `n`, or a dimension not known yet.
        """
        check_count("n", n)
        dim = int(self.dim)
        if not torch.compiler.is_compiling() and dim == 0:
            raise ValueError("dim: not known before the VAE has seen data; give it as StandardNormal(dim)")
        return torch.randn(n, dim, device=self.dim.device)
