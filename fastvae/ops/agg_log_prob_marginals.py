"""The weighted log-sum-exp for all dimensions together and for each alone, in one pass.

    log q(z_i)    = log sum_j w_ij prod_d q(z_id | x_j)
    log q_d(z_id) = log sum_j w_ij q(z_id | x_j)

The public function is in `fastvae.aggregate.marginals`, which tabulates log q_d where that is cheaper.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..backends.contract import Pairs
from .declare import declare, declare_backward, placed
from .pairs import INPUTS, POSTERIORS, WEIGHTS, as_pairs, restored, result, save

# Ops: z [S, D]; mu, logvar [N, D]; the weights of LogWeights, one by one.

agg_log_prob_marginals_op = declare(
    f"agg_log_prob_marginals({POSTERIORS}, {WEIGHTS}) -> (Tensor, Tensor)",
    lambda z, *_: (result(z, z.shape[0]), result(z, *z.shape)),
    lambda backend, *pairs: backend.agg_log_prob_marginals(as_pairs(pairs)),
)
_agg_log_prob_marginals_backward = declare_backward(
    "agg_log_prob_marginals_backward(Tensor? d_joint, Tensor? d_marginals, Tensor joint, Tensor marginals,"
    f" {POSTERIORS}, {WEIGHTS}, bool[] wanted) -> Tensor[]",
    INPUTS,
    lambda backend, d_joint, d_marginals, joint, marginals, *pairs: backend.agg_log_prob_marginals_backward(
        (d_joint, d_marginals), joint, marginals, as_pairs(pairs[:-1]), pairs[-1]
    ),
    rows=("d_joint", "d_marginals", "joint", "marginals", "z", "own"),
)


@agg_log_prob_marginals_op.differentiate
class AggLogProbMarginals(Function):
    """The autograd Function from z [S, D], mu and logvar [N, D], and the fields of LogWeights to the joint [S] and the
    marginals [S, D]."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        save(ctx, inputs, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_joint: Tensor | None, d_marginals: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        gradients = _agg_log_prob_marginals_backward(d_joint, d_marginals, *restored(ctx), wanted)
        return placed(gradients, wanted, 8)


class MarginalsOps:
    """The ops as functions of the contract, for what is composed of them, with a graph."""

    @staticmethod
    def agg_log_prob_marginals(pairs: Pairs) -> tuple[Tensor, Tensor]:
        return agg_log_prob_marginals_op(*pairs[:3], *pairs.weights)

    @staticmethod
    def agg_log_prob_marginals_backward(
        upstream: Sequence[Tensor | None], joint: Tensor, marginals: Tensor, pairs: Pairs, wanted: Sequence[bool]
    ) -> list[Tensor]:
        return _agg_log_prob_marginals_backward(*upstream, joint, marginals, *pairs[:3], *pairs.weights, wanted)
