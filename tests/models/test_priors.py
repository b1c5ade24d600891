"""The priors: their protocol against torch.distributions, and in a VAE."""

import linecache
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import wrong
from torch import distributions as D
from torch import nn

import fastvae
from fastvae import VAE, DiagonalGaussian, MixturePrior, StandardNormal, VampPrior

DIM = 3


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


def test_no_forward_changes_a_buffer():
    prior = StandardNormal(4)
    before = {name: (x.clone(), x._version) for name, x in prior.named_buffers()}
    prior.log_prob(torch.zeros(3, 2))
    assert prior.sample(1).shape == (1, 4)  # what was given stays
    assert all(x._version == before[name][1] for name, x in prior.named_buffers())
    z = torch.randn(3, 6)
    gradient = torch.func.grad(lambda z: StandardNormal().log_prob(z).sum())(z)
    torch.testing.assert_close(gradient, -z)


def test_the_dimension_is_taken_in_training_alone_and_goes_where_buffers_go():
    prior = StandardNormal()
    prior.eval().log_prob(torch.zeros(3, 2))
    assert prior.state_dict()["dim"] == 0
    average: Any = torch.optim.swa_utils.AveragedModel(prior.train())
    prior.log_prob(torch.zeros(3, 2))
    average.update_parameters(prior)
    assert average.module.sample(1).shape == (1, 2)
    given = StandardNormal(3)
    given.load_state_dict({"dim": torch.tensor(0)})  # of one that had seen nothing
    given.log_prob(torch.zeros(3, 3))
    assert given.sample(1).shape == (1, 3)


@pytest.mark.parametrize("dim", [0, 6])
def test_older_checkpoints_load(dim):
    """`dim` was a buffer."""
    prior = StandardNormal()
    prior.load_state_dict({"dim": torch.tensor(dim)})
    assert prior.dim == dim
    assert prior.state_dict()["dim"].dtype == torch.int64
    assert repr(prior) == f"StandardNormal({dim or ''})"
    with pytest.raises(RuntimeError, match=r"Missing.*dim"):
        prior.load_state_dict({})


@pytest.mark.parametrize("make", [StandardNormal, DiagonalGaussian, lambda dim, **o: MixturePrior(4, dim, **o)])
def test_priors_are_made_where_they_are_wanted(make):
    assert all(
        x.device.type == "meta" and x.dtype in (torch.half, torch.int64)
        for x in tensors_of(make(3, device="meta", dtype=torch.half))
    )
    assert make(3, dtype=torch.float64).sample(2).dtype == torch.float64
    assert make(3).double().sample(2).dtype == torch.float64


def test_a_default_device_is_not_taken_for_that_of_the_inputs():
    prior, x = StandardNormal(3), torch.zeros(4, 5)
    with torch.device("meta"):
        assert prior.sample(2).device.type == "cpu"
        assert prior.log_prob(prior.sample(2)).device.type == "cpu"
        assert {p.device.type for p in VampPrior(2, nn.Identity(), x).parameters()} == {"cpu"}
        mixture = MixturePrior.from_parameters(x[0].exp(), x.mT, x.mT.exp())
        assert {p.device.type for p in mixture.parameters()} == {"cpu"}


def tensors_of(module):
    return [*module.parameters(), *module.buffers()]


# Learned priors


class Encoder(nn.Module):
    """x [B, 5] to (mu, logvar) [B, 3]"""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 2 * DIM)

    def forward(self, x):
        return self.linear(x).chunk(2, dim=1)


def jittered(prior):
    """The prior with parameters off their start, in float64."""
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return prior.double()


def learned(name):
    """(a prior that is not at its start, its distribution in torch)"""
    torch.manual_seed(0)
    if name == "diagonal":
        prior = jittered(DiagonalGaussian(DIM))
        return prior, D.Independent(D.Normal(prior.mu, prior.logvar.exp().sqrt()), 1)
    if name == "mixture":
        prior = jittered(MixturePrior(7, DIM))
        logits, mu, logvar = prior.logits, prior.mu, prior.logvar
    else:
        prior = jittered(VampPrior(7, Encoder(), torch.randn(20, 5), limits=(-1, 1)))
        mu, logvar = prior.encoder(prior.pseudo_inputs.clamp(-1, 1))
        logits = torch.zeros(7, dtype=torch.float64)
    components = D.Independent(D.Normal(mu, logvar.exp().sqrt()), 1)
    return prior, D.MixtureSameFamily(D.Categorical(logits=logits), components)


LEARNED = ("diagonal", "mixture", "vamp")


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("shape", [(1,), (31,), (4, 7), ()])
def test_learned_densities_and_their_gradients_are_torchs(name, shape):
    prior, expected = learned(name)
    z = 2 * torch.randn(*shape, DIM, dtype=torch.float64)
    log_prob = prior.log_prob(z)
    torch.testing.assert_close(log_prob, expected.log_prob(z))
    parameters = list(prior.parameters())
    ours = torch.autograd.grad(log_prob.sum(), parameters, retain_graph=True)
    theirs = torch.autograd.grad(expected.log_prob(z).sum(), parameters, retain_graph=True, materialize_grads=True)
    torch.testing.assert_close(ours, theirs)
    assert prior.marginal_log_prob(z).shape == z.shape
    assert prior.log_prob(z.new_zeros(2, 0, DIM)).shape == (2, 0)


@pytest.mark.parametrize("name", LEARNED)
def test_marginals_are_the_joint_integrated(name):
    prior, _ = learned(name)
    line = torch.linspace(-12, 12, 121, dtype=torch.float64)
    z0 = torch.tensor([-0.7, 0.4], dtype=torch.float64)
    others = torch.cartesian_prod(line, line)
    grid = torch.cat((z0[:, None, None].expand(2, len(others), 1), others.expand(2, -1, -1)), -1)
    integral = prior.log_prob(grid).logsumexp(-1) + 2 * math.log(0.2)
    z = torch.zeros(2, DIM, dtype=torch.float64)
    z[:, 0] = z0
    torch.testing.assert_close(prior.marginal_log_prob(z)[:, 0], integral, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_priors_sample_what_they_say(name):
    prior, expected = learned(name)
    torch.manual_seed(1)
    z = prior.sample(50_000)
    torch.manual_seed(1)
    assert torch.equal(z, prior.sample(50_000))
    error = (expected.variance / len(z)).sqrt()
    assert ((z.mean(0) - expected.mean).abs() < 5 * error).all()
    torch.testing.assert_close(z.var(0), expected.variance, rtol=0.05, atol=0)
    torch.testing.assert_close(
        prior.log_prob(z).mean(), expected.log_prob(expected.sample((50_000,))).mean(), rtol=0, atol=0.05
    )
    assert prior.sample(0).shape == (0, DIM)
    with pytest.raises(ValueError, match=r"^n: "):
        prior.sample(-1)


def test_diagonal_gaussian_has_kl_gauss_and_its_options():
    prior, _ = learned("diagonal")
    mu, logvar = torch.randn(2, 31, DIM, dtype=torch.float64)
    q = D.Normal(mu, torch.exp(0.5 * logvar))
    dims = D.kl_divergence(q, D.Normal(prior.mu, prior.logvar.exp().sqrt())).mean(0)
    torch.testing.assert_close(prior.kl(mu, logvar), dims.sum())
    torch.testing.assert_close(prior.kl(mu, logvar, reduction="dim"), dims)
    floor = dims.median().item()
    torch.testing.assert_close(prior.kl(mu, logvar, free_bits=floor), dims.clamp(min=floor).sum())


def test_priors_start_near_the_standard_normal():
    z = torch.randn(1000, 16)
    normal = StandardNormal().log_prob(z)
    torch.testing.assert_close(DiagonalGaussian(16).log_prob(z), normal)
    torch.testing.assert_close(MixturePrior(1, 16).log_prob(z), normal)
    torch.manual_seed(0)
    prior = MixturePrior(2000, 16)
    moments = prior.sample(20_000)
    assert moments.mean(0).abs().max() < 0.1
    assert (moments.var(0) - 1).abs().max() < 0.15


def test_a_mixture_prior_is_a_fitted_mixture():
    torch.manual_seed(0)
    z = torch.randn(300, DIM) * torch.tensor([0.1, 1.0, 3.0]) + 2
    mixture = fastvae.GaussianMixture(4, seed=0).fit(z)
    parameters = (mixture.weights_, mixture.means_, mixture.variances_)
    exact = MixturePrior.from_parameters(*parameters)
    assert all(p.dtype == torch.float64 for p in exact.parameters())
    torch.testing.assert_close(exact.log_prob(z.double()), mixture.score_samples(z.double()), rtol=1e-12, atol=1e-12)
    prior = MixturePrior.from_parameters(*parameters, dtype=torch.float32)
    torch.testing.assert_close(prior.log_prob(z), mixture.score_samples(z), rtol=1e-5, atol=1e-4)
    assert prior.mu.dtype == torch.float32
    copy = MixturePrior(4, DIM)
    copy.load_state_dict(prior.state_dict())
    assert torch.equal(copy.log_prob(z), prior.log_prob(z))


def make_vae(name, **options):
    torch.manual_seed(0)
    encoder, decoder = Encoder(), nn.Linear(DIM, 5)
    prior: Any = {
        "standard": lambda: StandardNormal(DIM),
        "diagonal": lambda: DiagonalGaussian(DIM),
        "mixture": lambda: MixturePrior(6, DIM),
        "vamp": lambda: VampPrior(6, encoder, torch.randn(50, 5)),
    }[name]()
    return VAE(encoder, decoder, likelihood="gaussian", prior=prior, **options)


def bent(n=512):
    """Points along a bent line in 5 dimensions: no Gaussian."""
    t = torch.linspace(-2, 2, n)
    points = torch.stack((t, t**2 - 1, t.sin(), t.abs(), -t), 1)
    return points + 0.05 * torch.randn(n, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "objective",
    [fastvae.ELBO(), fastvae.IWAE(4, gradient="dreg"), fastvae.BetaTCVAE(dataset_size=512), fastvae.InfoVAE()],
)
@pytest.mark.parametrize("name", LEARNED)
def test_a_vae_trains_its_prior(name, objective):
    vae, x = make_vae(name, objective=objective), bent()
    before = [p.detach().clone() for p in vae.prior.parameters()]
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    first = vae(x).loss.item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = vae(x).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    assert all((p - old).abs().max() > 1e-3 for p, old in zip(vae.prior.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["mixture", "vamp"])
def test_the_kl_of_a_mixture_is_by_monte_carlo(name):
    vae, x = make_vae(name).double(), bent().double()
    torch.manual_seed(1)
    out = vae(x)
    torch.manual_seed(1)
    sampled: Any = fastvae.sample_gauss(out.mu, out.logvar, 1, outputs=("z", "log_q"))
    z, log_q, _, _ = sampled
    torch.testing.assert_close(out.z, z[0])
    torch.testing.assert_close(out.kl, (log_q[0] - vae.prior.log_prob(z[0])).mean())
    with pytest.raises(ValueError, match=r"^free_bits: .*closed form"):
        make_vae(name, objective=fastvae.ELBO(free_bits=0.1))(x.float())


@pytest.mark.parametrize("name", LEARNED)
def test_the_decomposition_has_the_priors_factorization(name):
    prior, _ = learned(name)
    mu, logvar = torch.randn(2, 40, DIM, dtype=torch.float64)
    z = fastvae.reparameterize(mu, logvar, seed=0)
    terms = fastvae.kl_decomposition(z, mu, logvar, prior=prior)
    expected = (prior.log_prob(z) - prior.marginal_log_prob(z).sum(1)).mean()
    torch.testing.assert_close(terms.prior_factorization, expected)
    assert (terms.prior_factorization.abs() < 1e-12) == (name == "diagonal")
    monte_carlo = (fastvae.log_prob_gauss(z, mu, logvar) - prior.log_prob(z)).mean()
    torch.testing.assert_close(terms.mi + terms.tc + terms.dim_kl.sum() - terms.prior_factorization, monte_carlo)
    out = make_vae(name, objective=fastvae.BetaTCVAE(dataset_size=512))(bent())
    torch.testing.assert_close(out.kl, out.loss - out.nell)
    assert (out.terms["prior_factorization"].abs() < 1e-5) == (name == "diagonal")


def test_a_vamp_prior_is_the_aggregate_posterior_of_its_pseudo_inputs():
    encoder, x = Encoder(), torch.randn(6, 5)
    prior = VampPrior(6, encoder, x)  # all of them, in some order
    z = torch.randn(9, DIM)
    torch.testing.assert_close(prior.log_prob(z), fastvae.agg_log_prob(z, *encoder(x)))
    vae = VAE(encoder, nn.Linear(DIM, 5), prior=prior)
    assert len({id(p) for p in vae.parameters()}) == len(list(vae.parameters())) == 5
    assert isinstance(vae.prior, VampPrior)
    assert vae.prior.encoder is vae.encoder


@pytest.mark.parametrize("name", ["standard", *LEARNED])
def test_fit_prior_samples_where_the_data_are(name):
    vae, x = make_vae(name), bent()
    with torch.no_grad():
        mu, logvar = vae.encode(x)
        old = fastvae.agg_log_prob(vae.prior.sample(2000), mu, logvar).mean()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(len(x))), 100, shuffle=True)
    mixture = vae.eval().fit_prior(loader, 8, n_samples=2, seed=0, max_iter=50)
    assert isinstance(vae.prior, MixturePrior)
    assert isinstance(mixture, fastvae.GaussianMixture)
    z = fastvae.reparameterize(mu, logvar)
    assert mixture.score(z) > fastvae.log_prob_gauss(z, z.mean(0), z.var(0).log()).mean()
    torch.testing.assert_close(vae.prior.log_prob(z), mixture.score_samples(z), rtol=1e-4, atol=1e-3)
    new = fastvae.agg_log_prob(vae.prior.sample(2000), mu, logvar).mean()
    entropy = fastvae.agg_entropy(z, mu, logvar)
    assert (new + entropy).abs() < (old + entropy).abs().clamp(max=0.5)
    assert vae.sample(4).shape == (4, 5)
    assert vae(x).loss.isfinite()
    again = make_vae(name).eval()
    assert torch.equal(again.fit_prior(x, 8, seed=0).means_, make_vae(name).eval().fit_prior(x, 8, seed=0).means_)


def test_warnings_of_fit_prior_are_about_the_line_that_called_it():
    vae = make_vae("standard").eval()
    with pytest.warns(UserWarning, match=r"^max_iter: EM has not converged") as caught:
        vae.fit_prior(bent(), 4, max_iter=1)
    assert [w.filename for w in caught] == [__file__]
    assert "vae.fit_prior(bent(), 4, max_iter=1)" in linecache.getline(__file__, caught[0].lineno)


def test_fit_prior_keeps_the_vaes_precision():
    vae, x = make_vae("standard").double().eval(), bent().double()
    mixture = vae.fit_prior(x, 4, seed=np.int64(0))
    torch.testing.assert_close(vae.prior.mu.detach(), mixture.means_, rtol=0, atol=0)
    assert {p.dtype for p in make_and_fit("standard").prior.parameters()} == {torch.float32}


def make_and_fit(name):
    vae = make_vae(name).eval()
    vae.fit_prior(bent(), 4, seed=0)
    return vae


def test_a_prior_fitted_in_inference_mode_can_be_trained():
    vae = make_vae("standard").eval()
    with torch.inference_mode():
        vae.fit_prior(bent(), 4, seed=0)
    vae.train()(bent()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in vae.prior.parameters())
    torch.optim.SGD(vae.parameters(), 1e-3).step()


@pytest.mark.parametrize("name", ["standard", *LEARNED])
def test_a_fitted_prior_says_how_it_is_loaded(name):
    saved = make_and_fit(name).state_dict()
    vae = make_vae(name).double()
    with pytest.raises(RuntimeError) as error:
        vae.load_state_dict(saved)
    line = re.search(r"prior: .*fit_prior.*write (vae\.prior = .*\))$", str(error.value), re.M)
    assert line is not None
    exec(line[1].replace("fastvae.", ""), {"vae": vae, "MixturePrior": MixturePrior, "torch": torch})
    vae.load_state_dict(saved)
    assert {p.dtype for p in vae.prior.parameters()} == {torch.float64}
    torch.testing.assert_close(vae.prior.mu, saved["prior.mu"].double(), rtol=0, atol=0)
    if name in ("standard", "vamp"):
        make_vae(name).load_state_dict(saved, strict=False)  # all but the prior, as asked for


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: StandardNormal(0), ValueError, "dim"),
        (lambda: StandardNormal(wrong(2.5)), TypeError, "dim"),
        (lambda: StandardNormal(2).sample(-1), ValueError, "n"),
        (lambda: StandardNormal().log_prob(torch.zeros(2, 3, dtype=torch.int64)), TypeError, "z"),
        (lambda: StandardNormal(2).sample(2**62), ValueError, "n"),
        (lambda: DiagonalGaussian(2).sample(2**62), ValueError, "n"),
        (lambda: MixturePrior(2, 3).sample(2**62), ValueError, "n"),
        (lambda: DiagonalGaussian(2).log_prob(torch.zeros(4, 3)), ValueError, "z"),
        (lambda: DiagonalGaussian(2).marginal_log_prob(torch.zeros(4, 1)), ValueError, "z"),
        (
            lambda: MixturePrior.from_parameters(-torch.ones(2), torch.ones(2, 2), torch.ones(2, 2)),
            ValueError,
            "weights",
        ),
        (
            lambda: MixturePrior.from_parameters(torch.zeros(2), torch.ones(2, 2), torch.ones(2, 2)),
            ValueError,
            "weights",
        ),
        (
            lambda: MixturePrior.from_parameters(torch.ones(2), torch.full((2, 2), math.nan), torch.ones(2, 2)),
            ValueError,
            "weights",
        ),
        (
            lambda: MixturePrior.from_parameters(torch.ones(2), torch.ones(2, 2), -torch.ones(2, 2)),
            ValueError,
            "variances",
        ),
        (
            lambda: MixturePrior.from_parameters(torch.ones(2), torch.ones(2, 2), torch.ones(2, 2, device="meta")),
            ValueError,
            "variances",
        ),
        (lambda: VampPrior(3, nn.Linear(2, 2), torch.zeros(4, 2), limits=wrong((1,))), TypeError, "limits"),
        (lambda: VampPrior(3, nn.Linear(2, 2), torch.zeros(4, 2), limits=wrong(3)), TypeError, "limits"),
        (lambda: VampPrior(3, nn.Linear(2, 2), torch.zeros(4, 2), limits=wrong(("0", "1"))), TypeError, "limits"),
        (lambda: VampPrior(3, nn.Linear(2, 2), torch.zeros(4, 2), limits=(0, math.nan)), ValueError, "limits"),
        (lambda: VampPrior(3, nn.Linear(2, 2), torch.zeros(4, 2)).sample(2), TypeError, "encoder"),
        (lambda: VampPrior(3, lambda x: (x[:2], x), torch.zeros(4, 2)).sample(2), ValueError, "encoder"),
        (lambda: DiagonalGaussian(0), ValueError, "dim"),
        (lambda: DiagonalGaussian(2).marginal_log_prob(torch.zeros(2, dtype=torch.int64)), TypeError, "z"),
        (lambda: MixturePrior(0, 2), ValueError, "n_components"),
        (lambda: MixturePrior(2, wrong(2.0)), TypeError, "dim"),
        (lambda: MixturePrior(2, 3).log_prob(torch.zeros(4, 2)), ValueError, "z"),
        (
            lambda: MixturePrior.from_parameters(torch.ones(2), torch.ones(3, 2), torch.ones(3, 2)),
            ValueError,
            "weights",
        ),
        (lambda: VampPrior(3, nn.Linear(2, 2), torch.zeros(2, 2)), ValueError, "x"),
        (lambda: VampPrior(3, None, torch.zeros(4, 2)), TypeError, "encoder"),
        (lambda: VampPrior(3, nn.Linear(2, 2), torch.zeros(4, 2), limits=(1, 0)), ValueError, "limits"),
        (lambda: make_vae("standard").fit_prior(bent(), 0), ValueError, "n_components"),
        (lambda: make_vae("standard").fit_prior(bent(3), 4), ValueError, "x"),
    ],
)
def test_errors_name_the_argument(call, error, name):
    with pytest.raises(error, match=rf"^{name}[:,] "):
        call()
