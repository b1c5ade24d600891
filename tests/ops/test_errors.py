"""Bad input is refused by name, before any kernel runs."""

import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import wrong
from support.ops import FUSED, OPS
from torch import Tensor

import fastvae
from fastvae import ColumnWeights
from fastvae.aggregate.estimators import ESTIMATORS

B, D = 4, 3


def tensors(name: str) -> tuple[str, ...]:
    """The arguments that a function must have: all are tensors."""
    parameters = inspect.signature(getattr(fastvae, name)).parameters.values()
    return tuple(p.name for p in parameters if p.default is p.empty)


ALL = tuple(name for name in OPS if hasattr(fastvae, name))
GAUSSIAN = tuple(name for name in ALL if "z" not in tensors(name))  # of mu and logvar
CROSSED = tuple(name for name in FUSED if name in ALL and name not in GAUSSIAN)  # and of z [S, D]


def call(name: str, **changed: Any) -> Any:
    """The function on good arguments, but for those given."""
    good: dict[str, Any] = {argument: torch.zeros(B, D) for argument in tensors(name)}
    return getattr(fastvae, name)(**{**good, **changed})


def check(error: type[Exception], named: str, name: str, **changed: Any) -> None:
    """The error names the argument, and says what was expected and what came."""
    with pytest.raises(error) as raised:
        call(name, **changed)
    message = str(raised.value)
    argument, _, rest = message.partition(":")
    assert named in argument
    assert "expected" in rest or "cannot" in rest


@pytest.mark.parametrize("name", ALL)
def test_good_arguments_are_accepted(name: str) -> None:
    call(name)


@pytest.mark.parametrize("bad", [torch.zeros(B, D, dtype=dtype) for dtype in (torch.long, torch.bool, torch.cfloat)])
@pytest.mark.parametrize("name", ALL)
def test_wrong_dtype(name: str, bad: Tensor) -> None:
    for argument in tensors(name):
        check(TypeError, argument, name, **{argument: bad})


@pytest.mark.parametrize("bad", [1.0, None, [[0.0] * D] * B, "mu", torch.zeros(B, D).numpy()], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_not_a_tensor(name: str, bad: object) -> None:
    for argument in tensors(name):
        check(TypeError, argument, name, **{argument: bad})


@pytest.mark.parametrize("shape", [(B, D + 1), (B + 1, D), (D,), (), (1, D), (2, B, D)], ids=str)
@pytest.mark.parametrize("name", [*GAUSSIAN, *CROSSED])
def test_mu_and_logvar_of_different_shapes(name: str, shape: tuple[int, ...]) -> None:
    *_, mu, logvar = tensors(name)
    check(ValueError, logvar, name, **{logvar: torch.zeros(shape)})
    few = len(shape) < (1 if name in GAUSSIAN else 2)
    check(ValueError, mu if few else logvar, name, **{mu: torch.zeros(shape)})


@pytest.mark.parametrize("shape", [(B, D + 1), (D,), (), (3, B, D + 1), (3, B + 1, D), (2, 3, B, D)], ids=str)
@pytest.mark.parametrize("name", CROSSED)
def test_z_that_does_not_fit(name: str, shape: tuple[int, ...]) -> None:
    check(ValueError, "z", name, z=torch.zeros(shape))


def test_log_prob_gauss_needs_shapes_that_broadcast() -> None:
    check(ValueError, "z", "log_prob_gauss", z=torch.zeros(B, D + 1))
    check(ValueError, "mu", "log_prob_gauss", mu=torch.zeros(B + 1, D))
    check(ValueError, "logvar", "log_prob_gauss", logvar=torch.zeros(2, 2, D))
    check(ValueError, "z", "log_prob_gauss", z=torch.zeros(()))


@pytest.mark.parametrize("name", ALL)
def test_different_devices(name: str) -> None:
    elsewhere = torch.zeros(B, D, device="meta")
    check(ValueError, tensors(name)[-1], name, **{tensors(name)[-1]: elsewhere})
    if name not in GAUSSIAN:
        with pytest.raises(ValueError, match=r"^(z|mu): expected the device of"):
            call(name, z=elsewhere)


@pytest.mark.parametrize("prior", ["prior_mu", "prior_logvar"])
def test_prior(prior: str) -> None:
    check(TypeError, prior, "kl_gauss", **{prior: 0.0})
    check(TypeError, prior, "kl_gauss", **{prior: torch.zeros(D).long()})
    check(ValueError, prior, "kl_gauss", **{prior: torch.zeros(D + 1)})
    check(ValueError, prior, "kl_gauss", **{prior: torch.zeros(B + 1, D)})
    check(ValueError, prior, "kl_gauss", **{prior: torch.zeros(1, B, D)})
    check(ValueError, prior, "kl_gauss", **{prior: torch.zeros(D, device="meta")})


@pytest.mark.parametrize("bad", ["batch_mean", "", None, 1], ids=str)
def test_reduction(bad: object) -> None:
    check(ValueError, "reduction", "kl_gauss", reduction=bad)


def test_free_bits() -> None:
    check(ValueError, "free_bits", "kl_gauss", free_bits=-0.1)
    check(ValueError, "free_bits", "kl_gauss", free_bits=math.nan)
    check(TypeError, "free_bits", "kl_gauss", free_bits="1")
    check(TypeError, "free_bits", "kl_gauss", free_bits=torch.ones(D))
    for reduction in ("none", "sample"):
        check(ValueError, "free_bits", "kl_gauss", reduction=reduction, free_bits=0.1)


@pytest.mark.parametrize("name", ["reparameterize", "sample_gauss"])
def test_sampling(name: str) -> None:
    check(ValueError, "n_samples", name, n_samples=-1)
    check(TypeError, "n_samples", name, n_samples=1.0)
    check(TypeError, "n_samples", name, n_samples=True)
    check(TypeError, "seed", name, seed=1.5)
    check(TypeError, "seed", name, seed=torch.tensor(1))
    check(ValueError, "seed", name, seed=2**64)
    check(ValueError, "seed", name, seed=-(2**63) - 1)
    check(ValueError, "generator", name, seed=1, generator=torch.Generator())
    check(TypeError, "generator", name, generator=1)


def test_outputs() -> None:
    check(ValueError, "outputs", "sample_gauss", outputs=("z", "log_r"))
    check(TypeError, "outputs", "sample_gauss", outputs="z")
    check(TypeError, "outputs", "sample_gauss", outputs=None)


@pytest.mark.parametrize("name", ["agg_log_prob", "agg_log_prob_marginals"])
def test_column_weights(name: str) -> None:
    own = torch.arange(B)
    for error, named, weights in (
        (TypeError, "weights", -1.0),
        (TypeError, "weights", torch.zeros(B)),
        (TypeError, "weights.log_w", ColumnWeights(wrong("1"))),
        (TypeError, "weights.log_w", ColumnWeights(wrong(None))),
        (TypeError, "weights.log_w", ColumnWeights(torch.zeros(B).long())),
        (ValueError, "weights.log_w", ColumnWeights(math.nan)),
        (ValueError, "weights.log_w", ColumnWeights(torch.zeros(B + 1))),
        (ValueError, "weights.log_w", ColumnWeights(torch.zeros(B, B))),
        (ValueError, "weights.log_w", ColumnWeights(torch.zeros(()))),
        (ValueError, "weights.log_w", ColumnWeights(torch.zeros(B, device="meta"))),
        (TypeError, "own", ColumnWeights(0.0, wrong([0] * B))),
        (TypeError, "own", ColumnWeights(0.0, own.int())),
        (TypeError, "own", ColumnWeights(0.0, own.float())),
        (ValueError, "own", ColumnWeights(0.0, own[1:])),
        (ValueError, "own", ColumnWeights(0.0, own[:, None])),
        (ValueError, "own", ColumnWeights(0.0, own.to("meta"))),
        (ValueError, "own", ColumnWeights(0.0, own + 1)),
        (ValueError, "own", ColumnWeights(0.0, own - 2)),
        (ValueError, "own", ColumnWeights(0.0, own + 2**40)),
        (ValueError, "own", ColumnWeights(0.0, None, 0.5)),
        (ValueError, "own", ColumnWeights(0.0, None, None, 0.5)),
        (TypeError, "log_w_own", ColumnWeights(0.0, own, wrong(torch.zeros(B)))),
        (TypeError, "log_w_next", ColumnWeights(0.0, own, 0.5, wrong("1"))),
        (ValueError, "log_w_own", ColumnWeights(0.0, own, math.nan)),
    ):
        check(error, named, name, weights=weights)


def entropy_and_weights(**arguments: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    """The two ways to ask for an estimator, of a batch of n_columns."""
    n = arguments.pop("n_columns", B)
    own = torch.arange(n)
    return (
        lambda: call("agg_entropy", **{k: torch.zeros(n, D) for k in ("z", "mu", "logvar")}, **arguments),
        lambda: fastvae.estimator_weights(**{"estimator": None, "n_columns": n, "own": own, **arguments}),
    )


@pytest.mark.parametrize(
    ("error", "named", "arguments"),
    [
        (ValueError, "estimator", {"estimator": "Uniform"}),
        (ValueError, "estimator", {"estimator": 1}),
        (ValueError, "dataset_size", {"dataset_size": B - 1}),
        (ValueError, "dataset_size", {"dataset_size": B - 1, "estimator": "uniform"}),
        (ValueError, "dataset_size", {"dataset_size": -1}),
        (TypeError, "dataset_size", {"dataset_size": 60.0}),
        (ValueError, "dataset_size", {"estimator": "stratified"}),
        (ValueError, "dataset_size", {"estimator": "mss"}),
        (ValueError, "dataset_size", {"estimator": "mws"}),
        (ValueError, "estimator", {"estimator": "stratified", "dataset_size": 60, "n_columns": 1}),
        (ValueError, "estimator", {"estimator": "mss", "dataset_size": 60, "n_columns": 1}),
    ],
    ids=str,
)
def test_estimator(error: type[Exception], named: str, arguments: dict[str, Any]) -> None:
    for ask in entropy_and_weights(**arguments):
        with pytest.raises(error, match=rf"^{named}: .*(expected|cannot)"):
            ask()


def test_own_columns_of_an_estimator() -> None:
    more = torch.zeros(B + 1, D)  # whose columns cannot be guessed
    for estimator in ("stratified", "mss"):
        check(ValueError, "own", "agg_entropy", z=more, estimator=estimator, dataset_size=60)
        with pytest.raises(ValueError, match=r"^own: expected"):
            fastvae.estimator_weights(estimator=estimator, n_columns=B, dataset_size=60)
    check(ValueError, "own", "agg_entropy", own=torch.arange(B) + 1)
    check(ValueError, "own", "agg_entropy", own=torch.arange(B - 1))
    check(TypeError, "own", "agg_entropy", own=list(range(B)))
    check(TypeError, "own", "agg_entropy", own=torch.arange(B).int(), dataset_size=60)
    for estimator in ESTIMATORS:
        for own in ("x", list(range(B)), torch.arange(B).float()):
            with pytest.raises(TypeError, match=r"^own: expected"):
                fastvae.estimator_weights(estimator=estimator, n_columns=B, dataset_size=60, own=wrong(own))
    with pytest.raises(ValueError, match=r"^n_columns: expected"):
        fastvae.estimator_weights(estimator="uniform", n_columns=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_sample_of_no_column_is_for_estimators_that_weigh_all_alike(estimator: str) -> None:
    """The rows of the others would not add up to 1."""
    own = torch.tensor([0, 1, 2, -1])
    if estimator in ("uniform", "mws"):
        everywhere = call("agg_entropy", estimator=estimator, dataset_size=60)
        torch.testing.assert_close(call("agg_entropy", estimator=estimator, dataset_size=60, own=own), everywhere)
    else:
        check(ValueError, "own", "agg_entropy", estimator=estimator, dataset_size=60, own=own)
        with pytest.raises(ValueError, match=r"^own: expected columns from 0 to 3, got values from -1"):
            fastvae.estimator_weights(estimator=estimator, n_columns=B, dataset_size=60, own=own)


@pytest.mark.parametrize("name", ["agg_entropy", "kl_decomposition"])
def test_means_of_no_samples(name: str) -> None:
    check(ValueError, "z", name, z=torch.zeros(0, B, D))
    check(ValueError, "z", name, z=torch.zeros(0, D), own=torch.arange(0))


def test_shapes_and_layouts_of_own() -> None:
    for own, error in ((torch.arange(B)[None], ValueError), (torch.arange(B).to_sparse(), TypeError)):
        with pytest.raises(error, match=r"^own: expected"):
            fastvae.estimator_weights(estimator="mss", n_columns=B, dataset_size=60, own=own)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-39, 10**400])
def test_bandwidth(bad: float) -> None:
    x = torch.zeros(B, D)
    with pytest.raises(ValueError, match=r"^bandwidth: expected"):
        fastvae.mmd(x, x, bad)
    with pytest.raises(ValueError, match=r"^z: expected"):
        fastvae.mmd(x[:, :0], x[:, :0])


def test_entropy_of_no_posteriors() -> None:
    empty = torch.zeros(0, D)
    check(ValueError, "mu", "agg_entropy", z=empty, mu=empty, logvar=empty)


@pytest.mark.parametrize("kind", ["sparse", "nested", "mkldnn"])
@pytest.mark.parametrize("name", ALL)
def test_layouts_other_than_strided(name: str, kind: str) -> None:
    dense = torch.ones(B, D)
    make: dict[str, Callable[[], Tensor]] = {
        "sparse": dense.to_sparse,
        "nested": lambda: torch.nested.nested_tensor([dense, dense]),
        "mkldnn": dense.to_mkldnn,
    }
    for argument in tensors(name):
        check(TypeError, argument, name, **{argument: make[kind]()})


# What a number may come as, and what it is used as.


def test_numbers_of_other_kinds_are_used_as_python_numbers() -> None:
    torch.manual_seed(0)
    z, mu = torch.randn(64, D), torch.randn(64, D)
    logvar = torch.zeros(64, D)
    for size in (np.int32(1_281_167), np.uint64(1_281_167)):
        for estimator in ("stratified", "mss", "mws"):
            ours, plain = (
                fastvae.agg_entropy(z, mu, logvar, dataset_size=n, estimator=estimator) for n in (size, 1_281_167)
            )
            assert torch.equal(ours, plain)
    halves: tuple[Any, ...] = (Fraction(1, 2), np.float32(0.5), np.float64(0.5))
    for half in (*halves, torch.tensor(0.5)):
        assert torch.equal(fastvae.kl_gauss(mu, logvar, free_bits=half), fastvae.kl_gauss(mu, logvar, free_bits=0.5))
    for half in halves:
        weights = (ColumnWeights(x, torch.arange(64), x, x) for x in (half, 0.5))
        ours, plain = (fastvae.agg_log_prob(z, mu, logvar, weights=w) for w in weights)
        assert torch.equal(ours, plain)
    ours, plain = (fastvae.reparameterize(mu, logvar, n, seed=s) for n, s in ((np.int8(2), np.int64(3)), (2, 3)))
    assert torch.equal(ours, plain)


HUGE = 10**5000


@pytest.mark.parametrize("huge", [HUGE, -HUGE], ids=["positive", "negative"])
def test_integers_that_no_float_holds(huge: int) -> None:
    check(ValueError, "free_bits", "kl_gauss", free_bits=huge)
    check(ValueError, "seed", "reparameterize", seed=huge)
    check(ValueError, "n_samples", "reparameterize", n_samples=huge)
    check(ValueError, "dataset_size", "agg_entropy", dataset_size=huge)
    check(ValueError, "tol", "agg_log_prob_marginals", tol=huge)
    check(ValueError, "log_w", "agg_log_prob", weights=ColumnWeights(huge))


def test_more_samples_than_any_memory_holds() -> None:
    for name in ("reparameterize", "sample_gauss"):
        check(ValueError, "n_samples", name, n_samples=2**62)
        with pytest.raises(ValueError, match=r"^n_samples: "):
            getattr(fastvae, name)(torch.zeros(9, 0), torch.zeros(9, 0), 2**62)


@pytest.mark.parametrize("array", [np.zeros(3), np.array(["sum", "mean"]), torch.zeros(3)], ids=str)
def test_arrays_as_a_choice(array: Any) -> None:
    check(ValueError, "reduction", "kl_gauss", reduction=array)
    check(ValueError, "method", "agg_log_prob_marginals", method=array)
    check(ValueError, "outputs", "sample_gauss", outputs=(array,))
    check(ValueError, "estimator", "agg_entropy", estimator=array)


def test_kl_of_an_empty_batch_with_free_bits() -> None:
    mu = torch.zeros(0, D, requires_grad=True)
    for reduction in ("sum", "mean", "batchmean", "dim"):
        kl = fastvae.kl_gauss(mu, mu, reduction=reduction, free_bits=0.5)
        assert torch.equal(kl, torch.zeros(D) if reduction == "dim" else torch.zeros(()))
        assert torch.autograd.grad(kl.sum(), mu)[0].shape == (0, D)
