"""The rule that the other tests judge by has teeth."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import LOG_2PI, Expected, aggregate, cast, evaluate, samples
from torch import Tensor


def expanded(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """z^2 / sigma^2 - 2 z mu / sigma^2 + mu^2 / sigma^2, as matrix products: fast, and wrong by many ulps."""
    w = torch.exp(-logvar)
    t2 = z**2 @ w.T - 2 * z @ (mu * w).T + (mu**2 * w).sum(-1)
    return torch.logsumexp(-0.5 * (t2 + logvar.sum(-1) + z.shape[-1] * LOG_2PI), 1) - math.log(len(mu))


def joint(**inputs: Any) -> Tensor:
    return aggregate(**inputs)[0]


def in_half(**inputs: Tensor) -> Tensor:
    return joint(**cast(inputs, torch.bfloat16)).to(inputs["z"].dtype)


def one_row_too_few(**inputs: Tensor) -> Tensor:
    return joint(**inputs).where(torch.arange(97) != 96, torch.nan)


def off_by_a_few_ulps(**inputs: Tensor) -> Tensor:
    result = joint(**inputs)
    return result * (1 + 16 * torch.finfo(result.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("wrong", [expanded, in_half, one_row_too_few, off_by_a_few_ulps])
def test_refuses(wrong: Callable[..., Tensor], dtype: torch.dtype) -> None:
    inputs = {name: x.detach() for name, x in samples(97, 123, 64 if wrong is expanded else 3, dtype).items()}
    inputs["logvar"] = inputs["logvar"] - 3
    expected = Expected(joint, inputs, ("z", "mu"))
    expected.check(evaluate(joint, inputs))
    with pytest.raises(AssertionError, match="errors are too large"):
        expected.check(evaluate(wrong, inputs))
