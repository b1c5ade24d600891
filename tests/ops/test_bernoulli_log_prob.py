"""bernoulli_log_prob: sizes, logits of any size, several rows of logits for each example, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from conftest import Target
from support.helpers import DTYPES, HALVES, Named, assert_accurate, cast, draw, wrong
from support.ops import bernoulli
from torch import Tensor

from fastvae.backends import backend_for, composed
from fastvae.ops.bernoulli_log_prob import bernoulli_log_prob


def inputs(L: int, B: int, M: int, dtype: torch.dtype, scale: float = 3.0, binary: bool = True) -> Named:
    """x [B, M] and logits [L, B, M], which want gradients; so does x where it is between 0 and 1."""
    x, logits = draw(B, M, seed=1), scale * draw(L, B, M, seed=2)
    x = (x > 0).double() if binary else x.sigmoid()
    named = cast({"x": x, "logits": logits}, dtype)
    named["logits"].requires_grad_()
    named["x"].requires_grad_(not binary)
    return named


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("sizes", [(1, 5, 784), (3, 2, 513), (2, 33, 1), (1, 1, 20_001), (4, 700, 7)], ids=str)
def test_sizes(backend: Target, sizes: tuple[int, int, int], binary: bool, dtype: torch.dtype) -> None:
    assert_accurate(bernoulli_log_prob, bernoulli, inputs(*sizes, dtype, binary=binary))


def elements(dtype: torch.dtype) -> Tensor:
    """Logits of any size, one a row, from the smallest to those whose exponentials are none."""
    large = torch.linspace(-130, 130, 5201, dtype=torch.float64, device="cpu")
    exponents = torch.arange(-120.0, 0.0, 0.25, dtype=torch.float64, device="cpu")
    small = torch.exp2(exponents)
    logits = torch.cat((large, small, -small, torch.zeros(2, dtype=torch.float64, device="cpu"), 10 * large))
    return logits.to(dtype).to(torch.get_default_device())[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x", [0.0, 1.0])
def test_small_results_keep_their_digits(backend: Target, x: float, dtype: torch.dtype) -> None:
    """Each log-probability of one element, and its gradient, to a few ulp of its own size, however small."""
    logits = elements(dtype).requires_grad_()
    log_p = bernoulli_log_prob(torch.full_like(logits, x), logits)
    (gradient,) = torch.autograd.grad(log_p.sum(), logits)
    away = (1 - 2 * x) * logits.detach().double()  # log p = −log(1 + e^away)
    exact = -torch.logaddexp(away, torch.zeros_like(away))[:, 0]
    smallest = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(log_p.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=8 * smallest)
    pulled = (1 - 2 * x) * -torch.sigmoid(away)
    relative = 4 * torch.finfo(dtype).eps if backend.backend == "native" else 0.0  # others: x − sigmoid(l), rounded
    absolute = 8 * smallest if backend.backend == "native" else torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), pulled, rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 9, 1040])
def test_infinite_logits_and_nan(backend: Target, M: int, dtype: torch.dtype) -> None:
    """A certain prediction costs nothing where it is right, and everything where it is wrong; NaN stays."""
    inf, nan = math.inf, math.nan
    cases = [(1, inf, 0), (0, inf, -inf), (1, -inf, -inf), (0, -inf, 0), (0.5, inf, -inf), (0, nan, nan), (nan, 0, nan)]
    x, logits, expected = torch.tensor(cases, dtype=dtype).unbind(1)
    x, logits = x[:, None].repeat(1, M), logits[:, None].repeat(1, M)
    logits[:, 1:], x[:, 1:] = 60.0, 1.0  # nothing, in either dtype, beside what is infinite
    logits.requires_grad_()
    log_p = bernoulli_log_prob(x, logits)
    torch.testing.assert_close(log_p, expected, equal_nan=True, rtol=0, atol=1e-20)
    (gradient,) = torch.autograd.grad(log_p.sum(), logits)
    wanted = torch.tensor([0, -1, 1, 0, -0.5, nan, nan], dtype=dtype)
    torch.testing.assert_close(gradient[:, 0], wanted, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(backend: Target, dtype: torch.dtype) -> None:
    """The contract's functions widen what they are given, x of any dtype too; gradients are in the inputs' dtype."""
    named = inputs(2, 5, 50, dtype, binary=False)
    x, logits = named["x"].detach(), named["logits"].detach().flatten(0, 1)
    module = backend_for(x.device)
    function, backward = (composed.function(module, f"bernoulli_log_prob{end}") for end in ("", "_backward"))
    grad = draw(10, seed=3).float()
    assert torch.equal(function(x, logits), function(x.float(), logits.float()))
    for found, wide in zip(
        backward(grad, x, logits, (True, True)), backward(grad, x.float(), logits.float(), (True, True)), strict=True
    ):
        assert found.dtype == dtype
        assert torch.equal(found, wide.to(dtype))
    whole = (x > 0.5).to(torch.uint8)
    assert torch.equal(function(whole, logits), function(whole.float(), logits.float()))


def test_shapes(backend: Target) -> None:
    """x [B, ...] and logits [..., B, ...]: an example is all axes after the first."""
    x, logits = draw(4, 3, 5, 2, seed=1).sigmoid(), draw(2, 6, 4, 3, 5, 2, seed=2)
    expected = bernoulli(x.flatten(1), logits.flatten(3))
    torch.testing.assert_close(bernoulli_log_prob(x, logits), expected)
    torch.testing.assert_close(bernoulli_log_prob(x, logits[0, 0]), expected[0, 0])
    torch.testing.assert_close(bernoulli_log_prob(x.mT, logits.mT), expected)
    torch.testing.assert_close(bernoulli_log_prob(x[:, 0, 0, 0], logits[..., 0, 0, 0]).shape, torch.Size([2, 6, 4]))
    of_one = x[:, 0, 0, 0], logits[0, :, :, 0, 0, 0]  # logits [6, 4] are no rows of x [4]
    torch.testing.assert_close(bernoulli_log_prob(*of_one), bernoulli(of_one[0][:, None], of_one[1][..., None]))
    assert bernoulli_log_prob(x[:, :0], logits[:, :, :, :0]).eq(0).all()
    assert bernoulli_log_prob(x[:0], logits[:, :, :0]).shape == (2, 6, 0)


@pytest.mark.parametrize("in_dims", [(0, 0), (None, 0), (0, None)], ids=str)
def test_one_call_for_a_batch(backend: Target, in_dims: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under vmap one call of the backend's function each way serves all problems."""
    x, logits = draw(7, 3, 5, seed=1).sigmoid(), draw(7, 2, 3, 5, seed=2)
    given = [t if dim == 0 else t[0] for t, dim in zip((x, logits), in_dims, strict=True)]

    def gradients(function: Any) -> Any:
        return torch.func.grad(lambda *t: function(*t).square().sum(), argnums=(0, 1))

    expected = torch.vmap(gradients(bernoulli), in_dims)(*given)
    calls: list[str] = []
    for name in ("bernoulli_log_prob", "bernoulli_log_prob_backward"):
        function = composed.function(module := backend_for(x.device), name)

        def noted(*arguments: Any, name: str = name, function: Any = function) -> Any:
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, noted, raising=False)
    found = torch.vmap(gradients(bernoulli_log_prob), in_dims)(*given)
    torch.testing.assert_close(found, expected)
    assert calls == ["bernoulli_log_prob", "bernoulli_log_prob_backward"]


@pytest.mark.parametrize(
    ("x", "logits", "error", "name"),
    [
        ([0.0], torch.zeros(1), TypeError, "x"),
        (torch.zeros(1, dtype=torch.int64), torch.zeros(1), TypeError, "x"),
        (torch.zeros(1), torch.zeros(1, dtype=torch.cfloat), TypeError, "logits"),
        (torch.zeros(()), torch.zeros(1), ValueError, "x"),
        (torch.zeros(2, 3), torch.zeros(3), ValueError, "x"),
        (torch.zeros(2, 3), torch.zeros(4, 1, 3), ValueError, "x"),
        (torch.zeros(1, 3), torch.zeros(4, 3), ValueError, "x"),
        (torch.zeros(3, device="meta"), torch.zeros(3), ValueError, "x"),
    ],
)
def test_errors(x: Any, logits: Any, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        bernoulli_log_prob(wrong(x), wrong(logits))
