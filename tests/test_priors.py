"""StandardNormal: the prior protocol against torch.distributions."""

import pytest
import torch
from torch import distributions as D

from fastvae import StandardNormal


@pytest.mark.parametrize("shape", [(1, 1), (31, 10), (4, 7, 3), (2, 0, 5)])
def test_densities_are_torchs(shape):
    z = 3 * torch.randn(shape, dtype=torch.float64)
    normal = D.Normal(torch.zeros_like(z), 1.0)
    prior = StandardNormal()
    torch.testing.assert_close(prior.marginal_log_prob(z), normal.log_prob(z))
    torch.testing.assert_close(prior.log_prob(z), normal.log_prob(z).sum(-1))


def test_kl_is_torchs():
    mu, logvar = torch.randn(2, 31, 10, dtype=torch.float64)
    q = D.Normal(mu, torch.exp(0.5 * logvar))
    expected = D.kl_divergence(q, D.Normal(torch.zeros_like(mu), 1.0)).sum(-1)
    torch.testing.assert_close(StandardNormal().kl(mu, logvar), expected.mean())
    torch.testing.assert_close(StandardNormal().kl(mu, logvar, reduction="sample"), expected)


def test_half_precision_accumulates_in_float32():
    z = torch.randn(3, 512).bfloat16()
    log_prob = StandardNormal().log_prob(z)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, StandardNormal().log_prob(z.float()))


def test_samples_come_from_torchs_generator():
    torch.manual_seed(3)
    z = StandardNormal(4).sample(20_000)
    torch.manual_seed(3)
    torch.testing.assert_close(z, StandardNormal(4).sample(20_000), rtol=0, atol=0)
    assert z.shape == (20_000, 4)
    assert z.mean(0).abs().max() < 0.05  # 7 standard errors
    assert (z.var(0) - 1).abs().max() < 0.07


def test_it_learns_its_dimension_and_keeps_it():
    prior = StandardNormal()
    with pytest.raises(ValueError, match=r"^dim: .*StandardNormal\(dim\)"):
        prior.sample(2)
    prior.log_prob(torch.zeros(3, 6))
    assert prior.sample(2).shape == (2, 6)
    copy = StandardNormal()
    copy.load_state_dict(prior.state_dict())
    assert copy.sample(0).shape == (0, 6)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: StandardNormal(0), ValueError, "dim"),
        (lambda: StandardNormal(2.5), TypeError, "dim"),
        (lambda: StandardNormal(2).sample(-1), ValueError, "n"),
        (lambda: StandardNormal().log_prob(torch.zeros(2, 3, dtype=torch.int64)), TypeError, "z"),
    ],
)
def test_errors_name_the_argument(call, error, name):
    with pytest.raises(error, match=rf"^{name}: "):
        call()
