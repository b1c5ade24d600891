"""The surfaces of bounds, information, divergences and evaluation."""

import math
from typing import Any

import torch
from calls import Call, Draw, surface
from support.helpers import aggregate, log_normal
from torch import Tensor

import fastvae
from fastvae.models.bounds import GRADIENTS
from kernels import decomposed, promoted


@surface
def elbo(draw: Draw) -> Call:
    shape = draw.sizes(draw.choice((1, 2)), least=1)
    arguments = {name: draw.normal(*shape, scale=9) for name in ("log_px_z", "log_pz", "log_qz_x")}

    def formula(log_px_z: Tensor, log_pz: Tensor, log_qz_x: Tensor) -> list[Tensor]:
        log_w = log_px_z + log_pz - log_qz_x
        return [log_w if log_w.ndim == 1 else log_w.mean(0)]

    return Call(fastvae.elbo, arguments, formula)


def importance(draw: Draw, name: str, n_axes: int) -> Call:
    shape = draw.sizes(n_axes, least=1, most=2000)
    gradient = draw.choice(GRADIENTS)
    log_densities = {name: draw.normal(*shape, scale=9) for name in ("log_px_z", "log_pz", "log_qz_x")}

    z = draw.normal(*shape, 3).to(log_densities["log_px_z"]) if gradient == "dreg" else None

    def formula(log_px_z: Tensor, log_pz: Tensor, log_qz_x: Tensor, **_: Any) -> list[Tensor]:
        bound = torch.logsumexp(log_px_z + log_pz - log_qz_x, -2) - math.log(shape[-2])
        return [bound.mean(0) if n_axes == 3 else bound]

    arguments = log_densities | {"z": z, "gradient": gradient}
    return Call(getattr(fastvae, name), arguments, formula, differentiable=gradient != "dreg", roundings=5)


@surface
def iw_elbo(draw: Draw) -> Call:
    return importance(draw, "iw_elbo", 2)


@surface
def mc_iw_elbo(draw: Draw) -> Call:
    return importance(draw, "mc_iw_elbo", 3)


@surface
def effective_sample_size(draw: Draw) -> Call:
    shape = draw.sizes(draw.choice((1, 2, 3)), least=1)
    arguments = {"log_w": draw.normal(*shape), "dim": draw.randrange(-len(shape), len(shape))}
    return Call(
        fastvae.effective_sample_size,
        arguments,
        lambda log_w, dim: [(2 * log_w.logsumexp(dim) - (2 * log_w).logsumexp(dim)).exp()],
    )


def of_categories(draw: Draw, name: str, formula: Any) -> Call:
    shape = draw.sizes(draw.choice((1, 2, 3)), least=1)
    dim = draw.randrange(-len(shape), len(shape))
    names = ("p",) if name == "entropy" else ("p", "q")
    arguments: dict[str, Any] = {n: draw.probabilities(*shape, dim=dim) for n in names}
    for x in arguments.values():
        x.clamp_(min=1e-4)  # float16 holds it
    if draw.chance(0.3):
        arguments["p"][..., 0] = 0.0  # adds nothing
    return Call(
        getattr(fastvae, name),
        arguments | {"dim": dim},
        lambda dim, **x: [formula(**x).sum(dim)],
        tensors=lambda r: [r],
    )


def plogq(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p == 0, 0 * q, p * q.where(p > 0, 1.0).log())


@surface
def entropy(draw: Draw) -> Call:
    return of_categories(draw, "entropy", lambda p: -plogq(p, p))


@surface
def cross_entropy(draw: Draw) -> Call:
    call = of_categories(draw, "cross_entropy", lambda p, q: -p * q.log())
    return call


@surface
def kl_discrete(draw: Draw) -> Call:
    return of_categories(draw, "kl_discrete", lambda p, q: plogq(p, p) - p * q.log())


@surface
def mmd(draw: Draw) -> Call:
    n, m, D = draw.sizes(3, least=2)
    arguments = {"z": draw.normal(n, D), "y": draw.normal(m, D), "bandwidth": draw.choice((None, 0.5, 2.0, 3))}

    def formula(z: Tensor, y: Tensor, bandwidth: Any) -> list[Tensor]:
        h = math.sqrt(D) if bandwidth is None else bandwidth

        def mean(a: Tensor, b: Tensor, own: bool) -> Tensor:
            k = torch.exp(-((a[:, None] - b) ** 2).sum(-1) / (2 * h * h))
            return (k.sum() - len(a)) / (len(a) * (len(a) - 1)) if own else k.mean()

        return [mean(z, z, True) - 2 * mean(z, y, False) + mean(y, y, True)]

    return Call(fastvae.mmd, arguments, formula, roundings=20)


@surface
def mi_bounds(draw: Draw) -> Call:
    by_size = draw.chance(0.5)
    arguments = {
        "nell": draw.uniform(0, 9),
        "div": draw.uniform(0, 9),
        "h_data": None if by_size else draw.uniform(0, 9),
        "dataset_size": draw.choice((1, 60_000, 10**15)) if by_size else None,
        "likelihood": "discrete" if by_size else draw.choice(("discrete", "density")),
    }

    def formula(nell: float, div: float, h_data: Any, dataset_size: Any, likelihood: str) -> list[Tensor]:
        h_data = math.log(dataset_size) if h_data is None else h_data
        return [torch.tensor([h_data - nell, div], dtype=torch.float64)]

    return Call(
        fastvae.mi_bounds,
        arguments,
        formula,
        tensors=lambda bounds: [torch.tensor([float(b) for b in bounds], dtype=torch.float64)],
        differentiable=False,
    )


@surface
def active_units(draw: Draw) -> Call:
    N, D = draw.sizes(2, least=2)
    options = {"threshold": draw.choice((0.01, 0.5, 1, 0)), "batch_size": draw.choice((3, 4096))}
    arguments = draw.posteriors(N, D) | options

    def of_posteriors(mu: Any, logvar: Any, **options: Any) -> Tensor:
        return fastvae.active_units((mu, logvar), **options)

    def check(active: Tensor, arguments: dict[str, Any]) -> None:
        variance, threshold = arguments["mu"].double().var(0), arguments["threshold"]
        clear = (variance - threshold).abs() > 1e-4 * (1 + variance)
        assert torch.equal(active[clear], (variance > threshold)[clear]), "other units are active"

    return Call(of_posteriors, arguments, check=None if draw.extreme else check)


def array(x: Any) -> Any:
    plain = isinstance(x, Tensor) and x.device.type == "cpu" and x.dtype in (torch.float64, torch.float32)
    return x.detach().resolve_neg().numpy() if plain and x.layout == torch.strided and not x.is_nested else x


def part(x: Any, rows: slice) -> Any:
    dense = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested
    return x[rows] if dense and x.ndim else x


def as_source(draw: Draw) -> Any:
    """Posteriors in one of the forms that functions of a data set take."""
    return draw.choice(
        (
            lambda mu, logvar: (mu, logvar),
            lambda mu, logvar: [(part(mu, rows), part(logvar, rows)) for rows in (slice(2), slice(2, None))],
            lambda mu, logvar: (array(mu), array(logvar)),
        )
    )


@surface
def kl_decomposition_dataset(draw: Draw) -> Call:
    N, D = draw.sizes(2, least=4, most=200)
    posteriors = {name: x.to(draw.dtypes[0]) for name, x in draw.posteriors(N, D).items()}
    rows = draw.integers(0, N, draw.choice((1, 2, 9))) if draw.chance(0.5) else None
    source = as_source(draw)
    arguments: dict[str, Any] = {
        **posteriors,
        "n_samples": draw.choice((1, 2, 5)),
        "rows": rows,
        "analytic_conditional": draw.chance(0.3),
        "method": draw.choice(("auto", "direct", "table")),
        "batch_size": draw.choice((1, 3, 4096)),
        "seed": draw.choice((0, 7, -3, 2**40)),
        "progress": False,
    }

    def function(mu: Any, logvar: Any, **options: Any) -> Any:
        return fastvae.kl_decomposition_dataset(source(mu, logvar), **options)

    at = torch.arange(N) if rows is None else rows
    dtype = promoted(*posteriors.values())
    zero = torch.zeros(len(at), D, dtype=dtype)
    eps = fastvae.reparameterize(zero, zero, arguments["n_samples"], seed=arguments["seed"])

    def formula(mu: Tensor, logvar: Tensor, analytic_conditional: bool, **_: Any) -> list[Tensor]:
        z = (mu[at] + (0.5 * logvar[at]).exp() * eps.to(mu.dtype)).flatten(0, 1)
        log_w = torch.full((len(z), N), -math.log(N), dtype=torch.float64)
        own = at.repeat(arguments["n_samples"])
        return [x.to(mu) for x in decomposed(z, mu, logvar, log_w, own, analytic_conditional)]

    return Call(
        function,
        arguments,
        formula,
        tensors=lambda terms: list(terms[:7]),
        differentiable=False,
        slack=2e-6 * D,
        roundings=20,
        differences=True,
        costly=("n_samples",),
    )


@surface
def prior_hole(draw: Draw) -> Call:
    N, D = draw.sizes(2, least=4, most=100)
    source = as_source(draw)
    arguments = {
        **{name: x.to(draw.dtypes[0]) for name, x in draw.posteriors(N, D).items()},
        "n_prior": draw.choice((1, 7, 60)),
        "quantile": draw.choice((0.01, 0.5, 0.99)),
        "n_dims": draw.choice((1, 2, 12)),
        "batch_size": draw.choice((3, 4096)),
        "seed": draw.choice((0, 7, -3, None)),
        "progress": False,
    }

    def function(mu: Any, logvar: Any, **options: Any) -> Any:
        return fastvae.prior_hole(source(mu, logvar), **options)

    def check(hole: fastvae.PriorHole, arguments: dict[str, Any]) -> None:
        mu, logvar = (arguments[name].double() for name in ("mu", "logvar"))
        z = hole.z_prior.double()
        exact = aggregate(z, mu, logvar)[0]
        spread = log_normal(z[:, None], mu, logvar).abs().sum(-1).amax(1)
        error = (hole.log_q_prior - exact).abs() / (1 + spread)
        assert error.max() < 1e-5, f"log_q_prior is off by {error.max():.3g} of its terms"
        assert hole.share == (hole.log_q_prior < hole.threshold).double().mean(), "share"
        shares = torch.cat((hole.dim_share, hole.share_without, hole.pair_share))
        assert ((shares >= 0) & (shares <= 1)).all(), "a share is not from 0 to 1"

    return Call(
        function,
        arguments,
        check=None if draw.extreme else check,
        costly=("n_prior", "n_dims"),
        draws=arguments["seed"] is None,
    )
