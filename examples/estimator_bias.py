"""The estimators of the aggregate posterior, compared with the truth. Runs in seconds and prints a Markdown
table: python examples/estimator_bias.py

The data set is 10,000 posteriors, correlated and of various widths, two of their eight latents switched off. The
entropy H(q(z)), the mutual information I(x; z) and the total correlation are known, by the sum over all 10,000;
from batches they are estimated. Two wrong forms that are often met are computed too, by broadcasting.
"""

import math

import torch
from torch import Tensor

import fastvae

N, D = 10_000, 8
BATCHES = {64: 80, 1024: 5}  # how many batches of each size: 5,120 examples either way


def population() -> tuple[Tensor, Tensor]:
    """The posteriors' mu and logvar, `[N, D]`."""
    mu = torch.randn(N, D) @ torch.randn(D, D) / math.sqrt(D)
    logvar = -3.5 + 0.6 * torch.randn(N, D)
    mu[:, -2:] = 0.02 * torch.randn(N, 2)
    logvar[:, -2:] = 0.02 * torch.randn(N, 2)
    return mu, logvar


def pairs(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z_id | x_jd), `[B, B, D]`, which the library never forms."""
    return -0.5 * ((z[:, None] - mu) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi))


def mss_weights(B: int) -> Tensor:
    """w_ij `[B, B]` of minibatch stratified sampling: 1/N on the diagonal, the remainder right of it"""
    i, M = torch.arange(B), B - 1
    w = torch.full((B, B), 1 / M)
    w[i, (i + 1) % B] = (N - M) / (N * M)
    w[i, i] = 1 / N
    return w


def strided(log_q: Tensor) -> list[Tensor]:
    """WRONG: the weights filled in with strides of B, not B + 1, through the flattened matrix. They go
    down columns 0 and 1, and the diagonal keeps the weight of all others."""
    B, M = len(log_q), len(log_q) - 1
    w = torch.full((B, B), 1 / M)
    w.view(-1)[::B] = 1 / N
    w.view(-1)[1::B] = (N - M) / (N * M)
    joint = torch.logsumexp(w.log() + log_q.sum(-1), 1)
    marginals = torch.logsumexp(w.log()[..., None] + log_q, 1)
    return terms(log_q, joint, marginals)


def counted_for_each_dimension(log_q: Tensor) -> list[Tensor]:
    """WRONG: the log-weights added before the sum over dimensions, so that the joint has them D times."""
    weighted = mss_weights(len(log_q)).log()[..., None] + log_q
    joint = torch.logsumexp(weighted.sum(-1), 1)
    marginals = torch.logsumexp(weighted, 1)
    return terms(log_q, joint, marginals)


def terms(log_q: Tensor, joint: Tensor, marginals: Tensor) -> list[Tensor]:
    """The entropy, mutual information and total correlation (H, I, TC)."""
    own = log_q.sum(-1).diagonal()
    return [-joint.mean(), (own - joint).mean(), (joint - marginals.sum(-1)).mean()]


def row(name: str, numbers: list[Tensor]) -> None:
    print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in numbers) + " |")


torch.manual_seed(0)
mu, logvar = population()
exact = fastvae.kl_decomposition_dataset((mu, logvar))

headers = [f"{term}, B = {B}" for B in BATCHES for term in ("H", "I", "TC")]
print(f"| nats | {' | '.join(headers)} |")
print("|---|" + "--:|" * len(headers))
row("all 10,000 posteriors", [exact.entropy, exact.mi, exact.tc] * len(BATCHES))

batches = []  # (z, mu, logvar) [n, B, D]
for B, n in BATCHES.items():
    rows = torch.randperm(N)[: n * B].view(n, B)
    batches.append((fastvae.reparameterize(mu[rows], logvar[rows], seed=B), mu[rows], logvar[rows]))

for estimator in ("uniform", "loo", "stratified", "mss", "mws"):
    estimates = [fastvae.kl_decomposition(*batch, dataset_size=N, estimator=estimator) for batch in batches]
    row(f"`{estimator}`", [x for e in estimates for x in (e.entropy, e.mi, e.tc)])

both = (strided, counted_for_each_dimension)
wrong = [torch.tensor([[f(log_q) for f in both] for log_q in map(pairs, *b)]).mean(0) for b in batches]
row("wrong: `mss`, weights down the columns", [x for w in wrong for x in w[0]])
row("wrong: `mss`, log-weights D times", [x for w in wrong for x in w[1]])

print("\n" + ", ".join(f"log {n:,} = {math.log(n):.2f}" for n in (*BATCHES, N)))
