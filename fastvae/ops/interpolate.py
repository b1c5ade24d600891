"""Marginals log q_d at many samples, interpolated between points where they were evaluated.

    f(x) = log sum_j w_j N(x; mu_j, sigma_j²)

On an interval of the line f is approximated by the polynomial sum_k c_k T_k(u), u in [-1, 1], through its values at 16
Chebyshev points. `fastvae.aggregate.table` chooses the intervals so that the error is within a tolerance. A sample that
is in none of them is a point itself, with a value of its own.

Points, values and coefficients are float64. Values, and their gradients with respect to the columns, are computed by
`agg_log_prob` in one dimension: the interpolant is linear in its values.

Source: Trefethen 2019, chapters 3 and 4.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends import reference
from ..backends.contract import LogWeights, Pairs, accumulation_dtype
from .declare import declare, declare_backward, placed
from .pairs import INPUTS

NODES = 16  # points of an interval
ELEMENTS = 2**17  # elements of a matrix per block, so that it stays in the cache


class Interpolant(NamedTuple):
    """The tabulated marginals for given samples z `[S, D]`, with P intervals in all dimensions together."""

    interval: Tensor  # [S, D] int32, the number of each sample's interval; arbitrary for a sample that is a point
    left: Tensor  # [P], where each interval begins
    width: Tensor  # [P]
    coefficients: Tensor  # [16, P]
    points: Tensor  # [n]: the intervals' own, [P, 16], then the samples that are points
    dims: Tensor  # [n] int64, the dimension of each point
    values: Tensor  # [n], f at the points
    singles: Tensor  # [n − 16 P] int64, the samples that are points, as indices into the flat z, [S D]


class Chunk(NamedTuple):
    """Some columns of a weighted log-sum-exp, transposed to one row per dimension, without gradient."""

    mu: Tensor  # [D, n], float64, or float32 where the samples are too
    logvar: Tensor  # [D, n]
    log_w: Tensor | None  # [n] float64; None where all columns have the same


def transposed(mu: Tensor, logvar: Tensor, log_w: Tensor | None) -> Chunk:
    """The chunk of the columns mu and logvar `[n, D]`."""
    dtype = accumulation_dtype(mu.dtype)
    mu, logvar = (x.detach().T.to(dtype).contiguous() for x in (mu, logvar))
    return Chunk(mu, logvar, None if log_w is None else log_w.detach().double())


def chebyshev(like: Tensor) -> tuple[Tensor, Tensor]:
    """The Chebyshev points u `[16]`, and the matrix `[16, 16]` from values at these to coefficients."""
    k = torch.arange(NODES, dtype=torch.float64, device=like.device)
    angles = (k + 0.5) * (math.pi / NODES)
    matrix = torch.cos(k[:, None] * angles) * (2 / NODES)
    matrix[0] *= 0.5
    return angles.cos(), matrix


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x `[P, 16]` times a matrix, the same bits for any number of threads."""
    result = torch.zeros_like(x)
    for column, row in zip(x.T, matrix, strict=True):
        result.addcmul_(column[:, None], row)
    return result


def _sorted_by_dimension(dims: Tensor, D: int) -> tuple[Tensor, list[tuple[int, slice]]]:
    """The order that sorts points by their dimension, and in it the slice of each dimension that occurs."""
    sizes = torch.bincount(dims, minlength=D)
    ends = sizes.cumsum(0).tolist()
    places = [(d, slice(end - n, end)) for d, (end, n) in enumerate(zip(ends, sizes.tolist(), strict=True)) if n]
    return dims.argsort(stable=True), places


def log_sums(chunks: Iterable[Chunk], log_w_all: float, x: Tensor, dims: Tensor, D: int) -> Tensor:
    """The log-sum-exp f at points x `[n]` of dimensions `dims`, in float64; log_w_all is for chunks without log_w."""
    order, places = _sorted_by_dimension(dims, D)
    x, total = x[order, None], torch.full_like(x, -math.inf)
    for mu, logvar, log_w in chunks:
        for d, part in places:
            posteriors = x[part], mu[d, :, None].double(), logvar[d, :, None].double()
            value = torch.ops.fastvae.agg_log_prob(*posteriors, log_w, log_w_all, None, None, None)
            torch.logaddexp(total[part], value, out=total[part])
    return torch.empty_like(total).index_put_((order,), total)


def blocks(z: Tensor) -> Iterator[slice]:
    """Slices of the rows of z `[S, D]`, of about ELEMENTS elements each."""
    step = max(1, ELEMENTS // max(1, z.shape[1]))
    return (slice(first, first + step) for first in range(0, len(z), step))


def _within(interpolant: Interpolant, z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The interval of each sample in `rows`, and its u there, both flat."""
    interval = interpolant.interval[rows].flatten()
    u = z[rows].flatten() - interpolant.left.index_select(0, interval)
    u = u.div_(interpolant.width.index_select(0, interval)).mul_(2).sub_(1)
    return interval, u.clamp_(-1, 1)  # a sample that is a point may be outside


def interpolate(interpolant: Interpolant, z: Tensor) -> Tensor:
    """The marginals at the samples, `[S, D]`, in float64."""
    result = torch.empty(z.shape, dtype=torch.float64, device=z.device)
    for rows in blocks(z):
        interval, u = _within(interpolant, z, rows)
        b, b_next = torch.zeros_like(u), torch.zeros_like(u)  # Clenshaw's recurrence
        for c in interpolant.coefficients[1:].flip(0):
            b, b_next = c.index_select(0, interval).sub_(b_next).addcmul_(u, b, value=2), b
        constant = interpolant.coefficients[0].index_select(0, interval)
        result[rows] = constant.addcmul_(u, b).sub_(b_next).view(-1, z.shape[1])
    result.view(-1)[interpolant.singles] = interpolant.values[len(interpolant.values) - len(interpolant.singles) :]
    return result


# Ops: z [S, D], mu and logvar [N, D], log_w [N] or None, log_w_all, the fields of their Interpolant.

_TABULATED = "Tensor z, Tensor mu, Tensor logvar, Tensor? log_w, float log_w_all, Tensor[] interpolant"

interpolation = declare(
    f"interpolate({_TABULATED}) -> Tensor",
    lambda z, *_: z.new_empty(z.shape, dtype=torch.float64),
    lambda backend, z, mu, logvar, log_w, log_w_all, interpolant: interpolate(Interpolant(*interpolant), z),
    formula=lambda *arguments: reference.agg_log_prob_marginals(_pairs(*arguments))[1].double(),
)
_interpolate_backward = declare_backward(
    f"interpolate_backward(Tensor grad, {_TABULATED}, bool[] wanted) -> Tensor[]",
    INPUTS,
    lambda backend, *arguments: _gradients(*arguments),
    formula=lambda *arguments: _gradients_of_the_sums(*arguments),
    rows=("grad", "z"),
)


@interpolation.differentiate
class Interpolation(Function):
    """The autograd Function from the op's arguments to the marginals [S, D] in float64."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.log_w_all, interpolant = inputs
        ctx.save_for_backward(*tensors, *interpolant)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, interpolant = ctx.saved_tensors[:4], list(ctx.saved_tensors[4:])
        wanted = ctx.needs_input_grad[:4]
        return placed(_interpolate_backward(grad, *inputs, ctx.log_w_all, interpolant, wanted), wanted, 6)


def _gradients(
    grad: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_w: Tensor | None,
    log_w_all: float,
    fields: list[Tensor],
    wanted: list[bool],
) -> list[Tensor]:
    inputs, interpolant = (z, mu, logvar, log_w), Interpolant(*fields)
    d_z, d_coefficients = _through_intervals(interpolant, z, grad)
    _, to_coefficients = chebyshev(grad)
    d_values = torch.cat((product(d_coefficients, to_coefficients).flatten(), grad.reshape(-1)[interpolant.singles]))
    d_points, *others = _through_columns(interpolant, inputs, log_w_all, d_values, wanted)
    d_z.view(-1)[interpolant.singles] = d_points[len(d_points) - len(interpolant.singles) :].to(d_z.dtype)
    gradients = zip((d_z, *others), inputs, wanted, strict=True)
    return [g.to(x.dtype) for g, x, want in gradients if want and x is not None]


def _pairs(z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor | None, log_w_all: float, _: Any) -> Pairs:
    return Pairs(z, mu, logvar, LogWeights(log_w, log_w_all))


def _gradients_of_the_sums(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """The gradients of what the interpolant stands for, which have derivatives."""
    pairs, grad = _pairs(*arguments[:-1]), grad.to(accumulation_dtype(arguments[0].dtype))
    joint, marginals = (x.detach() for x in reference.agg_log_prob_marginals(pairs))
    return reference.agg_log_prob_marginals_backward((None, grad), joint, marginals, pairs, arguments[-1])


def _through_intervals(interpolant: Interpolant, z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients: d z `[S, D]` of the samples in intervals, in z's dtype, and d coefficients `[P, 16]`."""
    k = torch.arange(NODES, dtype=torch.float64, device=z.device)[:, None]
    slopes = interpolant.coefficients * (2 * k / interpolant.width)  # T_k' = k U_{k − 1}
    d_z, d_coefficients = torch.empty_like(z, memory_format=torch.contiguous_format), torch.zeros_like(slopes)
    single = torch.zeros(z.numel(), dtype=torch.bool, device=z.device)
    single = single.index_fill_(0, interpolant.singles, True).view(z.shape)
    for rows in blocks(z):
        interval, u = _within(interpolant, z, rows)
        above, slope = grad[rows].masked_fill(single[rows], 0).flatten(), torch.zeros_like(u)
        t, t_next = torch.ones_like(u), u  # T_k and T_{k + 1}
        v, v_next = torch.zeros_like(u), torch.ones_like(u)  # U_{k − 1} and U_k
        for d_c, c in zip(d_coefficients, slopes, strict=True):
            d_c.index_add_(0, interval, above * t)
            slope.addcmul_(c.index_select(0, interval), v)
            t, t_next = t_next, (2 * u).mul_(t_next).sub_(t)
            v, v_next = v_next, (2 * u).mul_(v_next).sub_(v)
        d_z[rows] = slope.mul_(above).view(-1, z.shape[1])
    return d_z, d_coefficients.T


def _through_columns(
    interpolant: Interpolant, inputs: tuple[Any, ...], log_w_all: float, d_values: Tensor, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients: d points `[n]`, d mu and d logvar `[N, D]` in their dtypes, d log_w `[N]`; zero where not wanted."""
    mu, logvar, log_w = transposed(*inputs[1:4])
    order, places = _sorted_by_dimension(interpolant.dims, len(mu))
    x, d_x = interpolant.points[order, None], torch.zeros_like(interpolant.points)
    values, d_values = interpolant.values[order], d_values[order]
    d_mu, d_logvar = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs[1:3])
    d_log_w = d_x.new_zeros(mu.shape[1])
    for d, part in places:
        posteriors = x[part], mu[d, :, None].double(), logvar[d, :, None].double()
        weights = log_w, log_w_all, None, None, None
        gradients = torch.ops.fastvae.agg_log_prob_backward(d_values[part], values[part], *posteriors, *weights, wanted)
        totals = d_x[part], d_mu[:, d], d_logvar[:, d], d_log_w  # all but log_w's are of one dimension
        asked = (total for total, want in zip(totals, wanted, strict=True) if want)
        for total, gradient in zip(asked, gradients, strict=True):
            total += gradient.view_as(total)
    return torch.empty_like(d_x).index_put_((order,), d_x), d_mu, d_logvar, d_log_w
