"""The early exit of the Triton kernels, exact to rounding: what test_early_exit.py is for the native library, smaller,
and with tiles that are seen to be skipped."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import TRITON, Target, computing_on
from support.helpers import DTYPES, Expected, Named, assert_same, cast, draw, evaluate, needing_gradients
from test_early_exit import apart, expecting, functions, with_weights
from torch import Tensor

import fastvae
from fastvae import ColumnWeights

pytest.importorskip("triton")
from fastvae.kernels.triton import agg_log_prob, early_exit
from fastvae.kernels.triton.packing import Packed

INF = math.inf
N = 384  # three panels
D = 36  # two looks, and some more


@pytest.fixture(params=TRITON)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Makes kernels look at fewer columns than are worth it."""
    monkeypatch.setattr(early_exit, "MIN_COLUMNS", 1)
    with computing_on(TRITON[request.param]) as target, fastvae.use(exact_skip=True):
        yield target


def population(S: int, logvar: float = -3.0, seed: int = 0) -> Named:
    """Sample i is from posterior i mod N."""
    width = logvar + 0.1 * draw(N, D, seed=seed + 1)
    mu = draw(N, D, seed=seed)
    z = (mu + torch.exp(width / 2) * draw(N, D, seed=seed + 2))[torch.arange(S) % N]
    return {"z": z.clone(), "mu": mu, "logvar": width}


def one_heavy_column(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    """A column that is far from all samples but one in the dimension that is looked at last, and outweighs that."""
    inputs = population(S, -4)
    inputs["logvar"][:, 16] = 4  # the one that tells columns apart least
    inputs["mu"][277] = inputs["z"][5]
    inputs["mu"][277, 16] += 60  # 33 nats
    log_w = torch.full((N,), -math.log(N), dtype=torch.float64)
    log_w[277] += 40
    return inputs, ColumnWeights(log_w, own)


def heavy_weights(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    return population(S), ColumnWeights(30 * draw(N, seed=3).sign(), own)


def heavy_overrides(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    """The next column is far, and weighs e^60."""
    return population(S), ColumnWeights(-1.0, own, 0.0, 60.0)


def overrides(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    return population(S), ColumnWeights(draw(N, seed=3), own, -0.5, 0.5)


def no_weight(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    """A third of the columns has no weight, and a whole panel."""
    left = (torch.arange(N) % 3 > 0) & (torch.arange(N) // 128 != 2)
    return population(S), ColumnWeights(draw(N, seed=3).where(left, -INF), own)


def far_samples(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    """Samples of which some are far from everything, and drawn from none."""
    inputs = population(S)
    inputs["z"][::7] *= 30
    return inputs, ColumnWeights(-math.log(N), own.where(torch.arange(S) % 7 > 0, -1))


def weak_columns(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    """Columns that are only reached from afar keep what gradient they have."""
    inputs = population(S)
    inputs["mu"][300:] += 1
    return inputs, ColumnWeights(draw(N, seed=3))


def widths_apart(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    """Columns of which some are so narrow that their gradients weigh more than their shares."""
    inputs = population(S)
    inputs["logvar"][::5] -= 8
    return inputs, ColumnWeights(draw(N, seed=3))


def near(S: int, own: Tensor) -> tuple[Named, ColumnWeights]:
    return population(S, 0), ColumnWeights(-math.log(N), own)


CASES: dict[str, Callable[[int, Tensor], tuple[Named, ColumnWeights]]] = {
    case.__name__: case
    for case in (
        one_heavy_column,
        heavy_weights,
        heavy_overrides,
        overrides,
        no_weight,
        far_samples,
        weak_columns,
        widths_apart,
        near,
    )
}


@functools.cache
def problem(case: str, S: int, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Named, Expected]:
    return expecting(*CASES[case](S, torch.arange(S) % N), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_nothing_visible_is_lost(backend: Target, case: str, dtype: torch.dtype) -> None:
    fast, inputs, expected = problem(case, 40, dtype)
    expected.check(evaluate(fast, inputs))


def check_apart(S: int, N: int, near_rows: int, near_columns: int, nats: float, dtype: torch.dtype) -> None:
    inputs = apart(S, N, near_rows, near_columns, D, early_exit.LOOK.value, nats)
    inputs = needing_gradients(cast(inputs, dtype))
    fast, formula = functions(ColumnWeights(0.0, torch.zeros(S, dtype=torch.int64)))
    Expected(formula, inputs, ("z", "mu"), torch.ones_like).check(evaluate(fast, inputs, torch.ones_like))


@pytest.mark.parametrize(("dtype", "nats"), [(torch.float32, 12.5), (torch.float32, 15.5), (torch.float64, 27.5)])
def test_rows_go_to_the_margin(backend: Target, dtype: torch.dtype, nats: float) -> None:
    """Columns lie just beyond half of the margin, that of the sum and the wider one of what pulls on z."""
    check_apart(128, N, 128, 1, nats, dtype)


def test_columns_go_to_the_margin(backend: Target) -> None:
    """Samples lie just beyond it for a panel of columns that share one sample and have a little of many others; in
    float64, as in float32 the rule allows an error of that size."""
    check_apart(256, 129, 1, 128, 32.5, torch.float64)


def poison(x: Tensor) -> None:
    """Makes packed numbers NaN in the dimensions after the first look, so that whoever goes past it shows."""
    x[:, early_exit.LOOK.value :] = -1 if x.dtype == torch.int64 else math.nan  # the bits of two NaN


def gradients(S: int, dtype: torch.dtype, logvar: float = -5.0) -> list[Tensor]:
    inputs = cast(population(S, logvar), dtype)
    return evaluate(fastvae.agg_log_prob, {key: x.requires_grad_() for key, x in inputs.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_skip_far_tiles(backend: Target, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows skip far tiles, forward and backward, unless it is turned off or everything is near."""

    def poisoning(bounds: Callable[..., early_exit.Exits]) -> Callable[..., early_exit.Exits]:
        def of(packed: Packed, *own: Tensor | None) -> early_exit.Exits:
            exits = bounds(packed, *own)
            poison(packed.columns[2:])
            return exits

        return of

    monkeypatch.setattr(agg_log_prob, "of_rows", poisoning(agg_log_prob.of_rows))
    monkeypatch.setattr(agg_log_prob, "of_rows_backward", poisoning(agg_log_prob.of_rows_backward))
    joint, d_z, *_ = gradients(100, dtype)
    assert joint.isfinite().all()
    assert d_z.isfinite().all()
    joint, d_z, *_ = gradients(100, dtype, logvar=1.0)
    assert joint.isnan().all()
    with fastvae.use(exact_skip=False):
        joint, d_z, *_ = gradients(100, dtype)
    assert joint.isnan().all()
    assert d_z.isnan().all()


def test_columns_skip_far_tiles(backend: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column's own samples come first. In float64 these are so many tiles that it then looks at one in 16."""
    pull = agg_log_prob.pull_on_columns

    def poisoning(packed: Packed, *rest: Any) -> None:
        poison(packed.samples[2:])
        pull(packed, *rest)

    monkeypatch.setattr(agg_log_prob, "pull_on_columns", poisoning)
    *_, d_mu, d_logvar = gradients(N, torch.float32)
    assert d_mu[:256].isfinite().all()
    assert d_logvar[:256].isfinite().all()
    with fastvae.use(exact_skip=False):
        *_, d_mu, d_logvar = gradients(N, torch.float32)
    assert d_mu[:256].isnan().any()


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("z", "mu", "logvar") for value in (math.nan, INF, -INF)]
    + [("log_w", math.nan), ("log_w", -INF)],
)
def test_what_is_not_finite_is_not_skipped(backend: Target, name: str, value: float) -> None:
    """Numbers that are not finite are seen even in a dimension that no tile gets to."""
    inputs, weights = population(40, -6), ColumnWeights(torch.zeros(N, dtype=torch.float64))
    fast, formula = functions(weights)
    everything = {n: x.detach() for n, x in with_weights(inputs, weights, torch.float32).items()}
    for d in (0, D - 1):
        broken = {n: x.clone() for n, x in everything.items()}
        broken[name][7 if name == "log_w" else (7, d)] = value
        expected = formula(**cast(broken, torch.float64))
        got = fast(**broken)
        assert_same([got.isnan(), got == INF, got == -INF], [expected.isnan(), expected == INF, expected == -INF])


def test_columns_keep_their_gradients(backend: Target) -> None:
    """Columns keep their gradients where, with so many samples, tiles of their sums are left out too; the gradients'
    bits are the same each time."""
    fast, inputs, expected = problem("weak_columns", 200, torch.float32)
    got = evaluate(fast, inputs)
    expected.check(got)
    assert_same(evaluate(fast, inputs), got)


def test_fewer_columns_are_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_exit, "MIN_COLUMNS", N + 1)
    x = torch.zeros(N, D, device="meta")
    assert early_exit.early_order(x, x, True) is None
    monkeypatch.setattr(early_exit, "MIN_COLUMNS", N)
    assert early_exit.early_order(x, x, False) is None
