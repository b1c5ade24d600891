"""Information, in nats: of categorical distributions (Basics VAE, section 4), and the bounds of a VAE's I(x; z).

    H(p) = −sum_c p_c log p_c,    H(p, q) = −sum_c p_c log q_c,    KL(p ‖ q) = sum_c p_c log p_c / q_c = H(p, q) − H(p)

A category that p gives no probability adds nothing, whatever q gives it, and no NaN to a gradient; one that q gives
none and p does makes H(p, q) and KL(p ‖ q) infinite. Values are not looked at: that p and q are probabilities which
add up to 1 is the caller's word.
"""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from ._warnings import warn
from .backends.contract import accumulation_dtype
from .ops._checks import accumulated, check_choice, check_count, check_device, check_number, check_tensor


def entropy(p: Tensor, dim: int = -1) -> Tensor:
    """H(p) = −sum p log p, in nats: from 0 to the log of the number of categories.

    Args:
        p: probabilities, adding up to 1 along `dim`; float64, float32, bfloat16 or float16.
        dim: the axis of the categories.

    Returns:
        The shape of `p` without that axis, in float32 (float64 for float64 inputs).

    Raises:
        TypeError: `p` is not a floating-point tensor, or `dim` not an integer.
        ValueError: `p` has no axis `dim`.

    Source: Basics VAE, eq. 46.

    Example:
        >>> fastvae.entropy(mixture.weights_).exp()  # how many components as likely as each other would be as uncertain
    """
    check_tensor("p", p)
    dim = check_axis(dim, p)
    p = p.to(accumulation_dtype(p.dtype))
    return -(p * _log(p, p == 0)).sum(dim)


def cross_entropy(p: Tensor, q: Tensor, dim: int = -1) -> Tensor:
    """H(p, q) = −sum p log q, in nats: the mean length of a code for q when p is true; at least H(p).

    Args:
        p, q: probabilities, adding up to 1 along `dim`; their shapes broadcast.
        dim: the axis of the categories.

    Returns:
        The broadcast shape without that axis, in float32 (float64 for float64 inputs); inf where q gives a category
        no probability and p does.

    Raises:
        TypeError: an input is not a floating-point tensor, or `dim` not an integer.
        ValueError: shapes or devices do not match, or there is no axis `dim`.

    Source: Basics VAE, eq. 49.

    Example:
        >>> loss = fastvae.cross_entropy(labels, logits.softmax(1)).mean()
    """
    p, q = _checked(p, q)
    return -(p * _log(q, (p == 0) & (q == 0))).sum(check_axis(dim, p))


def kl_discrete(p: Tensor, q: Tensor, dim: int = -1) -> Tensor:
    """KL(p ‖ q) = sum p log p/q, in nats: what a code for q costs more than one for p; 0 only where they are the same.

    Args:
        p, q: probabilities, adding up to 1 along `dim`; their shapes broadcast.
        dim: the axis of the categories.

    Returns:
        The broadcast shape without that axis, in float32 (float64 for float64 inputs); inf where q gives a category
        no probability and p does.

    Raises:
        TypeError, ValueError: as in `cross_entropy`.

    Source: Basics VAE, eq. 49.

    Example:
        >>> fastvae.kl_discrete(q, mixture.predict_proba(x))  # [S], how far each row of q is from the E-step's
    """
    p, q = _checked(p, q)
    return (p * (_log(p, p == 0) - _log(q, (p == 0) & (q == 0)))).sum(check_axis(dim, p))


def mi_bounds(
    nell: float | Tensor,
    div: float | Tensor,
    *,
    h_data: float | Tensor | None = None,
    dataset_size: int | None = None,
    likelihood: Any = "discrete",
) -> tuple[float | Tensor, float | Tensor]:
    """(lower, upper) of H_data − Nell ≤ I_enc(x; z) ≤ Div, in nats.

    Args:
        nell: mean −log p(x|z), summed over the elements of x; not negative where p(x|z) is a probability.
        div: mean KL(q(z|x) ‖ p(z)).
        h_data: the entropy of the data, finite; the differential entropy where p(x|z) is a density.
        dataset_size: N, instead of `h_data`, for H_data = log N: right for N distinct examples of discrete data, which
            are then the whole population.
        likelihood: `"discrete"`, `"density"`, or a likelihood such as `vae.likelihood`, which says so itself.

    Raises:
        TypeError: an argument is not a number or a tensor of one element, or not a likelihood.
        ValueError: neither `h_data` nor `dataset_size`, or both; a density without `h_data`, since the entropy of N
            points is no differential entropy; NaN; a negative `nell` of a discrete likelihood.

    Warns:
        UserWarning: lower > upper. Beyond Monte Carlo error that cannot be: nell or div is a mean over something
            else than examples, or of other data than h_data.

    Source: Zheng, eq. 30-35; Alemi et al. 2018.

    Example:
        >>> out = vae(x)
        >>> lower, upper = fastvae.mi_bounds(out.nell, out.kl, dataset_size=60_000, likelihood=vae.likelihood)
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
    return lower, upper


def check_axis(dim: int, x: Tensor) -> int:
    """The number of an axis that x has."""
    if isinstance(dim, bool) or not isinstance(dim, numbers.Integral):
        raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim: expected an axis from {-x.ndim} to {x.ndim - 1} of shape {tuple(x.shape)}, got {dim}")
    return int(dim)


def _checked_scalar(name: str, value: Any, finite: bool = False) -> float | Tensor:
    """A tensor of one element as it is, anything else as a Python float."""
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


def _log(x: Tensor, unused: Tensor) -> Tensor:
    """log x, with 0 where it will be multiplied by 0: a where on the way in keeps the gradient finite there too."""
    return x.masked_fill(unused, 1.0).log()


def _checked(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of one shape, in the dtype of sums."""
    for name, x in (("p", p), ("q", q)):
        check_tensor(name, x)
        check_device(name, x, "p", p)
    try:
        p, q = torch.broadcast_tensors(*accumulated(p, q))
    except RuntimeError:
        shapes = f"{tuple(p.shape)} and {tuple(q.shape)}"
        raise ValueError(f"p, q: expected shapes that broadcast, got {shapes}") from None
    return p, q
