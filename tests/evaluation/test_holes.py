"""Prior holes: against the definitions written out, and where it is known what they are."""

import itertools
import math
import warnings

import pytest
import torch
from support.helpers import log_normal, wrong
from torch import nn

import fastvae
from fastvae import VAE, MixturePrior, StandardNormal, kl_decomposition_dataset, prior_hole
from fastvae.evaluation.holes import _quantile


def posteriors(N=60, D=4, seed=0, logvar=-0.5):
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(N, D, dtype=torch.float64, generator=generator)
    return mu, logvar + 0.3 * torch.randn(N, D, dtype=torch.float64, generator=generator)


def two_modes(N=400, D=3):
    """Nothing is encoded where dimensions 0 and 1 have different signs; dimension 2 is N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    sign = (torch.arange(N) % 2 * 2 - 1)[:, None]
    mu = 0.3 * torch.randn(N, D, generator=generator) + 1.5 * sign
    mu[:, 2] = torch.randn(N, generator=generator)
    return mu, torch.full((N, D), -2.5)


class Aggregate:
    """The aggregate posterior as a prior."""

    def __init__(self, mu, logvar):
        self.prior = MixturePrior.from_parameters(torch.full((len(mu),), 1 / len(mu)), mu, logvar.exp()).to(mu)
        self.log_prob, self.marginal_log_prob, self.sample = (
            self.prior.log_prob,
            self.prior.marginal_log_prob,
            self.prior.sample,
        )


@pytest.mark.parametrize("batch_size", [7, 4096])
def test_every_number_is_what_its_definition_says(batch_size):
    mu, logvar = posteriors()
    N, D = mu.shape
    n = N  # all posteriors, and as many samples of the prior
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hole = prior_hole((mu, logvar), n_prior=n, quantile=0.1, batch_size=batch_size, seed=3)
    z = torch.cat((fastvae.reparameterize(mu, logvar, seed=3), hole.z_prior))
    pairs = log_normal(z[:, None], mu, logvar)  # [2n, N, D]

    def log_q(dims):
        terms = pairs[..., dims].sum(-1)
        terms[range(n), range(n)] = -math.inf
        log_mean = terms.logsumexp(1)
        log_mean[:n] -= math.log(N - 1)
        log_mean[n:] -= math.log(N)
        return log_mean

    def share(dims):
        log_density = log_q(dims)
        return (log_density[n:] < log_density[:n].quantile(0.1)).double().mean()

    every = list(range(D))
    torch.testing.assert_close(hole.log_q_data, log_q(every)[:n])
    torch.testing.assert_close(hole.log_q_prior, log_q(every)[n:])
    torch.testing.assert_close(hole.threshold, log_q(every)[:n].quantile(0.1))
    torch.testing.assert_close(hole.share, share(every))
    torch.testing.assert_close(hole.dim_share, torch.stack([share([d]) for d in every]))
    assert sorted(hole.dims.tolist()) == every
    expected = [share([e for e in every if e != d]) for d in hole.dims]
    torch.testing.assert_close(hole.share_without, torch.stack(expected))
    assert (hole.share_without.diff() >= 0).all()
    assert sorted(map(tuple, hole.pairs.tolist())) == list(itertools.combinations(every, 2))
    torch.testing.assert_close(hole.pair_share, torch.stack([share(pair) for pair in hole.pairs.tolist()]))
    assert (hole.pair_share.diff() <= 0).all()
    thresholds = [log_q(pair)[:n].quantile(0.1) for pair in hole.pairs.tolist()]
    torch.testing.assert_close(hole.pair_threshold, torch.stack(thresholds))


@pytest.mark.parametrize("prior", [None, "mixture"])
def test_the_terms_are_those_of_the_decomposition(prior):
    mu, logvar = posteriors()
    if prior:
        prior = MixturePrior(5, 4).double()
    hole = prior_hole((mu, logvar), prior=prior, n_prior=5000, seed=2)
    expected = kl_decomposition_dataset((mu, logvar), prior=prior, seed=2)
    for name in ("mi", "agg_kl", "tc", "dim_kl", "prior_factorization", "kl", "entropy", "saturation"):
        torch.testing.assert_close(getattr(hole.terms, name), getattr(expected, name), msg=name)
    assert hole.terms.estimator == "uniform"


def test_the_aggregate_posterior_has_no_holes():
    mu, logvar = posteriors(N=2000, logvar=0.5)  # they overlap: one posterior more or less does not matter
    hole = prior_hole((mu, logvar), prior=Aggregate(mu, logvar), n_prior=2000)
    error = math.sqrt(2 * 0.01 / 2000)  # of the share, and of the quantile
    assert abs(hole.share - 0.01) < 4 * error
    assert (hole.dim_share - 0.01).abs().max() < 5 * error
    assert (hole.pair_share - 0.01).abs().max() < 5 * error
    assert hole.terms.agg_kl.abs() < 0.1


def test_holes_are_found_where_they_are_and_go_when_the_prior_is_fitted():
    mu, logvar = two_modes()
    before = prior_hole((mu, logvar))
    assert before.share > 0.4
    assert before.pairs[0].tolist() == [0, 1]
    assert before.pair_share[0] > 2 * before.pair_share[1]
    assert sorted(before.dims[:2].tolist()) == [0, 1]
    assert before.share_without[2] > before.share_without[1]

    vae = VAE(lambda x: x.chunk(2, 1), nn.Linear(3, 6), likelihood="gaussian", prior=StandardNormal(3))
    x = torch.cat((mu, logvar), 1)
    of_vae = prior_hole(vae, x.split(100))
    assert of_vae.share == prior_hole(vae.encode, x.split(100)).share == before.share
    torch.testing.assert_close(of_vae.log_q_data, before.log_q_data)
    vae.fit_prior(x, 2, seed=0)
    after = prior_hole(vae, x)
    assert after.share < 0.05
    assert after.pair_share.max() < 0.05
    assert after.terms.agg_kl < before.terms.agg_kl - 1


def test_some_of_many_posteriors():
    mu, logvar = posteriors(N=300, D=7)
    hole = prior_hole((mu, logvar), n_prior=50, n_dims=3)
    assert hole.log_q_data.shape == hole.log_q_prior.shape == (50,)
    assert hole.dims.shape == hole.share_without.shape == (3,)
    assert hole.pairs.shape == (3, 2)
    assert set(hole.pairs.flatten().tolist()) == set(hole.dims.tolist())
    assert hole.dim_share.shape == (7,)


def test_one_dimension():
    mu, logvar = posteriors(D=1)
    hole = prior_hole((mu, logvar), n_prior=200)
    assert hole.share == hole.dim_share[0]
    assert hole.pairs.shape == (0, 2)
    assert hole.dims.tolist() == [0]


def test_generators_are_left_as_they_were_and_the_seed_decides():
    pair = posteriors()
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    shares = [prior_hole(pair, n_prior=500, seed=seed).z_prior for seed in (0, 0, 1)]
    assert torch.equal(torch.randn(3), expected)
    assert torch.equal(shares[0], shares[1])
    assert not torch.equal(shares[0], shares[2])


@pytest.mark.parametrize("q", [0.001, 0.25, 0.5, 0.999])
def test_quantiles_are_torchs(q):
    x = posteriors(N=7, D=101)[0]
    torch.testing.assert_close(_quantile(x, q), x.quantile(q, dim=1))


def test_errors_name_the_argument_and_saturation_warns():
    pair = posteriors()
    vae = VAE(lambda x: x.chunk(2, 1), nn.Linear(4, 8), likelihood="gaussian")
    for call, error, name in (
        (lambda: prior_hole(vae), ValueError, "data"),
        (lambda: prior_hole(pair, pair[0]), TypeError, "source"),
        (lambda: prior_hole(pair[0], vae), TypeError, "source"),
        (lambda: prior_hole(pair[0]), TypeError, "source"),
        (lambda: prior_hole(pair, prior=wrong(1.0)), TypeError, "prior"),
        (lambda: prior_hole(pair, n_prior=0), ValueError, "n_prior"),
        (lambda: prior_hole(pair, n_dims=0), ValueError, "n_dims"),
        (lambda: prior_hole(pair, quantile=1.0), ValueError, "quantile"),
        (lambda: prior_hole((pair[0][:1], pair[1][:1])), ValueError, "source"),
        (lambda: prior_hole((pair[0] * math.nan, pair[1])), ValueError, "source"),
        (lambda: prior_hole(pair, prior=StandardNormal(3)), ValueError, "prior"),
        (lambda: prior_hole(pair, n_prior=2**62), ValueError, "n_prior"),
        (lambda: prior_hole(pair, seed=2**64), ValueError, "seed"),
        (lambda: prior_hole(pair, progress=wrong("no")), TypeError, "progress"),
        (lambda: prior_hole(pair, device="gpu"), ValueError, "device"),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            call()
    with pytest.warns(UserWarning, match=r"ceiling of log 60") as caught:
        prior_hole(posteriors(logvar=-6.0))
    assert caught[0].filename == __file__


def test_the_picture(tmp_path):
    plots = pytest.importorskip("fastvae.evaluation.plots")
    mu, logvar = two_modes()
    hole = prior_hole((mu, logvar), n_prior=500)
    figures = []

    def draw(figure):
        plots.plot_prior_hole(figure, hole, (mu, logvar), n_pairs=2)
        figures.append(figure)

    plots.save(tmp_path / "hole.png", (11, 4.4), draw)
    assert (tmp_path / "hole.png").stat().st_size > 20_000
    maps, histogram = figures[0].subfigs
    assert len(maps.axes) == 4
    assert maps.axes[0].get_title() == f"{hole.pair_share[0].item():.1%} from holes"
    words = [text.get_text() for text in histogram.axes[0].texts]
    assert words == [f"{hole.share.item():.1%} of the samples\nare from holes"]
    flat = prior_hole((mu[:, :1], logvar[:, :1]), n_prior=500)
    plots.save(tmp_path / "flat.png", (4, 4), lambda figure: plots.plot_prior_hole(figure, flat, (mu, logvar)))
