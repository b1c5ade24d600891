"""Marginals as functions of one variable: log q_d tabulated, where it would be evaluated at many samples.

    f(x) = log sum_j w_j N(x; mu_j, sigma_j²)

is a smooth function of one real variable, and on a short interval nearly the polynomial sum_k c_k T_k(u), u in [-1, 1],
through its values at 16 Chebyshev points. The last coefficients tell how close the two are, if no detail of f hides
between the points. So an interval is halved until

  - it is no wider than WIDTH times the smallest sigma of the columns that reach it. A column reaches as far as its
    term can exceed tol / N of the sum, where f is no lower than DEPTH nats below the highest value that a column has;
  - the largest of |c_15|, |c_14|, |c_13| / 4, |c_12| / 16 and |c_11| / 64 is below tol / 4, or below the rounding of
    the values, and no value is more than DEPTH below that highest one. (The last two coefficients alone are both small
    by chance now and then.)

Intervals without samples are left out. Where an interval has no more samples than points, or halving does not help, the
samples become points themselves: nothing is interpolated where f is not resolved, and no population costs much more
than without a table. docs/beyond-brute-force.md derives the error.

Source: Trefethen 2019, Approximation Theory and Approximation Practice, chapters 3, 4 and 8.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.interpolate import NODES, Interpolant, chebyshev, log_sums, product
from .columns import Columns
from .intervals import LEVELS, Nodes, Tree, joined, plant, too_wide, widest

WIDTH = 4.0  # of an interval, in units of sigma
DEPTH = 64.0  # nats
ROUGHEST = 100.0  # times tol: with more rounding than this in the values, the interpolant's slope would be noise
LOOSEST = 1e-6  # nats: the last coefficients tell too little about a larger error, which would save few points
DECAY = (*[0.0] * 11, 1 / 64, 1 / 16, 1 / 4, 1, 1)  # weights of the coefficients that are looked at


@torch.no_grad()
def tabulate(z: Tensor, columns: Columns, tol: float, most: float) -> Interpolant | None:
    """Tabulate log sum_j w_j N(z_id; mu_jd, sigma_jd²) for the samples z `[S, D]` to within `tol`.

    None where more than `most` evaluations of the sum per dimension would be needed on average; where something is not
    finite; and where there is nothing to tabulate.
    """
    S, D = z.shape
    if S * D * columns.N == 0:
        return None
    tol = min(tol, LOOSEST)
    log_w = columns.weights.common(columns.N)
    tree = plant(z, columns.by_dimension(), log_w, WIDTH)
    if tree is None:
        return None
    reach = math.sqrt(2 * (DEPTH + math.log(columns.N) - math.log(tol)))
    unresolved = too_wide(tree, columns.by_dimension(), WIDTH, reach)  # for each node of the trees, as are counts
    cells = tree.cells(z)
    counts = tree.counts(cells)
    nodes = widest(counts, unresolved & (counts > 2 * NODES))
    spent = 0
    fits: list[Fit] = []  # of the intervals that are accepted
    singles: list[Tensor] = []  # the samples that are points, and f there
    single_values: list[Tensor] = []
    while len(nodes.dim):
        # Where interpolation is not accurate enough, or saves nothing, the samples are points themselves.
        alone = unresolved[nodes] | (counts[nodes] <= NODES)
        samples, nodes = tree.samples_in(cells, nodes.where(alone)), nodes.where(~alone)
        spent += len(samples) + NODES * len(nodes.dim)
        if spent > most * D:
            return None
        fit, values = _evaluated(z, columns, tree, nodes, samples)
        singles.append(samples)
        single_values.append(values)
        good, high = fit.accepted(tree, tol)
        fits.append(fit.where(good))
        halve = high & ~good & (nodes.level() < LEVELS) & (counts[nodes] > 2 * NODES)
        given_up = nodes.where(~(good | halve))  # their samples become points in the next round
        unresolved[given_up] = True
        nodes = joined((nodes.where(halve).halves(), given_up))
    fit = Fit.joined(fits)
    if len(fit.left) == 0:
        return None
    return _interpolant(z, cells, fit, torch.cat(singles), torch.cat(single_values))


class Fit(NamedTuple):
    """The polynomials for f on P intervals."""

    nodes: Nodes  # [P]
    left: Tensor  # [P]
    width: Tensor  # [P]
    points: Tensor  # [P, 16]
    values: Tensor  # [P, 16], f at the points
    coefficients: Tensor  # [P, 16] of the polynomials through the values

    def where(self, chosen: Tensor) -> "Fit":
        return Fit(self.nodes.where(chosen), *(x[chosen] for x in self[1:]))

    @classmethod
    def joined(cls, fits: "list[Fit]") -> "Fit":
        nodes, *others = zip(*fits, strict=True)
        return cls(joined(nodes), *map(torch.cat, others))

    def accepted(self, tree: Tree, tol: float) -> tuple[Tensor, Tensor]:
        """Which polynomials are f to within `tol`; and which have values all high enough for that to be known, so that
        halving may help where the error is larger."""
        error = (self.coefficients.abs() * self.coefficients.new_tensor(DECAY)).amax(1)
        rounding = 8 * torch.finfo(torch.float64).eps * self.values.abs().amax(1)
        high = self.values.amin(1) > tree.top[self.nodes.dim] - DEPTH
        return high & (error < rounding.clamp(min=tol / 4)) & (rounding < ROUGHEST * tol), high


def _evaluated(z: Tensor, columns: Columns, tree: Tree, nodes: Nodes, samples: Tensor) -> tuple[Fit, Tensor]:
    """Evaluate f on intervals, and at some samples, given as indices into the flat z `[S D]`."""
    u, to_coefficients = chebyshev(z)
    left, width = tree.places(nodes)
    points = left[:, None] + (u + 1) * (0.5 * width[:, None])
    x, dims = _with_samples(points, nodes.dim, z, samples)
    sums = log_sums(columns.by_dimension(), columns.weights.common(columns.N), x, dims, z.shape[1])
    values, sample_values = sums.split((points.numel(), len(samples)))
    values = values.view_as(points)
    return Fit(nodes, left, width, points, values, product(values, to_coefficients.T)), sample_values


def _with_samples(points: Tensor, dim: Tensor, z: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """(x, its dimension) `[n]` of all points: the intervals' own `[P, 16]`, then the samples."""
    x = torch.cat((points.flatten(), z.reshape(-1)[samples].double()))
    return x, torch.cat((dim.repeat_interleave(NODES), samples % z.shape[1]))


def _interpolant(z: Tensor, cells: Tensor, fit: Fit, singles: Tensor, single_values: Tensor) -> Interpolant:
    """Make the Interpolant. A sample's interval is the last that begins at its cell or before, if it is in any."""
    begin, _ = fit.nodes.cells()
    fit, begin = fit.where(begin.argsort()), begin.sort().values
    interval = torch.zeros(z.shape[1] << LEVELS, dtype=torch.int32, device=z.device)
    interval[begin] = torch.arange(len(begin), dtype=torch.int32, device=z.device)
    points, dims = _with_samples(fit.points, fit.nodes.dim, z, singles)
    return Interpolant(
        interval=interval.cummax(0).values.index_select(0, cells.flatten()).view(z.shape),
        left=fit.left,
        width=fit.width,
        coefficients=fit.coefficients.T.contiguous(),
        points=points,
        dims=dims,
        values=torch.cat((fit.values.flatten(), single_values)),
        singles=singles,
    )


def override(common: Tensor, z: Tensor, columns: Columns, direct: Callable[[Tensor], Tensor]) -> Tensor:
    """The marginals `[S, D]` with the weights of the own and the next column, from those with the common weights, f:

        f + log(1 + sum (w_new − w_common) q / e^f)

    with the sum over these two columns. This multiplies the error of f by up to 2. Where it would be more, as most of f
    comes from a column that is left out, the rows `[n]` are computed by `direct`.
    """
    N, weights = columns.N, columns.weights
    if weights.own is None:
        return common
    known = (weights.own >= 0) & (weights.own < N)
    own = weights.own.where(known, 0)
    changes = []  # (log q of the column, its new log-weight, its common one)
    for log_new, column in ((weights.log_w_own, own), (weights.log_w_next, (own + 1) % N)):
        if log_new is None or (column is not own and N == 1 and weights.log_w_own is not None):
            continue
        mean, log_var = (x.double() for x in columns.rows(column))
        log_q = -0.5 * ((z.double() - mean) ** 2 * torch.exp(-log_var) + log_var + math.log(2 * math.pi))
        log_old = weights.common(N) if weights.log_w is None else weights.log_w[column, None].double()
        changes.append((log_q.masked_fill(~known[:, None], -math.inf), log_new, log_old))

    def change(common: Tensor, bad: Tensor) -> Tensor:
        terms = ((log_q.masked_fill(bad, -math.inf), new, old) for log_q, new, old in changes)
        return sum(((q + new - common).exp() - (q + old - common).exp() for q, new, old in terms), 0 * common)

    with torch.no_grad():
        relative = change(common, torch.zeros_like(common, dtype=torch.bool))
        bad = ~((relative > -0.5) & (relative < 1e100))  # NaN is bad too
        rows = bad.any(1).nonzero()[:, 0]
    common = common.masked_fill(bad, 0)
    result = common + torch.log1p(change(common, bad))
    return result.index_copy(0, rows, direct(rows).double()) if len(rows) else result
