"""The estimators' weights, the entropy they give, and the invariants of the aggregate posterior."""

import math

import pytest
import scipy.stats
import torch
from conftest import Target
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    LOG_2PI,
    SEARCH_MARGIN,
    Expected,
    Named,
    aggregate,
    assert_accurate,
    cast,
    cross,
    draw,
    evaluate,
    log_weights,
    needing_gradients,
    samples,
)
from torch import Tensor

import fastvae
from fastvae import ColumnWeights
from fastvae.aggregate.estimators import ESTIMATORS

NORMALIZED = ("uniform", "stratified", "mss", "loo")


def weight_matrix(estimator: str, B: int, N: int) -> Tensor:
    """w_ij for own(i) = i, from the table in fastvae/aggregate/estimators.py."""
    M, i = B - 1, torch.arange(B)
    own, following, other = {
        "uniform": (1 / B, 1 / B, 1 / B),
        "stratified": (1 / N, (N - 1) / (N * max(M, 1)), (N - 1) / (N * max(M, 1))),
        "mss": (1 / N, (N - M) / (N * max(M, 1)), 1 / max(M, 1)),
        "mws": (1 / (B * N),) * 3,
        "loo": (0.0, 1 / max(M, 1), 1 / max(M, 1)),
    }[estimator]
    w = torch.full((B, B), other, dtype=torch.float64)
    w[i, (i + 1) % B] = following
    w[i, i] = own
    return w


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("B", "N"), [(1, 1), (2, 2), (2, 9), (3, 3), (7, 60), (7, 7)])
def test_weights(estimator: str, B: int, N: int) -> None:
    own = torch.arange(B)
    if estimator == "loo" and B == 1:
        pytest.skip("an error: below")
    weights = fastvae.estimator_weights(estimator=estimator, n_columns=B, dataset_size=N, own=own)
    torch.testing.assert_close(log_weights(None, weights, B, B).exp(), weight_matrix(estimator, B, N))


def test_default_estimator() -> None:
    own = torch.arange(7)
    default, uniform = (fastvae.estimator_weights(estimator=name, n_columns=7) for name in (None, "uniform"))
    assert default == uniform
    default, stratified = (
        fastvae.estimator_weights(estimator=name, n_columns=7, dataset_size=60, own=own)
        for name in (None, "stratified")
    )
    assert default[2:] == stratified[2:]
    assert default.log_w == stratified.log_w


@pytest.mark.parametrize("dataset_size", [None, 1, 60])
def test_one_posterior_cannot_be_left_out(dataset_size: int | None) -> None:
    own = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^estimator: 'loo' .*batch of one.*expected at least 2.*drop_last=True"):
        fastvae.estimator_weights(estimator="loo", n_columns=1, dataset_size=dataset_size, own=own)
    with pytest.raises(ValueError, match=r"^own: expected"):
        fastvae.estimator_weights(estimator="loo", n_columns=7)


def test_equal_widths_in_one_dimension_are_a_kernel_density_estimate(backend: Target) -> None:
    mu, z, sigma = draw(97, 1, seed=1), draw(31, 1, seed=2), 0.4
    estimate = scipy.stats.gaussian_kde(mu[:, 0].numpy(force=True), bw_method=sigma / mu.std().item())
    density = fastvae.agg_log_prob(z, mu, torch.full_like(mu, 2 * math.log(sigma))).exp()
    torch.testing.assert_close(density.cpu(), torch.from_numpy(estimate(z[:, 0].numpy(force=True))))


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "loo"])
def test_entropy_of_one_posterior_is_the_gaussians_own(backend: Target, estimator: str) -> None:
    mu, logvar, S = draw(1, 3, seed=1), draw(1, 3, seed=2), 100_000
    z = fastvae.reparameterize(mu, logvar, S, seed=1)
    entropy = fastvae.agg_entropy(z, mu, logvar, estimator=estimator, dataset_size=1)
    exact = 0.5 * (LOG_2PI + 1 + logvar).sum()
    assert abs(entropy - exact) < 4 * math.sqrt(3 / 2 / S)


# agg_entropy


@pytest.mark.parametrize("estimator", [None, *ESTIMATORS])
@pytest.mark.parametrize("shape", ["[B, D]", "[L, B, D]", "[S, D]"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy(backend: Target, shape: str, estimator: str | None, dtype: torch.dtype) -> None:
    B, N, L = 11, 60, 1 if shape == "[B, D]" else 3
    S = 20 if shape == "[S, D]" else L * B
    own = torch.arange(S) % B
    matrix = weight_matrix(estimator or "stratified", B, N)[own].log()

    def fast(z: Tensor, **x: Tensor) -> Tensor:
        given = own if shape == "[S, D]" else None
        z = z.reshape(L, B, -1) if shape == "[L, B, D]" else z
        return fastvae.agg_entropy(z, **x, dataset_size=N, estimator=estimator, own=given)

    def formula(**x: Tensor) -> Tensor:
        return -torch.logsumexp(matrix.to(x["z"]) + cross(**x), 1).mean()

    assert_accurate(fast, formula, samples(S, B, 5, dtype), ("z", "mu"))


@pytest.mark.parametrize("estimator", ["uniform", "mws"])
def test_entropy_without_own_columns(backend: Target, estimator: str) -> None:
    """Estimators that weigh all columns alike need not know where a sample came from."""
    inputs = samples(20, 11, 5, torch.float64)
    log_w = -math.log(11 if estimator == "uniform" else 11 * 60)
    assert_accurate(
        lambda **x: fastvae.agg_entropy(**x, dataset_size=60, estimator=estimator),
        lambda **x: -aggregate(**x, weights=ColumnWeights(log_w))[0].mean(),
        inputs,
        ("z", "mu"),
    )


# Invariants

batches = st.tuples(st.integers(2, 30), st.integers(1, 12), st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 2**20))


def terms(inputs: Named, estimator: str, N: int) -> list[Tensor]:
    """(log q(z_i | x_i), joint, marginals) with own(i) = i"""
    B = len(inputs["mu"])
    weights = fastvae.estimator_weights(estimator=estimator, n_columns=B, dataset_size=N, own=torch.arange(B))
    return [fastvae.log_prob_gauss(**inputs), *fastvae.agg_log_prob_marginals(**inputs, weights=weights)]


def expected_terms(inputs: Named, estimator: str, N: int) -> Expected:
    B = len(inputs["mu"])
    matrix = weight_matrix(estimator, B, N).log()

    def formula(**x: Tensor) -> list[Tensor]:
        pairs = x["z"][:, None] - x["mu"]
        pairs = -0.5 * (pairs**2 * torch.exp(-x["logvar"]) + x["logvar"] + LOG_2PI)  # [B, B, D]
        log_w = matrix.to(pairs)
        joint = torch.logsumexp(log_w + pairs.sum(-1), 1)
        return [pairs.sum(-1).diagonal(), joint, torch.logsumexp(log_w[..., None] + pairs, 1)]

    return Expected(formula, {n: x.detach() for n, x in inputs.items()}, ("z", "mu"), margin=SEARCH_MARGIN)


@given(batch=batches, dtype=st.sampled_from(DTYPES))
def test_uniform_mi_never_exceeds_log_b(
    backend: Target, batch: tuple[int, int, float, int], dtype: torch.dtype
) -> None:
    B, D, scale, seed = batch
    inputs = {n: x.detach() for n, x in samples(B, B, D, dtype, scale, seed).items()}
    slack = max(t.max().item() for t in expected_terms(inputs, "uniform", B).tolerance[:2])
    conditional, joint, _ = terms(inputs, "uniform", B)
    assert (conditional - joint).max().item() <= math.log(B) + 2 * slack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_identical_posteriors_show_the_row_sums(backend: Target, estimator: str, dtype: torch.dtype) -> None:
    """q(z) = N(0, I) then: MI = TC = KL_d = 0 for weights that sum to one, and log N off for mws."""
    B, D, N = 31, 7, 60
    zeros = torch.zeros(B, D, dtype=dtype)
    inputs = {"z": draw(B, D).to(dtype), "mu": zeros, "logvar": zeros}
    expected = expected_terms(inputs, estimator, N)
    prior = -0.5 * (LOG_2PI + inputs["z"].double() ** 2)
    row_sum = 0.0 if estimator in NORMALIZED else -math.log(N)
    torch.testing.assert_close(expected.exact, [prior.sum(-1), prior.sum(-1) + row_sum, prior + row_sum])
    conditional, joint, marginals = terms(inputs, estimator, N)
    weights = fastvae.estimator_weights(estimator=estimator, n_columns=B, dataset_size=N, own=torch.arange(B))
    for log_qz in (joint, fastvae.agg_log_prob(**inputs, weights=weights)):
        expected.check([conditional, log_qz, marginals])


@given(batch=batches, estimator=st.sampled_from(ESTIMATORS), dtype=st.sampled_from(DTYPES))
def test_order_does_not_matter(
    backend: Target, batch: tuple[int, int, float, int], estimator: str, dtype: torch.dtype
) -> None:
    """Permuting the batch (but for mss, which looks at the next column) or the dimensions permutes the answer."""
    B, D, scale, seed = batch
    inputs = {n: x.detach() for n, x in samples(B, B, D, dtype, scale, seed).items()}
    expected = expected_terms(inputs, estimator, 60)
    rows = torch.arange(B) if estimator == "mss" else draw(B, seed=seed).argsort()
    dims = draw(D, seed=seed + 1).argsort()
    conditional, joint, marginals = terms({n: x[rows][:, dims] for n, x in inputs.items()}, estimator, 60)
    back, forth = rows.argsort(), dims.argsort()
    expected.check([conditional[back], joint[back], marginals[back][:, forth]])


@given(batch=batches, estimator=st.sampled_from(ESTIMATORS), shift=st.integers(-(2**12), 2**12))
def test_shifting_everything_changes_nothing(
    backend: Target, batch: tuple[int, int, float, int], estimator: str, shift: int
) -> None:
    """A shift of z and mu changes no term; on a grid on which it is exact in float32."""
    B, D, _, seed = batch
    inputs = {n: (x.detach() * 64).round() / 64 for n, x in samples(B, B, D, torch.float32, 1.0, seed).items()}
    expected = expected_terms(inputs, estimator, 60)
    shifted = {n: x if n == "logvar" else x + shift for n, x in inputs.items()}
    assert all(torch.equal(shifted[n] - shift, inputs[n]) for n in ("z", "mu"))
    expected.check(terms(shifted, estimator, 60))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_reach_all_inputs_in_every_dtype(backend: Target, estimator: str) -> None:
    inputs = needing_gradients(cast(samples(11, 11, 5, torch.float64), torch.bfloat16))
    entropy, *gradients = evaluate(lambda **x: fastvae.agg_entropy(**x, estimator=estimator, dataset_size=60), inputs)
    assert entropy.dtype == torch.float32
    for gradient in gradients:
        assert gradient.dtype == torch.bfloat16
        assert (gradient != 0).any()
        assert gradient.isfinite().all()
