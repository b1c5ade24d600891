"""A weight on the total correlation, compared with one on the whole KL: VAEs of binarized digits, each a point in
the plane of reconstruction and total correlation. Draws docs/beta_tcvae.png in a minute: python examples/beta_tcvae.py

With any objective a larger weight lowers the total correlation (TC) and makes the reconstruction worse, so objectives
are compared at equal reconstruction, along curves. All terms are of the aggregate posterior of the 1,797 digits, by the
sum over all of them.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastvae
from fastvae import demo, plots
from fastvae.protocols import Objective

D, HIDDEN, BATCH, LEARNING_RATE = 10, 128, 300, 2e-3


class Run(NamedTuple):
    """One VAE's terms, in nats per image."""

    beta: float
    nell: float
    mi: float
    tc: float
    dim_kl: float


class Family(NamedTuple):
    """Objectives that differ in beta. alpha is BetaTCVAE's weight of the mutual information, None for the ELBO."""

    label: str
    alpha: float | None
    betas: tuple[float, ...]
    color: str

    def objective(self, beta: float, dataset_size: int) -> Objective:
        if self.alpha is None:
            return fastvae.ELBO(beta=beta)
        return fastvae.BetaTCVAE(alpha=self.alpha, beta=beta, dataset_size=dataset_size)


PLAIN = Family("Nell + β KL", None, (0.75, 1, 1.5, 2), plots.MUTED)
FAMILIES = (
    PLAIN,
    Family("Nell + MI + β TC + dim KL", 1.0, (2, 4, 8), plots.MODEL),  # at beta = 1 it is the ELBO
    Family("Nell + ½ MI + β TC + dim KL", 0.5, (1, 2, 4, 8), plots.DATA),
)


class Encoder(nn.Module):
    """The encoder, from binary images `[B, 8, 8]` to (mu, logvar) `[B, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), *layers(64, 2 * D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.layers(2 * x - 1).chunk(2, dim=1)
        return mu, logvar


def layers(n_in: int, n_out: int) -> list[nn.Module]:
    return [nn.Linear(n_in, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, n_out)]


def train(objective: Objective, x: Tensor, steps: int) -> fastvae.VAE:
    torch.manual_seed(0)
    vae = fastvae.VAE(Encoder(), nn.Sequential(*layers(D, 64), nn.Unflatten(1, (8, 8))), objective=objective)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = vae(x[torch.randint(len(x), (BATCH,))]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return vae.eval()


@torch.no_grad()
def measure(vae: fastvae.VAE, x: Tensor, beta: float, n_samples: int = 4) -> Run:
    mu, logvar = vae.encode(x)
    nell = -vae.log_px_z(x, fastvae.reparameterize(mu, logvar, n_samples, seed=0)).mean()
    terms = fastvae.kl_decomposition_dataset((mu, logvar), n_samples=n_samples, seed=0)  # the samples are the same
    return Run(beta, *(float(t) for t in (nell, terms.mi, terms.tc, terms.dim_kl.sum())))


def tc_at(nell: float, runs: list[Run]) -> float:
    """A curve's TC where its reconstruction is `nell`, log TC interpolated; NaN where it does not get there."""
    runs = sorted(runs, key=lambda run: run.nell)
    for left, right in itertools.pairwise(runs):
        if left.nell <= nell <= right.nell:
            part = (nell - left.nell) / (right.nell - left.nell)
            return math.exp((1 - part) * math.log(left.tc) + part * math.log(right.tc))
    return math.nan


def draw(figure: Any, curves: dict[Family, list[Run]], elbo: Run) -> None:
    correlation, information = figure.subplots(1, 2)
    for axes, name in ((correlation, "tc"), (information, "mi")):
        for family, runs in curves.items():
            curve = [elbo, *runs] if family.alpha == 1 else runs
            points = [(run.nell, getattr(run, name)) for run in curve]
            axes.plot(*zip(*points, strict=True), "o-", color=family.color, ms=4, lw=1.8, label=family.label)
            below = family.alpha == 0.5 if name == "tc" else family.alpha is None  # where the other curves are not
            place: Any = {"xytext": (-5, -3) if below else (4, 4), "textcoords": "offset points", "fontsize": 8}
            place |= {"ha": "right", "va": "top"} if below else {"ha": "left", "va": "bottom"}
            for run in runs:
                axes.annotate(f"{run.beta:g}", (run.nell, getattr(run, name)), color=family.color, **place)
        axes.plot(elbo.nell, getattr(elbo, name), "o", color="black", ms=7, label="the ELBO")
        axes.margins(x=0.12)
        axes.set(xlabel="Nell = −E log p(x|z), nats per image")
    correlation.set(title="Total correlation", ylabel="TC, nats", yscale="log")
    information.set(title="Mutual information", ylabel="I(x; z), nats", ylim=(0, None))
    ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if within(correlation.get_ylim(), tick)]
    correlation.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    correlation.minorticks_off()
    information.plot([], [], " ", label="numbers: β")
    information.legend(frameon=False, fontsize=9, loc="lower left")

    lower = tc_at(elbo.nell, curves[FAMILIES[-1]])
    if not math.isnan(lower):
        arrow = {"arrowstyle": "->", "shrinkA": 4, "shrinkB": 1, "lw": 1.2}
        correlation.annotate("", (elbo.nell, lower), xytext=(elbo.nell, elbo.tc), arrowprops=arrow, zorder=4)
        text = f"TC {elbo.tc:.2f} → {lower:.2f}\nat equal Nell"
        place = {"xytext": (16, 24), "textcoords": "offset points", "fontsize": 9, "va": "bottom"}
        correlation.annotate(text, (elbo.nell, elbo.tc), **place)


def within(limits: tuple[float, float], value: float) -> bool:
    return limits[0] <= value <= limits[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of training each VAE (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "beta_tcvae.png")
    options = parser.parse_args()

    torch.set_num_threads(1)  # layers this small gain nothing from a second
    x = torch.cat(demo.load()[:2]) >= demo.COUNT / 2
    x = x.float()  # binary, as data of the Bernoulli likelihood have to be
    curves: dict[Family, list[Run]] = {family: [] for family in FAMILIES}
    print("objective                          Nell     MI      TC   dim KL   -ELBO")
    with tqdm(total=sum(len(family.betas) for family in FAMILIES), desc="training", leave=False, disable=None) as bar:
        for family in FAMILIES:
            for beta in family.betas:
                run = measure(train(family.objective(beta, len(x)), x, options.steps), x, beta)
                curves[family].append(run)
                numbers = f"{run.nell:7.2f} {run.mi:6.2f} {run.tc:7.3f} {run.dim_kl:8.3f} {sum(run[1:]):7.2f}"
                bar.write(f"{family.label.replace('β', f'{beta:g}'):<30} {numbers}")
                bar.update()
    elbo = next(run for run in curves[PLAIN] if run.beta == 1)
    print(f"\nTC where Nell is the {elbo.nell:.2f} of the ELBO: {elbo.tc:.3f} with the ELBO,")
    print(f"{tc_at(elbo.nell, curves[FAMILIES[-1]]):.3f} with {FAMILIES[-1].label}")
    plots.save(options.out, (10.5, 4), lambda figure: draw(figure, curves, elbo))


if __name__ == "__main__":
    main()
