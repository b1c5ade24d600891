"""Prior holes: where the prior puts samples and no data have been encoded, so that the decoder is not trained there."""

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..aggregate.columns import Streamed
from ..aggregate.dataset import warn_if_saturated
from ..aggregate.decomposition import KLDecomposition, decompose
from ..aggregate.marginals import log_densities
from ..aggregate.posteriors import open_posteriors, prior_of
from ..models.priors import StandardNormal
from ..ops.agg_log_prob import agg_log_prob_op
from ..ops.checks import MOST_SAMPLES, check_count, check_flag, check_number, drawn_seed
from ..ops.cross_log_prob import log_prob_gauss
from ..ops.sample_gauss import reparameterize
from ..protocols import Prior, check_prior
from .seeded import seeded


class PriorHole(NamedTuple):
    """The result of `prior_hole`. A share is the part of the prior's samples in holes: where log q(z) is below
    `threshold`, or, for some dimensions alone, below the same quantile of the data's. Where p(z) is q(z), the share is
    the quantile.

    Attributes:
        terms: KL(q(z) ‖ p(z)) = `terms.agg_kl` in nats, and what it consists of, over all posteriors.
        share: in all dimensions together, a scalar.
        threshold: the quantile of `log_q_data`, in nats.
        log_q_data: log q(z) of samples of the posteriors, each without its own posterior, `[S]`.
        log_q_prior: log q(z) of samples of the prior, `[n_prior]`.
        z_prior: the samples of the prior, `[n_prior, D]`.
        dim_share: the share in each dimension alone, `[D]`.
        dims: the `n_dims` dimensions with the most information about x, the one most responsible for holes first.
        share_without: for each of `dims`, the share in all other dimensions: the lower, the more responsible it is.
        pairs: of those dimensions, the pair with the largest share first, `[P, 2]`.
        pair_share: the shares in these two dimensions, `[P]`.
        pair_threshold: the quantiles of the data's log-density in these two dimensions, `[P]`.
    """

    terms: KLDecomposition
    share: Tensor
    threshold: Tensor
    log_q_data: Tensor
    log_q_prior: Tensor
    z_prior: Tensor
    dim_share: Tensor
    dims: Tensor
    share_without: Tensor
    pairs: Tensor
    pair_share: Tensor
    pair_threshold: Tensor


@torch.no_grad()
def prior_hole(
    source: Any,
    data: Any = None,
    *,
    prior: Prior | None = None,
    n_prior: int = 4096,
    quantile: float = 0.01,
    n_dims: int = 12,
    batch_size: int = 4096,
    device: torch.device | str | None = None,
    seed: int | None = 0,
    progress: bool = False,
) -> PriorHole:
    """How far the prior is from the aggregate posterior q(z) of a data set, and which share of its samples is from
    holes: regions where log q(z) is below the 1st percentile of the encoded data's.

    The data's log q(z) leaves out the posterior that each sample was drawn from, as if it were new: otherwise all but
    the neighbourhood of the examples would be a hole. Takes O(n_prior·N·D·n_dims) time.

    Args:
        source, data: the posteriors, or a VAE or an encoder and its examples, as in `kl_decomposition_dataset`.
        prior: p(z); None for the VAE's, and without a VAE for N(0, I).
        n_prior: how many samples of the prior; and how many posteriors to sample once each, or all N if fewer.
        quantile: of the data's log q(z), below which there is a hole.
        n_dims: how many dimensions are looked at one by one and in pairs, those with the most information about x.
        batch_size: how many rows of an array are encoded, and how many posteriors are columns, at once.
        device: where to encode and compute; None for where a module's parameters, or else the posteriors, are.
        seed: of all samples, which leaves torch's generators as they were; None draws one from torch's generator.
        progress: show a progress bar on stderr.

    Raises:
        TypeError, ValueError: as in `kl_decomposition_dataset`; fewer than two posteriors, or ones that are not finite.

    Warns:
        UserWarning: as `kl_decomposition_dataset`, about `terms`.

    Source: Basics VAE, section 2.5; Zheng, eq. 19.

    Example:
        >>> before = fastvae.prior_hole(vae.eval(), data)
        >>> vae.fit_prior(data, 50)
        >>> after = fastvae.prior_hole(vae, data)
        >>> print(f"from holes: {before.share:.0%} of the samples, and now {after.share:.0%}")
    """
    n_prior = check_count("n_prior", n_prior, least=1, most=MOST_SAMPLES)
    n_dims = check_count("n_dims", n_dims, least=1)
    batch_size = check_count("batch_size", batch_size, least=1)
    seed = drawn_seed(seed)
    progress = check_flag("progress", progress)
    quantile = check_number("quantile", quantile)
    if not 0 < quantile < 1:
        raise ValueError(f"quantile: expected a number between 0 and 1, got {quantile}")
    prior = prior_of(source, prior)
    check_prior(prior)
    posteriors = open_posteriors(source, data, batch_size=batch_size, device=device, progress=progress, least=2)
    N = len(posteriors.mu)

    rows = posteriors.choose(min(N, n_prior), seed)
    mu, logvar = posteriors.read(rows)  # [S, D]
    z = reparameterize(mu, logvar, seed=seed)
    z_prior = _sampled(prior, n_prior, z, seed)
    S, D = z.shape
    own = torch.full((S + n_prior,), -1, dtype=torch.int64, device=z.device)
    own[:S] = torch.as_tensor(rows, device="cpu")
    columns = Streamed(posteriors, own=own, batch_size=batch_size, progress=progress)
    both = torch.cat((z, z_prior))  # [S + n_prior, D]
    joint, marginals = log_densities(both, columns)
    assert joint is not None
    terms, known = _terms(z, mu, logvar, joint[:S], marginals[:S], prior, N)
    warn_if_saturated(terms, N)

    dims = known.topk(min(n_dims, D)).indices.tolist()
    pairs = list(itertools.combinations(sorted(dims), 2))
    without = [[e for e in range(D) if e != d] for d in dims] if D > 1 else []
    subsets = _log_q_of_subsets(both, columns, [*map(list, pairs), *without])

    without_own = math.log(N / (N - 1))  # makes of the data's log q a mean over the N − 1 columns that are not its own

    def holes(log_q: Tensor) -> tuple[Tensor, Tensor]:  # [k, S + n_prior]
        return _thresholds_and_shares(log_q[:, :S] + without_own, log_q[:, S:], quantile)

    threshold, share = holes(joint[None])
    _, dim_share = holes(marginals.T)
    pair_threshold, pair_share = holes(subsets[: len(pairs)])
    _, share_without = holes(subsets[len(pairs) :]) if D > 1 else (threshold, torch.zeros_like(share))
    by_share, by_pair = share_without.argsort(), pair_share.argsort(descending=True)
    return PriorHole(
        terms=terms,
        share=share[0],
        threshold=threshold[0],
        log_q_data=joint[:S] + without_own,
        log_q_prior=joint[S:],
        z_prior=z_prior,
        dim_share=dim_share,
        dims=own.new_tensor(dims)[by_share],
        share_without=share_without[by_share],
        pairs=own.new_tensor(pairs).view(-1, 2)[by_pair],
        pair_share=pair_share[by_pair],
        pair_threshold=pair_threshold[by_pair],
    )


def _sampled(prior: Prior | None, n: int, z: Tensor, seed: int) -> Tensor:
    """Samples of the prior `[n, D]`, in the dtype and on the device of z; a prior of None is N(0, I)."""
    D = z.shape[1]
    check_count("n_prior", n, most=MOST_SAMPLES // D)
    with seeded(seed, z.device), z.device:
        z_prior = (StandardNormal(D) if prior is None else prior).sample(n).to(z)
    if z_prior.shape != (n, D):
        raise ValueError(f"prior: expected samples {(n, D)}, got {tuple(z_prior.shape)}")
    return z_prior


def _terms(
    z: Tensor, mu: Tensor, logvar: Tensor, joint: Tensor, marginals: Tensor, prior: Prior | None, N: int
) -> tuple[KLDecomposition, Tensor]:
    """The terms of the KL over all N posteriors, and I(x; z_d) of each dimension, `[D]`. joint `[S]` and marginals
    `[S, D]` leave out each sample's own posterior, which is added again: here the samples are of the data set."""
    conditional = log_prob_gauss(z[..., None], mu[..., None], logvar[..., None]).double()  # [S, D]
    joint = torch.logaddexp(joint, conditional.sum(1) - math.log(N))
    marginals = torch.logaddexp(marginals, conditional - math.log(N))
    terms = decompose(z, conditional.sum(1), joint, marginals, prior, "uniform", N)
    return terms, (conditional - marginals).mean(0)


def _log_q_of_subsets(z: Tensor, columns: Streamed, subsets: list[list[int]]) -> Tensor:
    """log q of z `[S, D]` in each subset of its dimensions alone, `[subsets, S]`."""
    sums = columns.log_sum(
        lambda mu, logvar, *weights: [agg_log_prob_op(z[:, s], mu[:, s], logvar[:, s], *weights) for s in subsets]
    )
    return torch.stack(sums) if sums else z.new_empty(0, len(z), dtype=torch.float64)


def _thresholds_and_shares(data: Tensor, prior: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """The q-quantile of each row of log-densities of data `[k, S]`, and the share of the prior's `[k, n]` below it."""
    if data.isnan().any() or prior.isnan().any():
        raise ValueError("source: expected posteriors and samples of the prior with log-densities, got NaN")
    threshold = _quantile(data, q)
    return threshold, (prior < threshold[:, None]).double().mean(1)


def _quantile(x: Tensor, q: float) -> Tensor:
    """The q-quantile of each row, as by torch.quantile, which takes no more than 2**24 numbers."""
    rank = q * (x.shape[1] - 1)
    low, high = x.sort(1).values[:, [math.floor(rank), math.ceil(rank)]].T
    return low.lerp(high, rank % 1)
