"""Training objectives of a VAE that weigh terms of the aggregate posterior (see objectives.py)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._warnings import warn
from ..aggregate.decomposition import kl_decomposition
from ..aggregate.estimators import agg_entropy, check_estimator
from ..aggregate.mmd import check_bandwidth, mmd
from ..ops.checks import check_choice, check_count
from ..protocols import Draws
from .objectives import terms
from .priors import StandardNormal
from .schedules import Scheduled, Weight, check_weight

DIVERGENCES = ("mmd", "agg_kl")


@dataclass(frozen=True, kw_only=True)
class BetaTCVAE(Scheduled):
    """The ELBO with a weight for each term of its KL (Chen et al. 2018), in nats per example.

        loss = Nell + alpha · MI + beta · TC + gamma · (sum_d KL_d − prior factorization)

    MI is the mutual information of x and z, TC the total correlation of the aggregate posterior, KL_d the KL of its
    marginal from the prior's; the prior factorization is 0 for a prior that is a product over dimensions. The terms
    are those of `kl_decomposition`, at k samples of each posterior.

    Args:
        alpha, beta, gamma: finite numbers >= 0 or schedules; all 1 is the ELBO by Monte Carlo, and Chen et al. raise
            beta.
        dataset_size: N, the number of examples in the data set that the batches are from.
        estimator: of the aggregate posterior; None for `"stratified"`, or for `"uniform"` without `dataset_size`.
            `"uniform"` takes each batch for the whole data set: its MI cannot exceed log B, and its TC is larger by
            what the MI lacks. Give its name where you mean it. `"stratified"`, `"mss"` and `"loo"` refuse a batch of
            one example: give the DataLoader `drop_last=True`.
        k: samples of each posterior, an integer >= 1, as in `ELBO`; all terms are means over them.

    Terms: `nell`, `kl` = mean log q(z|x) − log p(z), `elbo` = −(nell + kl), `mi`, `tc`, `dim_kl` `[D]`,
    `prior_factorization`, and `saturation` = exp(mi) / B.

    Raises:
        TypeError, ValueError: a weight is neither a number >= 0 nor callable; `k` is not an integer >= 1;
            `dataset_size` and `estimator` as in `estimator_weights`.

    Warns:
        UserWarning: neither `dataset_size` nor `estimator` is given.

    Source: Chen et al. 2018; Zheng, eq. 17 to 21.

    Example:
        >>> vae = fastvae.VAE(encoder, decoder, objective=fastvae.BetaTCVAE(beta=6, dataset_size=60_000))
    """

    alpha: Weight = 1.0
    beta: Weight = 1.0
    gamma: Weight = 1.0
    dataset_size: int | None = None
    estimator: str | None = None
    k: int = 1
    m: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self._convert(**{name: check_weight(name, getattr(self, name)) for name in ("alpha", "beta", "gamma")})
        self._convert(k=check_count("k", self.k, least=1))
        self._convert(dataset_size=_checked_size(self.dataset_size, self.estimator))

    def __call__(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        nell = -draws.log_px_z.mean()
        samples, own = _rows(draws)
        of_kl = kl_decomposition(
            samples,
            draws.mu,
            draws.logvar,
            own=own,
            dataset_size=self.dataset_size,
            estimator=self.estimator,
            prior=None if type(draws.prior) is StandardNormal else draws.prior,
        )
        alpha, beta, gamma = (self._now(name, draws) for name in ("alpha", "beta", "gamma"))
        loss = nell + alpha * of_kl.mi + beta * of_kl.tc + gamma * (of_kl.dim_kl.sum() - of_kl.prior_factorization)
        shown = ("mi", "tc", "dim_kl", "prior_factorization", "saturation")
        return loss, {**terms(nell, of_kl.kl), **{name: getattr(of_kl, name) for name in shown}}


@dataclass(frozen=True, kw_only=True)
class InfoVAE(Scheduled):
    """The ELBO with weights for the mutual information and the aggregate posterior (Zhao et al. 2019), in nats.

        loss = Nell + (1 − alpha) · KL + (alpha + lambda − 1) · D(q(z) ‖ p(z))
             = Nell + (1 − alpha) · MI + lambda · D(q(z) ‖ p(z))          where D is the KL divergence

    The second line is exact where one estimator gives KL = MI + D: `"agg_kl"` with a KL by Monte Carlo, for a prior
    without closed form. Otherwise it holds up to the estimators' errors, including that of D(q(z) ‖ p(z)) from a batch.

    The defaults alpha = 0 and lambda = 1 are the ELBO: D is then among the terms, but its weight is 0. alpha = 1 with
    "mmd" is the MMD-VAE.

    Args:
        alpha: a finite number <= 1, or a schedule. Above 0, information about x costs less than in the ELBO.
        lambda_: a finite number >= 0, or a schedule.
        divergence: D of the aggregate posterior q(z) from the prior: `"mmd"`, by samples of both (see `mmd`; the
            gradient reaches a learned prior only where `prior.sample` has one), or `"agg_kl"`, their KL divergence
            by an estimator of log q(z).
        bandwidth: of the kernel of `"mmd"`; None for sqrt(D).
        dataset_size, estimator: for `"agg_kl"`, as in `BetaTCVAE`, including its warning.
        k: samples of each posterior, an integer >= 1, as in `ELBO`; D is the mean of that of k sets, of one sample of
            each posterior.

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
    k: int = 1
    m: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("kl",)

    def __post_init__(self) -> None:
        self._convert(
            alpha=check_weight("alpha", self.alpha, least=-math.inf, most=1.0),
            lambda_=check_weight("lambda_", self.lambda_),
            k=check_count("k", self.k, least=1),
        )
        check_choice("divergence", self.divergence, DIVERGENCES)
        others = ("dataset_size", "estimator") if self.divergence == "mmd" else ("bandwidth",)
        for name in others:
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: expected None for divergence={self.divergence!r}, got {getattr(self, name)}")
        self._convert(bandwidth=check_bandwidth(self.bandwidth))
        if self.divergence == "agg_kl":
            self._convert(dataset_size=_checked_size(self.dataset_size, self.estimator))

    def __call__(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        nell, kl = -draws.log_px_z.mean(), draws.kl
        samples, own = _rows(draws)
        if self.divergence == "mmd":
            if len(draws.mu) < 2:
                raise ValueError(
                    f"divergence: 'mmd' cannot be had from a batch of {len(draws.mu)}; expected at least 2, so give the"
                    " DataLoader drop_last=True"
                )
            priors = draws.prior.sample(len(samples)).to(samples).view_as(samples)
            # Sets of one sample of each posterior: two samples of the same one would make the mmd too large.
            sets = zip(samples.chunk(len(draws.z)), priors.chunk(len(draws.z)), strict=True)
            divergence = torch.stack([mmd(z, y, self.bandwidth) for z, y in sets]).mean()
        else:
            entropy = agg_entropy(
                samples, draws.mu, draws.logvar, dataset_size=self.dataset_size, estimator=self.estimator, own=own
            )
            divergence = -entropy - draws.log_pz.mean()
        alpha, lambda_ = self._now("alpha", draws), self._now("lambda_", draws)
        loss = nell + (1 - alpha) * kl + (alpha + lambda_ - 1) * divergence
        return loss, {**terms(nell, kl), self.divergence: divergence}


def _rows(draws: Draws) -> tuple[Tensor, Tensor | None]:
    """The samples `[k·B, D]`, and the posterior that each was drawn from; None where there is one of each."""
    # The same view as the decoder's: for another the compiler would make another tensor.
    rows = draws.z.flatten(0, -2)
    if len(draws.z) == 1:
        return rows, None
    return rows, torch.arange(len(rows), device=rows.device) % len(draws.mu)


def _checked_size(dataset_size: int | None, estimator: str | None) -> int | None:
    """Check and return `dataset_size`; warn where neither it nor an estimator is given."""
    check_estimator(estimator, dataset_size)
    if dataset_size is not None:
        return check_count("dataset_size", dataset_size, least=1)
    if estimator is None:
        warn(
            "dataset_size: not given, so that each batch of B is taken for the whole data set, and the mutual"
            " information cannot exceed log B; give the number of examples, or say estimator='uniform'"
        )
    return None
