"""The joint log-density of a weighted sum of posteriors and its marginals: directly, or the marginals from a table.

    log q(z_i)    = log sum_j w_ij prod_d q(z_id | x_j)
    log q_d(z_id) = log sum_j w_ij q(z_id | x_j)

`log_densities` is the one place that chooses, for batches, data sets and prior holes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import LogWeights
from ..ops.agg_log_prob import agg_log_prob_op
from ..ops.agg_log_prob_marginals import agg_log_prob_marginals_op
from ..ops.checks import accumulated, check_choice, check_number
from ..ops.modes import has_values
from ..ops.pairs import ColumnWeights, checked, over_batches
from ..ops.short import is_usual_call
from .columns import Columns, InMemory
from .table import override, tabulate

METHODS = ("auto", "direct", "table")


class AggregateLogProb(NamedTuple):
    """The result of `agg_log_prob_marginals`, in nats, in float32 (float64 for float64 inputs).

    Attributes:
        joint: log sum_j w_ij q(z_i | x_j) of each sample, `[S]`.
        marginals: log sum_j w_ij q(z_id | x_jd) of each sample and dimension, `[S, D]`.
    """

    joint: Tensor
    marginals: Tensor


def agg_log_prob_marginals(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    weights: ColumnWeights | None = None,
    method: str = "auto",
    tol: float | None = None,
) -> AggregateLogProb:
    """The joint log sum_j w_ij q(z_i | x_j) and, for each dimension, log sum_j w_ij q(z_id | x_jd), in nats.

    Never forms `[S, N]` or `[S, N, D]`. A marginal is a function of one variable, so where there are many samples it
    is tabulated at G points, some hundreds, and interpolated: O((G·N + S)·D) time instead of O(S·N·D).

    Args:
        z, mu, logvar, weights: as in `agg_log_prob`.
        method: `"direct"` evaluates all marginals, in one pass with the joint. `"table"` tabulates them, unless that
            takes more than S/2 points per dimension on average. `"auto"` tabulates where that is at least twice as
            fast; as it looks at the data, it never does so on a GPU, under the compiler or in a function transform.
        tol: how far a tabulated marginal may be from the direct one, apart from rounding; None for 1e-6, which is
            also the maximum, or 1e-12 for float64. Its gradients are exactly those of the interpolant.

    Returns:
        AggregateLogProb: `joint` `[S]` and `marginals` `[S, D]`, in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as in `agg_log_prob`; an unknown `method`, or `"table"` under the compiler; `tol` not
            above 0.

    Source: Chen et al. 2018; Zheng, eq. 21.

    Example:
        >>> log_q = fastvae.agg_log_prob_marginals(z, mu, logvar)
        >>> total_correlation = (log_q.joint - log_q.marginals.sum(-1)).mean()
    """
    if weights is None and is_usual_call(mu, logvar, z):
        check_method(method, tol, z.dtype)
        if is_direct(z, mu, method):
            return AggregateLogProb(*agg_log_prob_marginals_op.short(z, mu, logvar, None, None, None, None, None))
    z, mu, logvar, log_weights = checked(z, mu, logvar, weights)
    tol = check_method(method, tol, z.dtype)
    if is_direct(z, mu, method):
        return AggregateLogProb(*over_batches(agg_log_prob_marginals_op, z, mu, logvar, *log_weights))

    def of_a_batch(z: Tensor, mu: Tensor, logvar: Tensor, *fields: Any) -> tuple[Tensor | None, Tensor]:
        joint, marginals = log_densities(z, InMemory(mu, logvar, LogWeights(*fields)), method=method, tol=tol)
        return joint, marginals.to(z.dtype)

    # The joint's and the table's gradients for the inputs add up, and their sum is rounded once.
    z, mu, logvar = accumulated(z, mu, logvar)
    if log_weights.log_w is not None:
        log_weights = log_weights._replace(log_w=log_weights.log_w.to(z.dtype))
    return AggregateLogProb(*over_batches(of_a_batch, z, mu, logvar, *log_weights))


def is_direct(z: Tensor, mu: Tensor, method: str) -> bool:
    """Whether all marginals of samples z `[..., S, D]` are evaluated directly: by a method that has been checked."""
    if method != "direct" and not has_values(z):
        if method == "table":
            raise ValueError("method: expected 'auto' or 'direct' where values cannot be looked at, got 'table'")
        return True
    if method == "auto":
        return z.device.type != "cpu" or affordable(z.shape[-2], mu.shape[-2], z.dtype) <= 0
    return method == "direct"


def log_densities(
    z: Tensor,
    columns: Columns,
    *,
    method: str = "direct",
    tol: float = 1e-6,
    joint: bool = True,
    floor: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """log q(z_i) `[S]` and log q_d(z_id) `[S, D]` of samples z `[S, D]`, as sums over columns.

    Args:
        method, tol: as in `agg_log_prob_marginals`, except that `"auto"` may tabulate on any device.
        joint: whether log q(z_i) is wanted; None is returned for it otherwise. A table saves its computation.
        floor: `[S]`, a known lower bound of each log q(z_i), such as its term at its own column. A result that
            rounding has put below it becomes the floor.

    Returns:
        The joint and the marginals: in the dtype of z, an accumulation dtype, over columns in memory; in float64 over
        streamed columns, and for marginals from a table. Differentiable where the columns are in memory.
    """
    marginals = None if method == "direct" else _tabulated(z, columns, method, tol)
    if marginals is None:
        log_q, marginals = columns.log_sum(lambda *chunk: agg_log_prob_marginals_op(z, *chunk))
    elif joint:
        (log_q,) = columns.log_sum(lambda *chunk: [agg_log_prob_op(z, *chunk)])
    if not joint:
        return None, marginals
    return log_q if floor is None else torch.maximum(log_q, floor.to(log_q.dtype)), marginals


def _tabulated(z: Tensor, columns: Columns, method: str, tol: float) -> Tensor | None:
    """The marginals `[S, D]` from a table, in float64; None where it would take too many points."""
    S, weights = len(z), columns.weights
    most = S / 2 if method == "table" else affordable(S, columns.N, z.dtype)
    if most <= 0:
        return None
    overridden = weights.log_w_own is not None or weights.log_w_next is not None  # overrides may double the error
    interpolant = tabulate(z.detach(), columns, tol / 2 if overridden else tol, most)
    if interpolant is None:
        return None
    common = columns.interpolate(interpolant, z)
    return override(common, z, columns, lambda rows: log_densities(z[rows], columns.of_samples(rows), joint=False)[1])


def affordable(S: int, N: int, dtype: torch.dtype) -> float:
    """How many evaluations per dimension a table may take, so that it and the joint cost half of the joint and all S
    marginals, as measured with the native kernels. An evaluation in float64 takes the time of 3 in float32; packing a
    column takes that of 80, interpolating at a sample that of 130, the calls themselves that of 2.5 million."""
    return (0.26 if dtype == torch.float64 else 0.1) * S - 80 - (130 * S + 2.5e6) / max(1, N)


def check_method(method: str, tol: float | None, dtype: torch.dtype) -> float:
    """Check both; return the tolerance of the marginals, by default that of their dtype."""
    check_choice("method", method, METHODS)
    if tol is None:
        return 1e-12 if dtype == torch.float64 else 1e-6
    return check_number("tol", tol, above=0.0, finite=True)
