"""The panels of `table`: where samples are, and which panels are too wide for a column that reaches them.

There is a binary tree of panels for each dimension, over the samples' range. Its nodes are numbered as in a heap: the
root is 1, and the halves of h are 2 h and 2 h + 1. The 2^LEVELS nodes of the last level are called cells.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.interpolate import ELEMENTS, Columns, blocks

LEVELS = 12  # panels are halved so often at most
EXTREME = 1e30  # what is larger, or a width that is smaller than its inverse, is not tabulated


class Tree(NamedTuple):
    """low, root `[D]`: where the roots begin, and their widths. top `[D]`: the highest value that a column has. depth
    `[D]`: the level that is as wide as the narrowest column allows."""

    low: Tensor
    root: Tensor
    top: Tensor
    depth: Tensor

    def places(self, dim: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
        """(left, width) of nodes `[n]`."""
        nodes = torch.exp2(levels_of(node))
        width = self.root[dim] / nodes
        return self.low[dim] + (node - nodes) * width, width

    def cells(self, z: Tensor) -> Tensor:
        """The cells of the samples z `[S, D]`, of D·2^LEVELS, in int32."""
        cells = torch.empty(z.shape, dtype=torch.int32, device=z.device)
        offset = torch.arange(len(self.low), dtype=torch.int32, device=z.device) << LEVELS
        scale = 2**LEVELS / self.root
        for rows in blocks(z):
            torch.add(((z[rows] - self.low) * scale).int().clamp_(0, 2**LEVELS - 1), offset, out=cells[rows])
        return cells

    def counts(self, cells: Tensor) -> Tensor:
        """How many samples each node has, `[D, 2^(LEVELS + 1)]`."""
        found = torch.bincount(cells.flatten(), minlength=len(self.low) << LEVELS)
        levels = [found.view(len(self.low), -1)]
        while levels[0].shape[1] > 1:
            levels.insert(0, levels[0].unflatten(1, (-1, 2)).sum(2))
        return torch.cat((torch.zeros_like(levels[0]), *levels), 1)

    def samples_in(self, cells: Tensor, dim: Tensor, node: Tensor) -> Tensor:
        """Which elements of z `[S D]` are in one of the nodes, none of which is in another."""
        if len(dim) == 0:
            return dim
        inside = torch.zeros((len(self.low) << LEVELS) + 1, dtype=torch.int32, device=cells.device)
        begin = first_cells(dim, node)
        inside.index_add_(0, begin, torch.ones_like(begin, dtype=torch.int32))
        end = begin + torch.exp2(LEVELS - levels_of(node)).long()
        inside.index_add_(0, end, torch.full_like(end, -1, dtype=torch.int32))
        return (inside.cumsum(0) > 0).index_select(0, cells.flatten()).nonzero()[:, 0]


def levels_of(node: Tensor) -> Tensor:
    return torch.log2(node + 0.5).floor()


def first_cells(dim: Tensor, node: Tensor) -> Tensor:
    """The first cell of each node."""
    size = torch.exp2(LEVELS - levels_of(node)).long()
    return (dim << LEVELS) + node * size - 2**LEVELS


def plant(z: Tensor, columns: Columns, width: float) -> Tree | None:
    """The trees of z `[S, D]`, such that one level's panels are `width` times the narrowest column; None where
    something is not finite, or extreme."""
    low, high = (x.double() for x in z.aminmax(dim=0))
    narrowest, top = torch.full_like(low, math.inf), torch.full_like(low, -math.inf)
    means = [low.new_zeros(2)]
    for mu, logvar, log_w in columns.chunks():
        means.append(torch.stack(mu.aminmax()).double())
        least = logvar.amin(1).double()
        narrowest = torch.minimum(narrowest, least)
        highest = columns.log_w - 0.5 * least if log_w is None else (log_w - 0.5 * logvar).amax(1)
        top = torch.maximum(top, highest)
    widest = 0.9999 * width * torch.exp(0.5 * narrowest)  # in spite of rounding
    depth = torch.log2((high - low) / widest).ceil().clamp(min=0)
    tree = Tree(low, widest * torch.exp2(depth), top - 0.5 * math.log(2 * math.pi), depth)
    moderate = (torch.cat((*tree, *means, high)).abs() < EXTREME).all() & (tree.root > 1 / EXTREME).all()
    return tree if bool(moderate & ((high + 2 * tree.root) * (2**LEVELS / tree.root)).isfinite().all()) else None


def too_wide(tree: Tree, columns: Columns, width: float, reach: float) -> Tensor:
    """Which nodes are wider than `width` times the sigma of a column that is within `reach` times its sigma of them,
    `[D, 2^(LEVELS + 1)]`. A column has the level of the widest panels that it allows; those above one of them that is
    as far away from the column's own as any column of that level can reach are too wide."""
    D, deepest = len(tree.low), min(LEVELS + 1, int(tree.depth.max()))
    away = math.ceil(2 * reach / width) + 1  # panels of its level, as they are more than width / 2 sigmas wide
    pad = away + 1  # panels on either side of the samples; the last holds all columns further out
    start = [2**k - 1 + 2 * pad * k for k in range(deepest + 2)]  # of the panels of a level, [pad, 2^k, pad]
    size = start[-1]
    taken = torch.zeros(D * size, dtype=torch.bool, device=tree.low.device)
    offset = torch.arange(D, device=taken.device)[:, None] * size
    n = max(1, ELEMENTS // D)
    for mus, logvars, log_w in columns.chunks():
        low, scale, finest = (
            x[:, None].to(mus.dtype) for x in (tree.low, 1 / tree.root, torch.log2(tree.root / width))
        )
        for first in range(0, mus.shape[1], n):
            mu, logvar = mus[:, first : first + n], logvars[:, first : first + n]
            level = torch.add(finest, logvar, alpha=-0.5 / math.log(2)).ceil_().clamp_(0, deepest)
            if log_w is not None:
                level.masked_fill_(log_w[first : first + n] == -math.inf, 0)
            nodes = torch.exp2(level)
            panel = (mu - low).mul_(scale).mul_(nodes).floor_().clamp_(min=-pad)
            place = torch.minimum(panel, nodes.add_(pad - 1)).add_(nodes).add_(level, alpha=2 * pad)
            taken.index_fill_(0, place.long().add_(offset).flatten(), True)
    result = torch.zeros(D, 2 ** (LEVELS + 1), dtype=torch.bool, device=taken.device)
    above = result[:, : 2**deepest]
    for k in range(deepest, 0, -1):
        sums = taken.view(D, size)[:, start[k] : start[k + 1]].cumsum(1, dtype=torch.int32)
        reached = sums[:, 2 * pad - 1 : -1] > sums[:, : 2**k]
        above = (reached | above).unflatten(1, (-1, 2)).any(2)
        result[:, 2 ** (k - 1) : 2**k] = above
    return result


def halved(dim: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
    return dim.repeat_interleave(2), (2 * node[:, None] + torch.arange(2, device=node.device)).flatten()


def widest(counts: Tensor, halve: Tensor) -> tuple[Tensor, Tensor]:
    """(dim, node) of the widest panels with samples that are not to be halved, or cannot be."""
    dim, node = (torch.arange(len(counts), device=counts.device), torch.ones_like(counts[:, 0]))
    found = []
    for k in range(LEVELS + 1):
        if len(dim) == 0:
            break
        go_on = halve[dim, node] & (k < LEVELS)
        found.append((dim[~go_on], node[~go_on]))
        dim, node = halved(dim[go_on], node[go_on])
        some = counts[dim, node] > 0
        dim, node = dim[some], node[some]
    dims, nodes = zip(*found, strict=True)
    return torch.cat(dims), torch.cat(nodes)
