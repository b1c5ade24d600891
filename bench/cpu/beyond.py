"""Compares what does less than brute force, the early exit and the table of marginals, with brute force, in one run.

    python -m bench.cpu.beyond [--threads 2] [--repeats 5] [--full]

Prints Markdown tables: the early exit of the joint against all pairs, and the share of dimensions that it visits
(early_exit.py); and for the marginals, the time by brute force and ours, in turns, medians; the points at which the
marginals of a dimension are evaluated; the largest error. Errors are against brute force in float64, on 64 samples, and
those of the terms of the KL over a data set are of all of them: the joint, the marginals, and what they make.
`--full` adds the terms of the KL over 737,280 posteriors, which takes minutes, with a progress bar.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastvae
from fastvae.aggregate.columns import InMemory, Streamed
from fastvae.aggregate.marginals import log_densities
from fastvae.aggregate.posteriors import open_posteriors
from fastvae.aggregate.table import tabulate
from fastvae.backends.contract import LogWeights
from fastvae.ops.interpolate import Interpolant, interpolate

from ..harness import in_turns, peak_extra_bytes, seconds
from . import early_exit
from .machine import why_not

TOL = 1e-6
ROWS = 64  # that are checked
CHUNK = 4096  # columns at a time, as kl_decomposition_dataset takes them


class Row(NamedTuple):
    """A line of the table; times in seconds."""

    case: str
    brute: float
    ours: float
    points: float  # of a dimension, in the mean
    error: float
    bytes: int = 0
    target: str = ""


def population(N: int, D: int, logvar: float, spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """z, mu, logvar [N, D], each z from its own posterior; logvar about the value given."""
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(N, D, generator=generator)
    logvars = logvar + spread * torch.randn(N, D, generator=generator)
    return fastvae.reparameterize(mu, logvars, seed=0), mu, logvars


def table_of(z: Tensor, mu: Tensor, logvar: Tensor) -> Interpolant:
    columns = InMemory(mu, logvar, LogWeights())
    table = tabulate(z, columns, TOL, math.inf)
    assert table is not None
    return table


def exact(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The joint and the marginals of the samples that are checked."""
    wide = (x.double() for x in (z[:ROWS], mu, logvar))
    return fastvae.agg_log_prob_marginals(*wide, method="direct")


def exact_marginals(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return exact(z, mu, logvar)[1]


def terms(z: Tensor, mu: Tensor, logvar: Tensor, joint: Tensor, marginals: Tensor) -> Tensor:
    """The terms that `kl_decomposition_dataset` averages, for the samples that are checked, each from the posterior of
    its own row: log q(z), log q(z|x), mi, tc, and log q_d(z_d) and dim_kl of each dimension, `[ROWS, 4 + 2 D]`."""
    z = z[:ROWS]
    conditional = fastvae.log_prob_gauss(z, mu[:ROWS], logvar[:ROWS])
    log_p = fastvae.log_prob_gauss(z[..., None], torch.zeros(1).to(z), torch.zeros(1).to(z))
    sums = (joint, conditional, conditional - joint, joint - marginals.sum(1))
    return torch.cat((torch.stack(sums, 1), marginals, marginals - log_p), 1)


def marginals_alone(N: int, D: int, logvar: float, repeats: int, target: str = "", spread: float = 0.5) -> Row:
    """Times the marginals alone: ours, and brute force less the time of the joint, which it computes as well."""
    inputs = population(N, D, logvar, spread)
    joint, direct, ours = in_turns(
        repeats,
        lambda: fastvae.agg_log_prob(*inputs),
        lambda: fastvae.agg_log_prob_marginals(*inputs, method="direct"),
        lambda: interpolate(table_of(*inputs), inputs[0]),
    )
    table = table_of(*inputs)
    error = (interpolate(table, inputs[0])[:ROWS] - exact_marginals(*inputs)).abs().max()
    return Row(
        f"marginals, {N}×{N}, D {D}, logvar {logvar:g} ± {spread:g}",
        direct - joint,
        ours,
        len(table.points) / D,
        float(error),
        target=target,
    )


def joint_and_marginals(N: int, D: int, logvar: float, repeats: int, backward: bool) -> Row:
    inputs = population(N, D, logvar)
    points = len(table_of(*inputs).points) / D
    leaves = [x.requires_grad_(backward) for x in inputs]

    def run(method: str) -> Callable[[], object]:
        def call() -> object:
            results = fastvae.agg_log_prob_marginals(*leaves, method=method)
            return torch.autograd.grad([r.sum() for r in results], leaves) if backward else results

        return call

    direct, ours = in_turns(repeats, run("direct"), run("auto"))
    with torch.no_grad():
        got = fastvae.agg_log_prob_marginals(*inputs, method="auto")[1]
        error = (got[:ROWS] - exact_marginals(*inputs)).abs().max()
    both = "forward + backward" if backward else "forward"
    return Row(f"joint and marginals, {both}, {N}×{N}, D {D}, logvar {logvar:g}", direct, ours, points, float(error))


def full_data(N: int, target: str, brute: bool, progress: bool = False) -> Row:
    z, mu, logvar = population(N, 10, -3)
    results = []

    def run(method: str) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mi is near log N
            return fastvae.kl_decomposition_dataset((mu, logvar), method=method, progress=progress)

    memory = peak_extra_bytes(lambda: run("auto")) if brute else 0  # which is not worth minutes
    ours = seconds(lambda: results.append(run("auto")))
    direct = seconds(lambda: run("direct")) if brute else math.nan
    table = table_of(z, mu, logvar)
    stream = open_posteriors((mu, logvar))
    joint, _ = log_densities(z[:ROWS], Streamed(stream, batch_size=CHUNK))
    assert joint is not None
    got = terms(z, mu, logvar, joint, interpolate(table, z)[:ROWS])
    error = (got - terms(z.double(), mu.double(), logvar.double(), *exact(z, mu, logvar))).abs().max()
    points = len(table.points) / 10
    return Row(
        f"`kl_decomposition_dataset`, {N:,}, D 10, logvar -3", direct, ours, points, float(error), memory, target
    )


def line(row: Row) -> str:
    brute, ratio = ("", "") if math.isnan(row.brute) else (f"{row.brute:.3g} s", f"{row.brute / row.ours:.1f}")
    memory = f"{row.bytes / 2**20:.0f} MiB" if row.bytes else ""
    numbers = f"{brute} | {row.ours:.3g} s | {ratio} | {row.points:.0f} | {row.error:.1e} | {memory}"
    return f"| {row.case} | {numbers} | {row.target} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    if reason := why_not("native"):
        sys.exit(reason)
    torch.set_num_threads(options.threads)
    marginals_alone(4096, 4, -2, 1)  # what is loaded and kept at a first call

    print(f"{options.threads} threads, float32, tolerance {TOL:g}\n")
    for line_of_joint in early_exit.lines(options.repeats):
        print(line_of_joint, flush=True)
    print()
    print("| case | brute force | ours | ratio | points | error, nats | memory | target |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    n = options.repeats
    rows: list[Callable[[], Row]] = [
        *(lambda s=s: marginals_alone(16384, 32, -2, n, "12 times, 1e-6", s) for s in (0.5, 0.1)),
        *(lambda v=v: marginals_alone(16384, 8, v, n) for v in (0, -2, -4, -6)),
        lambda: joint_and_marginals(16384, 32, -2, n, False),
        lambda: joint_and_marginals(16384, 8, -2, n, True),
        lambda: full_data(60_000, "5 s, 200 MiB, 1e-5", True),
    ]
    if options.full:
        rows.append(lambda: full_data(737_280, "6 minutes", False, progress=True))
    for row in rows:
        print(line(row()))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
