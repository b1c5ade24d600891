"""The weighted log-sum-exp, over posteriors, of their densities at samples.

    log q(z_i) = log sum_j w_ij prod_d q(z_id | x_j)

It serves every estimator of the aggregate posterior, mixture priors and EM; nothing of shape [S, N] is formed.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..backends.contract import Pairs
from .declare import declare, declare_backward, placed
from .pairs import INPUTS, POSTERIORS, WEIGHTS, ColumnWeights, as_pairs, checked, over_batches, restored, result, save
from .short import is_usual_call

# Ops: z [S, D]; mu, logvar [N, D]; the weights of LogWeights, one by one.

agg_log_prob_op = declare(
    f"agg_log_prob({POSTERIORS}, {WEIGHTS}) -> Tensor",
    lambda z, *_: result(z, z.shape[0]),
    lambda backend, *pairs: backend.agg_log_prob(as_pairs(pairs)),
)
_agg_log_prob_backward = declare_backward(
    f"agg_log_prob_backward(Tensor d_joint, Tensor? joint, {POSTERIORS}, {WEIGHTS}, bool[] wanted) -> Tensor[]",
    INPUTS,
    lambda backend, d_joint, joint, *pairs: backend.agg_log_prob_backward(
        d_joint, joint, as_pairs(pairs[:-1]), pairs[-1]
    ),
    rows=("d_joint", "joint", "z", "own"),
    before=lambda d_joint, joint, z, *_: [result(z, z.shape[0])] if joint is None else [],
)


@agg_log_prob_op.differentiate
class AggLogProb(Function):
    """The autograd Function from z [S, D], mu and logvar [N, D], and the fields of LogWeights to [S]."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, d_joint: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        return placed(_agg_log_prob_backward(d_joint, *restored(ctx), wanted), wanted, 8)


class JointOps:
    """The ops as functions of the contract, for what is composed of them, with a graph."""

    @staticmethod
    def agg_log_prob(pairs: Pairs) -> Tensor:
        return agg_log_prob_op(*pairs[:3], *pairs.weights)

    @staticmethod
    def agg_log_prob_backward(d_joint: Tensor, joint: Any, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]:
        return _agg_log_prob_backward(d_joint, joint, *pairs[:3], *pairs.weights, wanted)


def agg_log_prob(z: Tensor, mu: Tensor, logvar: Tensor, *, weights: ColumnWeights | None = None) -> Tensor:
    """The aggregate posterior's log-density log sum_j w_ij q(z_i | x_j), in nats, without the [S, N] matrix.

    Args:
        z: samples `[S, D]`; `[L, B, D]` holds L samples per posterior and is flattened to S = L·B. Where z and
            mu have equal ranks above 2, leading axes are batches, which share the weights.
        mu: means `[N, D]`.
        logvar: log sigma², the shape of `mu`.
        weights: the log-weights; None for 1/N each. `estimator_weights` makes those of the known estimators.

    Returns:
        `[S]` in float32 (float64 for float64 inputs); −inf, with gradient 0, where every weight is zero.
        Differentiable in z, mu, logvar and `weights.log_w`.

    Raises:
        TypeError: an input is not a floating-point tensor, or `weights` not a ColumnWeights.
        ValueError: shapes or devices do not match, or `own` points past the columns (on CPU tensors; on a GPU,
            and under the compiler, such a sample counts as drawn from none of them).

    On NVIDIA GPUs `fastvae.precision("tf32x3")` trades digits for tensor cores.

    Source: Zheng, eq. 24; with weights, eq. 29.

    Example:
        >>> entropy = -fastvae.agg_log_prob(z, mu, logvar).mean()
    """
    if weights is None and is_usual_call(mu, logvar, z):
        return agg_log_prob_op.short(z, mu, logvar, None, None, None, None, None)
    z, mu, logvar, log_weights = checked(z, mu, logvar, weights)
    return over_batches(agg_log_prob_op, z, mu, logvar, *log_weights)


def mixture_sums(z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums of EM over points z `[S, D]`, for N components and without autograd: log p(z_i) `[S]`, and the gradients
    of sum_i log p(z_i) with respect to log_w `[N]`, mu and logvar `[N, D]`. All inputs are of the results' dtype."""
    upstream, weights = z.new_ones(z.shape[0]), (log_w, None, None, None, None)
    wanted = [False, True, True, True]
    joint, d_mu, d_logvar, d_log_w = _agg_log_prob_backward(upstream, None, z, mu, logvar, *weights, wanted)
    return joint, d_log_w, d_mu, d_logvar
