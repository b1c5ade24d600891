"""EM of a Gaussian mixture against scikit-learn's, from the same start, in one run: time per iteration and memory.

    python -m bench.cpu.mixture [--threads 2] [--repeats 3]

100,000 points of 32 dimensions, 64 components with diagonal covariances, 20 iterations. Prints a Markdown table.
Memory is what the process's resident set rises by during a fit, given as a share of N x K responsibilities in float32,
which an EM that forms them needs at the least.
"""

import argparse
import functools
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sklearn.mixture import GaussianMixture as Peer
from torch import Tensor

from fastvae import GaussianMixture

from ..harness import peak_extra_bytes, race, seconds
from .machine import why_not

N, D, K, ITERATIONS = 100_000, 32, 64, 20
Start = tuple[Tensor, Tensor, Tensor]  # weights [K], means [K, D], variances [K, D]


def data() -> tuple[Tensor, Start]:
    """Points [N, D] of K overlapping clusters, and where the fit starts."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(K, D, generator=generator)
    x = centres[torch.randint(K, (N,), generator=generator)] + torch.randn(N, D, generator=generator)
    return x, (torch.full((K,), 1 / K), x[:K].clone(), x.var(0).expand(K, D).clone())


def ours(x: Tensor, start: Start, iterations: int) -> Any:
    return GaussianMixture(K, tol=0, max_iter=iterations, reg_covar=0, init=start).fit(x)


def peer(x: Tensor, start: Start, iterations: int) -> Any:
    weights, means, variances = (s.numpy() for s in start)
    options = {"weights_init": weights, "means_init": means, "precisions_init": 1 / variances}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged after so few iterations
        return Peer(K, covariance_type="diag", tol=0, max_iter=iterations, reg_covar=0, **options).fit(x.numpy())


def seconds_per_iteration(fit: Callable[[int], Any]) -> float:
    """The time of a fit beyond that of a fit of one iteration, per further iteration."""
    one, all_ = (seconds(functools.partial(fit, iterations)) for iterations in (1, ITERATIONS))
    return (all_ - one) / (ITERATIONS - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if reason := why_not("native"):
        sys.exit(reason)
    torch.set_num_threads(options.threads)
    from threadpoolctl import threadpool_limits

    x, start = data()
    weights, means, variances = (s.double() for s in start)
    wide, wide_start = x.double(), (weights, means, variances)
    fits: dict[str, Callable[[int], Any]] = {
        "fastvae, float32": lambda n: ours(x, start, n),
        "scikit-learn, float32": lambda n: peer(x, start, n),
        "scikit-learn, float64": lambda n: peer(wide, wide_start, n),
    }
    with threadpool_limits(options.threads):
        for warm_up in (ours, peer):
            warm_up(x[:1000], start, 2)  # what is loaded and kept at a first call
        memory = {name: peak_extra_bytes(functools.partial(fit, 2)) for name, fit in fits.items()}
        log_p = {name: fit(2).lower_bound_ for name, fit in fits.items()}
        times = race(dict.fromkeys(fits, options.repeats), lambda name, _: seconds_per_iteration(fits[name]))
    medians = {name: statistics.median(t) for name, t in times.items()}
    fastest = medians["fastvae, float32"]
    print(f"{N:,} points, D {D}, K {K}, {ITERATIONS} iterations, {options.threads} threads\n")
    print("| | ms per iteration | ratio | peak extra memory, MiB | of N x K | mean log p after 1 step |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in fits:
        numbers = (
            f"{1e3 * medians[name]:.1f} | {medians[name] / fastest:.1f}"
            f" | {memory[name] / 2**20:.1f} | {memory[name] / (4 * N * K):.2f} | {log_p[name]:.6f}"
        )
        print(f"| {name} | {numbers} |")


if __name__ == "__main__":
    main()
