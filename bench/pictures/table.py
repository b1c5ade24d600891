"""Draws docs/table_error.png: the intervals of a marginal, and the error of tables against their tolerance.

    python -m bench.pictures.table [--populations 60] [--out docs/table_error.png]

Above: log q_d of 2,000 posteriors, one of which is narrow, and of 20,000 samples; a tick for each interval's edge.
Below: the largest error of tables of random populations, each a dot, at each tolerance; on the diagonal it is the
tolerance.
"""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae.aggregate.columns import InMemory
from fastvae.aggregate.table import tabulate
from fastvae.backends.contract import LogWeights
from fastvae.evaluation.plots import DATA, MODEL, save
from fastvae.ops.interpolate import Interpolant, interpolate

TOLERANCES = [10.0**-k for k in (6, 7, 8, 9, 10, 11)]


def population(generator: torch.Generator, N: int, S: int, narrow: int, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """z [S, 1] from the columns mu, logvar [N, 1], of which so many are narrow, in so many clusters."""

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    def any_of(n: int, size: int) -> Tensor:
        return torch.randint(n, (size,), generator=generator)

    mu = normal(N) / clusters + 3 * normal(clusters)[any_of(clusters, N)]
    logvar = -1 + normal(N) * 0.7
    logvar[any_of(N, narrow)] -= 6
    own = any_of(N, S)
    z = mu[own] + torch.exp(0.5 * logvar[own]) * normal(S)
    return z[:, None], mu[:, None], logvar[:, None]


def made(z: Tensor, mu: Tensor, logvar: Tensor, tol: float) -> Interpolant:
    table = tabulate(z, InMemory(mu, logvar, LogWeights()), tol, math.inf)
    assert table is not None
    return table


def density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    weights = None, -math.log(len(mu)), None, None, None
    return torch.ops.fastvae.agg_log_prob(z, mu, logvar, *weights)


def draw(populations: int, figure: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    above, below = figure.subplots(2, 1)

    z, mu, logvar = population(generator, 2000, 20_000, 1, 3)
    table = made(z, mu, logvar, 1e-6)
    x = torch.linspace(float(z.min()), float(z.max()), 4000, dtype=torch.float64)
    x = torch.cat((x, z[:, 0])).sort().values[:, None]
    f = density(x, mu, logvar)
    above.plot(x, f, color=DATA, lw=1.5)
    edges = torch.cat((table.left, table.left + table.width)).unique()
    above.plot(edges, torch.full_like(edges, float(f.min()) - 1), "|", color=MODEL, markersize=9)
    share = 1 - len(table.singles) / len(z)
    title = f"{len(table.left)} intervals for 20,000 samples, {share:.1%} of them interpolated, tolerance 1e-6"
    above.set(xlabel="z", ylabel="log q(z), nats", title=title)

    for _ in range(populations):
        narrow, clusters = (int(torch.randint(1, n, (1,), generator=generator)) for n in (20, 6))
        inputs = population(generator, 200, 2000, narrow, clusters)
        errors = []
        for tol in TOLERANCES:
            got = interpolate(made(*inputs, tol), inputs[0])[:, 0]
            errors.append(max(float((got - density(*inputs)).abs().max()), 1e-16))
        below.loglog(TOLERANCES, errors, ".", color=DATA, alpha=0.35, markersize=5)
    below.loglog(TOLERANCES, TOLERANCES, color=MODEL, lw=1.5)
    below.text(1.2e-11, 3e-9, "error = tolerance", color=MODEL)
    below.set(xlabel="tolerance, nats", ylabel="largest error, nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--populations", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("docs/table_error.png"))
    options = parser.parse_args()
    save(options.out, (7, 6.4), functools.partial(draw, options.populations))


if __name__ == "__main__":
    main()
