"""Finite numbers of any size: what one row or pair never sees costs it no digits, and no gradient is NaN or infinite
where the formula's, of the same dtype, is finite."""

import math

import pytest
import torch
from conftest import Target
from support.helpers import (
    DTYPES,
    Expected,
    aggregate,
    cast,
    cross,
    draw,
    evaluate,
    kl,
    needing_gradients,
    normals,
    sample,
    samples,
)
from support.ops import Op
from torch import Tensor

import fastvae
from fastvae import ColumnWeights

NONE = torch.full((8,), -1)
EVEN = torch.tensor([-1, 2] * 4)  # even samples are drawn from no column, odd ones from number 2
ODD = torch.tensor([2, -1] * 4)

# What even samples never see: own columns, log-weights of own and next columns, log-weight and logvar of column 2.
UNSEEN = {
    "own weight of no sample": (NONE, 700.0, None, 0.0, 0.0),
    "larger own weight of no sample": (NONE, 1e6, None, 0.0, 0.0),
    "own weight of others": (EVEN, 1e6, None, 0.0, 0.0),
    "next weight of others": (EVEN, None, 1e6, 0.0, 0.0),
    "small weights of others": (EVEN, -1e6, -1e30, 0.0, 0.0),
    "weight that another replaces": (ODD, -math.inf, None, 1e6, 0.0),
    "weight far smaller than all": (NONE, None, None, -1e30, 0.0),
    "weight of a column too narrow to be met": (NONE, None, None, 1e6, -60.0),
    "narrow column": (NONE, None, None, 0.0, -80.0),
    "wide column": (NONE, None, None, 0.0, 1e30),
}


@pytest.mark.parametrize("case", UNSEEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("common", [False, True], ids=["weights of columns", "common weight"])
def test_what_a_sample_never_sees_costs_it_no_digits(
    backend: Target, common: bool, dtype: torch.dtype, case: str
) -> None:
    own, log_w_own, log_w_next, heavy, narrow = UNSEEN[case]
    if common and heavy:
        pytest.skip("this is about a column's own weight")
    inputs = samples(8, 5, 2, torch.float64)
    logvar, log_w = inputs["logvar"].detach(), draw(5, seed=3)
    logvar[2] += narrow
    log_w[2] += heavy
    inputs = cast(inputs | {"logvar": logvar.requires_grad_(), "log_w": log_w.requires_grad_()}, dtype)
    own = own.to(logvar.device)
    if common:
        del inputs["log_w"]

    def even(joint: Tensor, marginals: Tensor) -> tuple[Tensor, Tensor]:
        return joint[::2], marginals[::2]

    def weights(log_w: Tensor | None) -> ColumnWeights:
        return ColumnWeights(-1.5 if log_w is None else log_w, own, log_w_own, log_w_next)

    def fast(z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return even(*fastvae.agg_log_prob_marginals(z, mu, logvar, weights=weights(log_w)))

    def formula(z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return even(*aggregate(z, mu, logvar, log_w, weights(log_w)))

    Expected(formula, inputs, ("z", "mu")).check(evaluate(fast, inputs))


def of_numbers(**numbers: list[float]) -> dict[str, Tensor]:
    """[numbers, 1] each, wanting gradients"""
    return needing_gradients({name: torch.tensor(x)[:, None] for name, x in numbers.items()})


def gradients_at(name: str) -> tuple[Op, float | list[list[float]]]:
    """Inputs at which factors of gradients overflow in float32, but not the formula's products, and the upstream."""
    if name == "cross_log_prob":  # of a narrow column, of far samples, and of neither
        inputs = of_numbers(z=[1e10, -1e10, 1e17, 1e17, 0.5], mu=[0.0, 0.25, 0.4], logvar=[-60.0, -30.0, -2.0])
        of_columns = [[1.0, -1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 2.0]]
        return Op(fastvae.cross_log_prob, cross, inputs), [list(row) for row in zip(*of_columns, strict=True)]
    if name == "kl_gauss":
        inputs = of_numbers(
            mu=[-1e38, 1e30, 3.0, 1e19], logvar=[1.0, 60.0, -1e4, 2.0], prior_mu=[-1.0, 1e30, 3.0, -1e19],
            prior_logvar=[-60.0, 0.5, -80.0, -40.0],
        )  # fmt: skip
        return Op(lambda **x: fastvae.kl_gauss(**x, reduction="none"), kl, inputs), 1e-30
    inputs = of_numbers(mu=[0.0, 1e38, -2.0], logvar=[1e27, -1e27, 0.5])
    eps = normals(2, 3, 1, dtype=torch.float32, seed=7)
    return Op(
        lambda **x: fastvae.reparameterize(**x, n_samples=2, seed=7), lambda **x: sample(**x, eps=eps)[0], inputs
    ), 1.0


@pytest.mark.parametrize("name", ["cross_log_prob", "kl_gauss", "reparameterize"])
def test_gradients_are_finite_and_right_where_the_formulas_are(backend: Target, name: str) -> None:
    op, upstream = gradients_at(name)

    def given(output: Tensor) -> Tensor:
        return torch.tensor(upstream, dtype=output.dtype).expand_as(output)

    expected = Expected(op.formula, op.inputs, upstream=given)
    results = zip(evaluate(op.fast, op.inputs, given), evaluate(op.formula, op.inputs, given), strict=True)
    for n, ((got, single), exact, tolerance) in enumerate(
        zip(results, expected.exact, expected.tolerance, strict=True)
    ):
        finite = single.isfinite()
        assert finite.any(), f"result {n}"
        assert got[finite].isfinite().all(), f"result {n}: {got}"
        assert ((got.double() - exact).abs() <= tolerance)[finite].all(), f"result {n}: {got}, expected {exact}"


@pytest.mark.parametrize("n_samples", [2, 9, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_both_signs_are_added_before_sigma_overflows(
    backend: Target, dtype: torch.dtype, n_samples: int
) -> None:
    """d logvar is infinite where the formula's is, with its sign, and not inf − inf."""
    overflows = 200.0 if dtype == torch.float32 else 1500.0
    inputs = cast(of_numbers(mu=[0.5, -1.0, 2.0], logvar=[overflows, 1.0, 1e30]), dtype)
    eps = normals(n_samples, 3, 1, dtype=dtype, seed=7)
    _, _, expected = evaluate(lambda **x: sample(**x, eps=eps)[0], inputs)
    _, _, got = evaluate(lambda **x: fastvae.reparameterize(**x, n_samples=n_samples, seed=7), inputs)
    assert expected.isinf()[:, 0].tolist() == [True, False, True]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_rows_that_hold_nothing_take_no_time(native: Target, reduction: str) -> None:
    nothing = torch.zeros(2**40, 0, requires_grad=True)
    loss = fastvae.kl_gauss(nothing, nothing, reduction=reduction)
    loss.backward()
    expected = math.nan if reduction == "mean" else 0.0
    torch.testing.assert_close(loss.detach(), torch.tensor(expected), equal_nan=True)
