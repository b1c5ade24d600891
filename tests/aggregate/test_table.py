"""Marginals from a table: within the tolerance of the direct ones for every population, and gradients that are exactly
those of what was interpolated."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Target
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    HALVES,
    Expected,
    aggregate,
    assert_rounded_once,
    assert_same,
    draw,
    evaluate,
    needing_gradients,
    samples,
)
from torch import Tensor

import fastvae
from fastvae import ColumnWeights
from fastvae.aggregate.columns import InMemory
from fastvae.aggregate.table import WIDTH, tabulate
from fastvae.backends.contract import LogWeights
from fastvae.ops.interpolate import Interpolant, chebyshev, interpolate, interpolation


def tabulated(
    z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor | None = None, tol: float = 1e-6
) -> Interpolant | None:
    """The table, whatever it takes."""
    return tabulate(z, InMemory(mu, logvar, LogWeights(log_w)), tol, math.inf)


def assert_within(tol: float, z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor | None = None) -> float:
    """The table is right to `tol`, beside the rounding of inputs and results; the share of samples interpolated."""
    table = tabulated(z, mu, logvar, log_w, tol)
    if table is None:
        return 0.0
    got = interpolate(table, z)
    x = z.double().requires_grad_()
    exact = aggregate(x, mu.double(), logvar.double(), log_w)[1]
    (slope,) = torch.autograd.grad(exact.sum(), x)
    size = (x.abs() + mu.double().abs().amax(0)) * slope.abs() + exact.abs().clamp(min=1)
    rounding = 8 * torch.finfo(torch.float64).eps * size.detach()
    far = exact == -math.inf
    assert (got[far] == -math.inf).all()
    excess = ((got - exact).abs() - rounding)[~far]
    assert excess.max() < tol, f"{excess.max():.3g} off where {tol} is promised"
    return 1 - len(table.singles) / z.numel()


def log_uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return 10 ** (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64))


def population(seed: int, kind: str, own: str) -> tuple[Tensor, Tensor, Tensor]:
    """z [S, 1], mu, logvar [N, 1]"""
    g = torch.Generator().manual_seed(seed)
    N, S = int(log_uniform(g, 0, 2.5, 1)), int(log_uniform(g, 2, 3.2, 1))
    spread, sigma = log_uniform(g, -2, 2, 1), log_uniform(g, -3, 1, 1)
    mu = spread * torch.randn(N, generator=g, dtype=torch.float64)
    sigma = sigma * torch.exp(0.5 * torch.randn(N, generator=g, dtype=torch.float64))
    if kind == "spiky":
        sigma[: 1 + N // 20] *= log_uniform(g, -6, 0, 1 + N // 20)
    elif kind == "clustered":
        mu = mu / 100 + spread * torch.randint(5, (N,), generator=g)
    elif kind == "bimodal":
        mu = mu / 20 + spread * torch.randn(N, generator=g, dtype=torch.float64).sign()
    elif kind == "wide":
        sigma *= log_uniform(g, 0, 6, N)
    elif kind == "one point":
        mu, sigma = mu[:1].expand(N).clone(), sigma[:1].expand(N).clone()
    columns = torch.randint(N, (S,), generator=g)
    z = mu[columns] + sigma[columns] * torch.randn(S, generator=g, dtype=torch.float64)
    if own == "uniform":
        z = z.min() + (z.max() - z.min()) * torch.rand(S, generator=g, dtype=torch.float64)
    elif own == "far":
        z = z + torch.randn(S, generator=g, dtype=torch.float64) * 10 * z.std()
    elif own == "at one":
        z = mu[columns[0]] + sigma[columns[0]] * log_uniform(g, -1, 2, 1) * torch.linspace(-1, 1, S).double()
    return z[:, None], mu[:, None], 2 * sigma.log()[:, None]


KINDS = ("smooth", "spiky", "clustered", "bimodal", "wide", "one point")
PLACES = ("own", "uniform", "far", "at one")


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from(PLACES), st.sampled_from([1e-3, 1e-6, 1e-9]))
def test_the_promise(seed: int, kind: str, place: str, tol: float) -> None:
    assert_within(tol, *population(seed, kind, place))


@given(st.integers(0, 10**6), st.sampled_from(["smooth", "bimodal", "wide"]), st.floats(0, 30))
def test_the_promise_with_weights(seed: int, kind: str, size: float) -> None:
    z, mu, logvar = population(seed, kind, "own")
    log_w = size * draw(len(mu), seed=seed % 1000)
    log_w[::7] = -math.inf
    if len(mu) > 1:
        assert_within(1e-6, z, mu, logvar, log_w)


@pytest.mark.parametrize("tol", [1e-6, 1e-12])
def test_a_smooth_population_takes_few_points(tol: float) -> None:
    z, mu, logvar = (x.detach() for x in samples(15_000, 100, 2, torch.float64).values())
    assert assert_within(tol, z, mu, logvar) > 0.9
    table = tabulated(z, mu, logvar, tol=tol)
    assert table is not None
    assert len(table.points) < 2 * (700 if tol > 1e-9 else 2000)


def test_the_last_coefficients_tell() -> None:
    """The last coefficients of 16 points tell the error, on intervals no wider than they may be, for every kind of
    detail and kink."""
    g = torch.Generator().manual_seed(1)
    u, matrix = chebyshev(torch.zeros(()))
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    polynomials = torch.cos(torch.arange(16) * torch.arccos(x)[:, None])
    decay = torch.tensor([0.0] * 11 + [1 / 64, 1 / 16, 1 / 4, 1, 1], dtype=torch.float64)
    for n in (2, 3, 6):
        shape = (10_000, n, 1)
        sigma = 2 / WIDTH * torch.empty(shape, dtype=torch.float64).exponential_(2, generator=g).exp()
        sigma[:, 0] = 2 / WIDTH
        mu = 6 * torch.rand(shape, generator=g, dtype=torch.float64) - 3
        log_w = torch.randn(shape, generator=g, dtype=torch.float64) * 5 ** torch.randint(
            3, (10_000, 1, 1), generator=g
        )
        log_w[:, 0] -= 15 * torch.rand(10_000, 1, generator=g)

        def f(x: Tensor) -> Tensor:
            return torch.logsumexp(log_w - 0.5 * ((x - mu) / sigma) ** 2, 1)  # noqa: B023

        coefficients = f(u) @ matrix.T
        error = (f(x) - coefficients @ polynomials.T).abs().amax(1)
        told = (coefficients.abs() * decay).amax(1)
        accepted = told < 1e-6
        assert accepted.double().mean() > 0.2
        assert (error < 4 * told + 1e-13)[accepted].all()


def test_a_narrow_column_is_not_missed() -> None:
    """Nodes alone do not see it: sigma 1e-3 among 600 of sigma 1, and 200 of sigma 1e-6."""
    mu, logvar = draw(600, 1, seed=1), torch.zeros(600, 1, dtype=torch.float64)
    logvar[7] = 2 * math.log(1e-3)
    z = torch.cat((mu.repeat(3, 1) + draw(1800, 1, seed=2), mu[7] + 1e-3 * draw(500, 1, seed=3)))
    assert assert_within(1e-6, z, mu, logvar) > 0.7
    logvar[100:300] = 2 * math.log(1e-6)
    z = torch.cat((z, mu[100:300] + 1e-6 * draw(200, 1, seed=4)))
    assert_within(1e-6, z, mu, logvar)


def test_a_kink_between_far_columns() -> None:
    """f turns within 1e-4, though no sigma is below 1."""
    mu = torch.tensor([[-100.0], [100.0]], dtype=torch.float64)
    z = torch.cat((torch.linspace(-10, 10, 3000), 1e-3 * torch.linspace(-1, 1, 500), mu[:, 0] + 1))[:, None].double()
    assert_within(1e-6, z, mu, torch.zeros_like(mu))
    mu = mu / 10  # a valley of 50 nats, which is tabulated
    assert assert_within(1e-6, z / 10, mu, torch.zeros_like(mu)) > 0.9


@pytest.mark.parametrize("sigma", [1.0, 1e-5])
def test_one_point(sigma: float) -> None:
    """All samples, and all columns, at the same place."""
    mu = torch.full((50, 2), 3.0, dtype=torch.float64)
    assert assert_within(1e-9, mu[:1].expand(300, 2), mu, torch.full_like(mu, 2 * math.log(sigma))) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", [None, "stratified", "mss", "loo"])
def test_every_estimator(backend: Target, estimator: str | None, dtype: torch.dtype) -> None:
    if backend.slow and (estimator != "mss" or dtype == torch.float64):
        return
    S, N, D = (500, 7, 1) if backend.slow else (1271, 123, 3)
    inputs = samples(S, N, D, dtype)
    weights, own = None, torch.arange(S) % N
    if estimator is not None:
        weights = fastvae.estimator_weights(estimator=estimator, n_columns=N, dataset_size=9 * N, own=own)
    expected = Expected(lambda **x: aggregate(**x, weights=weights), inputs, ("z", "mu"))
    tol, logvar = 1e-6 if dtype == torch.float32 else 1e-8, inputs["logvar"].detach()
    got = evaluate(lambda **x: fastvae.agg_log_prob_marginals(**x, weights=weights, method="table", tol=tol), inputs)
    direct = evaluate(lambda **x: fastvae.agg_log_prob_marginals(**x, weights=weights, method="direct"), inputs)
    assert not torch.equal(got[1], direct[1])
    expected.tolerance[1] = expected.tolerance[1] + tol
    slope = 450 * tol * float((-0.5 * logvar).exp().max())  # Markov's inequality, of degree 15
    counts = S / N * 10  # samples for which a column's share may be wrong
    expected.tolerance[2:] = [t + slope * (1 if n == 0 else counts) for n, t in enumerate(expected.tolerance[2:])]
    expected.check(got)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_by_way_of_a_table_are_rounded_once(native: Target, dtype: torch.dtype) -> None:
    inputs = samples(1271, 123, 3, torch.float64) | needing_gradients({"log_w": draw(123)})

    def table(log_w: Tensor, **x: Any) -> tuple[Tensor, Tensor]:
        return fastvae.agg_log_prob_marginals(**x, weights=ColumnWeights(log_w), method="table")

    assert_rounded_once(table, inputs, dtype)


def test_gradients_are_those_of_the_interpolant() -> None:
    """The interpolant is made here once more: values at the table's points by the formula, and the polynomials through
    them by numpy."""
    inputs = samples(700, 61, 2, torch.float64)
    z, mu, logvar = (x.detach().requires_grad_() for x in inputs.values())
    log_w = draw(61, seed=9).requires_grad_()
    table = tabulated(z, mu, logvar, log_w)
    assert table is not None
    assert len(table.singles) > 0
    x = table.points.clone()
    x[len(x) - len(table.singles) :] = z.detach().reshape(-1)[table.singles]
    x.requires_grad_()
    normal = -0.5 * ((x[:, None] - mu.T[table.dims]) ** 2 * (-logvar.T[table.dims]).exp() + logvar.T[table.dims])
    values = torch.logsumexp(log_w + normal - 0.5 * math.log(2 * math.pi), 1)
    nodes, singles = values.split((len(values) - len(table.singles), len(table.singles)))
    u = np.polynomial.chebyshev.chebpts1(16)[::-1].copy()
    fit = torch.from_numpy(np.linalg.inv(np.polynomial.chebyshev.chebvander(u, 15)))
    coefficients = nodes.view(-1, 16) @ fit.T  # [P, 16]
    dims = table.dims[: len(nodes) : 16]
    inside = (z.detach()[None] >= table.left[:, None, None]) & (
        z.detach()[None] < (table.left + table.width)[:, None, None]
    )
    inside &= dims[:, None, None] == torch.arange(2)
    interval = inside.int().argmax(0)  # [S, D]
    t = (2 * (z - table.left[interval]) / table.width[interval] - 1).clamp(-1 + 1e-15, 1 - 1e-15)
    powers = torch.cos(torch.arange(16) * torch.arccos(t)[..., None])
    expected = (powers * coefficients[interval]).sum(-1).reshape(-1).index_put((table.singles,), singles)
    got = interpolation(z, mu, logvar, log_w, 0.0, list(table))
    torch.testing.assert_close(got.flatten(), expected, rtol=0, atol=1e-12)

    upstream = draw(700, 2, seed=5)
    wanted = [z, mu, logvar, log_w, x]
    *by_hand, d_x = torch.autograd.grad(expected, wanted, upstream.flatten())
    by_hand[0].view(-1)[table.singles] = d_x[len(nodes) :]
    for mine, theirs in zip(torch.autograd.grad(got, wanted[:4], upstream), by_hand, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_one_gradient_of_four() -> None:
    inputs = samples(700, 61, 2, torch.float64)
    inputs["log_w"] = draw(61, seed=9).requires_grad_()

    def marginals(z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor) -> Tensor:
        return fastvae.agg_log_prob_marginals(z, mu, logvar, weights=ColumnWeights(log_w), method="table")[1]

    _, *every = evaluate(marginals, inputs)
    for name, gradient in zip(inputs, every, strict=True):
        alone = {other: x.detach().requires_grad_(other == name) for other, x in inputs.items()}
        assert_same(evaluate(marginals, alone)[1:], [gradient])
        (stride_0,) = torch.autograd.grad(marginals(**inputs).sum(), inputs[name])
        ones = torch.autograd.grad(marginals(**inputs), inputs[name], torch.ones(700, 2, dtype=torch.float64))
        assert_same([stride_0], ones)


def test_a_sample_that_is_its_own_density() -> None:
    """A sample without its own column has nothing left: the subtraction would cancel, and is not made."""
    mu = torch.arange(300.0)[:, None].double() * 20
    z = mu + draw(300, 1, seed=1)
    weights = ColumnWeights(-math.log(300), torch.arange(300), -math.inf, 30.0)
    expected = aggregate(z, mu, torch.zeros_like(mu), weights=weights)[1]
    z = z.repeat(9, 1)
    weights = weights._replace(own=torch.arange(300).repeat(9))
    got = fastvae.agg_log_prob_marginals(z, mu, torch.zeros_like(mu), weights=weights, method="table", tol=1e-9)[1]
    torch.testing.assert_close(got, expected.repeat(9, 1), rtol=1e-14, atol=1e-9)


def test_too_many_points_are_not_taken() -> None:
    """Results are the direct ones, bit for bit, where a table would need too many points."""
    z, mu, logvar = (x.detach() for x in samples(600, 600, 2, torch.float32).values())
    for few in ((z[:40], mu, logvar), (mu, mu, logvar - 20)):
        results = [fastvae.agg_log_prob_marginals(*few, method=m) for m in ("table", "direct")]
        assert_same(*results)


def test_auto_is_direct_where_that_is_fast_and_a_table_elsewhere() -> None:
    def methods(S: int, N: int, D: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        mu = torch.randn(N, D, generator=g)
        z = mu[torch.arange(S) % N] + torch.randn(S, D, generator=g)
        return [
            fastvae.agg_log_prob_marginals(z, mu, torch.zeros_like(mu), method=m)[1]
            for m in ("auto", "direct", "table")
        ]

    auto, direct, _ = methods(2000, 2000, 1)
    assert_same([auto], [direct])
    auto, direct, table = methods(30_000, 6000, 1)
    assert not torch.equal(direct, table)
    assert_same([auto], [table])
    assert (auto - direct).abs().max() < 3e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["z", "mu", "logvar", "log_w"])
def test_what_is_not_finite(where: str, bad: float) -> None:
    inputs = {name: x.detach() for name, x in samples(500, 60, 2, torch.float64).items()}
    inputs["log_w"] = draw(60, seed=3)
    inputs[where][7] = bad
    *gaussians, log_w = inputs.values()
    marginals = [
        fastvae.agg_log_prob_marginals(*gaussians, weights=ColumnWeights(log_w), method=m)[1]
        for m in ("table", "direct")
    ]
    torch.testing.assert_close(*marginals, equal_nan=True, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("S", "N", "D"), [(0, 5, 2), (5, 0, 2), (1, 1, 1), (300, 1, 1), (500, 3, 0)])
def test_few_of_anything(S: int, N: int, D: int) -> None:
    z, mu, logvar = (x.detach() for x in samples(S, max(N, 1), D, torch.float64).values())
    results = [fastvae.agg_log_prob_marginals(z, mu[:N], logvar[:N], method=m) for m in ("table", "direct")]
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)


def test_batches_are_tabulated_one_by_one() -> None:
    z, mu, logvar = (torch.stack((x.detach(), x.detach() * 2)) for x in samples(900, 50, 2, torch.float64).values())
    both = fastvae.agg_log_prob_marginals(z, mu, logvar, method="table")
    for n in range(2):
        one = fastvae.agg_log_prob_marginals(z[n], mu[n], logvar[n], method="table")
        assert_same([x[n] for x in both], one)


def test_the_same_bits_for_any_number_of_threads() -> None:
    inputs = samples(5000, 300, 4, torch.float32)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(evaluate(lambda **x: fastvae.agg_log_prob_marginals(**x, method="table"), inputs))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_the_compiler_gets_the_direct_ones() -> None:
    z, mu, logvar = (x.detach() for x in samples(40_000, 2000, 1, torch.float32).values())
    z = z[:3000]

    def compiled(method: str) -> Tensor:
        run = torch.compile(
            lambda *x: fastvae.agg_log_prob_marginals(*x, method=method), fullgraph=True, backend="eager", dynamic=False
        )
        return run(z, mu, logvar)[1]

    assert_same([compiled("auto")], [fastvae.agg_log_prob_marginals(z, mu, logvar, method="direct")[1]])
    with pytest.raises(Exception, match="method"):
        compiled("table")
    with pytest.raises(ValueError, match="method: expected 'auto' or 'direct'"):
        torch.func.vmap(lambda x: fastvae.agg_log_prob_marginals(x, mu, logvar, method="table")[1])(z[None])


def test_kl_decomposition_takes_it() -> None:
    inputs = samples(2000, 100, 3, torch.float64)
    own = torch.arange(2000) % 100
    for estimator in ("stratified", "mss"):
        terms = [
            fastvae.kl_decomposition(**inputs, own=own, estimator=estimator, dataset_size=900, method=m)
            for m in ("table", "direct")
        ]
        assert (terms[0].dim_kl != terms[1].dim_kl).any()
        torch.testing.assert_close(terms[0][:-1], terms[1][:-1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("batch_size", [37, 4096])
def test_a_data_set_is_tabulated_chunk_by_chunk(batch_size: int) -> None:
    _, mu, logvar = (x.detach() for x in samples(300, 300, 3, torch.float32).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        terms = [
            fastvae.kl_decomposition_dataset((mu, logvar), n_samples=9, method=m, batch_size=batch_size)
            for m in ("table", "direct")
        ]
    assert (terms[0].dim_kl != terms[1].dim_kl).any()
    torch.testing.assert_close(terms[0][:-1], terms[1][:-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "what"),
    [({"method": "tables"}, "method"), ({"tol": 0.0}, "tol"), ({"tol": math.nan}, "tol"), ({"tol": math.inf}, "tol")],
)
def test_bad_arguments(given: dict, what: str) -> None:
    inputs = samples(5, 5, 2, torch.float32)
    for function in (fastvae.agg_log_prob_marginals, fastvae.kl_decomposition):
        with pytest.raises(ValueError, match=f"^{what}: "):
            function(**inputs, **given)
    _, mu, logvar = inputs.values()
    with pytest.raises(ValueError, match=f"^{what}: "):
        fastvae.kl_decomposition_dataset((mu.detach(), logvar.detach()), **given)
