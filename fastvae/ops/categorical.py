"""Entropy, cross entropy and KL divergence of categorical distributions, in nats (Basics VAE, section 4).

    H(p) = −sum_c p_c log p_c,    H(p, q) = −sum_c p_c log q_c,    KL(p ‖ q) = sum_c p_c log p_c / q_c = H(p, q) − H(p)

Where p_c = 0, category c adds nothing, whatever q_c is, and its gradient is not NaN; where q_c = 0 and p_c > 0, H(p, q)
and KL(p ‖ q) are infinite. Values are not checked: p and q have to be probabilities that add up to 1.
"""

import torch
from torch import Tensor

from ..backends.contract import accumulation_dtype
from .checks import accumulated, check_axis, check_device, check_tensor


def entropy(p: Tensor, dim: int = -1) -> Tensor:
    """The entropy H(p) = −sum p log p, in nats: from 0 to the log of the number of categories.

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
    """The cross entropy H(p, q) = −sum p log q, in nats: the mean length of a code for q when p is true; at least H(p).

    Args:
        p, q: probabilities, adding up to 1 along `dim`; their shapes broadcast.
        dim: the axis of the categories.

    Returns:
        The broadcast shape without that axis, in float32 (float64 for float64 inputs); inf where a category
        has no probability under q and some under p.

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
    """KL(p ‖ q) = sum p log p/q, in nats: the extra length of a code for q when p is true; 0 only where p = q.

    Args:
        p, q: probabilities, adding up to 1 along `dim`; their shapes broadcast.
        dim: the axis of the categories.

    Returns:
        The broadcast shape without that axis, in float32 (float64 for float64 inputs); inf where a category
        has no probability under q and some under p.

    Raises:
        TypeError, ValueError: as in `cross_entropy`.

    Source: Basics VAE, eq. 49.

    Example:
        >>> fastvae.kl_discrete(q, mixture.predict_proba(x))  # [S], how far each row of q is from the E-step's
    """
    p, q = _checked(p, q)
    return (p * (_log(p, p == 0) - _log(q, (p == 0) & (q == 0)))).sum(check_axis(dim, p))


def _log(x: Tensor, unused: Tensor) -> Tensor:
    """log x, but 0 where `unused`; masking the input, not the result, keeps the gradient finite there too."""
    return x.masked_fill(unused, 1.0).log()


def _checked(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Check p and q; return them in one shape, in the accumulation dtype."""
    for name, x in (("p", p), ("q", q)):
        check_tensor(name, x)
        check_device(name, x, "p", p)
    try:
        p, q = torch.broadcast_tensors(*accumulated(p, q))
    except RuntimeError:
        shapes = f"{tuple(p.shape)} and {tuple(q.shape)}"
        raise ValueError(f"p, q: expected shapes that broadcast, got {shapes}") from None
    return p, q
