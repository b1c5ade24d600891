"""GaussianMixture: step for step against scikit-learn, where float32 cancels, and on data that degenerate."""

import itertools
import math
import warnings
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import NATIVE, computing_on
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture as Peer
from support.helpers import wrong
from torch import Tensor

from bench.harness import peak_extra_bytes
from fastvae import GaussianMixture, entropy, kl_discrete
from fastvae.mixtures import em


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
        seeds = em.seeds_far_apart(x, 5, torch.Generator().manual_seed(seed))
        assert sorted(((seeds[:, 0] + 5e3) / 1e4).round().tolist()) == [0, 1, 2, 3, 4]
        assert all((x == one).all(1).any() for one in seeds)
        variances = em.variance_within(x, seeds)
        assert ((variances > 1e-4 / 2) & (variances < 1e-3)).all()  # 1e-4, and the seeds' squared distances


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e30])
@pytest.mark.parametrize("seeds", [em.seeds_far_apart, em.seeds_anywhere])
def test_no_seed_comes_twice_as_long_as_there_are_other_points(seeds, scale):
    """No seed comes twice while there are other points, at scales too whose squares are no float32."""
    values = scale * torch.arange(1.0, 6.0)[:, None]
    x = values[[0] * 40 + [1, 2, 3, 4] + [0] * 40]
    for K in (5, 7):
        got = seeds(x, K, torch.Generator().manual_seed(0))
        assert got.shape == (K, 1)
        assert sorted(set(got[:, 0].tolist())) == values[:, 0].double().tolist()


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


@pytest.mark.filterwarnings("ignore:n_components")
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


def distinct_values(U, S, D, seed):
    """S points of U values, each at least 1 from the next, all of which come."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.stack([torch.randperm(U, generator=generator) for _ in range(D)], 1).double()
    return values[torch.cat((torch.arange(U), torch.randint(U, (S - U,), generator=generator)))]


@pytest.mark.filterwarnings("ignore:n_components", "ignore:max_iter")
@pytest.mark.parametrize("init", ["kmeans++", "random"])
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 3), st.sampled_from((torch.float64, torch.float32)))
def test_a_component_for_each_distinct_point_fits_best(init, seed, U, D, dtype):
    """The likelihood, with variances of reg_covar and up, has its maximum where each point has a component of that
    width, with the share of all that are there as its weight."""
    x = distinct_values(U, U + 8, D, seed).to(dtype)
    shares = x.unique(dim=0, return_counts=True)[1].double() / len(x)
    best = (shares * shares.log()).sum().item() - D / 2 * math.log(2 * math.pi * 1e-6)
    fits = [GaussianMixture(K, init=init, seed=seed, tol=1e-6).fit(x) for K in range(1, U + 4)]
    for fitted in fits[U - 1 :]:
        assert fitted.lower_bound_ == pytest.approx(best, abs=1e-4)
        assert fitted.score(x) == pytest.approx(best, abs=1e-4)
    assert all(fitted.lower_bound_ <= best + 1e-4 for fitted in fits)
    assert all(fitted.lower_bound_ >= fits[0].lower_bound_ - 1e-4 for fitted in fits)


@pytest.mark.filterwarnings("ignore:n_components", "ignore:Number of distinct clusters")
@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_more_components_never_fit_worse_than_fewer(init):
    """Fits are never worse with more components, up to the number of distinct points and beyond, where scikit-learn is
    followed."""
    x = distinct_values(9, 17, 2, seed=0)
    ours = [GaussianMixture(K, init=init, seed=0, n_init=20).fit(x).lower_bound_ for K in range(1, 13)]
    assert all(more >= fewer - 1e-3 for fewer, more in itertools.pairwise(ours))
    theirs = [Peer(K, covariance_type="diag", random_state=0, n_init=20).fit(x.numpy()).lower_bound_ for K in (9, 10)]
    assert ours[8:10] == pytest.approx(theirs, abs=1e-3)


def test_fewer_distinct_points_than_components_are_warned_of():
    x = distinct_values(9, 17, 2, seed=0)
    start = global_start(torch.arange(20.0)[:, None].expand(20, 2), 10)
    for call in (
        lambda: GaussianMixture(10, n_init=3).fit(x),
        lambda: GaussianMixture(10, init="random").fit_predict(x),
        lambda: GaussianMixture(10, init=tuple(start)).fit(x),
        lambda: GaussianMixture(10).partial_fit(x),
    ):
        with pytest.warns(UserWarning, match=r"^n_components: 10 components have only 9 distinct points") as caught:
            call()
        assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaussianMixture(9).fit(x).partial_fit(x[:1])


def test_a_fit_that_max_iter_ends_is_warned_of():
    x = clusters(K=6)
    for call in (
        lambda: GaussianMixture(6, max_iter=3, tol=1e-9, n_init=3).fit(x),
        lambda: GaussianMixture(6, max_iter=1).fit_predict(x),
    ):
        with pytest.warns(UserWarning, match=r"^max_iter: EM has not converged") as caught:
            call()
        assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not GaussianMixture(6, max_iter=3, tol=0).fit(x).converged_  # nothing else could have ended it
        assert GaussianMixture(6, max_iter=300).fit(x).converged_


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


def test_arguments_are_kept_as_given_and_used_as_python_numbers():
    x = clusters(S=50)
    start = [s.float() for s in global_start(x, 3)]
    given = {
        "n_components": np.int64(3),
        "tol": np.float32(0.5),
        "max_iter": np.int32(7),
        "n_init": np.uint8(2),
        "reg_covar": Fraction(1, 1024),
        "seed": np.int64(3),
        "init": start,
    }
    plain = {"n_components": 3, "tol": 0.5, "max_iter": 7, "n_init": 2, "reg_covar": 2**-10, "seed": 3, "init": start}
    assert all(getattr(GaussianMixture(**given), name) is value for name, value in given.items())
    for init, method in itertools.product((start, "kmeans++", "random"), ("fit", "partial_fit")):
        left, right = (getattr(GaussianMixture(**{**o, "init": init}), method)(x) for o in (given, plain))
        assert torch.equal(left.means_, right.means_)
        assert torch.equal(left.variances_, right.variances_)
    assert torch.equal(left.sample(np.int64(5), seed=np.int64(3))[0], left.sample(5, seed=3)[0])


BAD_OPTIONS = (
    ("n_components", 0, ValueError),
    ("n_components", 2.0, TypeError),
    ("n_components", None, TypeError),
    ("n_components", 2**70, ValueError),
    ("tol", -1, ValueError),
    ("tol", math.nan, ValueError),
    ("tol", math.inf, ValueError),
    ("tol", 10**400, ValueError),
    ("tol", "1", TypeError),
    ("reg_covar", -1, ValueError),
    ("reg_covar", math.inf, ValueError),
    ("reg_covar", math.nan, ValueError),
    ("reg_covar", 1j, TypeError),
    ("max_iter", 0, ValueError),
    ("max_iter", True, TypeError),
    ("n_init", 0, ValueError),
    ("seed", 2**64, ValueError),
    ("seed", 1.5, TypeError),
    ("init", "kmeans", ValueError),
    ("init", np.array(["kmeans++", "random"]), ValueError),
    ("init", None, ValueError),
)


@pytest.mark.parametrize("method", ["fit", "partial_fit", "fit_predict"])
@pytest.mark.parametrize(("name", "value", "error"), BAD_OPTIONS, ids=str)
def test_options_are_checked_when_they_are_used(name, value, error, method):
    mixture = GaussianMixture(**{"n_components": 2, name: value})
    with pytest.raises(error, match=rf"^{name}: expected"):
        getattr(mixture, method)(clusters(S=10))


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda s: s.masked_fill(s == s.flatten()[0], math.nan), ValueError),
        (lambda s: s.masked_fill(s == s.flatten()[0], math.inf), ValueError),
        (lambda s: s.masked_fill(s == s.flatten()[0], -math.inf), ValueError),
        (lambda s: s[:1], ValueError),
        (lambda s: s[None], ValueError),
        (lambda s: s.to(torch.complex128), TypeError),
        (lambda s: s.long(), TypeError),
        (lambda s: s.to_sparse(), TypeError),
        (lambda s: s.to("meta"), ValueError),
        (lambda s: s.numpy(), TypeError),
        (lambda s: None, TypeError),
    ],
)
def test_parameters_to_start_from_are_checked(part, spoil, error):
    x = clusters(S=10)
    start = list(global_start(x, 2))
    start[part] = spoil(start[part])
    with pytest.raises(error, match=r"^init: expected"):
        GaussianMixture(2, init=wrong(start)).fit(x)


def test_errors_name_the_argument():
    x = clusters(S=10).float()
    start = global_start(x, 2)
    fitted = GaussianMixture(2).fit(x)
    for call, error, name in (
        (lambda: fit(x, start._replace(variances=-start.variances)), ValueError, "init"),
        (lambda: fit(x, start._replace(weights=2 * start.weights)), ValueError, "init"),
        (lambda: GaussianMixture(2, init=start[:2]).fit(x), TypeError, "init"),
        (lambda: GaussianMixture(3, init=tuple(start)).fit(x), ValueError, "init"),
        (lambda: fit(x[:, :2], start), ValueError, "init"),
        (lambda: GaussianMixture(11).fit(x), ValueError, "x: expected at least 11 points"),
        (lambda: fitted.complete_log_likelihood(x, torch.ones(10, 3) / 3), ValueError, "q"),
        (lambda: fitted.complete_log_likelihood(x, torch.full((10, 2), math.nan)), ValueError, "q"),
        (lambda: fitted.elbo(x, torch.tensor([1.5, -0.5]).expand(10, 2)), ValueError, "q"),
        (lambda: fitted.elbo(x, wrong(None)), TypeError, "q"),
        (lambda: fitted.sample(0), ValueError, "n"),
        (lambda: fitted.sample(2**62), ValueError, "n"),
        (lambda: fitted.sample(5, seed=wrong("1")), TypeError, "seed"),
        (lambda: GaussianMixture(2).sample(), RuntimeError, "fit"),
        (lambda: GaussianMixture(2).bic(x), RuntimeError, "fit"),
    ):
        with pytest.raises(error, match=f"^{name}"):
            call()


ASKED = ("predict", "predict_proba", "score_samples", "score", "complete_log_likelihood", "bic", "aic")
BAD_POINTS = (
    (lambda x: x.where(x < x.max(), math.nan), ValueError),
    (lambda x: x.where(x < x.max(), math.inf), ValueError),
    (lambda x: x.where(x < x.max(), -math.inf), ValueError),
    (lambda x: x[0], ValueError),
    (lambda x: x[None], ValueError),
    (lambda x: x.to("meta"), ValueError),
    (lambda x: x.to(torch.complex64), TypeError),
    (lambda x: x.long(), TypeError),
    (lambda x: x.to_sparse(), TypeError),
    (lambda x: x.numpy(), TypeError),
    (lambda x: None, TypeError),
)


@pytest.mark.parametrize("method", ["fit", "partial_fit", "fit_predict", *ASKED, "elbo"])
@pytest.mark.parametrize(("spoil", "error"), BAD_POINTS)
def test_points_that_are_not_finite_or_none_at_all(method, spoil, error):
    """No method says which component NaN is from, or how likely it is."""
    x = clusters(S=10).float()
    mixture = GaussianMixture(2, seed=0)
    if "fit" not in method:
        mixture.fit(x)
    arguments = (torch.ones(10, 2) / 2,) if method == "elbo" else ()
    with pytest.raises(error, match=r"^x: expected"):
        getattr(mixture, method)(spoil(x), *arguments)


@pytest.mark.parametrize("method", ASKED)
def test_no_points(method):
    x = clusters(S=10).float()
    ask = getattr(GaussianMixture(2).fit(x), method)
    if method in ("predict", "predict_proba", "score_samples"):
        assert ask(x[:0]).shape == (0, *ask(x).shape[1:])
    else:
        with pytest.raises(ValueError, match=r"^x: expected at least 1 point, got 0"):
            ask(x[:0])


def test_points_that_are_too_far_out():
    """Points where log p(x) overflows its dtype: no component can be said to have made them."""
    x = clusters(S=10).float()
    mixture, far = GaussianMixture(2).fit(x), 1e30 * x
    assert mixture.score_samples(far).tolist() == [-math.inf] * 10
    for ask in (mixture.predict, mixture.predict_proba, mixture.complete_log_likelihood, mixture.partial_fit):
        with pytest.raises(ValueError, match=r"^x: expected points near enough"):
            ask(far)
    assert mixture.predict(far.double()).shape == (10,)
    with pytest.raises(ValueError, match=r"^x: expected points near enough"):
        fit(far, global_start(x, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [1e8, 1e15, 1e30, 1e150])
def test_a_start_that_is_too_far_out(far, dtype):
    """One step brings a component back from wherever it was."""
    x = clusters(S=10).to(dtype)
    start = Start(torch.ones(1), torch.full((1, 3), far, dtype=torch.float64), torch.ones(1, 3))
    mixture = fit(x, start, max_iter=1, reg_covar=0)
    torch.testing.assert_close(mixture.means_[0], x.double().mean(0))
    torch.testing.assert_close(mixture.variances_[0], x.double().var(0, correction=0))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e-25), (torch.float32, 1e20), (torch.float32, 1e37), (torch.float64, 1e140)]
)
def test_points_of_any_scale(dtype, scale):
    """A fit is the fit of the points at scale 1, scaled, though their squares overflow or underflow."""
    x = clusters(K=3, distance=6.0).to(dtype)
    ours = GaussianMixture(3, seed=0, reg_covar=0).fit(x * scale)
    plain = GaussianMixture(3, seed=0, reg_covar=0).fit(x)
    torch.testing.assert_close(ours.means_ / scale, plain.means_, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.variances_ / scale / scale, plain.variances_, rtol=1e-3, atol=1e-4)
    assert ours.predict(x * scale).tolist() == plain.predict(x).tolist()


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_points_whose_squares_overflow(method, init):
    for scale in (1e160, 1e308):
        with pytest.raises(ValueError, match=r"^x: expected points whose squared distances float64 can hold"):
            getattr(GaussianMixture(2, init=init), method)(scale * clusters(S=10).clamp(-1, 1))


# Batches, samples, and the rest of torch


def test_partial_fit_mixes_the_sufficient_statistics():
    """The sufficient statistics, against sums of r, r x and r x² mixed as Cappé & Moulines write it."""
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
