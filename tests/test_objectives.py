"""ELBO, and that the objective protocol has room for importance weights and for decompositions."""

import math

import pytest
import torch

import fastvae
from fastvae import ELBO, StandardNormal

K, M, B, D = 1, 1, 31, 5


class WithoutClosedForm:
    """N(0, I), but its KL only by Monte Carlo."""

    log_prob = StandardNormal(D).log_prob


@pytest.fixture
def handed():
    """What VAE hands to an objective, for a made-up log p(x|z)."""
    torch.manual_seed(0)
    mu, logvar = torch.randn(2, B, D, dtype=torch.float64)
    sample = fastvae.sample_gauss(mu, logvar, K * M)
    log_densities = (sample.z.sin().sum(-1), sample.log_p, sample.log_q)
    return (
        [x.view(K, M, B) for x in log_densities],
        {
            "z": sample.z.view(K, M, B, D),
            "mu": mu,
            "logvar": logvar,
            "prior": StandardNormal(),
            "step": torch.tensor(3),
        },
    )


@pytest.mark.parametrize("beta", [0.0, 1, 4.0])
def test_elbo_with_the_closed_form(handed, beta):
    (log_px_z, _, _), context = log_densities, context = handed
    loss, terms = ELBO(beta)(*log_densities, **context)
    kl = fastvae.kl_gauss(context["mu"], context["logvar"])
    torch.testing.assert_close(terms["nell"], -log_px_z.mean())
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(loss, -log_px_z.mean() + beta * kl)
    torch.testing.assert_close(terms["elbo"], log_px_z.mean() - kl)


def test_elbo_by_monte_carlo_where_the_prior_has_no_kl(handed):
    (log_px_z, log_pz, log_qz_x), context = log_densities, context = handed
    loss, terms = ELBO()(*log_densities, **{**context, "prior": WithoutClosedForm()})
    torch.testing.assert_close(terms["kl"], (log_qz_x - log_pz).mean())
    torch.testing.assert_close(loss, -(log_px_z + log_pz - log_qz_x).mean())


def test_a_schedule_is_a_function_of_the_step(handed):
    log_densities, context = handed
    warm_up = ELBO(beta=lambda step: (step / 4).clamp(max=1))
    for step in (0, 2, 4, 9):
        context["step"] = torch.tensor(step)
        loss, terms = warm_up(*log_densities, **context)
        torch.testing.assert_close(loss, terms["nell"] + min(step / 4, 1) * terms["kl"])
    plain_python, _ = ELBO(beta=lambda step: min(1.0, step / 18))(*log_densities, **context)
    torch.testing.assert_close(plain_python, terms["nell"] + 0.5 * terms["kl"])


@pytest.mark.parametrize(
    ("beta", "error"), [(-0.1, ValueError), (math.nan, ValueError), ("1", TypeError), (None, TypeError)]
)
def test_errors_name_the_argument(beta, error):
    with pytest.raises(error, match=r"^beta: "):
        ELBO(beta=beta)
