"""The panels of `table`: where samples are, and which panels are too wide for a column that reaches them.

There is a binary tree of panels for each dimension, over the samples' range. Its nodes are numbered as in a heap: the
root is 1, and the halves of h are 2 h and 2 h + 1. The 2^LEVELS nodes of the last level are called cells.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 12  # panels are halved so often at most
ELEMENTS = 2**16  # of a matrix at a time, which stay in the cache


class Columns(NamedTuple):
    """The columns of a weighted log-sum-exp, chunk by chunk as often as one asks: mu and logvar `[D, n]` in float64,
    log_w `[n]` or None for `log_w` of all; N in all."""

    chunks: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor | None]]]
    log_w: float
    N: int


class Tree(NamedTuple):
    """low, root `[D]`: where the roots begin, and their widths. top `[D]`: the highest value that a column has."""

    low: Tensor
    root: Tensor
    top: Tensor

    def places(self, dim: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
        """(left, width) of nodes `[n]`."""
        nodes = torch.exp2(levels_of(node))
        width = self.root[dim] / nodes
        return self.low[dim] + (node - nodes) * width, width

    def cells(self, z: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some rows of z `[S, D]` at a time, in float64, and their cells, of D·2^LEVELS."""
        offset = torch.arange(len(self.low), dtype=torch.int32, device=z.device) << LEVELS
        scale = 2**LEVELS / self.root
        step = max(1, ELEMENTS // len(self.low))
        for first in range(0, len(z), step):
            wide = z[first : first + step].double()
            cell = ((wide - self.low) * scale).int().clamp_(0, 2**LEVELS - 1).add_(offset)
            yield slice(first, first + step), wide, cell

    def counts(self, z: Tensor) -> Tensor:
        """How many samples each node has, `[D, 2^(LEVELS + 1)]`."""
        cells = torch.zeros(len(self.low) << LEVELS, dtype=torch.int64, device=z.device)
        for _, _, cell in self.cells(z):
            cells += torch.bincount(cell.flatten(), minlength=len(cells))
        levels = [cells.view(len(self.low), -1)]
        while levels[0].shape[1] > 1:
            levels.insert(0, levels[0].unflatten(1, (-1, 2)).sum(2))
        return torch.cat((torch.zeros_like(levels[0]), *levels), 1)

    def samples_in(self, z: Tensor, dim: Tensor, node: Tensor) -> Tensor:
        """Which elements of z `[S D]` are in one of the nodes, none of which is in another."""
        if len(dim) == 0:
            return dim
        inside = torch.zeros((len(self.low) << LEVELS) + 1, dtype=torch.int32, device=z.device)
        begin = first_cells(dim, node)
        inside.index_add_(0, begin, torch.ones_like(begin, dtype=torch.int32))
        end = begin + torch.exp2(LEVELS - levels_of(node)).long()
        inside.index_add_(0, end, torch.full_like(end, -1, dtype=torch.int32))
        inside = inside.cumsum(0) > 0
        found = [inside[cell.flatten()].nonzero()[:, 0] + rows.start * z.shape[1] for rows, _, cell in self.cells(z)]
        return torch.cat(found)


def levels_of(node: Tensor) -> Tensor:
    return torch.log2(node + 0.5).floor()


def first_cells(dim: Tensor, node: Tensor) -> Tensor:
    """The first cell of each node."""
    size = torch.exp2(LEVELS - levels_of(node)).long()
    return (dim << LEVELS) + node * size - 2**LEVELS


def plant(z: Tensor, columns: Columns, width: float) -> Tree | None:
    """The trees of z `[S, D]`, such that one level's panels are `width` times the narrowest column; None where
    something is not finite."""
    low, high = (x.double() for x in z.aminmax(dim=0))
    narrowest, top = torch.full_like(low, math.inf), torch.full_like(low, -math.inf)
    means = [low.new_zeros(2)]
    for mu, logvar, log_w in columns.chunks():
        means.append(torch.stack(mu.aminmax()))
        narrowest = torch.minimum(narrowest, logvar.amin(1))
        top = torch.maximum(top, (-0.5 * logvar + (columns.log_w if log_w is None else log_w)).amax(1))
    widest = width * torch.exp(0.5 * narrowest)
    root = widest * torch.exp2(torch.log2((high - low) / widest).ceil().clamp(min=0))
    tree = Tree(low, root, top - 0.5 * math.log(2 * math.pi))
    finite = torch.cat((*tree, *means, (high + 2 * root) * (2**LEVELS / root))).isfinite().all()
    return tree if bool(finite & (root > 0).all()) else None


def too_wide(tree: Tree, columns: Columns, width: float, reach: float) -> Tensor:
    """Which nodes are wider than `width` times the sigma of a column that is within `reach` times its sigma of them,
    `[D, 2^(LEVELS + 1)]`: those with a part at the column's own level, of the widest panels that are not, or at level
    LEVELS + 1, that the column reaches."""
    D, size = len(tree.low), 2 ** (LEVELS + 2) + 1
    steps = tree.low.new_zeros(D * size, dtype=torch.int32)  # +1 where the reach of a column begins, −1 past its end
    offset = torch.arange(D, dtype=torch.int32, device=steps.device)[:, None] * size
    low, root = tree.low[:, None], tree.root[:, None]
    n = max(1, ELEMENTS // D)
    for chunk in columns.chunks():
        for first in range(0, chunk[0].shape[1], n):
            mu, logvar = (x[:, first : first + n] for x in chunk[:2])
            sigma = torch.exp(0.5 * logvar)
            level = torch.log2(root / (width * sigma)).sub_(1e-6).ceil_().clamp_(0, LEVELS + 1)
            nodes = torch.exp2(level)
            middle, radius, scale = mu - low, reach * sigma, nodes / root
            begin, end = ((middle + sign * radius).mul_(scale).floor_() for sign in (-1, 1))
            reached = (end >= 0) & (begin < nodes) & (level > 0)
            if chunk[2] is not None:
                reached &= chunk[2][first : first + n] > -math.inf
            signed, offsets = reached.int(), offset + nodes.int()
            for place in (begin, end.add_(1)):
                at = offsets + torch.minimum(place.clamp_(min=0), nodes).int()
                steps.index_add_(0, at.flatten(), signed.flatten())
                signed = -signed
    reached = steps.view(D, size).cumsum(1, dtype=torch.int32) > 0
    levels = [reached[:, size // 2 : -1].unflatten(1, (-1, 2)).any(2)]
    for k in range(LEVELS, 0, -1):
        levels.insert(0, (reached[:, 2**k : 2 ** (k + 1)] | levels[0]).unflatten(1, (-1, 2)).any(2))
    return torch.cat((torch.zeros_like(levels[0]), *levels), 1)


def halved(dim: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
    return dim.repeat_interleave(2), (2 * node[:, None] + torch.arange(2, device=node.device)).flatten()


def widest(counts: Tensor, halve: Tensor) -> tuple[Tensor, Tensor]:
    """(dim, node) of the widest panels with samples that are not to be halved, or cannot be."""
    dim, node = (torch.arange(len(counts), device=counts.device), torch.ones_like(counts[:, 0]))
    found = []
    for k in range(LEVELS + 1):
        go_on = halve[dim, node] & (k < LEVELS)
        found.append((dim[~go_on], node[~go_on]))
        dim, node = halved(dim[go_on], node[go_on])
        some = counts[dim, node] > 0
        dim, node = dim[some], node[some]
    dims, nodes = zip(*found, strict=True)
    return torch.cat(dims), torch.cat(nodes)
