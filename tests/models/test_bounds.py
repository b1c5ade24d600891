"""The ladder of bounds against log p(x) of a linear-Gaussian model, and the mean of the gradients by each name."""

import itertools
import math
from typing import Any

import pytest
import torch
from support.helpers import wrong
from support.linear_gaussian import LinearGaussian
from torch import Tensor

import fastvae
from fastvae import effective_sample_size, elbo, iw_elbo, mc_iw_elbo
from fastvae.models.bounds import GRADIENTS

MODEL = LinearGaussian()
D = 3


def weights(x: Tensor, mu: Tensor, logvar: Tensor, shape: tuple[int, ...], gradient: str = "iwae", seed: int = 0):
    """(log p(x|z), log p(z), log q(z|x)) of samples of that shape and B, and their z."""
    samples = fastvae.reparameterize(mu, logvar, math.prod(shape), seed=seed)
    z = samples.view(*shape, *mu.shape)
    if gradient != "iwae":
        mu, logvar = mu.detach(), logvar.detach()
    zero = z.new_zeros(1)
    return [
        MODEL.log_px_z(x, z),
        fastvae.log_prob_gauss(z, zero, zero),
        fastvae.log_prob_gauss(z, mu, logvar),
    ], z


def wrong_posterior(x: Tensor) -> tuple[Tensor, Tensor]:
    """A posterior off in place, and too wide: with half the variance of p(z|x) the variance of its weights would be
    infinite."""
    mu, logvar = MODEL.posterior(x)
    return mu + torch.tensor([0.3, -0.2, 0.1]), logvar + torch.tensor([1.4, 1.0, 0.7])


# Values.


def test_with_the_exact_posterior_every_sample_of_every_bound_is_log_px():
    x = MODEL.draw(31)
    log_px, posterior = MODEL.log_px(x), MODEL.posterior(x)
    for bound in (
        elbo(*weights(x, *posterior, ())[0]),
        elbo(*weights(x, *posterior, (5,))[0]),
        iw_elbo(*weights(x, *posterior, (7,))[0]),
        mc_iw_elbo(*weights(x, *posterior, (3, 4))[0]),
    ):
        torch.testing.assert_close(bound, log_px, rtol=0, atol=1e-10)


def test_the_axes_are_k_outside_and_m_inside():
    log_px_z, log_pz, log_qz_x = torch.randn(3, 2, 4, 5, dtype=torch.float64)  # k = 2, m = 4, B = 5
    w = (log_px_z + log_pz - log_qz_x).exp()
    torch.testing.assert_close(mc_iw_elbo(log_px_z, log_pz, log_qz_x), w.mean(1).log().mean(0))
    torch.testing.assert_close(iw_elbo(log_px_z[0], log_pz[0], log_qz_x[0]), w[0].mean(0).log())
    torch.testing.assert_close(elbo(log_px_z[0], log_pz[0], log_qz_x[0]), w[0].log().mean(0))
    torch.testing.assert_close(elbo(log_px_z[0, 0], log_pz[0, 0], log_qz_x[0, 0]), w[0, 0].log())


@pytest.mark.parametrize("m", [1, 3, 32])
def test_twice_the_samples_inside_are_never_below_two_bounds_averaged(m):
    """MC_2-IW_m <= IW_2m for every sample, so that E IW_m <= E IW_2m."""
    x = MODEL.draw(507)
    terms, _ = weights(x, *wrong_posterior(x), (2, m))
    averaged, inside = mc_iw_elbo(*terms), iw_elbo(*(t.flatten(0, 1) for t in terms))
    assert (averaged <= inside + 1e-12).all()
    assert (averaged < inside - 1e-3).any()


def test_the_ladder_climbs_to_log_px():
    """The mean over 20,000 bounds of one example climbs to log p(x). Each comparison with log p(x) allows 5 standard
    errors: at most 6 in 10^7 seeds would fail one, and the seed is fixed."""
    x = MODEL.draw(1).expand(20_000, -1)
    mu, logvar = wrong_posterior(x)
    log_px = MODEL.log_px(x[:1]).item()

    def mean(bound: Tensor) -> tuple[float, float]:
        return bound.mean().item(), 5 * bound.std().item() / math.sqrt(len(bound))

    value, error = mean(elbo(*weights(x, mu, logvar, (4,))[0]))
    gap = fastvae.kl_gauss(mu, logvar, *MODEL.posterior(x)).item()  # ELBO = log p(x) − KL(q ‖ p(z|x))
    assert value == pytest.approx(log_px - gap, abs=error)
    assert error < 0.05 * gap
    gaps = [gap]
    for m in (2, 8, 32, 128):
        value, error = mean(iw_elbo(*weights(x, mu, logvar, (m,))[0]))
        assert value < log_px + error
        gaps.append(log_px - value)
    assert all(high > 1.5 * low for high, low in itertools.pairwise(gaps)), gaps
    assert gaps[-1] < 0.02 * gap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_accumulates_in_float32(dtype):
    terms = torch.randn(3, 2, 64, 5).to(dtype)
    bound = mc_iw_elbo(*terms)
    assert bound.dtype == torch.float32
    torch.testing.assert_close(bound, mc_iw_elbo(*terms.double()).float(), rtol=0, atol=1e-5)


# Gradients.


def phi_gradients(gradient: str, m: int, posterior: tuple[Tensor, Tensor], x: Tensor, seed: int) -> Tensor:
    """The bound's gradient with respect to (mu, logvar) of each example, [B, 2 D]."""
    mu, logvar = (p.detach().requires_grad_() for p in posterior)
    terms, z = weights(x, mu, logvar, (m,), gradient, seed)
    bound = iw_elbo(*terms, z=z, gradient=gradient)
    return torch.cat(torch.autograd.grad(bound.sum(), (mu, logvar)), 1)


@pytest.fixture(scope="module")
def estimates() -> dict[tuple[str, int], Tensor]:
    """40,000 gradients of the bound of one example, [40,000, 2 D], for each name and m; no two share noise."""
    x = MODEL.draw(1).expand(40_000, -1)
    cases = [(name, m) for name in GRADIENTS for m in (1, 8, 64)]
    return {case: phi_gradients(*case, wrong_posterior(x), x, seed) for seed, case in enumerate(cases)}


def z_scores(a: Tensor, b: Tensor | float) -> Tensor:
    """The differences of the means, in standard errors."""
    variance = a.var(0) / len(a) + (b.var(0) / len(b) if isinstance(b, Tensor) else 0)
    return ((a.mean(0) - (b.mean(0) if isinstance(b, Tensor) else b)) / variance.sqrt()).abs()


# Equal means differ by 5 standard errors in one of the 6 components in fewer than 4 of 10^6 seeds.
SAME = 5.0


@pytest.mark.parametrize("m", [1, 8, 64])
def test_iwae_and_dreg_agree_in_the_mean(estimates, m):
    iwae, dreg = estimates["iwae", m], estimates["dreg", m]
    assert (z_scores(iwae, dreg) < SAME).all()
    assert z_scores(dreg, 0.0).min() > 4 * SAME  # there is a gradient to agree about


def test_stl_agrees_for_one_sample_and_is_biased_for_several(estimates):
    assert (z_scores(estimates["iwae", 1], estimates["stl", 1]) < SAME).all()
    for m in (8, 64):
        assert (z_scores(estimates["dreg", m], estimates["stl", m]) > 4 * SAME).all()


def test_the_signal_to_noise_of_dreg_grows_and_that_of_iwae_falls(estimates):
    """The ratio of signal to noise goes like sqrt(m) for DReG and 1/sqrt(m) for IWAE, by 2.8 from m = 8 to 64
    (Rainforth et al. 2018, Tucker et al. 2019)."""

    def ratio(name: str, m: int) -> Tensor:
        return estimates[name, m].mean(0).norm() / estimates[name, m].std(0).norm()

    assert ratio("dreg", 64) > 2 * ratio("dreg", 8)
    assert ratio("iwae", 64) < ratio("iwae", 8) / 2


def test_the_mean_at_one_sample_is_the_derivative_of_the_elbo(estimates):
    x = MODEL.draw(1)
    mu, logvar = (p.requires_grad_() for p in wrong_posterior(x))
    gap = fastvae.kl_gauss(mu, logvar, *MODEL.posterior(x))
    expected = -torch.cat(torch.autograd.grad(gap, (mu, logvar)), 1)[0]
    for gradient in GRADIENTS:
        g = estimates[gradient, 1]
        assert (z_scores(g - expected, 0.0) < SAME).all()


def test_dreg_is_its_formula():
    x = MODEL.draw(31)
    mu, logvar = (p.requires_grad_() for p in wrong_posterior(x))
    (log_px_z, log_pz, log_qz_x), z = weights(x, mu, logvar, (8,), "dreg")
    log_w = log_px_z + log_pz - log_qz_x
    w = log_w.detach().softmax(0)
    (through_z,) = torch.autograd.grad((w**2 * log_w).sum(), z, retain_graph=True)
    expected = torch.autograd.grad(z, (mu, logvar), through_z, retain_graph=True)
    theta = torch.autograd.grad((w * log_w).sum(), (MODEL.W, MODEL.b), retain_graph=True)
    bound = iw_elbo(log_px_z, log_pz, log_qz_x, z=z, gradient="dreg")
    for _ in range(2):  # and again, on the same graph
        ours = torch.autograd.grad(bound.sum(), (mu, logvar, MODEL.W, MODEL.b), retain_graph=True)
        torch.testing.assert_close(ours, (*expected, *theta))


def test_the_name_changes_neither_the_value_nor_the_decoders_gradient():
    x = MODEL.draw(31)
    mu, logvar = (p.requires_grad_() for p in wrong_posterior(x))
    results = []
    for gradient in GRADIENTS:
        terms, z = weights(x, mu, logvar, (2, 8), gradient)
        bound = mc_iw_elbo(*terms, z=z, gradient=gradient)
        results.append((bound, *torch.autograd.grad(bound.mean(), (MODEL.W, MODEL.b))))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_with_the_exact_posterior_stl_and_dreg_have_no_noise():
    x = MODEL.draw(31)
    for gradient, silent in (("iwae", False), ("stl", True), ("dreg", True)):
        noise = phi_gradients(gradient, 8, MODEL.posterior(x), x, seed=0).abs()
        assert (noise.max() < 1e-10) == silent


def test_a_term_that_takes_the_sample_from_before_the_alias_keeps_its_gradient():
    x = MODEL.draw(31)
    mu, logvar = (p.requires_grad_() for p in wrong_posterior(x))

    def gradients(with_bound: float, with_other: float) -> tuple[Tensor, ...]:
        sample = fastvae.reparameterize(mu, logvar, 8, seed=0)
        z = sample.view_as(sample)
        zero = torch.zeros(1, dtype=torch.float64)
        log_q = fastvae.log_prob_gauss(z, mu.detach(), logvar.detach())
        terms = MODEL.log_px_z(x, z), fastvae.log_prob_gauss(z, zero, zero), log_q
        bound = iw_elbo(*terms, z=z, gradient="dreg").mean()
        other = fastvae.agg_entropy(sample, mu, logvar)
        return torch.autograd.grad(with_bound * bound + with_other * other, (mu, logvar))

    both = [a + b for a, b in zip(gradients(1, 0), gradients(0, 1), strict=True)]
    torch.testing.assert_close(list(gradients(1, 1)), both)


def test_a_hook_on_a_copy_of_z_makes_stl_of_dreg():
    """A widespread mistake, as the module's docstring says: no error, as it cannot be seen."""
    x = MODEL.draw(5)
    gradients = []
    for gradient, copy in (("dreg", True), ("stl", False), ("dreg", False)):
        mu, logvar = (p.requires_grad_() for p in wrong_posterior(x))
        terms, z = weights(x, mu, logvar, (8,), gradient)
        bound = iw_elbo(*terms, z=torch.cat(list(z.split(1))) if copy else z, gradient=gradient)
        gradients.append(torch.cat(torch.autograd.grad(bound.sum(), (mu, logvar))))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert (gradients[0] - gradients[2]).abs().max() > 0.1


def test_a_second_bound_of_the_same_z_is_refused():
    x = MODEL.draw(5)
    mu, logvar = (p.requires_grad_() for p in wrong_posterior(x))
    terms, z = weights(x, mu, logvar, (4,), "dreg")
    iw_elbo(*terms, z=z, gradient="dreg")
    for alias in (z.view_as(z), z[None]):
        assert mc_iw_elbo(*(t[None] for t in terms), z=alias.view(1, 4, 5, D), gradient="dreg").isfinite().all()
    with pytest.raises(ValueError, match=r"^z: expected an alias for this bound alone"):
        iw_elbo(*terms, z=z, gradient="dreg")


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_row_without_weight_has_no_gradient_and_spoils_no_other(gradient):
    x = MODEL.draw(3)
    results = []
    for dead in (0, 1):
        mu, logvar = (p.requires_grad_() for p in wrong_posterior(x))
        (log_px_z, log_pz, log_qz_x), z = weights(x, mu, logvar, (4,), gradient)
        impossible = torch.zeros(4, 3, dtype=torch.bool)
        impossible[:, 0] = bool(dead)
        impossible[1, 2] = True  # one of several
        log_px_z = log_px_z.masked_fill(impossible, -math.inf)
        bound = iw_elbo(log_px_z, log_pz, log_qz_x, z=z, gradient=gradient)
        assert bound.isfinite().tolist() == [not dead, True, True]
        results.append(torch.autograd.grad(bound, (mu, logvar), torch.ones(3).double()))
    for alive, dead in zip(*results, strict=True):
        assert (dead[0] == 0).all()
        torch.testing.assert_close(dead[1:], alive[1:], rtol=0, atol=0)


def test_nothing_is_hooked_where_no_gradient_is_wanted():
    x = MODEL.draw(5)
    mu, logvar = (p.requires_grad_() for p in wrong_posterior(x))
    with torch.no_grad():
        terms, z = weights(x, mu, logvar, (4,), "dreg")
    assert iw_elbo(*terms, z=z, gradient="dreg").isfinite().all()  # z wants no gradient, W and b do
    z = z.clone().requires_grad_()
    with torch.no_grad():
        iw_elbo(*terms, z=z, gradient="dreg")
    (gradient,) = torch.autograd.grad(z.sum(), z)
    torch.testing.assert_close(gradient, torch.ones_like(z))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_factor_of_a_half_precision_z_is_applied_in_float32(dtype):
    z = torch.randn(4, 5, D).to(dtype).requires_grad_()
    factor = torch.randn(4, 5, D)

    def gradient(z: Tensor) -> Tensor:
        log_w = (z.float() * factor).sum(-1)
        zero = torch.zeros_like(log_w)
        return torch.autograd.grad(iw_elbo(log_w, zero, zero, z=z, gradient="dreg").sum(), z)[0]

    half, exact = gradient(z), gradient(z.detach().float().requires_grad_())
    assert half.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(half.float(), exact, rtol=eps, atol=1e-7)  # two roundings: of w · factor, of w² · factor


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_compiles_to_one_graph(gradient):
    x = MODEL.draw(31)
    W, b = MODEL.W.detach(), MODEL.b.detach()

    def loss(mu: Tensor, logvar: Tensor, W: Tensor) -> Tensor:
        samples = fastvae.reparameterize(mu, logvar, 8, seed=3)
        z = samples.view_as(samples)
        zero = torch.zeros(1, dtype=torch.float64)
        q = (mu, logvar) if gradient == "iwae" else (mu.detach(), logvar.detach())
        log_px_z = -0.5 * ((x - z @ W.T - b) ** 2).sum(-1)
        terms = (log_px_z, fastvae.log_prob_gauss(z, zero, zero), fastvae.log_prob_gauss(z, *q))
        return iw_elbo(*terms, z=z, gradient=gradient).mean() + fastvae.agg_entropy(samples, mu, logvar)

    inputs = [p.requires_grad_() for p in (*wrong_posterior(x), W)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)


# The effective sample size.


def test_effective_sample_size():
    log_w = torch.tensor(
        [[0.0, -1e4, -math.inf, math.log(3.0)], [0.0, 0.0, -math.inf, 0.0], [0.0, -math.inf, -math.inf, -math.inf]]
    )
    expected = torch.tensor([3.0, 1.0, 0.0, 16 / 10])
    torch.testing.assert_close(effective_sample_size(log_w, dim=0), expected)
    torch.testing.assert_close(effective_sample_size(log_w.T + 500), expected)
    assert effective_sample_size(log_w.half()).dtype == torch.float32
    w = torch.randn(7, 31, dtype=torch.float64).exp()
    torch.testing.assert_close(effective_sample_size(w.log()), w.sum(-1) ** 2 / (w**2).sum(-1))


# Errors.

OK = torch.zeros(4, 5)
BAD: list[tuple[Any, ...]] = [
    (lambda: iw_elbo(wrong(1.0), OK, OK), TypeError, "log_px_z"),
    (lambda: iw_elbo(OK, OK.long(), OK), TypeError, "log_pz"),
    (lambda: iw_elbo(OK, OK, OK[:3]), ValueError, "log_qz_x"),
    (lambda: iw_elbo(OK, OK, OK.to("meta")), ValueError, "log_qz_x"),
    (lambda: iw_elbo(OK[0], OK[0], OK[0]), ValueError, r"log_px_z: .*\[m, B\].*\(5,\)"),
    (lambda: mc_iw_elbo(OK, OK, OK), ValueError, r"log_px_z: .*\[k, m, B\]"),
    (lambda: elbo(OK[None], OK[None], OK[None]), ValueError, r"log_px_z: .*\[B\] or \[k, B\]"),
    (lambda: iw_elbo(OK[:0], OK[:0], OK[:0]), ValueError, "log_px_z: .*at least one"),
    (lambda: iw_elbo(OK, OK, OK, gradient="rws"), ValueError, "gradient: .*'dreg'.*'rws'"),
    (lambda: iw_elbo(OK, OK, OK, gradient="dreg"), ValueError, "z: .*None"),
    (lambda: iw_elbo(OK, OK, OK, z=wrong(3), gradient="dreg"), TypeError, "z"),
    (lambda: iw_elbo(OK, OK, OK, z=OK, gradient="dreg"), ValueError, r"z: expected \[4, 5, D\].*\(4, 5\)"),
    (lambda: effective_sample_size(wrong([0.0])), TypeError, "log_w"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
