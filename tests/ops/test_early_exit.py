"""The early exit of agg_log_prob, exact to rounding: on or off the tolerance rule holds, wherever a wrong bound would
lose what can be seen."""

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import CUDA, NATIVE, Target, computing_on
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    SEARCH_MARGIN,
    Expected,
    Named,
    aggregate,
    assert_same,
    cast,
    draw,
    evaluate,
    needing_gradients,
    nudge,
)
from torch import Tensor

import fastvae
from fastvae import ColumnWeights
from fastvae.backends import native_library, settings


@pytest.fixture(params=[*NATIVE, *CUDA])
def backend(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The backends that leave tiles out."""
    with computing_on((NATIVE | CUDA)[request.param]) as target:
        yield target


INF = math.inf
N = 1200  # above the fewest columns that are worth a look


def population(S: int, D: int, logvar: float, active: int, seed: int = 0) -> Named:
    """Posteriors of which `active` dimensions, the last ones, tell them apart; sample i is from posterior i mod N."""
    width = torch.where(torch.arange(D) >= D - active, logvar, 0.0) + 0.1 * draw(N, D, seed=seed + 1)
    mu = draw(N, D, seed=seed) * torch.where(torch.arange(D) >= D - active, 1.0, 0.01)
    z = (mu + torch.exp(width / 2) * draw(N, D, seed=seed + 2))[torch.arange(S) % N]
    return {"z": z.clone(), "mu": mu, "logvar": width}


def one_heavy_column(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    """A column that is far from every sample in the dimension that is looked at last, and outweighs that."""
    inputs = population(S, 33, -4, 33)
    inputs["logvar"][:, 16] = 4  # the one that tells columns apart least
    inputs["mu"][777] = inputs["z"][5]
    inputs["mu"][777, 16] += 60  # 33 nats
    log_w = torch.full((N,), -math.log(N), dtype=torch.float64)
    log_w[777] += 40
    return inputs, ColumnWeights(log_w, own)


def heavy_weights(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    return population(S, 20, -3, 20), ColumnWeights(30 * draw(N, seed=3).sign(), own)


def heavy_overrides(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    """The next column is far, and weighs e^60."""
    return population(S, 20, -3, 20), ColumnWeights(-1.0, own, 0.0, 60.0)


def no_weight(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    return population(S, 20, -3, 20), ColumnWeights(draw(N, seed=3).where(torch.arange(N) % 3 > 0, -INF), own)


def without_their_own(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    return population(S, 20, -3, 20), ColumnWeights(-math.log(N - 1), own, -INF)


def far_samples(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    """Samples of which some are far from everything, and drawn from none."""
    inputs = population(S, 12, -3, 12)
    inputs["z"][::7] *= 30
    return inputs, ColumnWeights(-math.log(N), own.where(torch.arange(S) % 7 > 0, -1))


def weak_columns(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    """Columns that are only reached from afar keep what gradient they have."""
    inputs = population(S, 12, -3, 12)
    inputs["mu"][1000:] += 3
    return inputs, ColumnWeights(draw(N, seed=3))


def widths_apart(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    """Columns of which some are so narrow that their gradients weigh more than their shares."""
    inputs = population(S, 12, -3, 12)
    inputs["logvar"][::5] -= 8
    return inputs, ColumnWeights(draw(N, seed=3))


def near(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    return population(S, 9, 0, 9), ColumnWeights(-math.log(N), own)


CASES: dict[str, Callable[[int, Tensor], tuple[Named, ColumnWeights]]] = {
    case.__name__: case
    for case in (
        one_heavy_column,
        heavy_weights,
        heavy_overrides,
        no_weight,
        without_their_own,
        far_samples,
        weak_columns,
        widths_apart,
        near,
    )
}


def functions(
    weights: ColumnWeights,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """agg_log_prob and the formula, of z, mu, logvar and, where it is a tensor, log_w."""

    def fast(log_w: Tensor | None = None, **x: Tensor) -> Tensor:
        return fastvae.agg_log_prob(**x, weights=weights if log_w is None else weights._replace(log_w=log_w))

    return fast, lambda **x: aggregate(**x, weights=weights)[0]


def with_weights(inputs: Named, weights: ColumnWeights, dtype: torch.dtype) -> Named:
    log_w = {"log_w": weights.log_w} if isinstance(weights.log_w, Tensor) else {}
    return needing_gradients(cast(inputs | log_w, dtype))


def expecting(
    inputs: Named, weights: ColumnWeights, dtype: torch.dtype
) -> tuple[Callable[..., Tensor], Named, Expected]:
    """agg_log_prob, its inputs in a dtype, and what it has to give for them."""
    fast, formula = functions(weights)
    inputs = with_weights(inputs, weights, dtype)
    return fast, inputs, Expected(formula, inputs, ("z", "mu"))


@functools.cache
def problem(case: str, S: int, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Named, Expected]:
    return expecting(*CASES[case](S, torch.arange(S) % N), dtype)


@pytest.mark.parametrize("exact_skip", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_nothing_visible_is_lost(backend: Target, case: str, dtype: torch.dtype, exact_skip: bool) -> None:
    fast, inputs, expected = problem(case, 13, dtype)
    with fastvae.use(exact_skip=exact_skip):
        expected.check(evaluate(fast, inputs))


@functools.cache
def large(case: str) -> tuple[Callable[..., Tensor], Named, list[Tensor], list[float]]:
    """A problem with as many samples as columns, its results in float64, and how far float32's may be from them by the
    tolerance rule, but for its last term; all without early exit, and the formula in the reference's chunks."""
    S = N + 100
    inputs, weights = CASES[case](S, torch.arange(S) % N)
    fast, _ = functions(weights)
    inputs = with_weights(inputs, weights, torch.float32)
    wide = cast(inputs, torch.float64)

    def differences(results: list[Tensor], exact: list[Tensor]) -> list[float]:
        return [float((got.double() - x).abs().max()) for got, x in zip(results, exact, strict=True)]

    with fastvae.use_backend("native", exact_skip=False):
        exact = evaluate(fast, wide)
        eps = torch.finfo(torch.float32).eps
        nudged = [evaluate(fast, nudge(wide, ("z", "mu"), eps, seed)) for seed in range(4)]
    changes = [max(several) for several in zip(*(differences(results, exact) for results in nudged), strict=True)]
    with fastvae.use_backend("reference"):
        errors = differences(evaluate(fast, inputs), exact)
    return fast, inputs, exact, [2 * error + change for error, change in zip(errors, changes, strict=True)]


@pytest.mark.parametrize("wanted", [("z", "mu", "logvar", "log_w"), ("z",), ("logvar",)], ids="-".join)
@pytest.mark.parametrize("exact_skip", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_as_many_samples_as_columns(
    backend: Target, case: str, exact_skip: bool, wanted: tuple[str, ...]
) -> None:
    """Gradients where every column has a sample of its own, so that tiles of its sums are left out too."""
    if backend.device != "cpu" or (backend.slow and (not exact_skip or len(wanted) == 1)):
        return
    fast, inputs, exact, tolerances = large(case)
    names = ["joint", *inputs]
    inputs = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    with fastvae.use(exact_skip=exact_skip):
        got = dict(zip(["joint", *(n for n in inputs if n in wanted)], evaluate(fast, inputs), strict=True))
    for name, x, tolerance in zip(names, exact, tolerances, strict=True):
        if name in got:
            allowed = tolerance + 4 * torch.finfo(torch.float32).eps * x.abs().clamp(min=1)
            worst = ((got[name].double() - x).abs() / allowed).max()
            assert worst <= 1, f"{name}: {worst:.3g} times what the rule allows"


@given(
    S=st.integers(1, 12),
    D=st.integers(1, 24),
    active=st.integers(0, 24),
    logvar=st.sampled_from([-8.0, -4.0, -2.0, 0.0]),
    spread=st.sampled_from([0.0, 3.0, 30.0]),
    known=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_any_population(
    backend: Target,
    S: int,
    D: int,
    active: int,
    logvar: float,
    spread: float,
    known: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    if seed % 6:  # a formula of [S, 1200, D] takes its time
        return
    own = torch.arange(S).where(torch.arange(S) % 3 > 0, -1) if known else None
    weights = ColumnWeights(spread * draw(N, seed=seed + 3), own)
    fast, formula = functions(weights)
    inputs = with_weights(population(S, D, logvar, min(active, D), seed), weights, dtype)
    with fastvae.use(exact_skip=True):
        Expected(formula, inputs, ("z", "mu"), margin=SEARCH_MARGIN).check(evaluate(fast, inputs))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("z", "mu", "logvar") for value in (math.nan, INF, -INF)]
    + [("log_w", math.nan), ("log_w", -INF)],
)
def test_what_is_not_finite_is_not_skipped(backend: Target, name: str, value: float) -> None:
    """Numbers that are not finite are not skipped, not even in a dimension that no tile gets to."""
    inputs, weights = population(60, 40, -6, 40), ColumnWeights(torch.zeros(N, dtype=torch.float64))
    fast, formula = functions(weights)
    everything = {n: x.detach() for n, x in with_weights(inputs, weights, torch.float32).items()}
    for d in (0, 17, 39):
        broken = {n: x.clone() for n, x in everything.items()}
        broken[name][7 if name == "log_w" else (7, d)] = value
        expected = formula(**cast(broken, torch.float64))
        got = fast(**broken)
        assert_same([got.isnan(), got == INF, got == -INF], [expected.isnan(), expected == INF, expected == -INF])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads(native: Target, dtype: torch.dtype) -> None:
    weights = ColumnWeights(draw(N, seed=3))
    fast, _ = functions(weights)
    inputs = with_weights(population(1300, 33, -4, 20), weights, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(evaluate(fast, inputs))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


# What is counted


def visits(inputs: Named, weights: ColumnWeights | None = None) -> tuple[int, int]:
    """Dimensions of pairs that a forward and a backward visit, and those that there are."""
    native_library.take_visits()
    evaluate(lambda **x: fastvae.agg_log_prob(**x, weights=weights), inputs)
    return native_library.take_visits()


@pytest.mark.parametrize("backward", [False, True])
def test_without_early_exit_all_dimensions_are_visited(native: Target, backward: bool) -> None:
    """All dimensions are visited without early exit: by the forward, and twice by the backward."""
    S, D = 61, 33
    inputs = {name: x.requires_grad_(backward) for name, x in cast(population(S, D, -4, D), torch.float32).items()}
    everything = S * N * D * (3 if backward else 1)
    with fastvae.use(exact_skip=False):
        assert visits(inputs) == (everything, everything)
    with fastvae.use(exact_skip=True):
        visited, counted = visits(inputs)
        assert counted == everything
        assert visited < everything
        few = {name: x[:50].detach() for name, x in inputs.items()}
        assert visits(few) == (50 * 50 * D,) * 2


def test_visits_where_all_columns_are_far_but_those_of_a_panel(native: Target) -> None:
    """Tiles of them stop when they are first looked at, after 8 dimensions."""
    S, N, D = 13, 1024, 40
    mu = 100.0 * torch.arange(N)[:, None].expand(N, D)
    inputs = {"z": mu[:1].expand(S, D).clone().requires_grad_(), "mu": mu, "logvar": torch.zeros(N, D)}
    visited, everything = visits(inputs, ColumnWeights(0.0, torch.zeros(S, dtype=torch.int64)))
    assert everything == 3 * S * N * D
    width = (visited - 3 * S * N * 8) / (3 * S * (D - 8))
    assert width in (4, 8, 16, 32)  # whole vectors


def test_few_active_dimensions_are_few_visits(native: Target) -> None:
    """Few active dimensions are few visits, as many on any number of threads, and are taken in the right order."""
    inputs = needing_gradients(cast(population(N, 128, -3, 20), torch.float32))
    before = torch.get_num_threads()
    try:
        counts = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            counts.append(visits(inputs))
    finally:
        torch.set_num_threads(before)
    assert counts[0] == counts[1]
    visited, everything = counts[0]
    assert visited < 0.25 * everything


def apart(S: int, N: int, near_rows: int, near_columns: int, D: int, looked: int, nats: float) -> Named:
    """The first samples and columns at 0, the others where a term is less by so many nats, in the dimensions of the
    first look: what many little terms come to is seen."""
    there = torch.zeros(D, dtype=torch.float64)
    there[:looked] = math.sqrt(2 * nats / looked)
    inputs = {"z": there.repeat(S, 1), "mu": there.repeat(N, 1), "logvar": torch.zeros(N, D, dtype=torch.float64)}
    inputs["z"][:near_rows] = 0
    inputs["mu"][:near_columns] = 0
    return inputs


@pytest.mark.parametrize(("dtype", "nats"), [(torch.float32, 16.5), (torch.float64, 27.5)], ids=str)
def test_what_many_little_terms_come_to_is_seen(backend: Target, dtype: torch.dtype, nats: float) -> None:
    """One column is at the samples and all others are as far as half the margin, which they are by the first look."""
    inputs = apart(128, N, 128, 1, 36, 8, nats)
    inputs["z"] += 0.01 * draw(128, 36, seed=1)
    fast, formula = functions(ColumnWeights(0.0, torch.zeros(128, dtype=torch.int64)))
    inputs = needing_gradients(cast(inputs, dtype))
    expected = Expected(formula, inputs, ("z", "mu"))
    with fastvae.use(exact_skip=True):
        expected.check(evaluate(fast, inputs))


# Turning it off


def test_it_can_be_turned_off(native: Target) -> None:
    """Early exit can be turned off by an argument, with results that differ in their last bits at most."""
    inputs = cast(population(96, 33, -4, 33), torch.float32)
    with fastvae.use_backend("native", exact_skip=False):
        assert not settings.exact_skip()
        with fastvae.use_backend("native"):  # keeps what is set
            assert not settings.exact_skip()
        plain = fastvae.agg_log_prob(**inputs)
    with fastvae.use(exact_skip=True):
        assert settings.exact_skip()
        torch.testing.assert_close(fastvae.agg_log_prob(**inputs), plain)


@pytest.mark.parametrize(("setting", "cpu", "gpu"), [("0", False, False), ("1", True, True), ("", True, False)])
def test_the_environment_turns_it_on_or_off(setting: str, cpu: bool, gpu: bool) -> None:
    """The environment turns early exit on or off; unset, it is on where it has been measured."""
    code = "from fastvae.backends.settings import exact_skip; print(exact_skip(), exact_skip(otherwise=False))"
    environment = {**os.environ, "FASTVAE_EXACT_SKIP": setting}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [str(cpu), str(gpu)]
