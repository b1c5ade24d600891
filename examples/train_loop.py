"""An ordinary training loop of a VAE, in which two lines changed. Runs in seconds: python examples/train_loop.py"""

import torch
import torch.nn.functional as F
from torch import nn

import fastvae


def bars(n: int, side: int = 8) -> torch.Tensor:
    """n binary images `[n, side²]`: each row and each column is lit with probability 1/side."""
    rows, columns = torch.rand(2, n, side) < 1 / side
    return (rows[:, :, None] | columns[:, None, :]).flatten(1).float()


torch.manual_seed(0)
data = bars(4096)
encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * 16))
decoder = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64))
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)

for epoch in range(1, 11):
    total_nell = total_kl = total_usual_kl = 0.0
    for x in data[torch.randperm(len(data))].split(128):
        mu, logvar = encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        nell = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")

        # Line 1. It was: kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        # Both are sums over the batch, as this loop's nell is. The default, reduction="batchmean", divides the sum by
        # len(x), for losses that are means over the batch.
        kl = fastvae.kl_gauss(mu, logvar, reduction="sum")

        # Line 2, new: a bonus for the entropy H(q(z)) of the aggregate posterior, nats per example, hence · len(x).
        entropy = len(x) * fastvae.agg_entropy(z, mu, logvar, dataset_size=len(data))

        loss = nell + kl - 0.1 * entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        total_nell += nell.item()
        total_kl += kl.item()
        total_usual_kl += -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()).item()
    n = len(data)
    print(
        f"epoch {epoch:2d}   Nell {total_nell / n:6.3f}   KL {total_kl / n:6.3f}"
        f"   KL by the usual line {total_usual_kl / n:6.3f}   (nats per example)"
    )

difference = abs(total_kl - total_usual_kl) / total_kl
print(f"the two KL lines differ by {difference:.1e} of the KL: rounding in float32")
assert difference < 1e-5
