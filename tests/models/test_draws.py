"""The draws that an objective is handed: terms that are computed when they are asked for, and only then."""

import pytest
import torch
from test_vae import D, Several, binary, make_vae
from torch import nn

import fastvae
from fastvae import ELBO, IWAE, VAE, BetaTCVAE, Draws, InfoVAE, StandardNormal


class Counting:
    """N(0, I) without a closed form of its KL, which counts what it is asked for."""

    def __init__(self):
        self.normal, self.asked = StandardNormal(D), []
        self.marginal_log_prob, self.sample = self.normal.marginal_log_prob, self.normal.sample

    def log_prob(self, z):
        self.asked.append("log_prob")
        return self.normal.log_prob(z)


class CountingWithKL(Counting):
    def kl(self, mu, logvar):
        self.asked.append("kl")
        return self.normal.kl(mu, logvar)


@pytest.mark.parametrize(
    ("objective", "prior", "drawn", "asked"),
    [
        (ELBO(), CountingWithKL, ("z",), ["kl"]),
        (ELBO(), Counting, ("z", "log_q"), ["log_prob"]),
        (ELBO(k=3), CountingWithKL, ("z",), ["kl"]),
        (ELBO(k=3), Counting, ("z", "log_q"), ["log_prob"]),
        (InfoVAE(), CountingWithKL, ("z",), ["kl"]),
        (InfoVAE(divergence="agg_kl", dataset_size=99), CountingWithKL, ("z",), ["kl", "log_prob"]),
        (BetaTCVAE(dataset_size=99), CountingWithKL, ("z",), ["log_prob"]),
        (IWAE(3), CountingWithKL, ("z", "log_q"), ["log_prob"]),
        (Several(2, 3), CountingWithKL, ("z", "log_q"), ["log_prob"]),
    ],
)
def test_an_objective_pays_for_what_it_uses(monkeypatch, objective, prior, drawn, asked):
    outputs = []

    def sample_gauss(*arguments, **options):
        outputs.append(options["outputs"])
        return fastvae.sample_gauss(*arguments, **options)

    monkeypatch.setattr("fastvae.models.vae.sample_gauss", sample_gauss)
    vae = make_vae(prior=prior(), objective=objective)
    vae(binary(7, 4, 5)).loss.backward()
    assert outputs == [drawn]
    assert vae.prior.asked == asked


def test_what_is_drawn_with_z_does_not_change_it():
    x, zs = binary(7, 4, 5), []
    for objective in (ELBO(), Several(1, 1)):
        vae = make_vae(objective=objective)
        torch.manual_seed(3)
        zs.append(vae(x).z)
    assert torch.equal(*zs)


def test_terms_of_the_draws_are_computed_once():
    z, mu, logvar = torch.randn(2, 3, 5, D), torch.randn(5, D), torch.randn(5, D)
    prior, calls = CountingWithKL(), []

    def log_px_z(z):
        calls.append(z)
        return z.sum(-1)

    draws = Draws(z, mu, logvar, log_px_z=log_px_z, prior=prior, step=torch.tensor(0))
    assert not calls
    assert not prior.asked
    assert draws.log_px_z is draws.log_px_z
    assert draws.log_pz is draws.log_pz
    assert draws.kl is draws.kl
    assert len(calls) == 1
    assert prior.asked == ["log_prob", "kl"]


def test_the_draws_log_q_is_that_of_z_before_it_was_rounded():
    """Log q is that of z before rounding, and its gradient is total: d log q / d mu = 0, d log q / d logvar = −½."""

    class Keeping(Several):
        def __call__(self, draws):
            self.draws = draws
            return super().__call__(draws)

    mu, logvar = (torch.randn(7, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    vae = VAE(lambda x: (mu, logvar), nn.Linear(D, 4).bfloat16(), objective=Keeping(2, 3))
    x = binary(7, 4).bfloat16()
    torch.manual_seed(1)
    vae(x)
    torch.manual_seed(1)
    expected = fastvae.sample_gauss(mu, logvar, 6, outputs=("z", "log_q")).log_q
    assert expected is not None
    log_q = vae.objective.draws.log_qz_x
    assert torch.equal(log_q, expected.view(2, 3, 7))
    d_mu, d_logvar = torch.autograd.grad(log_q.sum(), (mu, logvar))
    assert (d_mu == 0).all()
    assert (d_logvar == -0.5 * 6).all()


class Alone:
    """An objective of z and log p(x|z) alone, but for what `asks` does with the draws first."""

    k = m = 1
    needs: tuple[str, ...] = ()

    def __init__(self, asks=lambda draws: None):
        self.asks = asks

    def __call__(self, draws):
        self.asks(draws)
        nell = -draws.log_px_z.mean()
        return nell, {"nell": nell, "kl": torch.zeros_like(nell)}


@pytest.mark.parametrize("asks", [lambda draws: None, lambda draws: draws.prior.sample(7)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_prior_learns_its_dimension_whatever_the_objective_asks_for(fresh_compiler, asks, compiled):
    vae = make_vae(objective=Alone(asks))
    run = torch.compile(vae, backend="eager", fullgraph=True) if compiled else vae
    run(binary(7, 4, 5)).loss.backward()
    assert vae.sample(3).shape == (3, 4, 5)
    assert vae.state_dict()["prior.dim"] == D


@pytest.mark.parametrize("prior", [Counting, CountingWithKL])
@pytest.mark.parametrize("name", ["log_qz_x", "kl"])
def test_a_term_that_was_not_said_to_be_needed_is_named(name, prior):
    """Asking is an error with every prior, so that none comes up when `fit_prior` replaces it."""
    vae = make_vae(objective=Alone(lambda draws: getattr(draws, name)), prior=prior())
    with pytest.raises(
        RuntimeError, match=f"^objective: asks for {name}, and so expected '{name}' among what it needs"
    ):
        vae(binary(7, 4, 5))


@pytest.mark.parametrize("needs", [("klx",), "kl", ["log_px_z"], None])
def test_needs_that_there_are_not(needs):
    objective = Alone()
    objective.needs = needs
    with pytest.raises(ValueError, match=r"^objective: expected needs to be a tuple of 'log_qz_x' and 'kl', got"):
        make_vae(objective=objective)
