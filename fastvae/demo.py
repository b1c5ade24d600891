"""python -m fastvae demo: a VAE of scikit-learn's handwritten digits, 8 x 8 pixels with counts 0..16.

The counts are binomial given z, so the ELBO is a bound on log p(x) of the data themselves. 1,500 images train,
297 are held out; the split is the same for every seed.
"""

import math
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from .aggregate.decomposition import kl_decomposition
from .backends import name_for
from .evaluation import plots
from .models.vae import VAE
from .ops.checks import drawn_seed
from .ops.kl_gauss import kl_gauss
from .ops.sample_gauss import reparameterize

COUNT, SIDE, LATENT = 16, 8, 16
N_TRAIN, BATCH, PASSES = 1500, 100, 10  # an epoch is 10 passes over the training images
LEARNING_RATE, WARM_UP = 4e-3, 100
AUGMENTED = 0.6  # share of the images that are distorted a little


class Terms(NamedTuple):
    """Mean terms over a population of images, in nats per image."""

    nell: float
    kl: float
    elbo: float
    entropy: float
    mi: float


class Encoder(nn.Module):
    """The encoder, from counts `[B, 8, 8]` to (mu, logvar) `[B, D]`."""

    def __init__(self, width: int = 16, hidden: int = 256):
        super().__init__()
        last = nn.Linear(hidden, 2 * LATENT)
        with torch.no_grad():
            last.weight.mul_(0.1)  # start near the prior
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(2 * width * (SIDE // 2) ** 2, hidden),
            nn.GELU(),
            last,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.layers(x[:, None] / (COUNT / 2) - 1).chunk(2, dim=1)
        return mu, logvar


def make_decoder(width: int = 16, hidden: int = 256) -> nn.Module:
    """Make the decoder, from z `[B, D]` to logits `[B, 8, 8]`."""
    half = SIDE // 2
    return nn.Sequential(
        nn.Linear(LATENT, hidden),
        nn.GELU(),
        nn.Linear(hidden, 2 * width * half**2),
        nn.GELU(),
        nn.Unflatten(1, (2 * width, half, half)),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(width, 1, 3, padding=1),
        nn.Flatten(1, 2),
    )


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load (training images, held-out images, their labels): counts `[n, 8, 8]`, labels `[n]`."""
    digits = load_digits()
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images, dtype=torch.float32)[order]
    labels = torch.tensor(digits.target)[order]
    return x[:N_TRAIN], x[N_TRAIN:], labels[:N_TRAIN], labels[N_TRAIN:]


def distort(x: Tensor) -> Tensor:
    """Put some of the counts `[B, 8, 8]` under a small random affine map, as 1,500 images are few."""
    B = len(x)
    chosen = torch.rand(B, 1, 1) < AUGMENTED
    linear = torch.eye(2) + 0.07 * chosen * torch.randn(B, 2, 2)
    shift = 0.08 * chosen * torch.randn(B, 2, 1)  # a third of a pixel
    grid = F.affine_grid(torch.cat((linear, shift), 2), [B, 1, SIDE, SIDE], align_corners=False)
    moved = F.grid_sample(x[:, None], grid, mode="bicubic", align_corners=False)[:, 0].clamp(0, COUNT)
    counts = torch.floor(moved + torch.rand_like(moved)).clamp(max=COUNT)  # whole again, with the same mean
    return torch.where(chosen, counts, x)


@torch.no_grad()
def evaluate(vae: VAE, x: Tensor, n_samples: int = 8) -> Terms:
    """The terms of the images x, which are the whole population of q(z): the mutual information is at most log n."""
    mu, logvar = vae.encode(x)
    z = reparameterize(mu, logvar, n_samples, seed=0)  # [L, n, D]
    nell, kl = -vae.log_px_z(x, z).mean(), kl_gauss(mu, logvar)
    of_kl = kl_decomposition(z, mu, logvar)
    return Terms(*(float(t) for t in (nell, kl, -nell - kl, of_kl.entropy, of_kl.mi)))


def train(vae: VAE, x: Tensor, held_out: Tensor, epochs: int, seconds: float) -> tuple[list[Terms], list[Terms]]:
    """Train; return the terms of held-out and of as many training images after each epoch."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    steps_per_epoch = PASSES * (len(x) // BATCH)
    history: tuple[list[Terms], list[Terms]] = ([], [])
    start, step, progress = time.monotonic(), 0, 0.0
    with tqdm(total=epochs * steps_per_epoch, desc="training", leave=False, disable=None) as bar:
        while progress < 1:
            order = torch.cat([torch.randperm(len(x)) for _ in range(PASSES)])
            for rows in order.split(BATCH)[:steps_per_epoch]:
                loss = vae(distort(x[rows])).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                bar.update()
                progress = max(step / bar.total, (time.monotonic() - start) / seconds)
                rate = LEARNING_RATE * min(1, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))
                optimizer.param_groups[0]["lr"] = rate
                if progress >= 1:
                    break
            for terms, images in zip(history, (held_out, x[: len(held_out)]), strict=True):
                terms.append(evaluate(vae, images))
            t = history[0][-1]
            bar.write(f"{len(history[0]):5d} {t.nell:9.2f} {t.kl:7.2f} {t.elbo:9.2f} {t.entropy:9.2f} {t.mi:9.2f}")
    return history


def draw(vae: VAE, x: Tensor, labels: Tensor, held_out: Tensor, history: tuple, folder: Path) -> list[str]:
    """Write the pictures, and return their names. x and labels: all digits."""
    shown = held_out[:36]
    pictures = {
        "reconstructions": ((7, 4), partial(plots.reconstructions, x=shown, means=vae.reconstruct(shown))),
        "samples": ((7, 4), partial(plots.samples, means=vae.sample(72))),
        "terms": ((9, 4), partial(plots.terms, held_out=history[0], train=history[1], population=len(held_out))),
        "aggregate": ((9, 4.6), partial(plots.aggregate, source=vae, data=x, labels=labels)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (size, picture) in pictures.items():
        plots.save(folder / f"{name}.png", size, picture)

    def all_of_them(figure: Any) -> None:
        parts = figure.subfigures(2, 2, wspace=0.04, hspace=0.04).flat
        for part, (_, picture) in zip(parts, pictures.values(), strict=True):
            picture(part)

    plots.save(folder / "demo.png", (15, 8.4), all_of_them)
    return [f"{name}.png" for name in (*pictures, "demo")]


def run(epochs: int = 40, seconds: float = 60.0, out: str = "demo-out", seed: int | None = 0) -> Terms:
    """Train, print and draw; return the held-out terms at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small gain nothing from a second, and lose where the machine is busy
    try:
        return _run(epochs, seconds, Path(out), seed)
    finally:
        torch.set_num_threads(threads)


def _run(epochs: int, seconds: float, out: Path, seed: int | None) -> Terms:
    torch.manual_seed(drawn_seed(seed))
    x, held_out, labels, held_out_labels = load()
    vae = VAE(Encoder(), make_decoder(), likelihood="binomial", total_count=COUNT)
    n, backend = len(held_out), name_for(torch.device("cpu"))
    print(f"{len(x):,} digits train, {n} are held out; kernels: {backend}.")
    print(f"Terms of the held-out images, in nats per image, after each epoch of {PASSES} passes. These {n} images")
    print(f"are the population of q(z), so I(x; z) is at most log {n} = {math.log(n):.2f}.\n")
    print("epoch      Nell      KL      ELBO   H(q(z))   I(x; z)")
    history = train(vae, x, held_out, epochs, seconds)
    vae.eval()
    final = evaluate(vae, held_out, n_samples=64)
    bits = -final.elbo / (SIDE * SIDE * math.log(2))
    print(f"\nheld-out ELBO {final.elbo:.2f} nats per image, {bits:.3f} bits per pixel;")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that it may be too low, which is printed below
        log_px = vae.log_likelihood(held_out, 256).log_px.mean()
    print(f"log p(x) is at least {log_px:.2f}, by 256 importance samples")
    images, labels = torch.cat((x, held_out)), torch.cat((labels, held_out_labels))
    names = draw(vae, images, labels, held_out, history, out)
    print(f"pictures in {out}: {', '.join(names)}")
    return final
