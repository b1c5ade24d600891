"""The weighted log-sum-exp, over posteriors, of their densities at samples.

    log q(z_i)       = log sum_j w_ij prod_d q(z_id | x_j)      agg_log_prob
    log q_d(z_id)    = log sum_j w_ij q(z_id | x_j)             agg_log_prob_marginals

It serves every estimator of the aggregate posterior, mixture priors and EM; nothing of shape [S, N] is formed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends.contract import LogWeights, accumulation_dtype
from ._checks import accumulated, check_choice, check_number
from ._library import declare, declare_backward, empty_gradients, has_values, spread
from .pairs import POSTERIORS, ColumnWeights, checked, over_batches, result
from .table import affordable, columns_of, interpolation, override, tabulate

METHODS = ("auto", "direct", "table")


# Ops: z [S, D]; mu, logvar [N, D]; the weights of LogWeights, one by one.

_WEIGHTS = "Tensor? log_w, Scalar? log_w_all, Tensor? own, Scalar? log_w_own, Scalar? log_w_next"

_agg_log_prob = declare(
    f"agg_log_prob({POSTERIORS}, {_WEIGHTS}) -> Tensor",
    lambda z, *_: result(z, z.shape[0]),
    lambda backend, z, mu, logvar, *weights: backend.agg_log_prob(z, mu, logvar, LogWeights(*weights)),
)
_agg_log_prob_backward = declare_backward(
    f"agg_log_prob_backward(Tensor d_joint, Tensor? joint, {POSTERIORS}, {_WEIGHTS}, bool[] wanted) -> Tensor[]",
    lambda d_joint, joint, z, mu, logvar, log_w, *rest: [
        *([] if joint is not None else [result(z, z.shape[0])]),
        *empty_gradients((z, mu, logvar, log_w), rest[-1]),
    ],
    lambda backend, *arguments: backend.agg_log_prob_backward(
        *arguments[:5], LogWeights(*arguments[5:10]), arguments[10]
    ),
)
_agg_log_prob_marginals = declare(
    f"agg_log_prob_marginals({POSTERIORS}, {_WEIGHTS}) -> (Tensor, Tensor)",
    lambda z, *_: (result(z, z.shape[0]), result(z, *z.shape)),
    lambda backend, z, mu, logvar, *weights: backend.agg_log_prob_marginals(z, mu, logvar, LogWeights(*weights)),
)
_agg_log_prob_marginals_backward = declare_backward(
    "agg_log_prob_marginals_backward(Tensor? d_joint, Tensor? d_marginals, Tensor joint, Tensor marginals,"
    f" {POSTERIORS}, {_WEIGHTS}, bool[] wanted) -> Tensor[]",
    lambda d_joint, d_marginals, joint, marginals, z, mu, logvar, log_w, *rest: empty_gradients(
        (z, mu, logvar, log_w), rest[-1]
    ),
    lambda backend, *arguments: backend.agg_log_prob_marginals_backward(
        *arguments[:7], LogWeights(*arguments[7:12]), arguments[12]
    ),
)


@_agg_log_prob.differentiate
class AggLogProb(Function):
    """z [S, D], mu and logvar [N, D], then the fields of LogWeights; to [S]."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, d_joint: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        return spread(_agg_log_prob_backward(d_joint, *_saved(ctx), wanted), wanted, 8)


@_agg_log_prob_marginals.differentiate
class AggLogProbMarginals(Function):
    """z [S, D], mu and logvar [N, D], then the fields of LogWeights; to the joint [S] and marginals [S, D]."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_joint: Tensor | None, d_marginals: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        gradients = _agg_log_prob_marginals_backward(d_joint, d_marginals, *_saved(ctx), wanted)
        return spread(gradients, wanted, 8)


def _save(ctx: Any, inputs: tuple[Any, ...], *results: Tensor) -> None:
    z, mu, logvar, log_w, log_w_all, own, log_w_own, log_w_next = inputs
    ctx.save_for_backward(*results, z, mu, logvar, log_w, own)
    ctx.numbers = log_w_all, log_w_own, log_w_next


def _saved(ctx: Any) -> tuple[Any, ...]:
    """(*results, z, mu, logvar, then the fields of LogWeights)"""
    *tensors, log_w, own = ctx.saved_tensors
    log_w_all, log_w_own, log_w_next = ctx.numbers
    return (*tensors, log_w, log_w_all, own, log_w_own, log_w_next)


# Public functions


def agg_log_prob(z: Tensor, mu: Tensor, logvar: Tensor, *, weights: ColumnWeights | None = None) -> Tensor:
    """log sum_j w_ij q(z_i | x_j) in nats: the aggregate posterior's log-density, without the [S, N] matrix.

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
    z, mu, logvar, log_weights = checked(z, mu, logvar, weights)
    return over_batches(_agg_log_prob, z, mu, logvar, *log_weights)


def agg_log_prob_marginals(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    weights: ColumnWeights | None = None,
    method: str = "auto",
    tol: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The joint log sum_j w_ij q(z_i | x_j) and, for each dimension, log sum_j w_ij q(z_id | x_jd), in nats.

    Never forms `[S, N]` or `[S, N, D]`. A marginal is a function of one variable, so where there are many samples it
    is tabulated at G points, some hundreds, and interpolated: O((G·N + S)·D) time instead of O(S·N·D).

    Args:
        z, mu, logvar, weights: as in `agg_log_prob`.
        method: `"direct"` evaluates all marginals, in one pass with the joint. `"table"` tabulates them, unless that
            takes more than S/2 points for each dimension in the mean. `"auto"` tabulates where that is at least twice
            as fast; not on a GPU, under the compiler or in a function transform, as it looks at the data.
        tol: how far a tabulated marginal may be from the direct one, beside rounding; None for 1e-6, which is
            also the most, and 1e-12 for float64. Its gradients are those of the interpolant, exactly.

    Returns:
        (joint `[S]`, marginals `[S, D]`) in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as in `agg_log_prob`; an unknown `method`, or `"table"` under the compiler; `tol` not
            above 0.

    Source: Chen et al. 2018; Zheng, eq. 21.

    Example:
        >>> joint, marginals = fastvae.agg_log_prob_marginals(z, mu, logvar)
        >>> total_correlation = (joint - marginals.sum(-1)).mean()
    """
    z, mu, logvar, log_weights = checked(z, mu, logvar, weights)
    tol = check_method(method, tol, z.dtype)
    if method != "direct" and not has_values(z):
        if method == "table":
            raise ValueError("method: expected 'auto' or 'direct' where values cannot be looked at, got 'table'")
        method = "direct"
    if method == "direct" or (method == "auto" and z.device.type != "cpu"):
        return over_batches(_agg_log_prob_marginals, z, mu, logvar, *log_weights)
    most = z.shape[-2] / 2 if method == "table" else affordable(z.shape[-2], mu.shape[-2], accumulation_dtype(z.dtype))

    def joint_and_marginals(z: Tensor, mu: Tensor, logvar: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
        # The joint and the table both have gradients for the inputs, which add up, to be rounded once.
        wide_z, wide_mu, wide_logvar = accumulated(z, mu, logvar)
        weights = LogWeights(*fields)
        if weights.log_w is not None:
            weights = weights._replace(log_w=weights.log_w.to(wide_z.dtype))
        marginals = _tabulated(wide_z, wide_mu, wide_logvar, weights, tol, most)
        if marginals is None:
            return _agg_log_prob_marginals(z, mu, logvar, *fields)
        joint = _agg_log_prob(wide_z, wide_mu, wide_logvar, *weights)
        return joint, marginals.to(joint.dtype)

    return over_batches(joint_and_marginals, z, mu, logvar, *log_weights)


def _tabulated(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights, tol: float, most: float) -> Tensor | None:
    """The marginals [S, D] from a table, in float64; None where it would take more than `most` points."""
    if most <= 0:
        return None
    common = weights.common(len(mu))
    columns = columns_of(mu, logvar, weights.log_w, common)
    overrides = weights.log_w_own is not None or weights.log_w_next is not None  # which may double the error
    table = tabulate(z.detach(), columns, tol / 2 if overrides else tol, most)
    if table is None:
        return None

    def direct(rows: Tensor) -> Tensor:
        assert weights.own is not None
        return _agg_log_prob_marginals(z[rows], mu, logvar, *weights._replace(own=weights.own[rows]))[1]

    marginals = interpolation(z, mu, logvar, weights.log_w, common, list(table))
    return override(marginals, z, mu, logvar, weights, direct)


def check_method(method: str, tol: float | None, dtype: torch.dtype) -> float:
    """The tolerance of the marginals, by default that of their dtype."""
    check_choice("method", method, METHODS)
    if tol is None:
        return 1e-12 if dtype == torch.float64 else 1e-6
    return check_number("tol", tol, above=0.0, finite=True)


def mixture_sums(z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What EM needs of points z `[S, D]` and N components, without autograd: log p(z_i) `[S]`, and the gradients of
    its sum with respect to log_w `[N]`, mu and logvar `[N, D]`. All of one dtype, that of the results."""
    upstream, weights = z.new_ones(z.shape[0]), (log_w, None, None, None, None)
    wanted = [False, True, True, True]
    joint, d_mu, d_logvar, d_log_w = _agg_log_prob_backward(upstream, None, z, mu, logvar, *weights, wanted)
    return joint, d_log_w, d_mu, d_logvar
