"""Log-densities of samples under posteriors: pair by pair, or each sample under all posteriors.

log q(z_i | x_j) = −½ sum_d [ log 2 pi + logvar_jd + (z_id − mu_jd)² / sigma_jd² ]
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends.contract import Pairs
from .checks import accumulated, check_device, check_tensor
from .declare import declare, declare_backward, placed
from .pairs import POSTERIORS, checked, over_batches, result

_cross_log_prob = declare(
    f"cross_log_prob({POSTERIORS}) -> Tensor",
    lambda z, mu, logvar: result(z, z.shape[0], mu.shape[0]),
    lambda backend, *posteriors: backend.cross_log_prob(Pairs(*posteriors)),
)
_cross_log_prob_backward = declare_backward(
    f"cross_log_prob_backward(Tensor grad, {POSTERIORS}, bool[] wanted) -> Tensor[]",
    ("z", "mu", "logvar"),
    lambda backend, grad, z, mu, logvar, wanted: backend.cross_log_prob_backward(grad, Pairs(z, mu, logvar), wanted),
    rows=("grad", "z"),
)


@_cross_log_prob.differentiate
class CrossLogProb(Function):
    """The autograd Function from z [S, D], mu and logvar [N, D] to [S, N]."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        return placed(_cross_log_prob_backward(grad, *ctx.saved_tensors, wanted), wanted, 3)


def log_prob_gauss(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The log-density log N(z; mu, diag exp(logvar)) in nats, summed over D, by plain broadcasting.

    Args:
        z: points `[..., D]`; float64, float32, bfloat16 or float16.
        mu: means, broadcast against `z`.
        logvar: log sigma², broadcast against `z`.

    Returns:
        The broadcast shape without D, in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices do not match.

    Example:
        >>> log_q = fastvae.log_prob_gauss(z, mu, logvar)  # [B]
    """
    for name, x in (("z", z), ("mu", mu), ("logvar", logvar)):
        check_tensor(name, x)
        check_device(name, x, "z", z)
    try:
        torch.broadcast_shapes(z.shape, mu.shape, logvar.shape)
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape)) for x in (z, mu, logvar))
        raise ValueError(f"z, mu, logvar: expected shapes that broadcast, got {shapes}") from None
    z, mu, logvar = accumulated(z, mu, logvar)
    finite = torch.finfo(logvar.dtype).max  # not inf: 0 · inf is NaN, also in masked gradients
    inv_sigma = torch.exp((-0.5 * logvar).clamp(max=(1 - 1e-7) * math.log(finite)))
    t = ((z - mu) * inv_sigma).clamp(-finite, finite)
    return -0.5 * (t * t + logvar + math.log(2 * math.pi)).sum(-1)


def cross_log_prob(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The matrix log q(z_i | x_j) of every sample under every posterior, in nats.

    Args:
        z: samples `[S, D]`; `[L, B, D]` holds L samples per posterior and is flattened to S = L·B. Where z and
            mu have equal ranks above 2, leading axes are batches.
        mu: means `[N, D]`.
        logvar: log sigma², the shape of `mu`.

    Returns:
        `[S, N]` in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices do not match.

    Example:
        >>> log_q = fastvae.cross_log_prob(z, mu, logvar)
        >>> responsibilities = log_q.softmax(1)
    """
    z, mu, logvar, _ = checked(z, mu, logvar)
    return over_batches(_cross_log_prob, z, mu, logvar)
