"""The log-probability of binary data under logits, fused with its sum over each example.

log p(x) = sum_m x log p + (1 − x) log(1 − p) = sum_m x l − log(1 + e^l),  p = sigmoid(l)
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..backends import composed
from ..backends.contract import accumulation_dtype
from .batching import leading
from .checks import check_device, check_tensor, promote
from .declare import declare, declare_backward, placed
from .short import unpacked

# Ops: x [B, M]; logits [R, M], of which row r meets row r mod B of x.


def _fake(x: Tensor, logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits.dtype))


def _compute(backend: Any, *arguments: Any) -> Tensor:
    return composed.function(backend, "bernoulli_log_prob")(*arguments)


def _compute_backward(backend: Any, *arguments: Any) -> list[Tensor]:
    return composed.function(backend, "bernoulli_log_prob_backward")(*arguments)


def _formula(x: Tensor, logits: Tensor) -> Tensor:
    dtype, n_samples = accumulation_dtype(logits.dtype), len(logits) // max(1, len(x))
    x, logits = x.to(dtype).repeat(n_samples, 1), logits.to(dtype)
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


_bernoulli_log_prob = declare("bernoulli_log_prob(Tensor x, Tensor logits) -> Tensor", _fake, _compute, _formula)
_bernoulli_log_prob_backward = declare_backward(
    "bernoulli_log_prob_backward(Tensor grad, Tensor x, Tensor logits, bool[] wanted) -> Tensor[]",
    ("x", "logits"),
    _compute_backward,
)


@_bernoulli_log_prob.differentiate
class BernoulliLogProb(Function):
    """The autograd Function of x [B, M] and logits [R, M]."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        return placed(_bernoulli_log_prob_backward(grad, *unpacked(ctx), wanted), wanted, 2)


# Under vmap the V problems are one of V·B examples, rows of the logits being in the order [L, V, B].


def _sizes(x: Tensor, logits: Tensor) -> tuple[int, int, int]:
    """L, V, B of x [V, B, M] and logits [V, L·B, M]"""
    V, B = x.shape[:2]
    return logits.shape[1] // max(1, B), V, B


def _by_sample(rows: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    L, _, B = sizes
    return rows.unflatten(1, (L, B)).transpose(0, 1).flatten(0, 2)


def _by_problem(rows: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    return rows.unflatten(0, sizes).transpose(0, 1).flatten(1, 2)


@_bernoulli_log_prob.batch
def _batched(V: int, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    x, logits = leading(arguments, in_dims, V)
    sizes = _sizes(x, logits)
    return _by_problem(_bernoulli_log_prob(x.flatten(0, 1), _by_sample(logits, sizes)), sizes), 0


@_bernoulli_log_prob_backward.batch
def _backward_batched(V: int, in_dims: Any, *arguments: Any) -> tuple[list[Tensor], int]:
    *tensors, wanted = arguments
    grad, x, logits = leading(tensors, in_dims, V)
    sizes = _sizes(x, logits)
    gradients = _bernoulli_log_prob_backward(
        _by_sample(grad, sizes), x.flatten(0, 1), _by_sample(logits, sizes), wanted
    )
    d_x, d_logits = placed(gradients, wanted, 2)
    found = (
        None if d_x is None else d_x.view(x.shape),
        None if d_logits is None else _by_problem(d_logits, sizes),
    )
    return [gradient for gradient in found if gradient is not None], 0


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x) of binary data in nats, summed over each example.

    Args:
        x: `[B, ...]`, 0 or 1; in between it is the negative cross-entropy. float64, float32, bfloat16 or float16.
        logits: `[..., B, ...]`, the log odds of a 1; the last axes are x's.

    Returns:
        `[..., B]`, in float32, or in float64 where an input is.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices do not match.
    """
    check_tensor("x", x)
    check_tensor("logits", logits)
    check_device("x", x, "logits", logits)
    lead = logits.ndim - x.ndim
    if lead < 0 or logits.shape[lead:] != x.shape:
        raise ValueError(f"x: expected the last axes of logits, {tuple(logits.shape)}, got shape {tuple(x.shape)}")
    x, logits = promote(x, logits)  # type: ignore[assignment]
    shape, M = logits.shape[: lead + 1], math.prod(x.shape[1:])
    if lead or x.ndim != 2:
        logits = logits.reshape(math.prod(shape), M)
    if x.ndim != 2:
        x = x.reshape(x.shape[0], M)
    log_p: Tensor = _bernoulli_log_prob(x, logits)
    return log_p.view(shape) if lead else log_p
