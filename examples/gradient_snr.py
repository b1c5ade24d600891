"""The encoder's gradient of the importance-weighted bound, by its three estimators: which of them gets better with more
samples? Draws docs/gradient_snr.png in seconds: python examples/gradient_snr.py

The model is linear and Gaussian, x = W z + noise, and q(z|x) a little off p(z|x), as it is in training. The signal-to-
noise ratio of the usual gradient falls like 1/sqrt(m) (Rainforth et al. 2018), that of the doubly reparameterized one
grows like sqrt(m) (Tucker et al. 2019).
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae
from fastvae import plots

D, X = 10, 20  # dimensions of z and x
NOISE = 0.5  # the standard deviation of x given z
OFF = 0.3  # how far off q's mean is, in standard deviations of p(z|x), and q's log-variance
GRADIENTS = {"dreg": ("DReG", plots.DATA), "stl": ("STL", plots.MUTED), "iwae": ("IWAE", plots.MODEL)}


class Problem:
    """One x of the model, and a q(z|x) `(mu, logvar)` that is off."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.W = torch.linalg.qr(normal(X, D))[0]  # orthogonal columns: p(z|x) is a diagonal Gaussian
        self.x = self.W @ normal(D) + NOISE * normal(X)
        precision = 1 + 1 / NOISE**2
        self.mu = self.x @ self.W / NOISE**2 / precision + OFF * precision**-0.5 * normal(D).sign()
        self.logvar = torch.full((D,), OFF - torch.tensor(precision).log().item())

    def gradients(self, name: str, m: int, repeats: int) -> Tensor:
        """`repeats` independent gradients of the bound with respect to mu, `[repeats, D]`."""
        mu = self.mu.repeat(repeats, 1).requires_grad_()  # [R, D]: the bounds are R examples of a batch
        logvar = self.logvar.repeat(repeats, 1)
        z = fastvae.reparameterize(mu, logvar, m)  # [m, R, D]
        zero = z.new_zeros(D)
        log_px_z = -0.5 * ((self.x - z @ self.W.T) ** 2).sum(-1) / NOISE**2  # the constant has no gradient
        log_qz_x = fastvae.log_prob_gauss(z, mu if name == "iwae" else mu.detach(), logvar)
        bound = fastvae.iw_elbo(log_px_z, fastvae.log_prob_gauss(z, zero, zero), log_qz_x, z=z, gradient=name)
        return torch.autograd.grad(bound.sum(), mu)[0]


class Measured(NamedTuple):
    """The norm of the mean gradient, the root of the summed variances, and the standard error of the norm."""

    mean: float
    deviation: float
    error: float


def measure(name: str, m: int, repeats: int) -> Measured:
    """Measure `repeats` gradients, some of which are computed at once."""
    problem, at_once = Problem(), max(1, 2**16 // m)
    sizes = [min(at_once, repeats - first) for first in range(0, repeats, at_once)]
    g = torch.cat([problem.gradients(name, m, size) for size in sizes]).double()
    mean, variance = g.mean(0), g.var(0).sum()
    signal = mean.square().sum() - variance / repeats  # minus what the noise of the mean adds to its square
    along = g @ (mean / mean.norm())  # [repeats], whose mean is the norm of the mean
    error = along.std() / repeats**0.5
    return Measured(*(float(x) for x in (signal.clamp(min=0).sqrt(), variance.sqrt(), error)))


def draw(figure: Any, counts: list[int], results: dict[str, list[Measured]]) -> None:
    ratio, signal = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    for name, (label, color) in GRADIENTS.items():
        means = [r.mean for r in results[name]]
        ratios = [r.mean / r.deviation for r in results[name]]
        errors = [2 * r.error for r in results[name]]
        relative = [2 * r.error / r.deviation for r in results[name]]
        for axes, values, bars in ((ratio, ratios, relative), (signal, means, errors)):
            dashed = axes is signal and name == "dreg"  # over the line of IWAE, which it agrees with
            look: Any = {"ls": (0, (3, 2)), "zorder": 3} if dashed else {"ls": "-", "zorder": 2}
            axes.errorbar(counts, values, bars, color=color, lw=2, elinewidth=1, capsize=2, **look)
        label = "STL (biased)" if name == "stl" else label
        place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "color": color}
        ratio.annotate(label, (counts[-1], ratios[-1]), **place)
        if name != "dreg":
            both = label if name == "stl" else "IWAE and DReG"
            signal.annotate(both, (counts[-1], means[-1]), **place | {"color": "black" if name == "iwae" else color})
    for name, power, text in (("dreg", 0.5, "√m"), ("iwae", -0.5, "1/√m")):
        last = results[name][-1].mean / results[name][-1].deviation * (0.55 if power > 0 else 1.8)
        guide = [last * (m / counts[-1]) ** power for m in counts[-5:]]
        ratio.plot(counts[-5:], guide, color="black", lw=0.8, ls=":")
        ratio.annotate(text, (counts[-3], guide[-3]), xytext=(0, -9 if power > 0 else 9), textcoords="offset points")
    ratio.set(title="Signal to noise of the encoder's gradient", ylabel="|mean| / standard deviation")
    signal.annotate("bars: ± 2 standard errors", (0.03, 0.04), xycoords="axes fraction", fontsize=8)
    signal.set(title="Mean of the encoder's gradient", ylabel="|mean gradient|, nats per unit of mu")
    for axes in (ratio, signal):
        axes.set(xscale="log", yscale="log", xlabel="m, samples inside the logarithm")
        axes.set_xticks(counts[::2], [str(m) for m in counts[::2]])
        axes.minorticks_off()
        axes.spines.right.set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=256, help="the largest m (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=32768, help="gradients of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "gradient_snr.png")
    options = parser.parse_args()

    torch.manual_seed(0)
    counts = [2**exponent for exponent in range(options.most.bit_length())]
    results = {name: [measure(name, m, options.repeats) for m in counts] for name in GRADIENTS}
    print("   m " + "".join(f"{label:>8} SNR    mean" for label, _ in GRADIENTS.values()))
    for i, m in enumerate(counts):
        numbers = (results[name][i] for name in GRADIENTS)
        print(f"{m:4d} " + "".join(f"{r.mean / r.deviation:12.3f} {r.mean:7.3f}" for r in numbers))
    plots.save(options.out, (10.5, 3.8), lambda figure: draw(figure, counts, results))


if __name__ == "__main__":
    main()
