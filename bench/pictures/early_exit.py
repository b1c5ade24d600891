"""Draws docs/early_exit.png: how tiles of pairs come to stop, and what share of the dimensions is visited.

    python -m bench.pictures.early_exit [--tiles 80] [--out docs/early_exit.png]

Above: the bound on a tile's terms after each dimension (docs/beyond-brute-force.md). Below: the share of the pairs'
dimensions that agg_log_prob visits, by its own count; this is no time, but depends on the width of a tile, 32 columns
with AVX-512.
"""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

from matplotlib.ticker import PercentFormatter
from torch import Tensor

from fastvae.evaluation.plots import DATA, MODEL, MUTED, save

from ..cpu.early_exit import run, visited
from ..inputs import population

N, D = 4096, 64
ROWS, COLUMNS, LOOK = 6, 32, 8  # a tile, and the dimensions between two looks at it
LOGVARS = [-6 + k / 2 for k in range(13)]
ACTIVE = {4: "#b5d3ee", 8: "#6fa6d9", 16: DATA, 32: "#12305a", 64: "black"}  # dimensions, and their colours


def bounds(active: int, logvar: float) -> Tensor:
    """[tiles, D] of the first rows: how far the terms of a tile's pairs are above what is known of their row's sum, at
    most, in nats, after each dimension in the kernel's order. The first tile holds the rows' own columns."""
    z, mu, widths = (x.detach().double() for x in population(N, D, active=active, logvar=logvar))
    order = (mu.var(0) / widths.mean(0).exp()).argsort(descending=True)
    squares = ((z[:ROWS, None] - mu) ** 2 / (2 * widths.exp()))[..., order].cumsum(-1)  # [6, N, D]
    log_c = -0.5 * (widths + math.log(2 * math.pi)).sum(-1)
    known = log_c[:ROWS] - squares[..., -1].diagonal()
    nearest = squares.unflatten(1, (-1, COLUMNS)).amin(2)  # [6, tiles, D]
    return (log_c.view(-1, COLUMNS).amax(1)[:, None] - nearest - known[:, None, None]).amax(0)


def draw_tiles(axes: Any, tiles: int, active: int, logvar: float) -> None:
    """A line for each tile, up to where it stops."""
    invisible = -18 - math.log(N)
    for line in bounds(active, logvar)[:tiles]:
        stop = next((d for d in range(LOOK, D + 1, LOOK) if line[d - 1] < invisible), None)
        axes.plot(range(1, (stop or D) + 1), line[:stop], color=DATA if stop else MODEL, lw=0.8, alpha=0.6)
        if stop:
            axes.plot(stop, line[stop - 1], ".", color=DATA, ms=6)
    axes.axhline(invisible, color="black", lw=1, ls="--")
    axes.text(0.5, invisible - 2, "−18 − log N:\ntoo small to be seen", va="top")
    axes.plot([], [], ".-", color=DATA, lw=0.8, label="a tile that stops, when next looked at")
    axes.plot([], [], color=MODEL, lw=0.8, label="one that does not: a column in it is near")
    axes.legend(frameon=False, loc="upper right")
    axes.set(xlim=(0, D), ylim=(-60, 70), xticks=range(0, D + 1, LOOK), xlabel="dimensions so far")
    axes.set(ylabel="bound on the terms of a tile, nats")
    axes.set_title(f"{tiles} tiles of {ROWS} × {COLUMNS} pairs; D {D}, {active} active, logvar −{-logvar:g}")


def draw_shares(axes: Any) -> None:
    """A line for each number of active dimensions."""
    for active, color in ACTIVE.items():
        calls = [run(population(N, D, active=active, logvar=logvar), False, True) for logvar in LOGVARS]
        shares = [visited(call)[1] for call in calls]
        axes.plot(LOGVARS, shares, "o-", color=color, ms=3.5, lw=1.5, label=f"{active} active", zorder=-active)
    axes.axhline(LOOK / D, color=MUTED, lw=1, ls="--")
    axes.text(0, LOOK / D - 0.02, "all tiles stop when first looked at", color=MUTED, ha="right", va="top")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.14))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(ylim=(0, 1.04), xlabel="logvar of the active dimensions", ylabel="dimensions visited")
    axes.set_title(f"{N} × {N} pairs, D {D}")


def draw(tiles: int, figure: Any) -> None:
    above, below = figure.subplots(2, 1)
    draw_tiles(above, tiles, 20, -2)
    draw_shares(below)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiles", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("docs/early_exit.png"))
    options = parser.parse_args()
    save(options.out, (7, 6.4), functools.partial(draw, options.tiles))


if __name__ == "__main__":
    main()
