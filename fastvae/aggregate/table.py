import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.contract import LogWeights
from ..ops.interpolate import NODES, Columns, Table, chebyshev, log_sums, product
from .intervals import LEVELS, first_cells, halved, levels_of, plant, too_wide, widest

WIDTH = 4.0  # of a panel, in units of sigma
DEPTH = 64.0  # nats
ROUGHEST = 100.0  # times the tolerance: the rounding of values so large that the interpolant's slope would be noise
LOOSEST = 1e-6  # nats: of a larger error the last coefficients tell too little, and it would save few points


def affordable(S: int, N: int, dtype: torch.dtype) -> float:
    """How many evaluations for each dimension make the joint and a table half as expensive as the joint and all S
    marginals, as measured with the native kernels. An evaluation in float64 takes the time of 3 in float32; packing a
    column that of 80, interpolating at a sample that of 130, and the calls themselves that of 2.5 million."""
    return (0.26 if dtype == torch.float64 else 0.1) * S - 80 - (130 * S + 2.5e6) / max(1, N)


@torch.no_grad()
def tabulate(z: Tensor, columns: Columns, tol: float, most: float) -> Table | None:
    """log sum_j w_j N(z_id; mu_jd, sigma_jd²) at the samples z `[S, D]` to within `tol`.

    None where more than `most` evaluations of the sum, in the mean over dimensions, would be needed; where something
    is not finite; and where there is nothing to tabulate.
    """
    S, D = z.shape
    tol = min(tol, LOOSEST)
    tree = plant(z, columns, WIDTH) if S * D * columns.N else None
    if tree is None:
        return None
    cells = tree.cells(z)
    counts = tree.counts(cells)
    unresolved = too_wide(tree, columns, WIDTH, math.sqrt(2 * (DEPTH + math.log(columns.N) - math.log(tol))))
    dim, node = widest(counts, unresolved & (counts > 2 * NODES))
    u, to_coefficients = chebyshev(z)
    decay = torch.tensor([0.0] * 11 + [1 / 64, 1 / 16, 1 / 4, 1, 1], dtype=torch.float64, device=z.device)
    spent, found = 0, []
    while len(dim):
        alone = unresolved[dim, node] | (counts[dim, node] <= NODES)
        singles = tree.samples_in(cells, dim[alone], node[alone])
        dim, node = dim[~alone], node[~alone]
        spent += len(singles) + NODES * len(dim)
        if spent > most * D:
            return None
        left, width = tree.places(dim, node)
        points = left[:, None] + (u + 1) * (0.5 * width[:, None])  # [P, 16]
        x = torch.cat((points.flatten(), z.reshape(-1)[singles].double()))
        dims = torch.cat((dim.repeat_interleave(NODES), singles % D))
        values, single_values = log_sums(columns, x, dims, D).split((points.numel(), len(singles)))
        values = values.view_as(points)
        coefficients = product(values, to_coefficients.T)
        error = (coefficients.abs() * decay).amax(1)
        rounding = 8 * torch.finfo(torch.float64).eps * values.abs().amax(1)
        high = values.amin(1) > tree.top[dim] - DEPTH
        good = high & (error < rounding.clamp(min=tol / 4)) & (rounding < ROUGHEST * tol)
        found.append(
            (
                *(x[good] for x in (first_cells(dim, node), dim, left, width, coefficients, points, values)),
                *(singles, single_values),
            )
        )
        halve = high & ~good & (levels_of(node) < LEVELS) & (counts[dim, node] > 2 * NODES)
        alone = ~(good | halve)
        unresolved[dim[alone], node[alone]] = True
        halves = halved(dim[halve], node[halve])
        dim, node = (torch.cat((a, b[alone])) for a, b in zip(halves, (dim, node), strict=True))
    *panels, singles, single_values = map(torch.cat, zip(*found, strict=True))
    begin, dim, left, width, coefficients, points, values = (x[panels[0].argsort()] for x in panels)
    if len(begin) == 0:
        return None
    panel = torch.zeros(D << LEVELS, dtype=torch.int32, device=z.device)
    panel[begin] = torch.arange(len(begin), dtype=torch.int32, device=z.device)
    return Table(
        panel=panel.cummax(0).values.index_select(0, cells.flatten()).view(S, D),
        left=left,
        width=width,
        coefficients=coefficients.T.contiguous(),
        points=torch.cat((points.flatten(), z.reshape(-1)[singles].double())),
        dims=torch.cat((dim.repeat_interleave(NODES), singles % D)),
        values=torch.cat((values.flatten(), single_values)),
        singles=singles,
    )


def override(
    common: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights, direct: Callable[[Tensor], Tensor]
) -> Tensor:
    """The marginals `[S, D]` where those of the common weights are given: f + log(1 + sum (w_new - w_common) q / e^f)
    over the own and next column. That multiplies the error of f by up to 2; rows `[n]` where it would be more are
    those that `direct` gives."""
    N, own, changes = len(mu), weights.own, []
    if own is None:
        return common
    known = (own >= 0) & (own < N)
    own = own.where(known, 0)
    for log_new, column in ((weights.log_w_own, own), (weights.log_w_next, (own + 1) % N)):
        if log_new is None or (column is not own and N == 1 and weights.log_w_own is not None):
            continue
        mean, log_var = mu[column].double(), logvar[column].double()
        log_q = -0.5 * ((z.double() - mean) ** 2 * torch.exp(-log_var) + log_var + math.log(2 * math.pi))
        log_old = weights.common(N) if weights.log_w is None else weights.log_w[column, None].double()
        changes.append((log_q.masked_fill(~known[:, None], -math.inf), log_new, log_old))

    def change(common: Tensor, bad: Tensor) -> Tensor:
        terms = ((log_q.masked_fill(bad, -math.inf), new, old) for log_q, new, old in changes)
        return sum(((q + new - common).exp() - (q + old - common).exp() for q, new, old in terms), 0 * common)

    with torch.no_grad():
        relative = change(common, torch.zeros_like(common, dtype=torch.bool))
        bad = ~((relative > -0.5) & (relative < 1e100))  # NaN too
        rows = bad.any(1).nonzero()[:, 0]
    common = common.masked_fill(bad, 0)
    result = common + torch.log1p(change(common, bad))
    return result.index_copy(0, rows, direct(rows).double()) if len(rows) else result
