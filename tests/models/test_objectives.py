"""The objectives against their formulas, and on a VAE: gradients, schedules, the compiler."""

import copy
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from support.helpers import wrong
from support.linear_gaussian import LinearGaussian
from torch import nn

import fastvae
from fastvae import ELBO, IWAE, VAE, BetaTCVAE, Draws, InfoVAE, StandardNormal, mmd
from fastvae.models.bounds import GRADIENTS
from fastvae.models.likelihoods import Gaussian

B, D = 31, 5


class WithoutClosedForm:
    """N(0, I), but its KL only by Monte Carlo."""

    log_prob = StandardNormal(D).log_prob
    marginal_log_prob = StandardNormal(D).marginal_log_prob
    sample = StandardNormal(D).sample


def hand(k: int = 1, m: int = 1, prior: Any = None) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The arguments that VAE hands to an objective, for a made-up log p(x|z); mu and logvar want gradients."""
    torch.manual_seed(0)
    mu, logvar = (x.requires_grad_() for x in torch.randn(2, B, D, dtype=torch.float64))
    sampled: Any = fastvae.sample_gauss(mu, logvar, k * m)
    z, log_q, log_p, _ = sampled
    prior = StandardNormal(D) if prior is None else prior
    context = {"z": z.view(k, m, B, D), "mu": mu, "logvar": logvar, "prior": prior, "step": torch.tensor(3)}
    return [x.view(k, m, B) for x in (context["z"].sin().sum(-1), log_p, log_q)], context


def handed(log_densities: Sequence[torch.Tensor], context: dict[str, Any]) -> Draws:
    """The same as one object; log p(z) is asked of the prior."""
    log_px_z, _, log_qz_x = log_densities
    return Draws(**context, log_px_z=lambda z: log_px_z, log_qz_x=log_qz_x)


# The ELBO.


@pytest.mark.parametrize("beta", [0.0, 1, 4.0])
def test_elbo_with_the_closed_form(beta):
    (log_px_z, _, _), context = log_densities, context = hand()
    loss, terms = ELBO(beta=beta)(handed(log_densities, context))
    kl = fastvae.kl_gauss(context["mu"], context["logvar"])
    torch.testing.assert_close(terms["nell"], -log_px_z.mean())
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(loss, -log_px_z.mean() + beta * kl)
    torch.testing.assert_close(terms["elbo"], log_px_z.mean() - kl)


def test_elbo_by_monte_carlo_where_the_prior_has_no_kl():
    (log_px_z, log_pz, log_qz_x), context = log_densities, context = hand(prior=WithoutClosedForm())
    loss, terms = ELBO()(handed(log_densities, context))
    torch.testing.assert_close(terms["kl"], (log_qz_x - log_pz).mean())
    torch.testing.assert_close(loss, -(log_px_z + log_pz - log_qz_x).mean())


def test_a_schedule_is_a_function_of_the_step():
    log_densities, context = hand()
    warm_up = ELBO(beta=lambda step: (step / 4).clamp(max=1))
    for step in (0, 2, 4, 9):
        context["step"] = torch.tensor(step)
        loss, terms = warm_up(handed(log_densities, context))
        torch.testing.assert_close(loss, terms["nell"] + min(step / 4, 1) * terms["kl"])
    plain_python, _ = ELBO(beta=lambda step: min(1.0, float(step / 18)))(handed(log_densities, context))
    torch.testing.assert_close(plain_python, terms["nell"] + 0.5 * terms["kl"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_schedule_has_no_say_in_the_losss_dtype(dtype):
    log_densities, context = hand()
    context = {name: x.to(dtype) if name in ("z", "mu", "logvar") else x for name, x in context.items()}
    for beta in (lambda step: step, lambda step: step.double() / 3, lambda step: step.bfloat16()):
        assert ELBO(beta=beta)(handed([x.to(dtype) for x in log_densities], context))[0].dtype == dtype


def test_numbers_of_any_kind_become_pythons():
    twos: tuple[Any, ...] = (torch.tensor(2.0), torch.tensor(2), np.float16(2), np.int8(2), Fraction(2))
    sizes_of_groups: Any = [np.int64(2), np.uint8(3)]
    for beta in twos:
        objective = ELBO(beta=beta, free_bits=beta, groups=sizes_of_groups, capacity=beta)
        assert [type(x) for x in (objective.beta, objective.free_bits, objective.capacity)] == [float] * 3
        assert objective == ELBO(beta=2.0, free_bits=2.0, groups=(2, 3), capacity=2.0)
        assert objective.groups is not None
        assert [type(size) for size in objective.groups] == [int, int]
    sizes = (BetaTCVAE(dataset_size=np.int32(2**31 - 1)), InfoVAE(divergence="agg_kl", dataset_size=np.int8(100)))
    assert [type(o.dataset_size) for o in sizes] == [int, int]
    assert type(IWAE(np.int64(3)).m) is int
    assert [type(make(k=wrong(np.int64(3))).k) for make in (ELBO, TCVAE, InfoVAE)] == [int] * 3
    assert type(InfoVAE(bandwidth=np.float32(2)).bandwidth) is float
    log_densities, context = hand()
    loss, terms = ELBO(beta=lambda step: np.float64(0.5))(handed(log_densities, context))
    torch.testing.assert_close(loss, terms["nell"] + 0.5 * terms["kl"])


@pytest.mark.parametrize("objective", [ELBO, BetaTCVAE, InfoVAE])
def test_weights_are_given_by_name(objective):
    """`BetaTCVAE(6)` would set alpha."""
    with pytest.raises(TypeError, match="positional"):
        objective(0.5)


def twice(step):
    return 2 * step


class WarmUp:
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, step):
        return (step / self.steps).clamp(max=1)


def test_schedules_are_pickled_and_copied():
    tcvae = BetaTCVAE(alpha=2.0, dataset_size=9)
    for objective in (ELBO(beta=twice, capacity=WarmUp(9)), InfoVAE(alpha=WarmUp(9)), tcvae):
        again = pickle.loads(pickle.dumps(objective))
        assert type(again) is type(objective)
        assert again.schedules() == objective.schedules()
        assert torch.equal(copy.deepcopy(make_vae(objective)).step, make_vae(objective).step)
    lambdas = ELBO(beta=twice, capacity=lambda step: 3.0 * step)
    with pytest.raises(pickle.PicklingError, match=r"^capacity: .*top level.*__call__.*lambda"):
        pickle.dumps(make_vae(lambdas))
    for copied in (copy.copy(lambdas), copy.deepcopy(lambdas), copy.deepcopy(make_vae(lambdas)).objective):
        assert copied == lambdas
    warm_up = ELBO(beta=WarmUp(9))
    assert copy.deepcopy(warm_up).beta is not warm_up.beta


@pytest.mark.parametrize("make", [BetaTCVAE, lambda **options: InfoVAE(divergence="agg_kl", **options)])
def test_a_batch_taken_for_the_data_set_is_worth_a_warning(make):
    with pytest.warns(UserWarning, match=r"^dataset_size: .*log B.*'uniform'") as caught:
        make()
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"dataset_size": 9}, {"estimator": "uniform"}, {"estimator": "loo"}):
            copy.deepcopy(make(**options))


@pytest.mark.parametrize("groups", [None, (2, 3), (5,), (1, 1, 1, 1, 1)])
def test_free_bits_per_dimension_and_per_group(groups):
    log_densities, context = hand()
    mu, logvar = context["mu"], context["logvar"]
    dims = fastvae.kl_gauss(mu, logvar, reduction="none").mean(0)
    sums = torch.stack([g.sum() for g in dims.split(groups or (1,) * D)])
    bits = sums.sort().values[: len(sums) // 2 + 1].mean().item() * 1.01  # some groups are below, at least one
    assert (sums < bits).any()
    loss, terms = ELBO(beta=2.0, free_bits=bits, groups=groups)(handed(log_densities, context))
    torch.testing.assert_close(terms["kl"], dims.sum())
    torch.testing.assert_close(terms["elbo"], -(terms["nell"] + dims.sum()))
    torch.testing.assert_close(loss, terms["nell"] + 2 * sums.clamp(min=bits).sum())
    (gradient,) = torch.autograd.grad(loss - terms["nell"], mu)
    free = (sums < bits).repeat_interleave(torch.tensor(groups or (1,) * D))
    assert ((gradient == 0).all(0) == free).all()
    if groups is None:
        torch.testing.assert_close(loss - terms["nell"], 2 * fastvae.kl_gauss(mu, logvar, free_bits=bits))


def test_free_bits_beyond_float32_are_its_largest_number():
    (log_densities, context), bits = hand(), 1e308
    single = [x.float() for x in log_densities]
    context |= {name: x.float() for name, x in context.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    loss, terms = ELBO(free_bits=bits)(handed(single, context))
    assert loss == math.inf
    assert terms["kl"].isfinite()


def test_capacity_holds_the_kl_from_both_sides():
    log_densities, context = hand()
    kl = fastvae.kl_gauss(context["mu"], context["logvar"])
    rising = ELBO(beta=10.0, capacity=lambda step: 100.0 * step)
    for step, expected in ((0, kl), (1, 100 - kl)):
        context["step"] = torch.tensor(step)
        loss, terms = rising(handed(log_densities, context))
        torch.testing.assert_close(loss, terms["nell"] + 10 * expected)
        torch.testing.assert_close(terms["kl"], kl)
    bits = 3.0
    loss, terms = ELBO(free_bits=bits, capacity=100.0)(handed(log_densities, context))
    free = fastvae.kl_gauss(context["mu"], context["logvar"], free_bits=bits)
    torch.testing.assert_close(loss, terms["nell"] + 100 - free)


# Importance weights.


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_iwae_is_the_bound_whatever_its_gradient(gradient):
    log_densities, context = hand(3, 4)
    loss, terms = IWAE(m=4, k=3, gradient=gradient)(handed(log_densities, context))
    log_w = log_densities[0] + log_densities[1] - log_densities[2]
    bound = (log_w.logsumexp(1) - math.log(4)).mean()
    torch.testing.assert_close(loss, -bound)
    torch.testing.assert_close(terms["iw_elbo"], bound)
    torch.testing.assert_close(terms["elbo"], log_w.mean())
    torch.testing.assert_close(terms["elbo"], -(terms["nell"] + terms["kl"]))
    torch.testing.assert_close(terms["ess"], fastvae.effective_sample_size(log_w, dim=1).mean())
    assert loss.requires_grad
    assert not any(term.requires_grad for term in terms.values())


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_iwae_stops_the_parameters_of_log_q_alone(gradient):
    """The objective hands back what iw_elbo gives for densities that the test has stopped itself; a prior that shares
    mu keeps its gradient."""

    class Sharing:
        def __init__(self):
            self.mu = torch.randn(D, dtype=torch.float64, requires_grad=True)

        def log_prob(self, z):
            return fastvae.log_prob_gauss(z, self.mu, torch.zeros(D).double())

    prior = Sharing()
    results = []
    for by_hand in (False, True):
        (log_px_z, _, log_qz_x), context = hand(2, 4, prior)
        z, mu, logvar = context["z"], context["mu"], context["logvar"]
        log_pz = prior.log_prob(z)
        if by_hand:
            if gradient != "iwae":
                log_qz_x = fastvae.log_prob_gauss(z, mu.detach(), logvar.detach())
            loss = -fastvae.mc_iw_elbo(log_px_z, log_pz, log_qz_x, z=z, gradient=gradient).mean()
        else:
            loss, _ = IWAE(4, 2, gradient)(handed((log_px_z, log_pz, log_qz_x), context))
        results.append(torch.autograd.grad(loss, (mu, logvar, prior.mu)))
    torch.testing.assert_close(*results)
    assert results[0][2].abs().min() > 0


# Terms of the KL.


@pytest.mark.parametrize("estimator", [None, "uniform", "stratified", "mss", "mws", "loo"])
def test_beta_tcvae_weighs_the_terms_of_the_kl(estimator):
    log_densities, context = hand()
    size = 100
    objective = BetaTCVAE(alpha=0.5, beta=lambda step: 2.0 * step, gamma=3.0, dataset_size=size, estimator=estimator)
    loss, terms = objective(handed(log_densities, context))
    of_kl = fastvae.kl_decomposition(
        context["z"][0, 0], context["mu"], context["logvar"], dataset_size=size, estimator=estimator
    )
    expected = -log_densities[0].mean() + 0.5 * of_kl.mi + 6 * of_kl.tc + 3 * of_kl.dim_kl.sum()
    torch.testing.assert_close(loss, expected)
    assert terms["dim_kl"].shape == (D,)
    for name in ("mi", "tc", "dim_kl", "saturation", "kl"):
        torch.testing.assert_close(terms[name], getattr(of_kl, name))


@pytest.mark.parametrize("estimator", ["uniform", "stratified", "mss", "mws", "loo"])
def test_beta_tcvae_of_unit_weights_is_the_elbo(estimator):
    """BetaTCVAE of unit weights is the ELBO, for a prior that is no product over dimensions too: the prior
    factorization is then not 0."""

    class Correlated:
        def __init__(self):
            covariance = torch.eye(D).double() + 0.3
            self.joint = torch.distributions.MultivariateNormal(torch.zeros(D).double(), covariance)

        def log_prob(self, z):
            return self.joint.log_prob(z)

        def marginal_log_prob(self, z):
            return torch.distributions.Normal(0.0, math.sqrt(1.3)).log_prob(z)

    prior = Correlated()
    (log_px_z, _, log_qz_x), context = hand(prior=prior)
    log_pz = prior.log_prob(context["z"])
    loss, terms = BetaTCVAE(dataset_size=100, estimator=estimator)(handed((log_px_z, log_pz, log_qz_x), context))
    torch.testing.assert_close(loss, -(log_px_z + log_pz - log_qz_x).mean())
    torch.testing.assert_close(terms["elbo"], -loss)
    assert terms["prior_factorization"].abs() > 0.01


# The aggregate posterior against the prior.


@pytest.mark.parametrize("divergence", ["mmd", "agg_kl"])
def test_infovae_weighs_kl_and_divergence(divergence):
    log_densities, context = hand()
    options = {"divergence": divergence, "dataset_size": 100 if divergence == "agg_kl" else None}
    loss, terms = InfoVAE(alpha=0.3, lambda_=5.0, **options)(handed(log_densities, context))
    kl = fastvae.kl_gauss(context["mu"], context["logvar"])
    torch.testing.assert_close(loss, terms["nell"] + 0.7 * kl + 4.3 * terms[divergence])
    loss, terms = InfoVAE(**options)(handed(log_densities, context))
    torch.testing.assert_close(loss, terms["nell"] + kl)


def test_infovaes_agg_kl_is_that_of_the_decomposition():
    log_densities, context = hand(prior=WithoutClosedForm())
    objective = InfoVAE(alpha=0.3, lambda_=5.0, divergence="agg_kl", dataset_size=100, estimator="mss")
    loss, terms = objective(handed(log_densities, context))
    of_kl = fastvae.kl_decomposition(
        context["z"][0, 0], context["mu"], context["logvar"], dataset_size=100, estimator="mss"
    )
    torch.testing.assert_close(terms["agg_kl"], of_kl.agg_kl)
    torch.testing.assert_close(loss, terms["nell"] + 0.7 * of_kl.mi + 5 * of_kl.agg_kl)  # as Zhao et al. write it


@pytest.mark.parametrize("bandwidth", [None, 0.7])
def test_mmd_is_its_formula(bandwidth):
    torch.manual_seed(0)
    z, y = (x.requires_grad_() for x in (torch.randn(B, D).double(), 2 * torch.randn(17, D).double() + 1))

    def formula(z, y):
        h2 = D if bandwidth is None else bandwidth**2
        zz, zy, yy = (torch.exp(-(torch.cdist(a, b) ** 2) / (2 * h2)) for a, b in ((z, z), (z, y), (y, y)))
        n, m = len(z), len(y)
        return (zz.sum() - n) / (n * (n - 1)) - 2 * zy.mean() + (yy.sum() - m) / (m * (m - 1))

    ours, expected = mmd(z, y, bandwidth), formula(z, y)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, (z, y)), torch.autograd.grad(expected, (z, y)))
    half = mmd(z.bfloat16(), y.bfloat16(), bandwidth)
    torch.testing.assert_close(half.double(), ours, rtol=0.05, atol=0)


def test_mmd_is_unbiased():
    """The MMD² of N(0, I) and N((a, ..., a), I): with h² = D, 2 (D / (D + 2))^(D/2) (1 − exp(−D a² / 2(D + 2))). The
    mean over 2,000 pairs is within 5 standard errors of it for both a: by chance not so for 12 seeds in 10^7."""
    torch.manual_seed(0)
    n, repeats = 8, 2000
    for a in (0.0, 1.0):
        z, y = torch.randn(2, repeats, n, D, dtype=torch.float64) + torch.tensor([a, 0.0]).view(2, 1, 1, 1)
        values = torch.stack([mmd(*pair) for pair in zip(z, y, strict=True)])
        overlap = (D / (D + 2)) ** (D / 2)
        expected = 2 * overlap * (1 - math.exp(-D * a * a / (2 * (D + 2))))
        assert abs(values.mean() - expected) < 5 * values.std() / math.sqrt(repeats)
        assert values.std() / math.sqrt(repeats) < 0.003


MMD_MEMORY = """
import resource, torch
from fastvae import mmd
z, y = torch.randn(2, 20_000, 2)
mmd(z[:99], y[:99])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mmd(z.requires_grad_(), y).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_mmd_forms_no_matrix():
    """20,000 samples against 20,000 are 1.5 GiB of kernel values; the reference's chunks are 64 MiB."""
    done = subprocess.run([sys.executable, "-c", MMD_MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300


# Several samples of each posterior.


class Given:
    """A prior whose samples are 3B rows, again and again; N(0, I) in all else."""

    def __init__(self, closed_form: bool):
        normal = StandardNormal(D)
        self.log_prob, self.marginal_log_prob = normal.log_prob, normal.marginal_log_prob
        if closed_form:
            self.kl = normal.kl
        self.rows = torch.randn(3 * B, D, generator=torch.Generator().manual_seed(1)).double()

    def sample(self, n):
        self.rows = self.rows.roll(-n, 0)
        return self.rows[-n:]


TCVAE = partial(BetaTCVAE, alpha=2.0, beta=3.0, dataset_size=100)
AGG_KL = partial(InfoVAE, alpha=0.5, lambda_=10.0, divergence="agg_kl", dataset_size=100)
AVERAGED: list[Any] = [
    partial(ELBO, beta=2.0, capacity=100.0),
    partial(InfoVAE, alpha=0.5, lambda_=10.0),
    *(partial(make, estimator=name) for make in (AGG_KL, TCVAE) for name in fastvae.estimators.ESTIMATORS),
]


@pytest.mark.parametrize(
    ("make", "closed_form"),
    [(partial(ELBO, free_bits=0.5), True), *((make, closed) for make in AVERAGED for closed in (True, False))],
)
def test_the_loss_of_k_samples_is_the_mean_of_k_losses(make, closed_form):
    """The loss, its terms and its gradients: a closed form is the same in each, the samples of an aggregate posterior
    know their own columns, and those of one posterior are in different sets of the mmd."""
    log_densities, context = hand(3, 1, Given(closed_form))
    results = []
    for objective, samples in ((make(k=3), [slice(3)]), (make(), [slice(i, i + 1) for i in range(3)])):
        parts = []
        for some in samples:
            loss, terms = objective(handed([x[some] for x in log_densities], {**context, "z": context["z"][some]}))
            gradients = torch.autograd.grad(loss, (context["mu"], context["logvar"]), retain_graph=True)
            parts.append((loss, *gradients, *(terms[name] for name in terms if name != "saturation")))
        results.append([torch.stack(part).mean(0) for part in zip(*parts, strict=True)])
    torch.testing.assert_close(*results)


def test_the_variance_of_nell_falls_as_one_over_k():
    """Given x, Nell in a linear-Gaussian model is a constant and a sum of scaled noncentral chi-squares, whose
    cumulants are known: its mean, its variance, which falls as 1/k, and the spread of the variance of R of them. None
    of six statistics is off by 5 standard errors: by chance one would be for 4 seeds in 10^6."""
    model, R = LinearGaussian(7, D), 1000
    x = model.draw(B)
    mu, logvar = (y + off for y, off in zip(model.posterior(x), (0.1, 1.0), strict=True))
    squares = model.W.detach().square().sum(0)
    nearest = (x - model.b.detach()) @ model.W.detach() / squares  # of all z, where log p(x|z) is largest
    scale, shift = logvar.exp() * squares / (2 * model.s2), (mu - nearest).square() / logvar.exp()  # [B, D]

    def cumulant(n: int, k: int) -> torch.Tensor:
        """Of the mean over k·B terms scale · (eps + sqrt(shift))², each summed over D."""
        return 2 ** (n - 1) * math.factorial(n - 1) * (scale**n * (1 + n * shift)).sum() * k / (k * B) ** n

    torch.manual_seed(0)
    for k in (1, 4, 16):
        vae = VAE(lambda x: (mu, logvar), model.decode, likelihood=Gaussian(model.s2), objective=ELBO(k=k))
        with torch.no_grad():
            outputs = [vae(x) for _ in range(R)]
        nell, variance = torch.stack([out.nell for out in outputs]), cumulant(2, k)
        mean = cumulant(1, k) - model.log_px_z(x, nearest).mean()
        spread = (cumulant(4, k) / R + 2 * variance**2 / (R - 1)).sqrt()
        assert abs(nell.mean() - mean) < 5 * (variance / R).sqrt()
        assert abs(nell.var() - variance) < 5 * spread
        assert spread < variance / 20
        (kl,) = {float(out.kl) for out in outputs}
        assert kl == pytest.approx(float(fastvae.kl_gauss(mu, logvar)), rel=1e-14)


@pytest.mark.parametrize("make", [ELBO, InfoVAE, AGG_KL, TCVAE])
def test_k_samples_are_decoded_at_once(make):
    """Samples and Nell are those of IWAE of one sample inside the logarithm."""
    vae, x, outputs, decoded = make_vae(make(k=4)), torch.randn(B, 7).double(), [], []
    vae.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output.shape))
    for objective in (vae.objective, IWAE(1, 4)):
        vae.objective = objective
        torch.manual_seed(1)
        outputs.append(vae(x))
    assert torch.equal(outputs[0].z, outputs[1].z)
    assert torch.equal(outputs[0].nell, outputs[1].nell)
    assert outputs[0].z.shape == (4, B, D)
    assert decoded == [(4 * B, 7)] * 2


# On a VAE.

OBJECTIVES: dict[str, Any] = {
    "elbo": ELBO(beta=lambda step: (step / 9).clamp(max=1)),
    "free bits": ELBO(free_bits=0.2, groups=(2, 3)),
    "capacity": ELBO(beta=5.0, capacity=lambda step: (0.1 * step).clamp(max=3)),
    "iwae": IWAE(4, 2),
    "stl": IWAE(4, 2, "stl"),
    "dreg": IWAE(4, 2, "dreg"),
    "beta-tcvae": BetaTCVAE(beta=lambda step: (step / 9).clamp(max=2), dataset_size=256),
    "beta-tcvae uniform": BetaTCVAE(beta=6, estimator="uniform"),
    "mmd": InfoVAE(alpha=0.5, lambda_=10.0),
    "agg_kl": InfoVAE(alpha=0.5, lambda_=10.0, divergence="agg_kl", dataset_size=256),
    "elbo, k": ELBO(k=3),
    "beta-tcvae, k": BetaTCVAE(beta=2.0, dataset_size=256, k=3),
    "mmd, k": InfoVAE(alpha=0.5, lambda_=10.0, k=3),
}


class Encoder(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.linear = nn.Linear(n, 2 * D)

    def forward(self, x):
        return self.linear(x).chunk(2, dim=1)


def make_vae(objective: Any, n: int = 7) -> VAE:
    torch.manual_seed(0)
    return VAE(Encoder(n), nn.Linear(D, n), likelihood="gaussian", learned=True, objective=objective).double()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_a_vae_compiled_and_not(name):
    """An objective on a VAE, not compiled and compiled to one graph for all sizes of a batch and all steps."""
    vae = make_vae(OBJECTIVES[name])
    compiled = torch.compile(vae, fullgraph=True, backend="aot_eager", dynamic=True)
    for step, B in ((4, 31), (5, 12)):
        x, results = torch.randn(B, 7).double(), []
        for model in (vae, compiled):
            vae.zero_grad()
            torch.manual_seed(2)
            with torch._dynamo.config.patch(error_on_recompile=step == 5):
                out = model(x, step=torch.tensor(step))
            out.loss.backward()
            gradients: list[Any] = [p.grad for p in vae.parameters()]
            results.append((out.loss.detach(), out.z, out.terms, [g.clone() for g in gradients]))
        assert all(g.abs().max() > 0 for g in results[0][3])
        assert {"nell", "kl", "elbo"} <= set(results[0][2])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_autocast_and_evaluation_without_gradients(name):
    vae = make_vae(OBJECTIVES[name]).float()
    x = torch.randn(B, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vae(x)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    with torch.inference_mode():
        assert vae.eval()(x).loss.isfinite()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_learns(name):
    """The loss that a VAE minimizes for 200 steps falls on the data, and so does what it costs to name them."""
    model = LinearGaussian(7, 3)
    x = model.draw(256)
    vae = make_vae(OBJECTIVES[name])
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.02)
    before = vae.log_likelihood(x, 200).log_px.mean()
    for _ in range(200):
        optimizer.zero_grad()
        vae(x).loss.backward()
        optimizer.step()
        vae.advance()
    after = vae.log_likelihood(x, 200).log_px.mean()
    assert after > before + 5
    assert after < model.log_px(x).mean() + 1  # 256 examples are few, so that it may fit them better than the truth


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_a_further_term_on_the_samples_keeps_its_gradient(gradient):
    """A further term on z keeps its gradient: VAE gives as z another tensor than the objective hooks."""
    vae = make_vae(IWAE(8, gradient=gradient))
    x = torch.randn(B, 7).double()
    gradients = []
    for weights in ((1, 0), (0, 1), (1, 1)):
        torch.manual_seed(1)
        out = vae(x)
        loss = weights[0] * out.loss + weights[1] * fastvae.agg_entropy(out.z, out.mu, out.logvar)
        gradients.append(torch.autograd.grad(loss, list(vae.encoder.parameters())))
    for a, b, both in zip(*gradients, strict=True):
        torch.testing.assert_close(a + b, both)


def test_with_the_exact_posterior_every_objective_of_unit_weights_is_log_px():
    model = LinearGaussian(6, D)
    x = model.draw(B)
    likelihood = Gaussian(model.s2)
    for objective in (
        ELBO(),
        ELBO(k=3),
        IWAE(1),
        IWAE(8, gradient="iwae"),
        IWAE(8, 3, "stl"),
        IWAE(8, 3, "dreg"),
        BetaTCVAE(dataset_size=1000),
        BetaTCVAE(dataset_size=1000, k=3),
        InfoVAE(),
        InfoVAE(divergence="agg_kl", estimator="uniform"),
    ):
        prior = WithoutClosedForm()  # the closed form is log p(x) only in the mean over z
        vae = VAE(model.posterior, model.decode, likelihood=likelihood, prior=prior, objective=objective)
        torch.testing.assert_close(-vae(x).loss, model.log_px(x).mean(), rtol=0, atol=1e-10)


# Errors.


class PlainKL(WithoutClosedForm):
    def kl(self, mu, logvar):
        return fastvae.kl_gauss(mu, logvar)


class DeafKL(WithoutClosedForm):
    def kl(self, mu, logvar, **options):
        return fastvae.kl_gauss(mu, logvar)


# What cannot learn from one example, as a last batch may be.
LAST: list[Any] = [
    BetaTCVAE(dataset_size=100),
    BetaTCVAE(dataset_size=100, estimator="mss"),
    BetaTCVAE(estimator="loo"),
    InfoVAE(),
    InfoVAE(divergence="agg_kl", dataset_size=100),
    *(make(k=3) for make in (InfoVAE, AGG_KL, TCVAE)),
]

BAD: list[tuple[Any, ...]] = [
    (lambda: ELBO(beta=-0.1), ValueError, "beta"),
    (lambda: ELBO(beta=math.nan), ValueError, "beta"),
    (lambda: ELBO(beta=wrong("1")), TypeError, "beta"),
    (lambda: ELBO(beta=wrong(None)), TypeError, "beta"),
    (lambda: ELBO(beta=math.inf), ValueError, "beta: .*finite"),
    (lambda: ELBO(beta=10**400), ValueError, "beta"),
    (lambda: ELBO(beta=wrong(torch.ones(1))), TypeError, "beta"),
    (lambda: ELBO(beta=wrong(torch.tensor(1.0, requires_grad=True))), TypeError, "beta"),
    (lambda: ELBO(beta=wrong(lambda step: None))(handed(*hand())), TypeError, "beta"),
    (lambda: ELBO(beta=lambda step: math.nan)(handed(*hand())), ValueError, "beta"),
    (lambda: ELBO(capacity=lambda step: torch.ones(2))(handed(*hand())), ValueError, r"capacity: .*\(2,\)"),
    (lambda: handed(hand()[0], {**hand()[1], "z": hand()[1]["z"][:, :, :0]}), ValueError, "z: .*B > 0"),
    (lambda: handed(hand()[0], {**hand()[1], "z": hand()[1]["z"][0]}), ValueError, r"z: expected \[k, m, B, D\]"),
    *((lambda o=o: make_vae(o)(torch.zeros(0, 7).double()), ValueError, "x: .*one example") for o in (ELBO(), IWAE(2))),
    (lambda: ELBO()(handed([wrong(3.0), *hand()[0][1:]], hand()[1])), TypeError, "log_px_z"),
    (lambda: handed([*hand()[0][:2], torch.zeros(1, 1, 3).double()], hand()[1]), ValueError, "log_qz_x"),
    (lambda: ELBO()(Draws(**hand()[1], log_px_z=lambda z: z[..., :2].sum(-1, True))), ValueError, "log_px_z"),
    (lambda: IWAE(1)(Draws(**hand()[1], log_px_z=lambda z: z.sum(-1))), RuntimeError, "objective: .*'log_qz_x'"),
    (lambda: ELBO(free_bits=-1.0), ValueError, "free_bits"),
    (lambda: ELBO(capacity=wrong(dict)), TypeError, "capacity: .*got type"),
    (lambda: ELBO(free_bits=math.inf), ValueError, "free_bits: .*finite"),
    (lambda: ELBO(free_bits=wrong(lambda step: 1.0)), TypeError, "free_bits"),
    (lambda: ELBO(groups=(2, 3)), ValueError, "free_bits: .*groups"),
    (lambda: ELBO(free_bits=1.0, groups=wrong(2)), TypeError, "groups"),
    (lambda: ELBO(free_bits=1.0, groups=(2, 0)), ValueError, "groups"),
    (lambda: ELBO(free_bits=1.0, groups=()), ValueError, "groups"),
    (lambda: ELBO(capacity=-1.0), ValueError, "capacity"),
    (lambda: ELBO(capacity=math.inf), ValueError, "capacity: .*finite"),
    *((lambda make=make: make(k=0), ValueError, "k: .*at least 1, got 0") for make in (ELBO, InfoVAE, TCVAE)),
    *((lambda k=k: ELBO(k=k), TypeError, "k: .*integer") for k in (2.5, True, "4")),
    (lambda: InfoVAE(k=wrong(2.5)), TypeError, "k"),
    (lambda: TCVAE(k=wrong("4")), TypeError, "k"),
    (lambda: IWAE(0), ValueError, "m"),
    (lambda: IWAE(wrong(2.0)), TypeError, "m"),
    (lambda: IWAE(2, 0), ValueError, "k"),
    (lambda: IWAE(2, gradient="sticking"), ValueError, "gradient: .*'stl'"),
    (lambda: BetaTCVAE(alpha=-1), ValueError, "alpha"),
    (lambda: BetaTCVAE(gamma=wrong("1")), TypeError, "gamma"),
    (lambda: BetaTCVAE(beta=math.inf), ValueError, "beta: .*finite"),
    (lambda: BetaTCVAE(estimator="mss"), ValueError, "dataset_size"),
    (lambda: BetaTCVAE(estimator="mxs"), ValueError, "estimator"),
    (lambda: BetaTCVAE(dataset_size=0), ValueError, "dataset_size"),
    (lambda: BetaTCVAE(dataset_size=wrong(1.5)), TypeError, "dataset_size"),
    (lambda: InfoVAE(alpha=1.1), ValueError, "alpha"),
    (lambda: InfoVAE(alpha=-math.inf), ValueError, "alpha: .*finite"),
    (lambda: InfoVAE(lambda_=math.inf), ValueError, "lambda_: .*finite"),
    (lambda: InfoVAE(lambda_=-0.1), ValueError, "lambda_"),
    (lambda: InfoVAE(divergence="kl"), ValueError, "divergence: .*'agg_kl'"),
    (lambda: InfoVAE(bandwidth=0.0), ValueError, "bandwidth"),
    (lambda: InfoVAE(divergence="agg_kl", bandwidth=1.0), ValueError, "bandwidth: .*'agg_kl'"),
    (lambda: InfoVAE(dataset_size=100), ValueError, "dataset_size: .*'mmd'"),
    (lambda: InfoVAE(divergence="agg_kl", estimator="mws"), ValueError, "dataset_size"),
    (lambda: mmd(torch.zeros(1, 3), torch.zeros(4, 3)), ValueError, "z"),
    (lambda: mmd(torch.zeros(4, 3), torch.zeros(4, 2)), ValueError, "y: .*3.*2"),
    (lambda: mmd(torch.zeros(4, 3), torch.zeros(4, 3).long()), TypeError, "y"),
    (lambda: mmd(torch.zeros(4, 3), torch.zeros(4, 3), -1.0), ValueError, "bandwidth"),
    (lambda: make_vae(ELBO(free_bits=0.1, groups=(2, 2)))(torch.zeros(2, 7).double()), ValueError, "groups: .*5"),
    (lambda: ELBO(free_bits=0.1)(handed(*hand(prior=WithoutClosedForm()))), ValueError, "free_bits: .*With"),
    (lambda: ELBO(free_bits=0.1)(handed(*hand(prior=PlainKL()))), TypeError, "prior: .*reduction.*PlainKL"),
    (
        lambda: ELBO(free_bits=0.1)(handed(*hand(prior=DeafKL()))),
        ValueError,
        r"prior: .*\(5,\).*\(\) from Deaf",
    ),
    *((lambda o=o: make_vae(o)(torch.zeros(1, 7).double()), ValueError, ".*batch of.*drop_last=True") for o in LAST),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
