"""Training objectives of a VAE.

An objective says how many samples it wants, `k` outside the logarithm and `m` inside it, gets their
log-densities `[k, m, B]`, and returns the loss and a dict of named terms, "nell" and "kl" among them. One
that stops gradients in log q(z|x), or bounds the KL of each dimension, takes what it needs from z, mu, logvar
and the prior.

A weight is a number, or a schedule: a function of the training step. The step comes as a 0-dim tensor: a schedule
written with tensor operations compiles, and does not make a GPU wait. The defaults of each objective are the bound
on log p(x) itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .divergences import check_bandwidth, mmd
from .estimators import agg_entropy, check_estimator, kl_decomposition
from .importance import GRADIENTS, effective_sample_size, mc_iw_elbo
from .ops._checks import check_choice, check_count, check_number
from .ops.aggregate import log_prob_gauss
from .priors import Prior

Weight = float | Callable[[Tensor], float | Tensor]

DIVERGENCES = ("mmd", "agg_kl")


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
        beta: weight of the KL, a finite number >= 0 or a schedule (beta-VAE, Higgins et al. 2017; 1 is the bound).
        free_bits: lambda, nats (Kingma et al. 2016): in the loss, a dimension whose batch-mean KL is below it
            counts as lambda and gets no gradient, which keeps it from collapsing. Needs a prior with a closed form,
            `kl(mu, logvar, reduction="dim")`.
        groups: the sizes of groups of neighbouring dimensions that have lambda nats together, such as `(4, 4, 8)`
            for D = 16; None for each dimension on its own.
        capacity: C, nats, a finite number >= 0 or a schedule that lets it rise (Burgess et al. 2018): the loss is
            Nell + beta · |KL − C|, which holds the KL at C where beta is large.

    Terms: `nell`, `kl`, and `elbo` (KL and the bound themselves, whatever the arguments are).

    Raises:
        TypeError, ValueError: an argument is not as above; when called, `groups` do not add up to D, or there are
            free bits and the prior has no closed form.

    Source: Kingma & Welling 2014; Zheng, eq. 14 and 15.

    Example:
        >>> warm_up = fastvae.ELBO(beta=lambda step: (step / 1000).clamp(max=1), free_bits=0.1)
        >>> vae = fastvae.VAE(encoder, decoder, objective=warm_up)
        >>> controlled = fastvae.ELBO(beta=100, capacity=lambda step: 25 * (step / 10_000).clamp(max=1))
    """

    beta: Weight = 1.0
    free_bits: float = 0.0
    groups: tuple[int, ...] | None = None
    capacity: Weight | None = None
    k: ClassVar[int] = 1
    m: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_weight("beta", self.beta)
        _check_finite("free_bits", self.free_bits)
        if self.capacity is not None:
            _check_weight("capacity", self.capacity)
        if self.groups is not None:
            if not isinstance(self.groups, tuple | list):
                raise TypeError(f"groups: expected a tuple of sizes, got {self.groups!r}")
            if not self.groups:
                raise ValueError("groups: expected at least one size, got none")
            for size in self.groups:
                check_count("groups", size, least=1)
            if not self.free_bits:
                raise ValueError(f"free_bits: expected a number > 0 where groups are given, got {self.free_bits}")

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
        if self.free_bits:
            dims = _kl_of_dims(mu, logvar, prior)
            kl, penalty = dims.sum(), self._groups(dims).clamp(min=self.free_bits).sum()
        else:
            kl = penalty = _kl(log_pz, log_qz_x, mu, logvar, prior)
        if self.capacity is not None:
            penalty = (penalty - _now(self.capacity, step)).abs()
        return nell + _now(self.beta, step) * penalty, _terms(nell, kl)

    def _groups(self, dims: Tensor) -> Tensor:
        """The KL of each group from that of each dimension, `[D]`."""
        if self.groups is None:
            return dims
        if sum(self.groups) != len(dims):
            raise ValueError(f"groups: expected sizes that add up to the {len(dims)} dimensions, got {self.groups}")
        return torch.stack([group.sum() for group in dims.split(list(self.groups))])


@dataclass(frozen=True)
class IWAE:
    """The importance-weighted bound, negated (Burda et al. 2016), in nats per example; k of them averaged.

        loss = −mean_B mean_k log 1/m sum_m w,    w = p(x|z) p(z) / q(z|x)

    Args:
        m: samples inside the logarithm: the bound's tightness. 1 is the ELBO by Monte Carlo.
        k: samples of the bound, which lower the variance and leave the bound as it is.
        gradient: `"iwae"`, `"stl"` or `"dreg"`: the gradient of the same loss by another estimator, as
            `fastvae.importance` describes them. For m > 1 the encoder learns best by `"dreg"`; `"stl"` is biased
            there. The two go through z: where z is rounded to half precision, so is what they see of the noise,
            and it is better to have an encoder whose result is float32.

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

    def __post_init__(self) -> None:
        check_count("m", self.m, least=1)
        check_count("k", self.k, least=1)
        check_choice("gradient", self.gradient, GRADIENTS)

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
        if self.gradient != "iwae":
            stopped = log_prob_gauss(z, mu.detach(), logvar.detach())
            log_qz_x = stopped + (log_qz_x - stopped).detach()  # the value from before z was rounded
        bound = mc_iw_elbo(log_px_z, log_pz, log_qz_x, z=z, gradient=self.gradient).mean()
        log_px_z, log_pz, log_qz_x = log_px_z.detach(), log_pz.detach(), log_qz_x.detach()
        terms = _terms(-log_px_z.mean(), (log_qz_x - log_pz).mean())
        ess = effective_sample_size(log_px_z + log_pz - log_qz_x, dim=1).mean()
        return -bound, {**terms, "iw_elbo": bound.detach(), "ess": ess}


@dataclass(frozen=True)
class BetaTCVAE:
    """The ELBO with a weight for each term of its KL (Chen et al. 2018), in nats per example.

        loss = Nell + alpha · MI + beta · TC + gamma · (sum_d KL_d − prior factorization)

    of the mutual information of x and z, the total correlation of the aggregate posterior, and the KL of each of its
    marginals from the prior's; the prior factorization is 0 for a prior that is a product over dimensions. The terms
    are those of `kl_decomposition`, at one sample of each posterior.

    Args:
        alpha, beta, gamma: finite numbers >= 0 or schedules; all 1 is the ELBO by Monte Carlo, and Chen et al. raise
            beta.
        dataset_size: N, the number of examples in the data set that the batches are from.
        estimator: of the aggregate posterior; None for `"stratified"`, or `"uniform"` without `dataset_size`, which
            takes each batch for the whole data set: its MI cannot exceed log B. `"stratified"`, `"mss"` and
            `"loo"` refuse a batch of one example: give the DataLoader `drop_last=True`.

    Terms: `nell`, `kl` = mean log q(z|x) − log p(z), `elbo` = −(nell + kl), `mi`, `tc`, `dim_kl` `[D]`,
    `prior_factorization`, and `saturation` = exp(mi) / B.

    Raises:
        TypeError, ValueError: a weight is neither a number >= 0 nor callable; `dataset_size` and `estimator` as in
            `estimator_weights`.

    Source: Chen et al. 2018; Zheng, eq. 17 to 21.

    Example:
        >>> vae = fastvae.VAE(encoder, decoder, objective=fastvae.BetaTCVAE(beta=6, dataset_size=60_000))
    """

    alpha: Weight = 1.0
    beta: Weight = 1.0
    gamma: Weight = 1.0
    dataset_size: int | None = None
    estimator: str | None = None
    k: ClassVar[int] = 1
    m: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            _check_weight(name, getattr(self, name))
        check_estimator(self.estimator, self.dataset_size)

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
        of_kl = kl_decomposition(
            z.flatten(0, -2), mu, logvar, dataset_size=self.dataset_size, estimator=self.estimator, prior=prior
        )
        alpha, beta, gamma = (_now(weight, step) for weight in (self.alpha, self.beta, self.gamma))
        loss = nell + alpha * of_kl.mi + beta * of_kl.tc + gamma * (of_kl.dim_kl.sum() - of_kl.prior_factorization)
        shown = ("mi", "tc", "dim_kl", "prior_factorization", "saturation")
        return loss, {**_terms(nell, of_kl.kl), **{name: getattr(of_kl, name) for name in shown}}


@dataclass(frozen=True)
class InfoVAE:
    """The ELBO with weights for the mutual information and the aggregate posterior (Zhao et al. 2019), in nats.

        loss = Nell + (1 − alpha) · KL + (alpha + lambda − 1) · D(q(z) ‖ p(z))
             = Nell + (1 − alpha) · MI + lambda · D(q(z) ‖ p(z))          where D is the KL divergence

    alpha = 0 and lambda = 1, the defaults, is the ELBO: D is a term then, but its weight is 0. alpha = 1 with "mmd" is
    the MMD-VAE.

    Args:
        alpha: a finite number <= 1, or a schedule. Above 0 information about x costs less than in the ELBO.
        lambda_: a finite number >= 0, or a schedule.
        divergence: D of the aggregate posterior q(z) from the prior: `"mmd"`, by samples of both (see `mmd`; the
            gradient reaches a learned prior only where `prior.sample` has one), or `"agg_kl"`, their KL divergence
            by an estimator of log q(z).
        bandwidth: of the kernel of `"mmd"`; None for sqrt(D).
        dataset_size, estimator: of `"agg_kl"`, as in `BetaTCVAE`.

    A batch of one example is refused by `"mmd"`, and by the estimators that `BetaTCVAE` names.

    Terms: `nell`, `kl`, `elbo` = −(nell + kl), and `mmd` or `agg_kl`. KL is in closed form where the prior has one.

    Raises:
        TypeError, ValueError: an argument is not as above, or belongs to the other divergence.

    Source: Zhao et al. 2019.

    Example:
        >>> vae = fastvae.VAE(encoder, decoder, objective=fastvae.InfoVAE(alpha=1, lambda_=100))
    """

    alpha: Weight = 0.0
    lambda_: Weight = 1.0
    divergence: str = "mmd"
    bandwidth: float | None = None
    dataset_size: int | None = None
    estimator: str | None = None
    k: ClassVar[int] = 1
    m: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_weight("alpha", self.alpha, least=-math.inf)
        if not callable(self.alpha) and self.alpha > 1:
            raise ValueError(f"alpha: expected a number <= 1, got {self.alpha}")
        _check_weight("lambda_", self.lambda_)
        check_choice("divergence", self.divergence, DIVERGENCES)
        others = ("dataset_size", "estimator") if self.divergence == "mmd" else ("bandwidth",)
        for name in others:
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: expected None for divergence={self.divergence!r}, got {getattr(self, name)}")
        check_bandwidth(self.bandwidth)
        if self.divergence == "agg_kl":
            check_estimator(self.estimator, self.dataset_size)

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
        nell, kl = -log_px_z.mean(), _kl(log_pz, log_qz_x, mu, logvar, prior)
        samples = z.flatten(0, -2)  # [B, D], the view that the decoder has: inductor mistakes two for two tensors
        if self.divergence == "mmd":
            if len(samples) < 2:
                raise ValueError(
                    f"divergence: 'mmd' cannot be had from a batch of {len(samples)}; expected at least 2, so give the"
                    " DataLoader drop_last=True"
                )
            divergence = mmd(samples, prior.sample(len(samples)).to(samples).view_as(samples), self.bandwidth)
        else:
            entropy = agg_entropy(samples, mu, logvar, dataset_size=self.dataset_size, estimator=self.estimator)
            divergence = -entropy - log_pz.mean()
        alpha, lambda_ = _now(self.alpha, step), _now(self.lambda_, step)
        loss = nell + (1 - alpha) * kl + (alpha + lambda_ - 1) * divergence
        return loss, {**_terms(nell, kl), self.divergence: divergence}


def _kl(log_pz: Tensor, log_qz_x: Tensor, mu: Tensor, logvar: Tensor, prior: Any) -> Tensor:
    """mean KL(q(z|x) ‖ p(z)), in closed form where the prior has one."""
    return prior.kl(mu, logvar) if hasattr(prior, "kl") else (log_qz_x - log_pz).mean()


def _kl_of_dims(mu: Tensor, logvar: Tensor, prior: Any) -> Tensor:
    """The closed form's mean of each dimension, `[D]`."""
    name = type(prior).__name__
    if not hasattr(prior, "kl"):
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


def _terms(nell: Tensor, kl: Tensor) -> dict[str, Tensor]:
    return {"nell": nell, "kl": kl, "elbo": -(nell + kl)}


def _now(weight: Weight, step: Tensor) -> float | Tensor:
    return weight(step) if callable(weight) else weight


def _check_weight(name: str, weight: Any, least: float = 0.0) -> None:
    if not callable(weight):
        _check_finite(name, weight, least)


def _check_finite(name: str, number: Any, least: float = 0.0) -> None:
    check_number(name, number, least=least)
    if math.isinf(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
