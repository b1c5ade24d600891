"""Training objectives of a VAE: the bounds on log p(x). `fastvae.Objective` says what one is.

With its defaults each is the bound on log p(x) itself. Weights may be schedules (see schedules.py).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.checks import check_choice, check_count, check_number
from ..ops.cross_log_prob import log_prob_gauss
from ..protocols import Draws, has_closed_form
from .bounds import GRADIENTS, effective_sample_size, mc_iw_elbo
from .schedules import Scheduled, Weight, check_weight

__all__ = ["ELBO", "IWAE"]


@dataclass(frozen=True, kw_only=True)
class ELBO(Scheduled):
    """The evidence lower bound, negated: loss = Nell + beta · KL, in nats per example.

        Nell = mean −log p(x|z),    KL = mean KL(q(z|x) ‖ p(z)),    ELBO = −(Nell + KL) ≤ log p(x)

    KL is in closed form where the prior has one, otherwise mean log q(z|x) − log p(z). Means are over the batch and, of
    what depends on z, over k samples of each posterior.

    Args:
        beta: weight of the KL, a finite number >= 0 or a schedule (beta-VAE, Higgins et al. 2017; 1 is the bound).
        free_bits: lambda, nats (Kingma et al. 2016): in the loss, a dimension whose batch-mean KL is below it
            counts as lambda and gets no gradient, which keeps it from collapsing. Needs a prior with a closed form,
            `kl(mu, logvar, reduction="dim")`.
        groups: the sizes of groups of neighbouring dimensions that have lambda nats together, such as `(4, 4, 8)`
            for D = 16; None for each dimension on its own.
        capacity: C, nats, a finite number >= 0 or a schedule that lets it rise (Burgess et al. 2018): the loss is
            Nell + beta · |KL − C|, which holds the KL at C where beta is large. Here KL is the batch's mean; some code
            takes the mean of |KL_i − C| over the examples, which is never less, and holds each example at C.
        k: samples of each posterior, an integer >= 1. They leave the bound as it is and, for k times the decoder's work
            and memory, divide the variance of Nell that is due to z by k; a KL in closed form has none.

    Terms: `nell`, `kl`, and `elbo` (KL and the bound themselves, whatever the arguments are).

    Raises:
        TypeError, ValueError: an argument is not as above; when called, `groups` do not add up to D, or there are
            free bits and the prior has no closed form.

    Source: Kingma & Welling 2014; Zheng, eq. 14 and 15; Basics VAE, eq. 40 and 41.

    Example:
        >>> warm_up = fastvae.ELBO(beta=lambda step: (step / 1000).clamp(max=1), free_bits=0.1)
        >>> vae = fastvae.VAE(encoder, decoder, objective=warm_up)  # vae.advance() after each optimizer.step()
        >>> controlled = fastvae.ELBO(beta=100, capacity=lambda step: 25 * (step / 10_000).clamp(max=1))
    """

    beta: Weight = 1.0
    free_bits: float = 0.0
    groups: tuple[int, ...] | None = None
    capacity: Weight | None = None
    k: int = 1
    m: ClassVar[int] = 1

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.free_bits else ("kl",)  # free bits take that of each dimension

    def __post_init__(self) -> None:
        self._convert(
            beta=check_weight("beta", self.beta),
            free_bits=check_number("free_bits", self.free_bits, least=0.0, finite=True),
            capacity=None if self.capacity is None else check_weight("capacity", self.capacity),
            groups=None if self.groups is None else self._checked_groups(),
            k=check_count("k", self.k, least=1),
        )

    def _checked_groups(self) -> tuple[int, ...]:
        if not isinstance(self.groups, tuple | list):
            raise TypeError(f"groups: expected a tuple of sizes, got {self.groups!r}")
        if not self.groups:
            raise ValueError("groups: expected at least one size, got none")
        if not self.free_bits:
            raise ValueError(f"free_bits: expected a number > 0 where groups are given, got {self.free_bits}")
        return tuple(check_count("groups", size, least=1) for size in self.groups)

    def __call__(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        nell = -draws.log_px_z.mean()
        if self.free_bits:
            dims = _kl_of_dims(draws.mu, draws.logvar, draws.prior)
            least = min(self.free_bits, torch.finfo(dims.dtype).max)
            kl, penalty = dims.sum(), self._groups(dims).clamp(min=least).sum()
        else:
            kl = penalty = draws.kl
        if self.capacity is not None:
            penalty = (penalty - self._now("capacity", draws)).abs()
        return nell + self._now("beta", draws) * penalty, terms(nell, kl)

    def _groups(self, dims: Tensor) -> Tensor:
        """The KL of each group, from `dims` `[D]`, the KL of each dimension."""
        if self.groups is None:
            return dims
        if sum(self.groups) != len(dims):
            raise ValueError(f"groups: expected sizes that add up to the {len(dims)} dimensions, got {self.groups}")
        return torch.stack([group.sum() for group in dims.split(list(self.groups))])


@dataclass(frozen=True)
class IWAE(Scheduled):
    """The importance-weighted bound, negated (Burda et al. 2016), in nats per example; k of them averaged.

        loss = −mean_B mean_k log 1/m sum_m w,    w = p(x|z) p(z) / q(z|x)

    Args:
        m: samples inside the logarithm: the bound's tightness. 1 is the ELBO by Monte Carlo.
        k: samples of the bound, which lower the variance and leave the bound as it is.
        gradient: `"iwae"`, `"stl"` or `"dreg"`: the gradient of the same loss by another estimator, as
            `fastvae.bounds` describes them. For m > 1 the encoder learns best by `"dreg"`; `"stl"` is biased
            there. Both go through z: where z is rounded to half precision, so is the noise that they see, and an
            encoder with results in float32 is better.

    Terms, values without gradient: `iw_elbo` (the bound), `nell` and `kl` = mean log q(z|x) − log p(z) over all
    samples, `elbo` = −(nell + kl), and `ess`, the mean effective sample size of the m weights.

    Raises:
        TypeError, ValueError: `m` or `k` is not an integer >= 1, or an unknown `gradient`.

    Source: Zheng, eq. 38 to 40; Roeder et al. 2017; Tucker et al. 2019.

    Example:
        >>> vae = fastvae.VAE(encoder, decoder, objective=fastvae.IWAE(m=64, gradient="dreg"))
    """

    m: int
    k: int = 1
    gradient: str = "iwae"
    needs: ClassVar[tuple[str, ...]] = ("log_qz_x",)

    def __post_init__(self) -> None:
        self._convert(m=check_count("m", self.m, least=1), k=check_count("k", self.k, least=1))
        check_choice("gradient", self.gradient, GRADIENTS)

    def __call__(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        log_px_z, log_pz, log_qz_x, z = draws.log_px_z, draws.log_pz, draws.log_qz_x, draws.z
        if self.gradient != "iwae":
            stopped = log_prob_gauss(z, draws.mu.detach(), draws.logvar.detach())
            log_qz_x = stopped + (log_qz_x - stopped).detach()  # the value from before z was rounded
        bound = mc_iw_elbo(log_px_z, log_pz, log_qz_x, z=z, gradient=self.gradient).mean()
        log_px_z, log_pz, log_qz_x = log_px_z.detach(), log_pz.detach(), log_qz_x.detach()
        means = terms(-log_px_z.mean(), (log_qz_x - log_pz).mean())
        ess = effective_sample_size(log_px_z + log_pz - log_qz_x, dim=1).mean()
        return -bound, {**means, "iw_elbo": bound.detach(), "ess": ess}


def _kl_of_dims(mu: Tensor, logvar: Tensor, prior: Any) -> Tensor:
    """The batch-mean KL of each dimension, `[D]`, from the prior's closed form."""
    name = type(prior).__name__
    if not has_closed_form(prior):
        raise ValueError(f"free_bits: expected a prior with a closed form, kl(), got {name}")
    try:
        dims = prior.kl(mu, logvar, reduction="dim")
    except TypeError as error:
        raise TypeError(
            f"prior: expected kl(mu, logvar, reduction='dim') for free bits, but {name}: {error}"
        ) from error
    if dims.shape != mu.shape[-1:]:
        expected = f"({mu.shape[-1]},) from kl(mu, logvar, reduction='dim')"
        raise ValueError(f"prior: expected {expected} for free bits, got {tuple(dims.shape)} from {name}")
    return dims


def terms(nell: Tensor, kl: Tensor) -> dict[str, Tensor]:
    return {"nell": nell, "kl": kl, "elbo": -(nell + kl)}
