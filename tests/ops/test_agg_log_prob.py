"""agg_log_prob and agg_log_prob_marginals: sizes, every kind of weights, and inputs hard to keep exact.

What only the marginals have is in test_agg_log_prob_marginals.py.
"""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from conftest import Target
from hypothesis import example, given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    HALVES,
    LAYOUTS,
    SEARCH_MARGIN,
    SIZES,
    Expected,
    Named,
    aggregate,
    assert_accurate,
    assert_rounded_once,
    assert_same,
    cast,
    draw,
    evaluate,
    flattened,
    lay_out,
    needing_gradients,
    samples,
    tensors,
)
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import fastvae
from fastvae import ColumnWeights

INF = math.inf


def some_zero(log_w: Tensor) -> Tensor:
    return log_w.where(torch.arange(len(log_w)) % 3 != 1, -INF)


def drawn(S: int, N: int) -> Tensor:
    """own(i) = i mod N, but every fifth sample is drawn from none of the columns."""
    own = torch.arange(S) % max(N, 1)
    return own.where(torch.arange(S) % 5 != 2, -1)


# Of (S, N): the weights, `log_w` being the tensor to differentiate where there is one.
WEIGHTS: dict[str, Callable[[int, int], ColumnWeights | None]] = {
    "none": lambda S, N: None,
    "a number": lambda S, N: ColumnWeights(-1.5),
    "zero": lambda S, N: ColumnWeights(-INF),
    "columns": lambda S, N: ColumnWeights(draw(N, seed=1)),
    "columns, some zero": lambda S, N: ColumnWeights(some_zero(draw(N, seed=1))),
    "columns, all zero": lambda S, N: ColumnWeights(torch.full((N,), -INF, dtype=torch.float64)),
    "own without overrides": lambda S, N: ColumnWeights(draw(N, seed=1), drawn(S, N)),
    "number and own": lambda S, N: ColumnWeights(-1.5, drawn(S, N), 0.5),
    "columns and own": lambda S, N: ColumnWeights(draw(N, seed=1), drawn(S, N), 0.5),
    "columns, some zero, and own": lambda S, N: ColumnWeights(some_zero(draw(N, seed=1)), drawn(S, N), 0.5),
    "next": lambda S, N: ColumnWeights(draw(N, seed=1), drawn(S, N), None, 2.5),
    "own and next": lambda S, N: ColumnWeights(-1.5, drawn(S, N), 0.5, 2.5),
    "leave one out": lambda S, N: ColumnWeights(-1.5, drawn(S, N), -INF),
    "leave two out": lambda S, N: ColumnWeights(draw(N, seed=1), drawn(S, N), -INF, -INF),
    "only own": lambda S, N: ColumnWeights(-INF, drawn(S, N), 0.5),  # rows drawn from none are all zero
    "only next": lambda S, N: ColumnWeights(-INF, drawn(S, N), -INF, 0.5),
}


@pytest.fixture(params=["agg_log_prob", "agg_log_prob_marginals"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def functions(
    name: str, weights: ColumnWeights | None
) -> tuple[Callable[..., Tensor | tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    """The public function and the formula, of z, mu, logvar and, where it is a tensor, log_w."""

    def fast(log_w: Tensor | None = None, **x: Tensor) -> Tensor | tuple[Tensor, ...]:
        w = weights if weights is None or log_w is None else weights._replace(log_w=log_w)
        return getattr(fastvae, name)(**x, weights=w)

    n = 2 if name == "agg_log_prob_marginals" else 1
    return fast, lambda **x: aggregate(**x, weights=weights)[:n]


def weighted(inputs: Named, weights: ColumnWeights | None) -> Named:
    """The inputs, and log_w where it is a tensor."""
    if weights is None or not isinstance(weights.log_w, Tensor):
        return inputs
    return inputs | needing_gradients({"log_w": weights.log_w.to(inputs["z"])})


@functools.cache
def problem(
    device: str, name: str, sizes: tuple[int, int, int], kind: str, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Callable[..., Tensor | tuple[Tensor, ...]], Named, Expected]:
    weights = WEIGHTS[kind](*sizes[:2])
    fast, formula = functions(name, weights)
    inputs = weighted(samples(*sizes, dtype, scale), weights)
    return fast, inputs, Expected(formula, inputs, ("z", "mu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(backend: Target, name: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    fast, inputs, expected = problem(backend.device, name, sizes, "columns and own", dtype)
    expected.check(evaluate(fast, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(31, 37, 5), (7, 1, 3), (9, 2, 3), (19, 0, 4), (0, 5, 4)], ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(backend: Target, name: str, kind: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Weights of every kind, also on one column, which is its own next, and two, each the other's next."""
    if sizes[1] == 0:
        kind = kind if kind in ("none", "zero", "columns") else "a number"
    fast, inputs, expected = problem(backend.device, name, sizes, kind, dtype)
    expected.check(evaluate(fast, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(("kind", "N"), [*((kind, 61) for kind in WEIGHTS), ("columns", 4500)])
def test_many_rows_in_one_dimension(native: Target, kind: str, N: int, far: bool, dtype: torch.dtype) -> None:
    """Rows whose sums are a marginal's, over several spans of columns; with a maximum where all columns are far."""
    inputs, expected = _in_one_dimension(kind, N, far, dtype)
    expected.check(evaluate(functions("agg_log_prob", WEIGHTS[kind](101, N))[0], inputs))


@functools.cache
def _in_one_dimension(kind: str, N: int, far: bool, dtype: torch.dtype) -> tuple[Named, Expected]:
    weights = WEIGHTS[kind](101, N)
    inputs = weighted(samples(101, N, 1, dtype), weights)
    if far:
        inputs["z"] = (inputs["z"].detach() + 300).requires_grad_()
    return inputs, Expected(functions("agg_log_prob", weights)[1], inputs, ("z", "mu"))


def test_rows_without_weight_are_minus_infinity_with_gradient_zero(backend: Target, name: str) -> None:
    inputs = samples(19, 23, 4, torch.float32)
    own = drawn(19, 23)
    fast, _ = functions(name, ColumnWeights(-INF, own, 0.5))
    results = evaluate(fast, inputs)
    dead = own == -1
    for result in results[: -len(inputs)]:
        assert (result[dead] == -INF).all()
        assert result[~dead].isfinite().all()
    d_z = results[-3]
    assert (d_z[dead] == 0).all()
    assert (d_z[~dead] != 0).any()
    fast, _ = functions(name, ColumnWeights(torch.full((23,), -INF)))
    for gradient in evaluate(fast, inputs)[-3:]:
        assert (gradient == 0).all()


@pytest.mark.parametrize("kind", ["columns", "own and next", "only own"])
def test_gradcheck(backend: Target, name: str, kind: str) -> None:
    weights = WEIGHTS[kind](5, 4)
    fast, _ = functions(name, weights)
    inputs = weighted(samples(5, 4, 2, torch.float64), weights)

    def finite(*x: Tensor) -> tuple[Tensor, ...]:
        outputs = tensors(fast(**dict(zip(inputs, x, strict=True))))
        return tuple(o.where(o > -INF, 0) for o in outputs)  # numerical differences of -inf are NaN

    assert torch.autograd.gradcheck(finite, tuple(inputs.values()), fast_mode=backend.slow)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shift", "scale", "width"),
    [(1e6, 1.0, 0.0), (0.0, 1e3, -10.0), (1e4, 1.0, -14.0), (0.0, 1e6, 20.0), (1e3, 1e-3, -16.0)],
    ids=str,
)
@pytest.mark.parametrize("outlier", [False, True])
def test_far_from_the_origin(
    backend: Target, name: str, shift: float, scale: float, width: float, outlier: bool, dtype: torch.dtype
) -> None:
    """Means that are large beside sigma cost no more digits than the inputs themselves have lost."""
    inputs = samples(41, 37, 6, torch.float64, scale)
    moved = {n: x.detach() + (width if n == "logvar" else shift) for n, x in inputs.items()}
    moved["z"] = moved["mu"][torch.arange(41) % 37] + torch.exp(moved["logvar"] / 2)[torch.arange(41) % 37] * draw(
        41, 6
    )
    if outlier:
        moved["mu"][5] = 1e6
    fast, formula = functions(name, None)
    assert_accurate(fast, formula, needing_gradients(cast(moved, dtype)), ("z", "mu"))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("n_samples", [None, 3])
def test_leading_axes(backend: Target, name: str, batch: tuple[int, ...], n_samples: int | None) -> None:
    """z [*batch, S, D] or [L, *batch, N, D] with mu [*batch, N, D]: each batch alone, under the same weights."""
    N, D = 5, 4
    S = N * (n_samples or 1)
    fast, formula = functions(name, ColumnWeights(0.0, torch.arange(S) % N, 0.5, 1.5))
    inputs = {
        "z": draw(*(() if n_samples is None else (n_samples,)), *batch, N, D, seed=3),
        "mu": draw(*batch, N, D, seed=1),
        "logvar": draw(*batch, N, D, seed=2),
        "log_w": draw(N, seed=4),
    }
    assert_accurate(fast, lambda z, mu, **x: formula(z=flattened(z, mu), mu=mu, **x), needing_gradients(inputs))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_of_weights_that_batches_share_are_rounded_once(
    backend: Target, name: str, dtype: torch.dtype
) -> None:
    fast, _ = functions(name, ColumnWeights(0.0))
    inputs = {n: draw(7, 11, 4, seed=seed) for seed, n in enumerate(("z", "mu", "logvar"))} | {"log_w": draw(11)}
    assert_rounded_once(fast, needing_gradients(inputs), dtype)


def test_agrees_with_torch_distributions(backend: Target) -> None:
    z, mu, logvar = (x.detach() for x in samples(31, 23, 4, torch.float64).values())
    log_w = draw(23, seed=1).log_softmax(0)
    posteriors = Independent(Normal(mu, (logvar / 2).exp()), 1)
    mixture = MixtureSameFamily(Categorical(logits=log_w), posteriors)
    joint = fastvae.agg_log_prob(z, mu, logvar, weights=ColumnWeights(log_w))
    torch.testing.assert_close(joint, mixture.log_prob(z))


@given(
    S=st.integers(1, 40),
    N=st.integers(1, 40),
    D=st.integers(1, 40),
    kind=st.sampled_from(list(WEIGHTS)),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e3]),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
@example(
    S=19, N=18, D=30, kind="none", scale=30.0, layout="one column expanded", dtype=torch.float64, seed=36
)  # rounding errors that are the same in all dimensions
def test_any_shape_weights_and_scale(
    backend: Target,
    name: str,
    S: int,
    N: int,
    D: int,
    kind: str,
    scale: float,
    layout: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    if backend.leaves_out(seed):
        return
    weights = WEIGHTS[kind](S, N)
    fast, formula = functions(name, weights)
    inputs = weighted(lay_out(samples(S, N, D, dtype, scale, seed), layout), weights)
    assert_accurate(fast, formula, inputs, ("z", "mu"), margin=SEARCH_MARGIN)


@given(
    S=st.integers(1, 20),
    N=st.integers(1, 20),
    D=st.integers(1, 20),
    kind=st.sampled_from(list(WEIGHTS)),
    scale=st.sampled_from([0.0, 1.0, 1e6]),
    width=st.sampled_from([0.0, 10.0, 60.0]),
    near=st.booleans(),
    dtype=st.sampled_from((*DTYPES, torch.bfloat16)),
    seed=st.integers(0, 2**20),
)
@example(1, 1, 12, "none", 0.0, 60.0, True, torch.float32, 632)  # log q of 141 nats: e^141 is infinite
def test_finite_inputs_never_give_nan(
    backend: Target,
    name: str,
    S: int,
    N: int,
    D: int,
    kind: str,
    scale: float,
    width: float,
    near: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """|mu| to 1e6 and logvar from -60 to 60, samples at their posteriors or anywhere."""
    if backend.leaves_out(seed):
        return
    mu = scale * (draw(N, D, seed=seed) / 2).clamp(-1, 1)
    logvar = width * (draw(N, D, seed=seed + 1) / 2).clamp(-1, 1)
    z = mu[torch.arange(S) % N] if near else scale * draw(S, D, seed=seed + 2).clamp(-1, 1)
    weights = WEIGHTS[kind](S, N)
    fast, _ = functions(name, weights)
    inputs = weighted(needing_gradients(cast({"z": z, "mu": mu, "logvar": logvar}, dtype)), weights)
    for result in evaluate(fast, inputs, upstream=torch.ones_like):  # of one sign: inf - inf is nobody's fault
        assert not result.isnan().any()


def test_same_bits_every_time(backend: Target, name: str) -> None:
    fast, inputs, _ = problem(backend.device, name, (97, 123, 10), "columns and own", torch.float32)
    first = evaluate(fast, inputs)
    for _ in range(3):
        assert_same(evaluate(fast, inputs), first)


@pytest.mark.parametrize("N", [37, 611])
def test_backward_gives_the_joint_too(backend: Target, N: int) -> None:
    """A backward not told the joint, as by EM, gives the forward's, by the tolerance rule, and the same gradients."""
    weights = WEIGHTS["columns and own"](31, N)
    assert weights is not None
    _, formula = functions("agg_log_prob", weights)
    inputs = weighted(samples(31, N, 5, torch.float32), weights)
    joint_alone = Expected(formula, {name: x.detach() for name, x in inputs.items()}, ("z", "mu"))
    z, mu, logvar, log_w = (x.detach() for x in inputs.values())
    rest = (log_w, None, *weights[1:])
    known = torch.ops.fastvae.agg_log_prob(z, mu, logvar, *rest)
    wanted = [True] * 4
    joint, *gradients = torch.ops.fastvae.agg_log_prob_backward(known, None, z, mu, logvar, *rest, wanted)
    joint_alone.check([joint])
    told = torch.ops.fastvae.agg_log_prob_backward(known, known, z, mu, logvar, *rest, wanted)
    for got, expected in zip(gradients, told, strict=True):
        torch.testing.assert_close(got, expected)
