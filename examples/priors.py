"""The worth of a learned prior, on scikit-learn's digits. Trains three VAEs, prints a Markdown table and draws
docs/prior_hole.png, in two minutes: python examples/priors.py

The VAEs have N(0, I), a mixture of Gaussians and a VampPrior as prior, and are otherwise the same. For held-out digits
the table has the ELBO, and the importance-weighted bound with 512 samples of z; for the prior, the share of its samples
that are from holes, where log q(z) is below the 1st percentile of encoded digits, before and after `fit_prior` puts a
mixture fitted to q(z) in its place.
"""

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastvae
from fastvae import VAE, demo, plots

COMPONENTS = 100  # of the learned priors
FITTED = 50  # components of the mixture that `fit_prior` fits
BATCH, LEARNING_RATE, WARM_UP = 100, 4e-3, 100


def train(vae: VAE, x: Tensor, steps: int) -> None:
    """Train as the demo does, but without weight decay for the prior's parameters."""
    prior = list(vae.prior.parameters(recurse=False)) if isinstance(vae.prior, nn.Module) else []
    others = [p for p in vae.parameters() if all(p is not q for q in prior)]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": prior, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=LEARNING_RATE)
    for step in range(steps):
        rate = LEARNING_RATE * min(1, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = vae(demo.distort(x[torch.randint(len(x), (BATCH,))])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def bounds(vae: VAE, x: Tensor, n_importance: int) -> tuple[float, float]:
    """The pair (ELBO, importance-weighted bound), in nats per image."""
    torch.manual_seed(0)
    elbo = torch.stack([vae(x).terms["elbo"] for _ in range(64)]).mean()
    return float(elbo), float(vae.log_likelihood(x, n_importance).log_px.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="of training, for each prior (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=512, help="of the IW bound (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "prior_hole.png")
    options = parser.parse_args()
    torch.set_num_threads(1)  # layers this small gain nothing from a second
    warnings.filterwarnings("ignore", message="mi: ")  # 1,500 examples: the mutual information is at its ceiling
    x, held_out, _, _ = demo.load()

    priors: dict[str, Callable[[nn.Module], Any]] = {
        "N(0, I)": lambda encoder: None,
        f"mixture of {COMPONENTS}": lambda encoder: fastvae.MixturePrior(COMPONENTS, demo.LATENT),
        f"VampPrior of {COMPONENTS}": lambda encoder: fastvae.VampPrior(COMPONENTS, encoder, x, limits=(0, demo.COUNT)),
    }
    print("| prior | ELBO | IW bound | KL(q(z) ‖ p(z)) | from holes | after `fit_prior` |")
    print("|---|--:|--:|--:|--:|--:|")
    shown: list[tuple[fastvae.PriorHole, VAE, Tensor]] = []
    for name, make in priors.items():
        torch.manual_seed(0)
        encoder = demo.Encoder()
        vae = VAE(encoder, demo.make_decoder(), prior=make(encoder), likelihood="binomial", total_count=demo.COUNT)
        train(vae, x, options.steps)
        vae.eval()
        elbo, iw = bounds(vae, held_out, options.samples)
        before = fastvae.prior_hole(vae, x)
        vae.fit_prior(x, FITTED, n_samples=20, seed=0)
        after = fastvae.prior_hole(vae, x)
        print(
            f"| {name} | {elbo:.2f} | {iw:.2f} | {before.terms.agg_kl:.2f} | {before.share:.1%} | {after.share:.1%} |",
            flush=True,
        )
        if not shown:
            shown = [(before, vae, x), (after, vae, x)]

    def draw(figure: Any) -> None:
        titles = ("Prior N(0, I)", f"The same VAE, its prior a mixture of {FITTED} fitted to q(z)")
        for part, title, arguments in zip(figure.subfigures(2, 1, hspace=0.04), titles, shown, strict=True):
            part.suptitle(title, fontsize=12, weight="bold", x=0.01, ha="left")
            plots.plot_prior_hole(part, *arguments)

    plots.save(options.out, (11, 9), draw)


if __name__ == "__main__":
    main()
