"""The early exit of agg_log_prob against going through all pairs, in one run: times in turns, medians.

    python -m bench.early_exit [--threads 2] [--repeats 7]

Prints a Markdown table. Differences are between the two, relative to the largest element, gradients included.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import fastvae

from .harness import seconds

# S = N, D, active dimensions, logvar of these (the others: mu near 0, logvar near 0), backward too, target
CASES = (
    (4096, 128, 20, -3, False, "3.5"),
    (4096, 32, 32, -4, False, ""),
    (4096, 32, 32, -2, False, ""),
    (4096, 10, 10, 0, False, "0.98"),
    (4096, 32, 32, 0, False, "0.98"),
    (4096, 64, 64, -4, True, "2.5"),
    (4096, 32, 32, -2, True, ""),
    (4096, 10, 10, 0, True, "0.98"),
)


def population(N: int, D: int, active: int, logvar: float) -> list[Tensor]:
    """z, mu, logvar [N, D], each z from its own posterior; which dimensions are active is drawn."""
    generator = torch.Generator().manual_seed(0)
    inactive = torch.randperm(D, generator=generator)[active:]
    mu, widths = torch.randn(N, D, generator=generator), torch.full((N, D), float(logvar))
    mu[:, inactive] *= 0.01
    widths[:, inactive] = 0
    widths += 0.1 * torch.randn(N, D, generator=generator)
    return [fastvae.reparameterize(mu, widths, seed=0), mu, widths]


def run(inputs: list[Tensor], backward: bool, exact_skip: bool) -> Callable[[], list[Tensor]]:
    leaves = [x.requires_grad_(backward) for x in inputs]

    def call() -> list[Tensor]:
        with fastvae.use_backend("native", exact_skip=exact_skip):
            joint = fastvae.agg_log_prob(*leaves)
            return [joint.detach(), *(torch.autograd.grad(joint.sum(), leaves) if backward else ())]

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, float32\n")
    print("| agg_log_prob | all pairs, ms | early exit, ms | ratio | target | largest relative difference |")
    print("|---|--:|--:|--:|--:|--:|")
    for N, D, active, logvar, backward, target in CASES:
        inputs = population(N, D, active, logvar)
        early, plain = (run(inputs, backward, skip) for skip in (True, False))
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(early(), plain(), strict=True))
        times = [(1e3 * seconds(plain), 1e3 * seconds(early)) for _ in range(options.repeats)]
        slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
        what = f"{'forward + backward' if backward else 'forward'}, {N}×{N}, D {D}, {active} active, logvar {logvar}"
        print(f"| {what} | {slow:.2f} | {fast:.2f} | {slow / fast:.2f} | {target} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
