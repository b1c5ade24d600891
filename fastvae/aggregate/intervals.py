"""The intervals of the line that marginals are tabulated on: where samples are, and which intervals are too wide.

Each dimension has a binary tree of intervals over the samples' range. Nodes are numbered as in a heap: the root is 1,
and the halves of h are 2 h and 2 h + 1. The 2^LEVELS nodes of the last level are called cells.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.interpolate import ELEMENTS, Chunk, blocks

LEVELS = 12  # how often an interval is halved at most
EXTREME = 1e30  # a larger number, or a width smaller than its inverse, is not tabulated


class Nodes(NamedTuple):
    """Some intervals: the dimension of each, and its number in the tree, `[n]` int64."""

    dim: Tensor
    node: Tensor

    def where(self, chosen: Tensor) -> "Nodes":
        return Nodes(self.dim[chosen], self.node[chosen])

    def halves(self) -> "Nodes":
        two = torch.arange(2, device=self.node.device)
        return Nodes(self.dim.repeat_interleave(2), (2 * self.node[:, None] + two).flatten())

    def level(self) -> Tensor:
        return torch.log2(self.node + 0.5).floor()

    def cells(self) -> tuple[Tensor, Tensor]:
        """Each interval's first cell and the one after its last, out of D·2^LEVELS."""
        size = torch.exp2(LEVELS - self.level()).long()
        first = (self.dim << LEVELS) + self.node * size - 2**LEVELS
        return first, first + size


def joined(parts: Iterable[Nodes]) -> Nodes:
    return Nodes(*map(torch.cat, zip(*parts, strict=True)))


class Tree(NamedTuple):
    """The trees of all dimensions, `[D]` each.

    Attributes:
        low, root: where the roots begin, and their widths.
        top: the highest value that a weighted column has anywhere.
        depth: the level whose intervals are as wide as the narrowest column allows.
    """

    low: Tensor
    root: Tensor
    top: Tensor
    depth: Tensor

    def places(self, nodes: Nodes) -> tuple[Tensor, Tensor]:
        """(left, width) of intervals, `[n]`."""
        in_a_level = torch.exp2(nodes.level())
        width = self.root[nodes.dim] / in_a_level
        return self.low[nodes.dim] + (nodes.node - in_a_level) * width, width

    def cells(self, z: Tensor) -> Tensor:
        """The cell of each element of z `[S, D]`, out of D·2^LEVELS, in int32."""
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

    def samples_in(self, cells: Tensor, nodes: Nodes) -> Tensor:
        """Indices into the flat z `[S D]` of the elements inside the nodes, none of which may contain another."""
        if len(nodes.dim) == 0:
            return nodes.dim
        begin, end = nodes.cells()
        inside = torch.zeros((len(self.low) << LEVELS) + 1, dtype=torch.int32, device=cells.device)
        one = torch.ones_like(begin, dtype=torch.int32)
        inside.index_add_(0, begin, one).index_add_(0, end, -one)
        return (inside.cumsum(0) > 0).index_select(0, cells.flatten()).nonzero()[:, 0]


def plant(z: Tensor, chunks: Iterable[Chunk], log_w_all: float, width: float) -> Tree | None:
    """Make the trees for z `[S, D]`, one level of which has intervals `width` times as wide as the narrowest column.
    None where something is not finite, or extreme."""
    low, high = (x.double() for x in z.aminmax(dim=0))
    narrowest, top = torch.full_like(low, math.inf), torch.full_like(low, -math.inf)  # log sigma², log-density
    means = [low.new_zeros(2)]
    for mu, logvar, log_w in chunks:
        means.append(torch.stack(mu.aminmax()).double())
        least = logvar.amin(1).double()
        narrowest = torch.minimum(narrowest, least)
        highest = log_w_all - 0.5 * least if log_w is None else (log_w - 0.5 * logvar).amax(1)
        top = torch.maximum(top, highest)
    widest = 0.9999 * width * torch.exp(0.5 * narrowest)  # less than 1, to allow for rounding
    depth = torch.log2((high - low) / widest).ceil().clamp(min=0)
    tree = Tree(low, widest * torch.exp2(depth), top - 0.5 * math.log(2 * math.pi), depth)
    moderate = (torch.cat((*tree, *means, high)).abs() < EXTREME).all() & (tree.root > 1 / EXTREME).all()
    return tree if bool(moderate & ((high + 2 * tree.root) * (2**LEVELS / tree.root)).isfinite().all()) else None


def too_wide(tree: Tree, chunks: Iterable[Chunk], width: float, reach: float) -> Tensor:
    """Which nodes are wider than `width` times the sigma of a column that reaches them, `[D, 2^(LEVELS + 1)]`. A column
    reaches as far as `reach` times its sigma.

    Each column is looked at once. The widest intervals that it allows are those of one level, its level; of these the
    one with its mean is marked. They are between width / 2 and width times its sigma wide, so the column reaches a
    fixed number of intervals, `away`, from the mark. Level by level, then, an interval is reached where a mark of its
    level is at most that far away; and all intervals with a reached one inside, being wider, are too wide.
    """
    deepest = min(LEVELS + 1, int(tree.depth.max()))
    away = math.ceil(2 * reach / width) + 1
    marks = _marks(tree, chunks, width, deepest, away + 1)
    result = torch.zeros(len(tree.low), 2 ** (LEVELS + 1), dtype=torch.bool, device=tree.low.device)
    inside = result[:, : 2**deepest]  # whether each of the level's intervals has a reached one inside
    for level in range(deepest, 0, -1):
        # Interval i is at place pad + i, and pad is away + 1: those near it are at places i + 1 to i + 2 away + 1.
        upto = marks[level].cumsum(1, dtype=torch.int32)  # number of marks up to a place, [D, pad + 2^level + pad]
        reached = upto[:, 2 * away + 1 : -1] > upto[:, : 2**level]
        inside = (reached | inside).unflatten(1, (-1, 2)).any(2)
        result[:, 2 ** (level - 1) : 2**level] = inside
    return result


def _marks(tree: Tree, chunks: Iterable[Chunk], width: float, deepest: int, pad: int) -> list[Tensor]:
    """The marks of each level up to `deepest`, on the intervals with the mean of a column of that level,
    `[D, pad + 2^level + pad]`: `pad` intervals are on either side of the samples' range, and the last on a side stands
    for all that is further out."""
    D = len(tree.low)
    starts = [2**level - 1 + 2 * pad * level for level in range(deepest + 2)]  # where each level begins
    marks = torch.zeros(D, starts[-1], dtype=torch.bool, device=tree.low.device)
    offset = torch.arange(D, device=marks.device)[:, None] * starts[-1]
    n = max(1, ELEMENTS // D)
    for mus, logvars, log_w in chunks:
        low, scale, finest = (
            x[:, None].to(mus.dtype) for x in (tree.low, 1 / tree.root, torch.log2(tree.root / width))
        )
        for first in range(0, mus.shape[1], n):
            mu, logvar = mus[:, first : first + n], logvars[:, first : first + n]
            level = torch.add(finest, logvar, alpha=-0.5 / math.log(2)).ceil_().clamp_(0, deepest)
            if log_w is not None:
                level.masked_fill_(log_w[first : first + n] == -math.inf, 0)  # a column without weight allows any width
            in_a_level = torch.exp2(level)
            interval = (mu - low).mul_(scale).mul_(in_a_level).floor_().clamp_(min=-pad)
            interval = torch.minimum(interval, in_a_level + (pad - 1))
            place = interval.add_(in_a_level - 1).add_(level, alpha=2 * pad).add_(pad)  # starts[level] + pad + interval
            marks.view(-1).index_fill_(0, place.long().add_(offset).flatten(), True)
    return list(marks.tensor_split(starts[1:-1], 1))


def widest(counts: Tensor, to_halve: Tensor) -> Nodes:
    """The widest intervals that have samples and are not to be halved, or cannot be."""
    nodes = Nodes(torch.arange(len(counts), device=counts.device), torch.ones_like(counts[:, 0]))  # the roots
    found = []
    for level in range(LEVELS + 1):
        if len(nodes.dim) == 0:
            break
        halve = to_halve[nodes] & (level < LEVELS)
        found.append(nodes.where(~halve))
        nodes = nodes.where(halve).halves()
        nodes = nodes.where(counts[nodes] > 0)
    return joined(found)
