"""EM is coordinate ascent on the ELBO (Basics VAE, sections 1.3 and 3). Prints a table in a second, and with --out
draws it: python examples/em_is_elbo.py --out em.png

For any distribution q(k) over the component that each point is from,

    log p(x) = E_q log p(x, k) + H(q) + KL(q ‖ p(k|x)),     bound(q, theta) = E_q log p(x, k) + H(q)

The E-step sets q to p(k|x) of the present theta: KL = 0, and the bound touches the log-likelihood. The M-step raises
the bound in theta at that q, and the log-likelihood, never below the bound, rises at least as much. A VAE does the
same, except for the E-step: its q(z|x) comes from an encoder, and the KL that remains is why the bound stays below.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvae

STEPS, K = 12, 3


def clusters(n: int = 600) -> Tensor:
    """Points `[n, 2]` in three clusters that overlap."""
    centres = torch.tensor([[0.0, 0.0], [4.0, 1.0], [1.0, 4.0]], dtype=torch.float64)
    return centres[torch.arange(n) % K] + torch.randn(n, 2, dtype=torch.float64)


def step(x: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> fastvae.GaussianMixture:
    """One EM step from theta, (weights, means, variances)."""
    init = weights, means, variances
    return fastvae.GaussianMixture(len(weights), init=init, tol=0, max_iter=1, reg_covar=0).fit(x)


def ascend(x: Tensor) -> list[tuple[float, float, float]]:
    """(log-likelihood, bound before the E-step, bound after it) at theta of each step; nats per point."""
    mixture = step(x, torch.full((K,), 1 / K), x[1::K][:K], torch.ones(K, 2))  # all three start in one cluster
    q = torch.full((len(x), K), 1 / K, dtype=x.dtype)
    rows = []
    for _ in range(STEPS):
        log_likelihood, before = mixture.score(x), mixture.elbo(x, q)
        gap = fastvae.kl_discrete(q, mixture.predict_proba(x)).mean().item()
        assert abs(log_likelihood - before - gap) < 1e-9  # the identity above
        q = mixture.predict_proba(x)  # E-step
        rows.append((log_likelihood, before, mixture.elbo(x, q)))
        mixture = step(x, mixture.weights_, mixture.means_, mixture.variances_)  # M-step, at that q
    return rows


def draw(figure: Any, rows: list[tuple[float, float, float]]) -> None:
    from fastvae import plots

    axes = figure.subplots()
    steps, rows = range(2, len(rows) + 1), rows[1:]  # the first q, the same for every point, is far below
    axes.plot(steps, [row[0] for row in rows], color="black", lw=1.8, zorder=1, label="log p(x)")
    path = [(i, bound) for i, row in zip(steps, rows, strict=True) for bound in row[1:]]
    axes.plot(*zip(*path, strict=True), color=plots.MODEL, lw=1, ls=":")
    axes.scatter(steps, [row[1] for row in rows], s=22, color=plots.MODEL, label="bound, after the M-step")
    axes.scatter(steps, [row[2] for row in rows], s=22, color=plots.DATA, zorder=2, label="bound, after the E-step")
    axes.set(xlabel="EM step", ylabel="nats per point", title="EM's lower bound touches the likelihood at every E-step")
    axes.legend(frameon=False, loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a picture to draw")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = ascend(clusters())
    print("nats per point   log p(x)   bound: after M   after E    KL(q | p(k|x)) before the E-step")
    for i, (log_likelihood, before, after) in enumerate(rows, 1):
        gap = log_likelihood - before
        print(f"EM step {i:2d}    {log_likelihood:12.6f}    {before:12.6f} {after:12.6f}    {gap:10.6f}")
        assert abs(after - log_likelihood) < 1e-9
    if options.out:
        from fastvae import plots

        plots.save(options.out, (7, 4), lambda figure: draw(figure, rows))


if __name__ == "__main__":
    main()
