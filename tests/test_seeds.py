"""Every seed takes the same integers, and None, for one that torch's generator draws."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae import VAE, GaussianMixture

N, D = 40, 3


def posteriors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=generator), torch.randn(N, D, generator=generator) - 1


def model() -> VAE:
    decoder = nn.Linear(D, 4)
    with torch.no_grad():
        decoder.weight.copy_(torch.linspace(-1, 1, 4 * D).view(4, D))
        decoder.bias.zero_()
    prior = fastvae.StandardNormal(D)
    return VAE(lambda x: (x[:, :D], x[:, 1:] - 1), decoder, likelihood="gaussian", prior=prior).eval()


def examples() -> Tensor:
    return torch.cat((posteriors()[0], posteriors()[1][:, :1]), 1)


def fit_prior(seed: Any) -> Tensor:
    return model().fit_prior(examples(), 3, seed=seed, max_iter=1, tol=0).means_


def mixture(init: str, method: str, seed: Any) -> Tensor:
    fitted = GaussianMixture(4, init=init, max_iter=1, tol=0, seed=seed)
    return getattr(fitted, method)(posteriors()[0]).means_


DRAWN: dict[str, Callable[[Any], Any]] = {
    "reparameterize": lambda seed: fastvae.reparameterize(*posteriors(), seed=seed),
    "sample_gauss": lambda seed: fastvae.sample_gauss(*posteriors(), seed=seed).log_q,
    "kl_decomposition_dataset": lambda seed: fastvae.kl_decomposition_dataset(posteriors(), rows=9, seed=seed).entropy,
    "prior_hole": lambda seed: fastvae.prior_hole(posteriors(), n_prior=20, seed=seed).log_q_prior,
    "decoder_mutual_information": lambda seed: (
        fastvae.decoder_mutual_information(model(), n_prior=20, n_importance=50, seed=seed).mi
    ),
    "VAE.fit_prior": fit_prior,
    "GaussianMixture": lambda seed: mixture("kmeans++", "fit", seed),
    "GaussianMixture, anywhere": lambda seed: mixture("random", "fit", seed),
    "GaussianMixture, in batches": lambda seed: mixture("random", "partial_fit", seed),
    "GaussianMixture.sample": lambda seed: GaussianMixture(2, seed=0).fit(posteriors()[0]).sample(9, seed=seed)[0],
}


@pytest.mark.parametrize("name", DRAWN)
def test_without_a_seed_torchs_generator_governs(name: str) -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results += [DRAWN[name](None), DRAWN[name](None)]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[4])


@pytest.mark.parametrize("name", DRAWN)
def test_a_seed_is_an_integer_of_64_bits(name: str) -> None:
    for seed in (-(2**63), -1, 2**64 - 1):
        assert torch.equal(DRAWN[name](seed), DRAWN[name](seed))
    assert not torch.equal(DRAWN[name](-1), DRAWN[name](-2))
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(ValueError, match=r"^seed: expected at (least|most) "):
            DRAWN[name](seed)
    for wrong in (1.5, "1", True):
        with pytest.raises(TypeError, match=r"^seed: expected an integer, got "):
            DRAWN[name](wrong)


def test_a_mixture_whose_start_is_given_draws_nothing() -> None:
    x = posteriors()[0]
    start = (torch.ones(2) / 2, x[:2], torch.ones(2, D))
    before = torch.get_rng_state()
    GaussianMixture(2, init=start).fit(x)
    assert torch.equal(torch.get_rng_state(), before)
