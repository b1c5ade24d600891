"""Gaussian priors p(z) over the latents; `fastvae.Prior`, in `protocols.py`, says what a prior has."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.contract import accumulation_dtype
from ..ops.checks import check_count, check_device, check_tensor
from ..ops.cross_log_prob import log_prob_gauss
from ..ops.kl_gauss import kl_gauss
from ..ops.modes import has_values
from ..ops.sample_gauss import reparameterize

__all__ = ["DiagonalGaussian", "StandardNormal"]


class StandardNormal(nn.Module):
    """The prior p(z) = N(0, I).

    Args:
        dim: D, the number of latent dimensions, which only `sample` needs. None takes it from a forward pass of the VAE
            in training mode, or from the z that `log_prob` is given then. It is in the state dict, 0 where not known.
        device, dtype: of the samples; `to` changes them, as for any module.

    Example:
        >>> prior = fastvae.StandardNormal(10)
        >>> z = prior.sample(64)  # [64, 10]
    """

    dim: Tensor  # a buffer, so that it is saved, averaged and copied with the module
    _like: Tensor
    _seen = 0  # the dimension, where the buffer could not be written to

    def __init__(
        self,
        dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        known = 0 if dim is None else check_count("dim", dim, least=1, most=2**31)
        self.register_buffer("dim", torch.full((), known, dtype=torch.int64, device=device))
        self.register_buffer("_like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, `[..., D]` to `[...]`, in float32 (float64 for float64 inputs)."""
        return self.marginal_log_prob(z).sum(-1)

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        """log p_d(z_d) in nats, `[..., D]` to `[..., D]`, in float32 (float64 for float64 inputs)."""
        check_tensor("z", z)
        self.meet(z)
        z = z.to(accumulation_dtype(z.dtype))
        return -0.5 * (z * z + math.log(2 * math.pi))

    def kl(self, mu: Tensor, logvar: Tensor, *, reduction: str = "batchmean", free_bits: float = 0.0) -> Tensor:
        """KL(q(z|x) ‖ p(z)) in nats, by `kl_gauss`."""
        return kl_gauss(mu, logvar, reduction=reduction, free_bits=free_bits)

    def sample(self, n: int) -> Tensor:
        """Draw `[n, D]` with torch's generator.

        Raises:
            ValueError: a negative `n`, or a dimension not known yet.
        """
        dim = self._known()
        if dim == 0:
            raise ValueError("dim: not known before the VAE has been trained on data; give it as StandardNormal(dim)")
        n = check_n(n, dim)
        return torch.randn(n, dim, device=self._like.device, dtype=self._like.dtype)

    def extra_repr(self) -> str:
        return str(self._known() or "")

    def _known(self) -> int:
        """The dimension, 0 where it is not known. A buffer has no value on the meta device, and to look at one the
        compiler would break the graph."""
        if self.dim.is_meta or (self._seen and torch.compiler.is_compiling()):
            return self._seen
        return int(self.dim) or self._seen

    def meet(self, z: Tensor) -> None:
        """In training mode, take the dimension from z `[..., D]`, unless it is known. The buffer is not changed under
        the compiler or function transforms, nor, if it was made under inference_mode, outside of that mode."""
        if not self.training:
            return
        eager = has_values(z) and not self.dim.is_meta
        if not eager or (self.dim.is_inference() and not torch.is_inference_mode_enabled()):
            self._seen = z.shape[-1]  # not read before, or the compiler would make another graph for each value
        elif self._seen != z.shape[-1]:
            self._seen = z.shape[-1]
            if int(self.dim) == 0:
                self.dim.fill_(z.shape[-1])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.dim.is_meta and self._seen and self._known() != int(self.dim):
            destination[prefix + "dim"] = torch.full_like(self.dim, self._seen)


class DiagonalGaussian(nn.Module):
    """The prior p(z) = N(mu, diag exp(logvar)), learned with the VAE; it starts at N(0, I).

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
        """Draw `[n, D]` with torch's generator; differentiable.

        Raises:
            ValueError: a negative `n`.
        """
        n = check_n(n, len(self.mu))
        return reparameterize(self.mu.expand(n, -1), self.logvar.expand(n, -1))


def check_n(n: Any, dim: int) -> int:
    """Check the number of samples: as many as can be counted in bytes, so that torch reports a lack of memory."""
    return check_count("n", n, most=2**60 // max(dim, 1))


def check_dim(z: Any, mu: Tensor) -> None:
    check_tensor("z", z)
    check_device("z", z, "the prior's mu", mu)
    if z.shape[-1] != mu.shape[-1]:
        raise ValueError(f"z: expected [..., {mu.shape[-1]}], got shape {tuple(z.shape)}")
