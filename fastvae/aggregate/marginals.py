"""Marginals of the aggregate posterior: direct, or from a table."""

from typing import Any

import torch
from torch import Tensor

from ..backends.contract import LogWeights, accumulation_dtype
from ..ops.agg_log_prob import agg_log_prob_op
from ..ops.agg_log_prob_marginals import agg_log_prob_marginals_op
from ..ops.checks import accumulated, check_choice, check_number
from ..ops.declare import has_values
from ..ops.interpolate import columns_of, interpolation
from ..ops.pairs import ColumnWeights, checked, over_batches
from .table import affordable, override, tabulate

METHODS = ("auto", "direct", "table")


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
        return over_batches(agg_log_prob_marginals_op, z, mu, logvar, *log_weights)
    most = z.shape[-2] / 2 if method == "table" else affordable(z.shape[-2], mu.shape[-2], accumulation_dtype(z.dtype))

    def joint_and_marginals(z: Tensor, mu: Tensor, logvar: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
        # The joint and the table both have gradients for the inputs, which add up, to be rounded once.
        wide_z, wide_mu, wide_logvar = accumulated(z, mu, logvar)
        weights = LogWeights(*fields)
        if weights.log_w is not None:
            weights = weights._replace(log_w=weights.log_w.to(wide_z.dtype))
        marginals = _tabulated(wide_z, wide_mu, wide_logvar, weights, tol, most)
        if marginals is None:
            return agg_log_prob_marginals_op(z, mu, logvar, *fields)
        joint = agg_log_prob_op(wide_z, wide_mu, wide_logvar, *weights)
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
        return agg_log_prob_marginals_op(z[rows], mu, logvar, *weights._replace(own=weights.own[rows]))[1]

    marginals = interpolation(z, mu, logvar, weights.log_w, common, list(table))
    return override(marginals, z, mu, logvar, weights, direct)


def check_method(method: str, tol: float | None, dtype: torch.dtype) -> float:
    """The tolerance of the marginals, by default that of their dtype."""
    check_choice("method", method, METHODS)
    if tol is None:
        return 1e-12 if dtype == torch.float64 else 1e-6
    return check_number("tol", tol, above=0.0, finite=True)
