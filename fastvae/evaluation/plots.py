"""Pictures of a VAE. Each function draws into a matplotlib Figure or SubFigure, so that they can be combined."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..aggregate.marginals import agg_log_prob_marginals
from ..aggregate.posteriors import open_posteriors
from ..models.priors import StandardNormal
from ..ops.agg_log_prob import agg_log_prob
from ..ops.kl_gauss import kl_gauss
from .holes import PriorHole

__all__ = ["aggregate", "plot_prior_hole", "reconstructions", "samples", "save", "terms"]

DATA, MODEL, MUTED = "#1f5fa8", "#d1495b", "#8a8f98"
Q_STYLE: Any = {"color": DATA, "lw": 1.5}
PRIOR_STYLE: Any = {"color": MODEL, "lw": 0.9, "ls": "--"}
STYLE: Any = {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}


def save(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Draw into a new figure of `size` inches and write it as a PNG."""
    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=140, layout="constrained")
        draw(figure)
        figure.savefig(path)


def tile(images: Tensor, columns: int) -> Tensor:
    """Images `[n, H, W]`, n a multiple of `columns`, as one image, with a blank pixel between them."""
    n, H, W = images.shape
    padded = images.new_full((n, H + 1, W + 1), math.nan)  # NaN is drawn as the background
    padded[:, :H, :W] = images
    rows = padded.unflatten(0, (-1, columns)).transpose(1, 2)  # [rows, H + 1, columns, W + 1]
    return rows.flatten(2).flatten(0, 1)[:-1, :-1]


def reconstructions(figure: Any, x: Tensor, means: Tensor, columns: int = 12) -> None:
    """Draw data `[n, H, W]`, and below each its reconstruction E[x|z]."""
    figure.suptitle("Held-out digits, and below each its reconstruction", fontsize=11)
    rows = len(x) // columns
    for i, axes in enumerate(_as_list(figure.subplots(rows, 1))):
        part = slice(i * columns, (i + 1) * columns)
        _show(axes, torch.cat((x[part], means[part])), columns, x.max())


def samples(figure: Any, means: Tensor, columns: int = 12) -> None:
    """Draw means E[x|z] `[n, H, W]` of samples z from the prior."""
    figure.suptitle("Samples: E[x|z] for z from the prior N(0, I)", fontsize=11)
    _show(figure.subplots(), means, columns, means.max())


def terms(figure: Any, held_out: Sequence[Any], train: Sequence[Any], population: int) -> None:
    """Draw the objective's terms after each epoch (fields nell, kl, elbo), and the aggregate posterior's entropy and
    mutual information (entropy, mi), which is at most the log of the population's size."""
    bound, information = figure.subplots(1, 2)
    epochs = range(1, len(held_out) + 1)

    def line(axes: Any, label: str, values: list[float], color: str, y_offset: int = 0) -> None:
        axes.plot(epochs, values, color=color, lw=1.8)
        place = {"xytext": (5, y_offset), "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (epochs[-1], values[-1]), color=color, **place)

    for label, color, value in (
        ("−ELBO", "black", lambda t: -t.elbo),
        ("Nell", DATA, lambda t: t.nell),
        ("KL", MODEL, lambda t: t.kl),
    ):
        line(bound, label, [value(t) for t in held_out], color)
        bound.plot(epochs, [value(t) for t in train], color=color, lw=1, ls=":")
    bound.plot([], [], color=MUTED, lw=1.8, label="held out")
    bound.plot([], [], color=MUTED, lw=1, ls=":", label="training")
    bound.legend(frameon=False, loc="upper right")
    bound.set(title="−ELBO = Nell + KL", ylabel="nats per image", ylim=(0, -1.6 * held_out[-1].elbo))

    information.axhline(math.log(population), color=MUTED, lw=1, ls="--")
    place = {"xytext": (0, -5), "textcoords": "offset points", "ha": "right", "va": "top"}
    information.annotate(
        f"at most log {population}", (epochs[-1], math.log(population)), color=MUTED, fontsize=9, **place
    )
    line(information, "H(q(z))", [t.entropy for t in held_out], DATA)
    line(information, "I(x; z)", [t.mi for t in held_out], MODEL)
    information.set(title="Aggregate posterior: entropy and information", ylabel="nats", ylim=(0, None))
    for axes in (bound, information):
        axes.set(xlabel="epoch", xlim=(1, max(2, len(held_out))))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def aggregate(figure: Any, source: Any, data: Any = None, *, labels: Tensor, reach: float = 3.5) -> None:
    """Draw q(z), the mean of the posteriors, over p(z) = N(0, I), in the two dimensions with the largest KL; and the
    posteriors' means by their labels `[N]`. source, data: as in `kl_decomposition_dataset`, in the labels' order."""
    mu, logvar = _posteriors(source, data)
    dims = kl_gauss(mu, logvar, reduction="none").mean(0).topk(2).indices.sort().values
    mu, logvar = mu[:, dims], logvar[:, dims]  # the marginal of a mixture is the mixture of the marginals
    z = torch.linspace(-reach, reach, 141)
    density = agg_log_prob(torch.cartesian_prod(z, z), mu, logvar).exp().view(len(z), -1).T
    log_q = agg_log_prob_marginals(z[:, None].expand(-1, 2), mu, logvar)
    across, up = log_q.marginals.exp().T.numpy()  # [141] each
    line, prior = z.numpy(), StandardNormal().marginal_log_prob(z).exp().numpy()

    left, right = figure.subplots(1, 2)
    left.imshow(density.numpy(), origin="lower", extent=2 * (-reach, reach), cmap="Blues", interpolation="bilinear")
    above, beside = left.inset_axes((0, 1.01, 1, 0.16)), left.inset_axes((1.01, 0, 0.16, 1))
    above.plot(line, across, **Q_STYLE)
    above.plot(line, prior, **PRIOR_STYLE)
    above.set(xlim=(-reach, reach), ylim=0, title="Density of q(z)")
    beside.plot(up, line, **Q_STYLE)
    beside.plot(prior, line, **PRIOR_STYLE)
    beside.set(ylim=(-reach, reach), xlim=0)
    for axes in (above, beside):
        axes.set_axis_off()

    for digit in labels.unique():
        chosen = mu[labels == digit]
        right.scatter(*chosen.T.numpy(), s=7, color=f"C{int(digit)}", alpha=0.5, linewidths=0)
        text = right.annotate(
            str(int(digit)), chosen.median(0).values.tolist(), color=f"C{int(digit)}", fontsize=16, weight="bold"
        )
        text.set(ha="center", va="center", path_effects=[withStroke(linewidth=4, foreground="white")])
    right.set_title("Posterior means by digit", y=1.17)  # level with the other
    angle = torch.linspace(0, 2 * math.pi, 200)
    circle = torch.stack((angle.cos(), angle.sin())).numpy()  # [2, 200]
    for axes in (left, right):
        for radius in (1, 2, 3):
            axes.plot(*(radius * circle), **PRIOR_STYLE)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axes.set(xlabel=f"$z_{{{dims[0]}}}$", ylabel=f"$z_{{{dims[1]}}}$")
    left.plot([], [], **Q_STYLE, label="q(z)")
    left.plot([], [], **PRIOR_STYLE, label="p(z), 1, 2, 3 σ")
    left.legend(frameon=False, loc="lower left", fontsize=8, borderaxespad=0.2)


def plot_prior_hole(figure: Any, hole: PriorHole, source: Any, data: Any = None, *, n_pairs: int = 3) -> None:
    """Draw the prior's holes, as `prior_hole` found them: density maps of q(z) over those of p(z) in the pairs of
    dimensions with the largest shares, and histograms of log q(z) of data and of the prior's samples.

    The line is each pair's threshold. Outside of it is the hole, and the prior's samples there are drawn.
    p(z) is a kernel density estimate from its samples. source, data: as `prior_hole` was given them.
    """
    n_pairs = min(n_pairs, len(hole.pairs))
    if n_pairs:
        maps, histogram = figure.subfigures(1, 2, width_ratios=(n_pairs, 1.6))
        _pair_maps(maps, hole, *_posteriors(source, data), n_pairs)
    else:
        histogram = figure

    axes = histogram.subplots()
    data, prior, threshold = hole.log_q_data.cpu(), hole.log_q_prior.cpu(), float(hole.threshold)
    high = max(float(prior.max()), float(data.max()))
    low = min(float(prior.quantile(0.002)), 2 * threshold - high)  # room for the annotation
    bins = torch.linspace(low, high, 41).numpy()
    for values, color, label in ((data, DATA, "encoded data"), (prior, MODEL, "samples of p(z)")):
        look: Any = {"bins": bins, "weights": torch.full_like(values, 1 / len(values)).numpy(), "color": color}
        axes.hist(values.numpy(), alpha=0.4, **look)
        axes.hist(values.numpy(), histtype="step", lw=1.5, label=label, **look)
    axes.axvline(threshold, color="black", lw=1, ls="--")
    axes.axvspan(low, threshold, color=MUTED, alpha=0.15, lw=0)
    place: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate(f"{float(hole.share):.1%} of the samples\nare from holes", (threshold, 0.97), xytext=(-6, 0), **place)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.84), fontsize=9)
    axes.set(xlim=(low, high), xlabel="nats", ylabel="share", title="log q(z)")


@torch.no_grad()
def _posteriors(source: Any, data: Any) -> tuple[Tensor, Tensor]:
    """mu and logvar `[N, D]` of all posteriors, on the CPU."""
    mu, logvar = open_posteriors(source, data).read(slice(None))
    return mu.cpu(), logvar.cpu()


def _pair_maps(figure: Any, hole: PriorHole, mu: Tensor, logvar: Tensor, n_pairs: int) -> None:
    """Draw q(z) over p(z) in pairs of dimensions, all on one scale of z."""
    axes_grid = figure.subplots(2, n_pairs, squeeze=False, sharex=True, sharey=True)
    pairs, thresholds, z_prior = hole.pairs[:n_pairs].cpu(), hole.pair_threshold.tolist(), hole.z_prior.cpu()
    reach = 1.15 * float(torch.cat((z_prior, mu))[:, pairs].abs().flatten().quantile(0.998))
    line = torch.linspace(-reach, reach, 121)
    grid = torch.cartesian_prod(line, line).to(mu)
    for column, dims in enumerate(pairs):
        points = z_prior[:, dims]
        width = 2 * points.std(0).log() - math.log(len(points)) / 3  # Scott's rule in two dimensions: n^(-1/6)
        posteriors, kernels = (mu[:, dims], logvar[:, dims]), (points, width.expand_as(points))
        log_q, log_p = (agg_log_prob(grid, *columns).view(len(line), -1).T for columns in (posteriors, kernels))
        largest = float(max(log_q.max(), log_p.max()).exp())  # one scale for both densities
        for axes, log_density, colors in zip(axes_grid[:, column], (log_q, log_p), ("Blues", "Reds"), strict=True):
            picture: Any = {"origin": "lower", "extent": 2 * (-reach, reach), "vmin": 0, "vmax": largest}
            axes.imshow(log_density.exp().numpy(), cmap=colors, interpolation="bilinear", **picture)
            axes.contour(line, line, log_q, levels=[thresholds[column]], colors=DATA, linewidths=1, linestyles="solid")
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
        outside = points[agg_log_prob(points, *posteriors) < thresholds[column]]
        axes_grid[1, column].scatter(*outside.T.numpy(), s=5, color="black", linewidths=0)
        axes_grid[0, column].set_title(f"{float(hole.pair_share[column]):.1%} from holes")
        axes_grid[1, column].set_xlabel(f"$z_{{{dims[0]}}}$")
        for axes in axes_grid[:, column]:
            axes.set_ylabel(f"$z_{{{dims[1]}}}$", labelpad=0 if column == 0 else 3)
    for axes, name, color in zip(axes_grid[:, 0], ("q(z)", "p(z)"), (DATA, MODEL), strict=True):
        place: Any = {"xytext": (5, -5), "xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
        axes.annotate(name, (0, 1), color=color, weight="bold", **place)


def _as_list(axes: Any) -> Sequence[Any]:
    return axes if hasattr(axes, "__len__") else [axes]


def _show(axes: Any, images: Tensor, columns: int, largest: Tensor) -> None:
    axes.imshow(tile(images, columns).numpy(), cmap="gray_r", vmin=0, vmax=float(largest), interpolation="nearest")
    axes.set_axis_off()
