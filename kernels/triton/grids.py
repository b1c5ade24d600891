"""Launch configurations of the cross-evaluated kernels, fixed by the sizes: tiles, and how many programs share them."""

import functools
from typing import NamedTuple

import torch

from ._launch import INTERPRETED, Config, Target, cdiv, resources, target
from .packing import Packed
from .tiles import FOLD

THREADS = 256
SMALL = (2, 4, 8, 32, 4)  # 16 x 128 pairs, for problems that have few pairs, or little to own
Tile = tuple[int, int, int, int, int]  # RO, RP, TO, TP, UNROLL


class Grid(NamedTuple):
    """Programs own blocks of samples (or columns), and take one of `splits` ranges of what passes by."""

    config: Config  # RO, RP, TO, TP, UNROLL and the launch options
    programs: int  # blocks * splits, for each dimension where they have programs of their own
    blocks: int
    splits: int
    tiles: int  # that pass by in one range


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors to fill: an H200's where there is no GPU to ask, and one for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if INTERPRETED and device.type == "cpu" else 132


@functools.lru_cache(4096)
def _grid(tile: Tile, small: Tile, owned: int, passing: int, copies: int, steps: int, sms: int, on: Target) -> Grid:
    """The grid, with the small tile where there are few pairs. Sizes decide between these two tiles alone, the same way
    for all kernels of a problem, so that another batch size seldom compiles another kernel: below 128 x 128 pairs for
    each of 132 multiprocessors, batches of some 1,450, it never does."""
    per_sm = 2
    few = owned * passing < sms * 128**2 or 2 * owned <= tile[0] * tile[2]
    RO, RP, TO, TP, unroll = small if few else tile
    config = {"RO": RO, "RP": RP, "TO": TO, "TP": TP, "UNROLL": unroll} | resources(
        on, THREADS, 65536 // THREADS // per_sm
    )
    blocks, tiles = cdiv(owned, RO * TO), cdiv(passing, RP * TP)
    splits = _splits(blocks * copies, tiles, steps, per_sm * sms)
    return Grid(config, blocks * copies * splits, blocks, splits, max(1, cdiv(tiles, splits)))


class Kind(NamedTuple):
    """The work that a kernel does with pairs, which decides how many of them a thread has room for."""

    reduce: bool = False  # each dimension is summed over what passes by
    overridden: bool = False  # own columns have weights of their own
    early: bool = False  # tiles may stop early
    matrix: bool = False  # each pair has an address of its own, in a matrix


def _tile(D: int, dtype: torch.dtype, kind: Kind) -> Tile:
    """The tile for large problems.

    A program has 256 threads of at most 128 registers, so that two share a multiprocessor, and none may spill. Where a
    pair keeps one sum, a thread has 8 x 8 pairs: a step in d loads 16 words for 128 FMAs. It has half of them where
    squares are summed in two levels, where pairs are compared with own columns, where a tile may stop early, and where
    a compiler makes FMAs in pairs, whose registers have to be neighbours. Gradients keep a tile's shares while they sum
    each dimension over what passes by, across lanes, which should then be few: 2 x 16 pairs and 4 lanes. A number in
    float64 takes two registers."""
    folded, in_pairs = FOLD.value < D, target().pairs_fmas
    half = folded or kind.overridden or kind.early
    if dtype == torch.float64:
        return (2, 2 if folded else 4, 64, 4, 1) if kind.reduce else (4, 2 if half else 4, 32, 8, 1)
    if kind.reduce:
        half = folded or kind.matrix or (kind.overridden and (kind.early or in_pairs))
        return (2, 8, 64, 4, 2) if half else (2, 16, 64, 4, 1 if kind.early or kind.overridden else 2)
    if folded and kind.early:
        return 4, 4, 32, 8, 2
    if half or in_pairs:
        return 8, 4, 16, 16, 1 if folded else 2
    return 8, 8, 16, 16, 1


def grid(
    owned: int, passing: int, D: int, dtype: torch.dtype, device: torch.device, kind: Kind, tile: Tile | None = None
) -> Grid:
    """The grid for `owned` samples against `passing` columns, or the other way round."""
    tile = tile or _tile(D, dtype, kind)
    return _grid(tile, SMALL, owned, passing, 1, D + 8, multiprocessors(device), target())


def kind_of(packed: Packed, reduce: bool) -> Kind:
    """The kind of a kernel of a weighted sum over pairs."""
    return Kind(reduce, any(packed.overridden), packed.order is not None)


def constants(packed: Packed, g: Grid, **others: bool) -> Config:
    """The constants of a kernel that goes through all dimensions of a pair."""
    OWN, NEXT = packed.overridden
    return {"TWO_LEVELS": FOLD.value < packed.D, "OWN": OWN, "NEXT": NEXT, **others, **g.config}


def configs(owned: int, passing: int, dtype: torch.dtype) -> list[Config]:
    """Tiles for `grid` to be timed by `_launch.fastest`: its own choice, and others for large problems."""
    large = owned * passing >= 1 << 22 and dtype != torch.float64
    others = ((4, 16, 32, 8, 1), (4, 8, 32, 8, 2), (8, 4, 16, 16, 2), (8, 8, 16, 16, 2)) if large else ()
    return [{"tile": tile} for tile in (None, *others)]


def grid_per_dimension(owned: int, passing: int, D: int, dtype: torch.dtype, device: torch.device, kind: Kind) -> Grid:
    """The grid with programs for each dimension alone. There each pair has an exponential, which takes as long as eight
    FMAs: what is left to save is the work done once for a row and a tile, so many columns pass at a time, and fewer
    where there is more to keep in registers."""
    small = (4, 4, 8, 32, 1) if kind.overridden else (4, 8, 16, 16, 1)  # not as small, as each dimension has programs
    if dtype == torch.float64:
        tile, small = (2, 4, 64, 4, 1) if kind.reduce or kind.overridden else (4, 4, 32, 8, 1), SMALL
    elif kind.reduce:
        tile = (4, 4 if kind.overridden or target().pairs_fmas else 8, 32, 8, 1)
    else:
        tile = (4, 8 if kind.overridden else 16, 32, 8, 1)
    return _grid(tile, small, owned, passing, D, 6, multiprocessors(device), target())


@functools.cache
def _splits(blocks: int, tiles: int, steps: int, slots: int) -> int:
    """The number of ranges to split `tiles` into, so that the last wave of programs on `slots` is as full as may be. No
    range is shorter than 256 steps in d, so that little problems need no second kernel to put ranges together."""
    most = min(tiles, tiles * steps // 256, cdiv(4 * slots, max(blocks, 1)))

    def time(splits: int) -> float:
        return cdiv(blocks * splits, slots) * (cdiv(tiles, splits) + 0.5)

    return min(range(1, most + 1), key=time, default=1)


def matrix_grid(owned: int, passing: int, D: int, device: torch.device) -> Grid:
    """The grid for tensor cores: 64 x 64 pairs for 128 threads, 16 dimensions at a time, which spills no registers on
    any target; two such programs have room on a multiprocessor."""
    config = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 16, "num_warps": 4}
    blocks, tiles = cdiv(owned, config["ROWS"]), cdiv(passing, config["COLUMNS"])
    splits = _splits(blocks, tiles, D + 8, 2 * multiprocessors(device))
    return Grid(config, blocks * splits, blocks, splits, max(1, cdiv(tiles, splits)))


def has_tensor_cores() -> bool:
    """Whether Triton compiles for tensor cores; its interpreter emulates them."""
    return INTERPRETED or target().backend == "cuda"
