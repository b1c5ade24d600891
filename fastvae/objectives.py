"""Training objectives of a VAE.

An objective says how many samples it wants, `k` outside the logarithm and `m` inside it, gets their
log-densities `[k, m, B]`, and returns the loss and a dict of named terms, "nell" and "kl" among them. One
that stops gradients in log q(z|x), or bounds the KL of each dimension, takes what it needs from z, mu, logvar
and the prior.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from .ops._checks import check_number
from .priors import Prior


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


@dataclass(frozen=True)
class ELBO:
    """The evidence lower bound, negated: loss = Nell + beta · KL, in nats per example.

        Nell = mean −log p(x|z),    KL = mean KL(q(z|x) ‖ p(z)),    ELBO = −(Nell + KL) ≤ log p(x)

    KL is in closed form where the prior has one, else mean log q(z|x) − log p(z).

    Args:
        beta: weight of the KL: a number >= 0 (beta-VAE, Higgins et al. 2017; 1 is the bound), or a schedule,
            a function of the training step. The step comes as a 0-dim tensor: a schedule written with tensor
            operations compiles, and does not make a GPU wait.

    Terms: `nell`, `kl`, and `elbo` (the bound itself, whatever beta is).

    Raises:
        TypeError, ValueError: `beta` is neither a number >= 0 nor callable.

    Source: Kingma & Welling 2014; Zheng, eq. 14 and 15.

    Example:
        >>> warm_up = fastvae.ELBO(beta=lambda step: (step / 1000).clamp(max=1))
        >>> vae = fastvae.VAE(encoder, decoder, objective=warm_up)
    """

    beta: float | Callable[[Tensor], float | Tensor] = 1.0
    k: ClassVar[int] = 1
    m: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not callable(self.beta):
            check_number("beta", self.beta, least=0.0)

    def __call__(
        self,
        log_px_z: Tensor,
        log_pz: Tensor,
        log_qz_x: Tensor,
        *,
        z: Tensor,
        mu: Tensor,
        logvar: Tensor,
        prior: Any,
        step: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        nell = -log_px_z.mean()
        kl = prior.kl(mu, logvar) if hasattr(prior, "kl") else (log_qz_x - log_pz).mean()
        beta = self.beta(step) if callable(self.beta) else self.beta
        return nell + beta * kl, {"nell": nell, "kl": kl, "elbo": -(nell + kl)}
