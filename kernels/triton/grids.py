"""Launch configurations of the cross-evaluated kernels, fixed by the sizes: tiles, and how many programs share them."""

import functools
from typing import Any, NamedTuple

import torch
import triton

from ._launch import INTERPRETED, Config, cdiv
from .tiles import FOLD

THREADS = 256
SMALL = (2, 4, 8, 32, 4)  # 16 x 128 pairs, for problems that have few tiles
Tile = tuple[int, int, int, int, int]  # RO, RP, TO, TP, UNROLL


class Grid(NamedTuple):
    """Programs own blocks of samples (or columns), and take one of `splits` ranges of what passes by."""

    config: Config  # RO, RP, TO, TP, UNROLL and the launch options
    blocks: int  # in all dimensions, where each has its own
    splits: int
    tiles: int  # that pass by in one range

    @property
    def programs(self) -> int:
        return self.blocks * self.splits


@functools.cache
def _target(driver: Any) -> tuple[str, int]:
    """Backend and threads in a warp"""
    target = driver.get_current_target()
    return target.backend, target.warp_size


def multiprocessors(device: torch.device) -> int:
    """How many to fill; an H200's where there is no GPU to ask, and few for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if INTERPRETED and device.type == "cpu" else 132


def _grid(tile: Tile, owned: int, passing: int, copies: int, steps: int, device: torch.device) -> Grid:
    sms, per_sm = multiprocessors(device), 2
    RO, RP, TO, TP, unroll = tile
    if cdiv(owned, RO * TO) * cdiv(passing, RP * TP) * copies < sms:
        RO, RP, TO, TP, unroll = SMALL
    while RO > 1 and 2 * owned <= RO * TO:
        RO //= 2
    backend, warp = ("", 32) if INTERPRETED else _target(triton.runtime.driver.active)
    config = {"RO": RO, "RP": RP, "TO": TO, "TP": TP, "UNROLL": unroll, "num_warps": THREADS // warp}
    if backend == "cuda":
        config["maxnreg"] = 65536 // THREADS // per_sm
    blocks, tiles = cdiv(owned, RO * TO), cdiv(passing, RP * TP)
    splits = _splits(blocks * copies, tiles, steps, per_sm * sms)
    return Grid(config, blocks * copies, splits, max(1, cdiv(tiles, splits)))


def grid(
    owned: int, passing: int, D: int, dtype: torch.dtype, device: torch.device, reduce: bool, tile: Tile | None = None
) -> Grid:
    """For `owned` samples against `passing` columns, or the other way round; `reduce`: whether each dimension is summed
    over what passes by, across lanes, which should then be few.

    The register tile is 8 x 8 or 4 x 16 pairs, so that a step in d loads 16 to 20 words for 128 FMAs and 128 registers
    hold it: two programs of 256 threads on a multiprocessor. Half as many pairs, two steps at a time, where they are
    summed in two levels; two steps of 8 x 8 would spill. A quarter of float64."""
    if tile is None and dtype == torch.float64:
        tile = (4, 4, 32, 8, 1)
    elif tile is None:
        split = 2 if FOLD.value < D else 1
        tile = (4, 16 // split, 32, 8, 1) if reduce else (8, 8 // split, 16, 16, split)
    return _grid(tile, owned, passing, 1, D + 8, device)


def configs(owned: int, passing: int, dtype: torch.dtype) -> list[Config]:
    """Tiles for `grid` to be timed by `_launch.fastest`: its own choice, and others for large problems."""
    large = owned * passing >= 1 << 22 and dtype != torch.float64
    others = ((4, 16, 32, 8, 1), (4, 8, 32, 8, 2), (8, 4, 16, 16, 2), (8, 8, 16, 16, 2)) if large else ()
    return [{"tile": tile} for tile in (None, *others)]


def grid_per_dimension(owned: int, passing: int, D: int, dtype: torch.dtype, device: torch.device, more: bool) -> Grid:
    """The same with programs for each dimension alone; `more`: whether they need registers for more than sums, for
    gradients or own columns' weights. An exponential takes as long as eight FMAs: what is left to save is what is done
    once for a row and a tile, so many columns pass at a time."""
    tile = (4, 4 if dtype == torch.float64 else 8 if more else 16, 32, 8, 1)
    return _grid(tile, owned, passing, D, 6, device)


@functools.cache
def _splits(blocks: int, tiles: int, steps: int, slots: int) -> int:
    """Into how many ranges to split `tiles`, so that the last wave of programs on `slots` is a full one as nearly as
    may be. None shorter than 256 steps in d, so that little problems need no second kernel to put ranges together."""
    most = min(tiles, tiles * steps // 256, cdiv(4 * slots, max(blocks, 1)))

    def time(splits: int) -> float:
        return cdiv(blocks * splits, slots) * (cdiv(tiles, splits) + 0.5)

    return min(range(1, most + 1), key=time, default=1)


def matrix_grid(owned: int, passing: int, D: int, device: torch.device) -> Grid:
    """For tensor cores: 64 x 64 pairs for 128 threads, 16 dimensions at a time, which no target's registers spill at;
    two such programs have room on a multiprocessor."""
    config = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 16, "num_warps": 4}
    blocks, tiles = cdiv(owned, config["ROWS"]), cdiv(passing, config["COLUMNS"])
    splits = _splits(blocks, tiles, D + 8, 2 * multiprocessors(device))
    return Grid(config, blocks, splits, max(1, cdiv(tiles, splits)))


def has_tensor_cores() -> bool:
    """Whether Triton compiles for those; its interpreter emulates them."""
    return INTERPRETED or _target(triton.runtime.driver.active)[0] == "cuda"
