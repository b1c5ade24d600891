"""The mutual information I(x; z) of a VAE: its bounds, and that of the decoder under the model's own samples."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._warnings import warn
from ..models.vae import PROPOSALS, VAE, warn_if_few
from ..ops.checks import MOST_SAMPLES, check_choice, check_count, check_number, drawn_seed
from .seeded import seeded


class MIBounds(NamedTuple):
    """The result of `mi_bounds`, in nats: tensors where the arguments that they are from are, else Python floats.

    Attributes:
        lower: H_data − Nell.
        upper: Div, the mean KL(q(z|x) ‖ p(z)).
    """

    lower: float | Tensor
    upper: float | Tensor


class DecoderMI(NamedTuple):
    """The estimate of I_dec(x; z) by Monte Carlo, in nats.

    Attributes:
        mi: the estimate, a scalar.
        standard_error: of the mean over the drawn x, a scalar; the bias of log p(x) is not in it.
        ess: the effective sample size of each log p(x), `[n_prior]`.
    """

    mi: Tensor
    standard_error: Tensor
    ess: Tensor


def mi_bounds(
    nell: float | Tensor,
    div: float | Tensor,
    *,
    h_data: float | Tensor | None = None,
    dataset_size: int | None = None,
    likelihood: Any = "discrete",
) -> MIBounds:
    """The bounds of the mutual information, H_data − Nell ≤ I_enc(x; z) ≤ Div, in nats.

    Args:
        nell: mean −log p(x|z), summed over the elements of x; not negative where p(x|z) is a probability.
        div: mean KL(q(z|x) ‖ p(z)).
        h_data: the entropy of the data, finite; the differential entropy where p(x|z) is a density.
        dataset_size: N, instead of `h_data`, for H_data = log N: right for N distinct examples of discrete data, which
            are then the whole population.
        likelihood: `"discrete"`, `"density"`, or a likelihood such as `vae.likelihood`, which says so itself.

    Returns:
        MIBounds: `lower` = H_data − Nell and `upper` = Div, tensors where `nell`, `h_data` or `div` are.

    Raises:
        TypeError: an argument is not a number or a tensor of one element, or not a likelihood.
        ValueError: neither `h_data` nor `dataset_size`, or both; a density without `h_data`, since the entropy of N
            points is no differential entropy; NaN; a negative `nell` of a discrete likelihood.

    Warns:
        UserWarning: lower > upper. Beyond Monte Carlo error this means that nell or div is a mean over something
            other than examples, or is of other data than h_data.

    Source: Zheng, eq. 30-35; Alemi et al. 2018.

    Example:
        >>> out = vae(x)
        >>> bounds = fastvae.mi_bounds(out.nell, out.kl, dataset_size=60_000, likelihood=vae.likelihood)
        >>> print(f"{bounds.lower:.2f} <= I(x; z) <= {bounds.upper:.2f} nats")
    """
    nell, div = _checked_scalar("nell", nell), _checked_scalar("div", div)
    h_data = None if h_data is None else _checked_scalar("h_data", h_data, finite=True)
    if isinstance(likelihood, str):
        check_choice("likelihood", likelihood, ("discrete", "density"))
    elif not isinstance(getattr(likelihood, "discrete", None), bool):
        raise TypeError(f"likelihood: expected 'discrete', 'density' or a likelihood, got {type(likelihood).__name__}")
    discrete = likelihood == "discrete" if isinstance(likelihood, str) else likelihood.discrete
    if discrete and nell < 0:
        raise ValueError(
            f"nell: expected a number >= 0, as p(x|z) is a probability, got {float(nell):.4g}; where it is a density,"
            " say so by likelihood='density'"
        )
    if h_data is None:
        if not discrete:
            raise ValueError("h_data: expected the differential entropy of the data, as p(x|z) is a density, got None")
        if dataset_size is None:
            raise ValueError(
                "h_data: expected the entropy of the data, or dataset_size for distinct examples, got None"
            )
        h_data = math.log(check_count("dataset_size", dataset_size, least=1))
    elif dataset_size is not None:
        raise ValueError(f"dataset_size: expected None where h_data is given, got {dataset_size!r}")
    elif isinstance(h_data, Tensor) and isinstance(nell, Tensor):
        h_data = h_data.to(nell.device)
    lower, upper = h_data - nell, div
    low, high = (x.item() if isinstance(x, Tensor) else float(x) for x in (lower, upper))
    if low > high:
        warn(
            f"the bounds of I(x; z) cross: H_data - Nell = {low:.4g} is above Div = {high:.4g};"
            " but for Monte Carlo error, nell, div and h_data cannot be of the same data, in nats per example"
        )
    return MIBounds(lower, upper)


@torch.no_grad()
def decoder_mutual_information(
    vae: VAE,
    *,
    n_prior: int = 256,
    n_importance: int = 1024,
    proposal: str = "posterior",
    batch_size: int = 4096,
    seed: int | None = 0,
) -> DecoderMI:
    """I_dec(x; z) = E log p(x|z) / p(x) over the model's own samples, z ~ p(z) and x ~ p(x|z), in nats.

    log p(x) is importance-sampled by `vae.log_likelihood`, which in expectation is too low; so mi is too high, until
    `n_importance` are enough. Takes n_prior·n_importance passes of an example through the decoder.

    Args:
        vae: one whose likelihood has `sample`; put it in eval mode before.
        n_prior: how many z are drawn from the prior, and an x from each.
        n_importance: importance samples of each x.
        proposal: as in `vae.log_likelihood`. The encoder may know the model's samples less well than the data;
            `"prior"` leaves it out.
        batch_size: how many decoder outputs are in memory at once.
        seed: of all draws, which leaves torch's generators as they were; None draws one from torch's generator.

    Raises:
        TypeError: `vae` is not a VAE, or its likelihood has no `sample`; or a number is not an integer.
        ValueError: `n_prior` below 2, a `seed` beyond 64 bits, or as in `vae.log_likelihood`.

    Warns:
        UserWarning: as `vae.log_likelihood` does where log p(x) is too low: mi is then too high.

    Source: Zheng, eq. 3-6.

    Example:
        >>> of_decoder = fastvae.decoder_mutual_information(vae.eval())
        >>> print(f"I_dec(x; z) = {of_decoder.mi:.2f} ± {of_decoder.standard_error:.2f} nats")
    """
    n_prior = check_count("n_prior", n_prior, least=2, most=MOST_SAMPLES)
    n_importance = check_count("n_importance", n_importance, least=1)
    batch_size = check_count("batch_size", batch_size, least=1)
    seed = drawn_seed(seed)
    check_choice("proposal", proposal, PROPOSALS)
    if not isinstance(vae, VAE):
        raise TypeError(f"vae: expected a VAE, got {type(vae).__name__}")
    if not hasattr(vae.likelihood, "sample"):
        got = type(vae.likelihood).__name__
        raise TypeError(f"vae: expected a VAE whose likelihood has sample, got likelihood {got}")
    device = next((p.device for p in vae.parameters()), torch.device("cpu"))
    information, sizes = [], []  # log p(x|z) / p(x) of each x, and its effective sample size
    with seeded(seed, device):
        for first in range(0, n_prior, batch_size):
            z = vae._sample_prior(min(batch_size, n_prior - first))
            x = vae.likelihood.sample(vae.decoder(z))
            vae._check(x)
            log_px, ess = vae._log_likelihood(x, n_importance, proposal, batch_size)
            information.append((vae.log_px_z(x, z) - log_px).double())
            sizes.append(ess)
    mi, ess = torch.cat(information), torch.cat(sizes)
    warn_if_few(ess, n_importance)
    return DecoderMI(mi.mean(), mi.std() / math.sqrt(n_prior), ess)


def _checked_scalar(name: str, value: Any, finite: bool = False) -> float | Tensor:
    """Check for a number: a tensor of one element is returned as it is, anything else as a Python float."""
    if not isinstance(value, Tensor):
        return check_number(name, value, finite=finite)
    if value.is_nested or value.layout != torch.strided:
        raise TypeError(f"{name}: expected a number or a dense tensor of one element, got {value.layout}")
    if value.numel() != 1:
        raise TypeError(f"{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}")
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor with a value, got one on the meta device")
    check_number(name, value.item(), finite=finite)
    return value
