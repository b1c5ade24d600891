"""What one extends: a prior, a likelihood, an objective; and the checks that say what an object lacks."""

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .ops.checks import check_tensor


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


class Likelihood(Protocol):
    """What `VAE` and its evaluation ask of a likelihood. `output` is the decoder's; `x` broadcasts against it."""

    discrete: ClassVar[bool]

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """log p(x|z) of each element, in float32 (float64 for float64 outputs)."""

    def mean(self, output: Tensor) -> Tensor:
        """E[x|z], the shape of `output`."""

    def check(self, x: Tensor) -> None:
        """Raise a ValueError where x lies outside the likelihood's support."""

    def sample(self, output: Tensor) -> Tensor:
        """x drawn from p(x|z) by torch's generator, the shape of `output`, in the dtype of `log_prob`."""


class Objective(Protocol):
    """What `VAE` asks of an objective."""

    k: int
    m: int

    def __call__(
        self,
        log_px_z: Tensor,  # log p(x|z) [k, m, B]
        log_pz: Tensor,  # log p(z) [k, m, B]
        log_qz_x: Tensor,  # log q(z|x) [k, m, B], its gradient total, at fixed noise
        *,
        z: Tensor,  # [k, m, B, D], what the decoder and the prior were given
        mu: Tensor,  # [B, D]
        logvar: Tensor,  # [B, D]
        prior: Prior,
        step: Tensor,  # 0-dim int64: training steps so far
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and its terms by name."""


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
