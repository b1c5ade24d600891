"""Priors p(z) over the latents.

A prior has `log_prob`, `marginal_log_prob` and `sample`, and, where KL(q(z|x) ‖ p(z)) has a closed form,
`kl(mu, logvar)`, the batch mean, with the options of `kl_gauss`. Without it an objective takes the Monte
Carlo form, the mean of log q(z|x) − log p(z).
"""

import math
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .backends.contract import accumulation_dtype
from .ops._checks import check_count, check_device, check_tensor
from .ops.cross import log_prob_gauss
from .ops.kl import kl_gauss
from .ops.sampling import reparameterize
from .saved import SavedNumbers


class Prior(Protocol):
    """What `VAE` and the objectives ask of a prior.

    Optional: `kl(mu, logvar)`, the closed form of the mean KL(q(z|x) ‖ p(z)), for mu and logvar `[B, D]`; free bits
    need it with `reduction="dim"` too, the mean of each dimension, `[D]`.
    """

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), z `[S, D]` to `[S]`."""

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        """log p_d(z_d) of each dimension, z `[S, D]` to `[S, D]`."""

    def sample(self, n: int) -> Tensor:
        """`[n, D]`"""


class StandardNormal(SavedNumbers):
    """p(z) = N(0, I).

    Args:
        dim: D, the number of latent dimensions, which only `sample` needs. None takes it from the z that `log_prob` was
            given last (a forward pass of the VAE does that). It is in the state dict, 0 where it is not known.
        device, dtype: of the samples; `to` changes them, as for any module.

    Example:
        >>> prior = fastvae.StandardNormal(10)
        >>> z = prior.sample(64)  # [64, 10]
    """

    dim: int
    _like: Tensor
    saved_numbers: ClassVar[dict[str, torch.dtype]] = {"dim": torch.int64}

    def __init__(
        self,
        dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dim = 0 if dim is None else check_count("dim", dim, least=1, most=2**31)
        self._given = dim is not None
        self.register_buffer("_like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, `[..., D]` to `[...]`, in float32 (float64 for float64 inputs)."""
        return self.marginal_log_prob(z).sum(-1)

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        """log p_d(z_d) in nats, `[..., D]` to `[..., D]`, in float32 (float64 for float64 inputs)."""
        check_tensor("z", z)
        if not self._given:
            self.dim = z.shape[-1]  # not looked at before, or the compiler would make of each value another graph
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
        if self.dim == 0:
            raise ValueError("dim: not known before the VAE has seen data; give it as StandardNormal(dim)")
        n = check_n(n, self.dim)
        return torch.randn(n, self.dim, device=self._like.device, dtype=self._like.dtype)

    def extra_repr(self) -> str:
        return str(self.dim or "")


class DiagonalGaussian(nn.Module):
    """p(z) = N(mu, diag exp(logvar)), learned with the VAE; it starts at N(0, I).

    Args:
        dim: D, the number of latent dimensions.
        device, dtype: of the parameters.

    Attributes:
        mu, logvar: the parameters, `[D]` each.

    Example:
        >>> vae = fastvae.VAE(encoder, decoder, prior=fastvae.DiagonalGaussian(16))
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dim = check_count("dim", dim, least=1, most=2**31)
        self.mu, self.logvar = (nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) for _ in range(2))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, `[..., D]` to `[...]`, in float32 (float64 for float64 inputs)."""
        check_dim(z, self.mu)
        return log_prob_gauss(z, self.mu, self.logvar)

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        """log p_d(z_d) in nats, `[..., D]` to `[..., D]`, in float32 (float64 for float64 inputs)."""
        check_dim(z, self.mu)
        return log_prob_gauss(z[..., None], self.mu[:, None], self.logvar[:, None])

    def kl(self, mu: Tensor, logvar: Tensor, *, reduction: str = "batchmean", free_bits: float = 0.0) -> Tensor:
        """KL(q(z|x) ‖ p(z)) in nats, by `kl_gauss`."""
        return kl_gauss(mu, logvar, self.mu, self.logvar, reduction=reduction, free_bits=free_bits)

    def sample(self, n: int) -> Tensor:
        """`[n, D]`, from torch's generator; differentiable.

        Raises:
            ValueError: a negative `n`.
        """
        n = check_n(n, len(self.mu))
        return reparameterize(self.mu.expand(n, -1), self.logvar.expand(n, -1))


def check_n(n: Any, dim: int) -> int:
    """How many samples: as many as can be counted in bytes, so that it is torch that has no memory for them."""
    return check_count("n", n, most=2**60 // max(dim, 1))


def check_dim(z: Any, mu: Tensor) -> None:
    check_tensor("z", z)
    check_device("z", z, "the prior's mu", mu)
    if z.shape[-1] != mu.shape[-1]:
        raise ValueError(f"z: expected [..., {mu.shape[-1]}], got shape {tuple(z.shape)}")


def check_posteriors(posteriors: Any, n: int) -> tuple[Tensor, Tensor]:
    """What an encoder gave for n inputs: mu and logvar, `[n, D]` each."""
    if not (isinstance(posteriors, tuple | list) and len(posteriors) == 2):
        raise TypeError(f"encoder: expected the pair (mu, logvar), got {type(posteriors).__name__}")
    mu, logvar = posteriors
    check_tensor("encoder's mu", mu)
    check_tensor("encoder's logvar", logvar)
    if not (mu.ndim == 2 and mu.shape[0] == n and mu.shape == logvar.shape):
        shapes = f"{tuple(mu.shape)} and {tuple(logvar.shape)}"
        raise ValueError(f"encoder: expected mu and logvar of one shape [{n}, D], got {shapes}")
    return mu, logvar


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
