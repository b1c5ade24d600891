"""The entropy of a weighted sum of posteriors at samples, −mean_i log q(z_i), with the mean in the same call.

The public function is in `fastvae.aggregate.estimators`, which makes the weights.
"""

import functools
from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..backends import composed
from .agg_log_prob import JointOps
from .declare import declare, declare_backward, placed
from .pairs import INPUTS, POSTERIORS, WEIGHTS, as_pairs, restored, result, save

# Ops: z [S, D]; mu, logvar [N, D]; the weights of LogWeights, one by one.


def _compute(backend: Any, *pairs: Any) -> Tensor:
    return composed.function(backend, "agg_entropy")(as_pairs(pairs))


def _compute_backward(backend: Any, d_entropy: Tensor, *arguments: Any) -> list[Tensor]:
    *pairs, wanted = arguments
    return composed.function(backend, "agg_entropy_backward")(d_entropy, as_pairs(pairs), wanted)


agg_entropy_op = declare(
    f"agg_entropy({POSTERIORS}, {WEIGHTS}) -> Tensor",
    lambda z, *_: result(z),
    _compute,
    functools.partial(_compute, JointOps),
)
_agg_entropy_backward = declare_backward(
    f"agg_entropy_backward(Tensor d_entropy, {POSTERIORS}, {WEIGHTS}, bool[] wanted) -> Tensor[]",
    INPUTS,
    _compute_backward,
    functools.partial(_compute_backward, JointOps),
)


@agg_entropy_op.differentiate
class AggEntropy(Function):
    """The autograd Function from z [S, D], mu and logvar [N, D], and the fields of LogWeights to a number."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        return placed(_agg_entropy_backward(d_entropy, *restored(ctx), wanted), wanted, 8)
