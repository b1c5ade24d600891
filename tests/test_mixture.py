"""GaussianMixture: step for step against scikit-learn, where float32 cancels, and on data that degenerate."""

import math
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import NATIVE, computing_on
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture as Peer
from torch import Tensor

from bench.harness import peak_extra_bytes
from fastvae import GaussianMixture, em, entropy, kl_discrete


class Start(NamedTuple):
    weights: Tensor  # [K]
    means: Tensor  # [K, D]
    variances: Tensor  # [K, D]


def clusters(S=400, D=3, K=4, seed=0, distance=2.0):
    """Points of K overlapping Gaussians, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")

    centres, widths = distance * normal(K, D), (0.3 * normal(K, D)).exp()
    label = torch.randint(K, (S,), generator=generator, device="cpu")
    return (centres[label] + widths[label] * normal(S, D)).to(torch.get_default_device())


def global_start(x, K):
    """The first K points, with the variance of all."""
    x = x.double()
    return Start(torch.full((K,), 1 / K, dtype=torch.float64), x[:K].clone(), x.var(0).expand(K, -1).clone())


def fit(x, start, **options):
    options = {"tol": 0, "reg_covar": 0, **options}
    return GaussianMixture(len(start.weights), init=tuple(start), **options).fit(x)


def peer(x, start, **options):
    weights, means, variances = (s.cpu().numpy() for s in start)
    given = {"weights_init": weights, "means_init": means, "precisions_init": 1 / variances}
    options = {"tol": 0, "reg_covar": 0, **given, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged
        return Peer(len(weights), covariance_type="diag", **options).fit(x.cpu().numpy())


def assert_same_parameters(ours, theirs, tolerance=1e-8):
    for got, expected in (
        (ours.weights_, theirs.weights_),
        (ours.means_, theirs.means_),
        (ours.variances_, theirs.covariances_),
        (ours.lower_bounds_, theirs.lower_bounds_),
    ):
        got = got.cpu().numpy() if isinstance(got, Tensor) else got
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


# Against scikit-learn


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_backend_steps_as_scikit_learn_does(backend, steps):
    x = clusters(S=97)
    start = global_start(x, 3)
    assert_same_parameters(fit(x, start, max_iter=steps), peer(x, start, max_iter=steps))


@pytest.mark.parametrize(("S", "D", "K"), [(50, 1, 2), (1271, 2, 5), (507, 33, 7), (9000, 16, 3)])
def test_a_hundred_steps_of_scikit_learn(S, D, K):
    x = clusters(S, D, K, seed=S)
    start = global_start(x, K)
    for steps in (1, 3, 10, 30, 100):
        ours, theirs = fit(x, start, max_iter=steps), peer(x, start, max_iter=steps)
        assert_same_parameters(ours, theirs)
        assert ours.n_iter_ == steps
        assert ours.lower_bound_ == ours.lower_bounds_[-1]


def test_reg_covar_is_added():
    x = clusters()
    start = global_start(x, 4)
    assert_same_parameters(
        fit(x, start, max_iter=9, reg_covar=0.3), peer(x, start, max_iter=9, reg_covar=0.3), tolerance=1e-8
    )


def test_what_is_asked_of_a_fitted_mixture_is_what_scikit_learn_says():
    x, new = clusters(), clusters(S=150, seed=1)
    start = global_start(x, 4)
    ours, theirs = fit(x, start, tol=1e-4), peer(x, start, tol=1e-4)
    assert ours.converged_ == theirs.converged_ is True
    assert ours.n_iter_ == theirs.n_iter_
    points = new.numpy()
    torch.testing.assert_close(ours.score_samples(new), torch.from_numpy(theirs.score_samples(points)))
    torch.testing.assert_close(ours.predict_proba(new), torch.from_numpy(theirs.predict_proba(points)))
    assert ours.predict(new).tolist() == theirs.predict(points).tolist()
    assert ours.score(new) == pytest.approx(theirs.score(points), abs=1e-10)
    assert ours.bic(new) == pytest.approx(theirs.bic(points), rel=1e-10)
    assert ours.aic(new) == pytest.approx(theirs.aic(points), rel=1e-10)
    again = GaussianMixture(4, init=tuple(start), tol=1e-4, reg_covar=0).fit_predict(x)
    assert again.tolist() == theirs.predict(x.numpy()).tolist()


# Where float32 cancels


def far_from_zero(K):
    """Mean 1e4, spread 1e-2: E[x²] − E[x]² loses every digit; clusters that overlap."""
    return 1e4 + 1e-2 * clusters(2000, 3, K, distance=1.5)


def far_apart(K):
    """Clusters of spread 1e-2 at distances of 1e4."""
    noise = 1e-2 * torch.randn(2000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (1e4 * (torch.arange(2000) % K) - 5e3)[:, None] + noise


def beside_a_far_bulk(K):
    """A cluster of spread 1e-5 near 0, and others of spread 1 at 1e4."""
    narrow, wide = 1e-5 * clusters(500, 3, 1), 1e4 + clusters(2000, 3, K - 1)
    return torch.cat((narrow[:1], wide, narrow[1:]))


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
@pytest.mark.parametrize(
    ("points", "K"), [(far_from_zero, 1), (far_from_zero, 3), (far_apart, 2), (far_apart, 5), (beside_a_far_bulk, 3)]
)
def test_float32_keeps_variances_where_the_difference_of_moments_cancels(points, K, steps):
    x = points(K)
    narrow, start = x.float(), global_start(x.float(), K)
    if points is beside_a_far_bulk:  # the variance of all, 1e7, would make three components of one for long
        start.variances.fill_(1.0)
    single, double = fit(narrow, start, max_iter=steps), fit(narrow.double(), start, max_iter=steps)
    assert (single.variances_ > 0).all()
    torch.testing.assert_close(single.variances_, double.variances_, rtol=1e-2, atol=0)
    moved = (single.means_ - double.means_).abs() / double.variances_.sqrt()
    assert moved.max() < 0.02
    assert single.lower_bound_ == pytest.approx(double.lower_bound_, abs=1e-2)
    if (points, K, steps) == (far_apart, 2, 40):  # they are separated: the points before rounding say the same
        exact = fit(x, start, max_iter=steps)
        torch.testing.assert_close(single.variances_, exact.variances_, rtol=1e-2, atol=0)
        assert exact.variances_.max() < 2e-4


def test_the_differences_alone_would_fail_here(monkeypatch):
    """The two clusters give negative variances without sums about the new means: the test above can fail."""
    x = far_apart(2).float()
    monkeypatch.setattr(em, "CANCELLED", -math.inf)
    monkeypatch.setattr(em, "MISPLACED", math.inf)
    start = global_start(x, 2)
    with pytest.raises(ValueError, match=r"^reg_covar: "):
        fit(x, start, max_iter=40)


@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 6),
    st.floats(0.1, 8.0),
    st.sampled_from((torch.float64, torch.float32)),
    st.sampled_from((0.0, 3.0, 1000.0)),
)
def test_the_likelihood_never_falls(seed, K, D, distance, dtype, offset):
    x = (offset + clusters(40 * K, D, K, seed, distance)).to(dtype)
    mixture = GaussianMixture(K, init="random", tol=0, max_iter=25, reg_covar=0, seed=seed)
    try:
        mixture.fit(x)
    except ValueError as error:  # a component shrank onto one point, where the likelihood has no maximum
        assume(not str(error).startswith("reg_covar: "))
        raise
    assume(mixture.n_reseeded_ == 0)
    trace = torch.tensor(mixture.lower_bounds_, dtype=torch.float64)
    largest = max(mixture.score_samples(x).abs().mean().item(), D)
    assert (trace.diff() >= -8 * torch.finfo(dtype).eps * largest).all()
    assert trace[-1] >= trace[0]


# Complete and incomplete data


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 5), st.floats(0.01, 20.0))
def test_log_likelihood_is_bound_plus_kl(seed, K, D, sharpness):
    """log p(x) = E_q log p(x, z) − E_q log q(z) + KL(q ‖ p(z|x)) for any q (Basics VAE, eq. 7)."""
    x = clusters(60, D, K, seed)
    mixture = fit(x, global_start(x, K), max_iter=2, reg_covar=1e-3)
    generator = torch.Generator().manual_seed(seed)
    q = (sharpness * torch.randn(60, K, dtype=torch.float64, generator=generator)).softmax(1)
    posterior = mixture.predict_proba(x)
    gap = kl_discrete(q, posterior).mean().item()
    assert mixture.score(x) == pytest.approx(mixture.elbo(x, q) + gap, rel=1e-9, abs=1e-9)
    assert mixture.elbo(x, q) == pytest.approx(mixture.complete_log_likelihood(x, q) + entropy(q).mean().item())
    assert mixture.elbo(x, q) <= mixture.score(x) + 1e-9
    assert mixture.elbo(x, posterior) == pytest.approx(mixture.score(x), rel=1e-9, abs=1e-9)


def test_the_complete_likelihood_has_its_log_weights():
    x = torch.tensor([[0.0], [3.0]])
    start = Start(torch.tensor([0.9, 0.1]), torch.tensor([[0.0], [3.0]]), torch.ones(2, 1))
    mixture = GaussianMixture(2)
    mixture._keep(em.Mixture(*(s.double() for s in start)), [0.0], torch.float32)
    hard = torch.eye(2)  # each point from the component that it is at
    expected = -0.5 * math.log(2 * math.pi) + 0.5 * (math.log(0.9) + math.log(0.1))
    assert mixture.complete_log_likelihood(x, hard) == pytest.approx(expected, abs=1e-6)
    with_posterior = mixture.complete_log_likelihood(x)
    assert with_posterior == pytest.approx(mixture.complete_log_likelihood(x, mixture.predict_proba(x)), abs=1e-6)


def test_a_hard_assignment_to_a_component_without_weight():
    x = torch.zeros(1, 1)
    mixture = GaussianMixture(2)
    parameters = (torch.tensor([1.0, 0.0]), torch.zeros(2, 1), torch.ones(2, 1))
    mixture._keep(em.Mixture(*(p.double() for p in parameters)), [0.0], torch.float32)
    assert mixture.elbo(x, torch.tensor([[1.0, 0.0]])) == pytest.approx(mixture.score(x), abs=1e-6)
    assert mixture.elbo(x, torch.tensor([[0.5, 0.5]])) == -math.inf


# Starts, and data that degenerate


def test_kmeans_plus_plus_finds_clusters_that_are_far_apart():
    x = far_apart(5)
    for seed in range(5):
        seeds, variances = em.seed_components(x, 5, torch.Generator().manual_seed(seed))
        assert sorted(((seeds[:, 0] + 5e3) / 1e4).round().tolist()) == [0, 1, 2, 3, 4]
        assert all((x == one).all(1).any() for one in seeds)
        assert ((variances > 1e-4 / 2) & (variances < 1e-3)).all()  # 1e-4, and the seeds' squared distances


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_a_seed_decides_and_more_starts_do_no_worse(init):
    x = clusters(K=6, distance=4.0).float()
    one, same = (GaussianMixture(6, init=init, seed=3).fit(x) for _ in range(2))
    assert torch.equal(one.means_, same.means_)
    assert one.lower_bounds_ == same.lower_bounds_
    several = GaussianMixture(6, init=init, seed=3, n_init=5).fit(x)
    assert several.lower_bound_ >= one.lower_bound_
    torch.manual_seed(0)
    drawn = GaussianMixture(6, init=init).fit(x)
    assert not torch.equal(drawn.means_, GaussianMixture(6, init=init).fit(x).means_)


def test_one_component_is_the_moments_of_the_points():
    x = clusters()
    mixture = GaussianMixture(reg_covar=0).fit(x)
    torch.testing.assert_close(mixture.means_[0], x.mean(0))
    torch.testing.assert_close(mixture.variances_[0], x.var(0, correction=0))
    assert mixture.weights_.tolist() == [1.0]
    assert mixture.converged_
    assert mixture.predict(x).unique().tolist() == [0]


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_one_point_repeated(K, value):
    x = torch.full((20, 2), value)
    mixture = GaussianMixture(K, seed=0).fit(x)
    torch.testing.assert_close(mixture.means_, torch.full((K, 2), value, dtype=torch.float64))
    torch.testing.assert_close(mixture.variances_, torch.full((K, 2), 1e-6, dtype=torch.float64))
    torch.testing.assert_close(mixture.weights_.sum(), torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^reg_covar: .* all the same in dimension 0, got 0"):
        GaussianMixture(K, reg_covar=0).fit(x)


def test_as_many_components_as_points():
    x = 10 * clusters(5, 2, 1)
    mixture = GaussianMixture(5, seed=0, max_iter=200, tol=0).fit(x)
    assert mixture.variances_.isfinite().all()
    assert mixture.score(x) > GaussianMixture(1).fit(x).score(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_component_without_points_is_started_again(dtype):
    x = clusters(K=2, distance=4.0).to(dtype)
    start = global_start(x, 3)
    start.means[2], start.variances[2] = 1e4, 1e-2
    mixture = fit(x, start, max_iter=60)
    assert mixture.n_reseeded_ >= 1
    for parameter in (mixture.weights_, mixture.means_, mixture.variances_):
        assert parameter.isfinite().all()
    assert mixture.weights_.min() > 0.5 / len(x)
    assert mixture.means_.abs().max() <= x.abs().max()


def test_errors_name_the_argument():
    x = clusters(S=10).float()
    start = global_start(x, 2)
    for call, error, name in (
        (lambda: GaussianMixture(0), ValueError, "n_components"),
        (lambda: GaussianMixture(2.0), TypeError, "n_components"),
        (lambda: GaussianMixture(2, tol=-1), ValueError, "tol"),
        (lambda: GaussianMixture(2, reg_covar=-1), ValueError, "reg_covar"),
        (lambda: GaussianMixture(2, max_iter=0), ValueError, "max_iter"),
        (lambda: GaussianMixture(2, init="kmeans"), ValueError, "init"),
        (lambda: GaussianMixture(3, init=tuple(start)), ValueError, "init"),
        (lambda: GaussianMixture(2, init=(start.weights, start.means)), TypeError, "init"),
        (lambda: GaussianMixture(2, init=(start.weights, start.means, -start.variances)), ValueError, "init"),
        (lambda: GaussianMixture(2, init=(2 * start.weights, *start[1:])), ValueError, "init"),
        (lambda: GaussianMixture(2, init=tuple(start)).fit(x[:, :2]), ValueError, "init"),
        (lambda: GaussianMixture(11).fit(x), ValueError, "x: expected at least 11 points"),
        (lambda: GaussianMixture(2).fit(x[0]), ValueError, "x"),
        (lambda: GaussianMixture(2).fit(x.numpy()), TypeError, "x"),
        (lambda: GaussianMixture(2).fit(x.where(x < x.max(), math.nan)), ValueError, "x: expected finite"),
        (lambda: GaussianMixture(2).fit(x.where(x < x.max(), math.inf)), ValueError, "x: expected finite"),
        (lambda: GaussianMixture(2).partial_fit(x.where(x < x.max(), math.nan)), ValueError, "x: expected finite"),
        (lambda: GaussianMixture(2).fit(x).score(x[:, :2]), ValueError, "x"),
        (lambda: GaussianMixture(2).fit(x).complete_log_likelihood(x, torch.ones(10, 3) / 3), ValueError, "q"),
        (lambda: GaussianMixture(2).fit(x).sample(0), ValueError, "n_samples"),
        (lambda: GaussianMixture(2).predict(x), RuntimeError, "fit"),
    ):
        with pytest.raises(error, match=f"^{name}"):
            call()


# Batches, samples, and the rest of torch


def test_partial_fit_mixes_the_sufficient_statistics():
    """Against sums of r, r x and r x² mixed as Cappé & Moulines write it."""
    batches = clusters(S=300).split(100)
    start = global_start(batches[0], 3)
    mixture = GaussianMixture(3, init=tuple(start), reg_covar=0)
    weights, means, variances = start
    statistics = [weights, weights[:, None] * means, weights[:, None] * (variances + means**2)]
    for t, x in enumerate(batches, 1):
        log_joint = weights.log() - 0.5 * (
            (x[:, None] - means) ** 2 / variances + variances.log() + math.log(2 * math.pi)
        ).sum(-1)
        r = log_joint.softmax(1)
        gamma = (t + 1) ** -0.6
        batch = (r.mean(0), r.T @ x / len(x), r.T @ x**2 / len(x))
        statistics = [(1 - gamma) * old + gamma * new for old, new in zip(statistics, batch, strict=True)]
        weights, means = statistics[0], statistics[1] / statistics[0][:, None]
        variances = statistics[2] / statistics[0][:, None] - means**2
        mixture.partial_fit(x)
        torch.testing.assert_close(mixture.weights_, weights)
        torch.testing.assert_close(mixture.means_, means)
        torch.testing.assert_close(mixture.variances_, variances)
        assert mixture.lower_bounds_[-1] == pytest.approx(log_joint.logsumexp(1).mean().item())
    assert mixture.n_batches_ == 3


def test_partial_fit_gets_near_fit():
    x = clusters(S=20_000, K=4, distance=3.0).float()
    start = global_start(x, 4)
    whole, stream = fit(x, start, tol=1e-4), GaussianMixture(4, init=tuple(start))
    for batch in x.split(200):
        stream.partial_fit(batch)
    single = GaussianMixture(1).fit(x).score(x)
    assert stream.score(x) > whole.score(x) - 0.1 * (whole.score(x) - single)
    assert stream.partial_fit(x[:1]).weights_.isfinite().all()


def test_partial_fit_leaves_a_component_without_points_as_it_was():
    x = clusters(K=1)
    start = global_start(x, 2)
    start.means[1] = 1e5
    mixture = GaussianMixture(2, init=tuple(start)).partial_fit(x)
    torch.testing.assert_close(mixture.means_[1], start.means[1])
    torch.testing.assert_close(mixture.variances_[1], start.variances[1])
    assert 0 < mixture.weights_[1] < 0.5


def test_samples_are_from_the_mixture():
    x = clusters(K=3, distance=4.0).float()
    mixture = GaussianMixture(3, seed=0, n_init=3).fit(x)
    points, labels = mixture.sample(20_000, seed=1)
    assert points.dtype == torch.float32
    again, _ = mixture.sample(20_000, seed=1)
    assert torch.equal(points, again)
    for k in range(3):
        mine = points[labels == k].double()
        error = (mixture.variances_[k] / len(mine)).sqrt()
        assert ((mine.mean(0) - mixture.means_[k]).abs() < 5 * error).all()
        torch.testing.assert_close(mine.var(0), mixture.variances_[k], rtol=0.15, atol=0)
    torch.testing.assert_close(labels.bincount(minlength=3) / 20_000.0, mixture.weights_.float(), rtol=0, atol=0.02)
    assert mixture.score(points) == pytest.approx(mixture.score(x), abs=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype):
    x = clusters().to(dtype)
    start = global_start(x, 3)
    half, single = fit(x, start, max_iter=5), fit(x.float(), start, max_iter=5)
    torch.testing.assert_close(half.variances_, single.variances_)
    assert half.score_samples(x).dtype == torch.float32


def test_gradients_and_inference_mode_do_not_matter():
    x = clusters().float()
    start = global_start(x, 3)
    expected = fit(x, start, max_iter=5).means_
    assert torch.equal(fit(x.clone().requires_grad_(), start, max_iter=5).means_, expected)
    with torch.inference_mode():
        assert torch.equal(fit(x.clone(), start, max_iter=5).means_, expected)
        assert GaussianMixture(3, seed=0).fit(x.clone()).score_samples(x.clone()).shape == (400,)


def test_responsibilities_are_never_formed():
    S, K = 100_000, 400  # so that the bound, 16 MB, is far above what a process takes now and then
    x = clusters(S, 4, 3).float()
    start = global_start(x, K)
    with computing_on(NATIVE[next(iter(NATIVE))]):
        fit(x[:1000], global_start(x, 2), max_iter=1)
        peak = peak_extra_bytes(lambda: fit(x, start, max_iter=2, reg_covar=1e-3))
    assert peak < S * K * 4 / 10
