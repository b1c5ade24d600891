"""The terms of the KL of posteriors from N(0, I), as means over samples, in one call.

The public function is in `fastvae.aggregate.decomposition`, which defines the terms, and puts them together for other
priors and tabulated marginals.
"""

import functools
from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..backends import composed
from ..backends.contract import TERMS
from .agg_log_prob_marginals import MarginalsOps
from .declare import declare, declare_backward, placed
from .pairs import INPUTS, POSTERIORS, WEIGHTS, as_pairs, restored, result, save

N_TERMS = len(TERMS)
N_DIFFERENTIABLE = N_TERMS - 1  # all but the saturation

# Ops: z [S, D], sample i from posterior i mod N; mu, logvar [N, D]; the weights of LogWeights, one by one. Results: the
# terms, and for the backward the joint [S] and the marginals [S, D].


def _fake(z: Tensor, *_: Any) -> list[Tensor]:
    S, D = z.shape
    terms = [result(z, D) if name == "dim_kl" else result(z) for name in TERMS]
    return [*terms, result(z, S), result(z, S, D)]


def _compute(backend: Any, *pairs: Any) -> list[Tensor]:
    return composed.function(backend, "kl_decomposition")(as_pairs(pairs))


def _compute_backward(backend: Any, *arguments: Any) -> list[Tensor]:
    upstream, (joint, marginals, *pairs, wanted) = arguments[:N_DIFFERENTIABLE], arguments[N_DIFFERENTIABLE:]
    backward = composed.function(backend, "kl_decomposition_backward")
    return backward(upstream, joint, marginals, as_pairs(pairs), wanted)


kl_decomposition_op = declare(
    f"kl_decomposition({POSTERIORS}, {WEIGHTS}) -> Tensor[]",
    _fake,
    _compute,
    functools.partial(_compute, MarginalsOps),
)
_kl_decomposition_backward = declare_backward(
    f"kl_decomposition_backward({', '.join(f'Tensor? d_{name}' for name in TERMS[:N_DIFFERENTIABLE])}, Tensor joint,"
    f" Tensor marginals, {POSTERIORS}, {WEIGHTS}, bool[] wanted) -> Tensor[]",
    INPUTS,
    _compute_backward,
    functools.partial(_compute_backward, MarginalsOps),
)


@kl_decomposition_op.differentiate
class KLDecompositionTerms(Function):
    """The autograd Function from z [S, D], mu and logvar [N, D], and the fields of LogWeights to the op's results."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[N_DIFFERENTIABLE:])
        ctx.set_materialize_grads(False)
        save(ctx, inputs, *output[N_TERMS:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        gradients = _kl_decomposition_backward(*upstream[:N_DIFFERENTIABLE], *restored(ctx), wanted)
        return placed(gradients, wanted, 8)
