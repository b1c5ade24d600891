"""Bounds on log p(x) from importance weights log w = log p(x|z) + log p(z) − log q(z|x), z drawn from q(z|x).

    ELBO           = log w                              one sample; averaged over k of them, MC_k-ELBO
    IW_m-ELBO      = log 1/m sum_m w                    m samples inside the logarithm
    MC_k-IW_m-ELBO = mean_k log 1/m sum_m w             and k outside

    E ELBO <= E IW_m-ELBO <= E IW_2m-ELBO <= log p(x),  the gap vanishing as m grows        (Zheng, eq. 39 and 40)

The value is always the bound itself; its gradient is one of three, chosen by name. With the normalized weights
w̃_m = w_m / sum_m w, the parameters theta of p(x, z), and phi of q(z|x):

    "iwae"   the derivative of the bound (Burda et al. 2016)
    "stl"    theta likewise; phi through z alone: sum_m w̃_m ∂log w_m/∂z · ∂z/∂phi (Roeder et al. 2017)
    "dreg"   theta likewise; phi through z alone: sum_m w̃_m² ∂log w_m/∂z · ∂z/∂phi (Tucker et al. 2019)

"iwae" and "dreg" have the same mean for every m. "stl" has it only for m = 1, where it is "dreg"; for m > 1 it is
biased, however many samples are averaged. The signal-to-noise ratio of phi's gradient falls like 1/sqrt(m) for "iwae"
(Rainforth et al. 2018) and grows like sqrt(m) for "dreg".

"dreg" is a hook on z, and so z has to be the tensor that log w was computed from. A hook on another tensor with the
same values, such as a concatenation of the samples made for the hook alone, never runs: the gradient is then that of
"stl", an error found in public code.
"""

import math

import torch
from torch import Tensor

from ..backends.contract import accumulation_dtype
from ..ops.checks import accumulated, check_axis, check_choice, check_device, check_same_shape, check_tensor

__all__ = ["effective_sample_size", "elbo", "iw_elbo", "mc_iw_elbo"]

GRADIENTS = ("iwae", "stl", "dreg")


def elbo(log_px_z: Tensor, log_pz: Tensor, log_qz_x: Tensor) -> Tensor:
    """The evidence lower bound of each example by Monte Carlo, in nats: mean_k log w.

    Args:
        log_px_z: log p(x|z), `[B]` for one sample of each posterior, `[k, B]` for k of them.
        log_pz: log p(z), of the same shape.
        log_qz_x: log q(z|x), of the same shape.

    Returns:
        `[B]` in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices do not match, other axes, or no samples.

    Source: Zheng, eq. 13 and 40.

    Example:
        >>> z, log_q, log_p, _ = fastvae.sample_gauss(mu, logvar, 8)
        >>> bound = fastvae.elbo(log_px_z(x, z), log_p, log_q)  # [B]
    """
    log_w = _log_w(log_px_z, log_pz, log_qz_x, "B", "kB")
    return log_w if log_w.ndim == 1 else log_w.mean(0)


def iw_elbo(
    log_px_z: Tensor, log_pz: Tensor, log_qz_x: Tensor, *, z: Tensor | None = None, gradient: str = "iwae"
) -> Tensor:
    """The importance-weighted bound of each example, in nats: log 1/m sum_m w.

    Args:
        log_px_z: log p(x|z), `[m, B]`, m samples of each posterior.
        log_pz: log p(z), `[m, B]`.
        log_qz_x: log q(z|x), `[m, B]`; for `"stl"` and `"dreg"` with the parameters of q stopped, as in
            `log_prob_gauss(z, mu.detach(), logvar.detach())`, so that its gradient goes through z alone. This
            cannot be checked here: where they are not stopped, the gradient is wrong, and no error is raised.
        z: `[m, B, D]`, for `"dreg"`: the very tensor that the decoder, the prior and log q were given. The bound
            hooks it: in the backward, all of the gradient that reaches z on its way to the encoder is multiplied by
            w̃; the decoder's gradient is not. So nothing else may use this z: z is an alias of the sample, as in the
            example, and other terms use the sample itself. Each bound needs an alias of its own, and refuses a z that
            another bound has hooked.
        gradient: `"iwae"`, `"stl"` or `"dreg"`; see above. It changes the gradient, never the value.

    Returns:
        `[B]` in float32 (float64 for float64 inputs); −inf, with gradient 0, where all m weights are zero.

    With `"dreg"` the gradient that reaches z is of the order w̃²: a z in float16 needs the loss scaled
    (`torch.amp.GradScaler`); the product itself is computed in float32.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices do not match, other axes, no samples, an unknown `gradient`, or `"dreg"`
            without `z`, or with one that another bound has hooked (not seen under `torch.compile`). Parameters of q
            that are not stopped, and other uses of z, raise nothing.

    Source: Burda et al. 2016; Zheng, eq. 38 to 40.

    Example:
        >>> sample = fastvae.reparameterize(mu, logvar, 8)  # for other terms
        >>> z = sample.view_as(sample)  # for this one
        >>> log_q = fastvae.log_prob_gauss(z, mu.detach(), logvar.detach())
        >>> bound = fastvae.iw_elbo(log_px_z(x, z), prior.log_prob(z), log_q, z=z, gradient="dreg")
        >>> (-bound.mean()).backward()
    """
    return _log_mean_w(_log_w(log_px_z, log_pz, log_qz_x, "mB"), z, gradient)


def mc_iw_elbo(
    log_px_z: Tensor, log_pz: Tensor, log_qz_x: Tensor, *, z: Tensor | None = None, gradient: str = "iwae"
) -> Tensor:
    """The mean over k of importance-weighted bounds with m samples each, in nats: mean_k log 1/m sum_m w.

    Args:
        log_px_z: log p(x|z), `[k, m, B]`, m inside the logarithm and k outside.
        log_pz: log p(z), `[k, m, B]`.
        log_qz_x: log q(z|x), `[k, m, B]`.
        z: `[k, m, B, D]`, for `"dreg"`.
        gradient: `"iwae"`, `"stl"` or `"dreg"`. All as in `iw_elbo`.

    Returns:
        `[B]` in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as in `iw_elbo`.

    Source: Zheng, eq. 40; Rainforth et al. 2018.

    Example:
        >>> z, log_q, log_p, _ = fastvae.sample_gauss(mu, logvar, k * m)
        >>> terms = (t.unflatten(0, (k, m)) for t in (log_px_z(x, z), log_p, log_q))
        >>> bound = fastvae.mc_iw_elbo(*terms)  # [B]
    """
    return _log_mean_w(_log_w(log_px_z, log_pz, log_qz_x, "kmB"), z, gradient).mean(0)


def effective_sample_size(log_w: Tensor, dim: int = -1) -> Tensor:
    """How many equal weights would do as well: (sum w)² / sum w², from 1 to the number of weights.

    Args:
        log_w: log-weights of any shape.
        dim: the axis of the samples.

    Returns:
        The shape of `log_w` without that axis, in float32 (float64 for float64 inputs); 0 where all weights are
        zero.

    Raises:
        TypeError: `log_w` is not a floating-point tensor, or `dim` not an integer.
        ValueError: `log_w` has no axis `dim`.

    Source: Kong 1992.

    Example:
        >>> fastvae.effective_sample_size(log_px_z + log_pz - log_qz_x, dim=0)  # [m, B] to [B]
    """
    check_tensor("log_w", log_w)
    dim = check_axis(dim, log_w)
    log_w, dead = _alive(log_w.to(accumulation_dtype(log_w.dtype)), dim)
    return (1 / log_w.softmax(dim).square().sum(dim)).masked_fill(dead, 0.0)


def _log_w(log_px_z: Tensor, log_pz: Tensor, log_qz_x: Tensor, *axes: str) -> Tensor:
    """log w, checked to have one of the `axes`, each a string with a letter for each axis."""
    for name, x in (("log_px_z", log_px_z), ("log_pz", log_pz), ("log_qz_x", log_qz_x)):
        check_tensor(name, x)
        check_same_shape(name, x, "log_px_z", log_px_z)
        check_device(name, x, "log_px_z", log_px_z)
    shape = tuple(log_px_z.shape)
    if len(shape) not in map(len, axes):
        expected = " or ".join(f"[{', '.join(a)}]" for a in axes)
        raise ValueError(f"log_px_z: expected axes {expected}, got shape {shape}")
    if 0 in shape[:-1]:
        raise ValueError(f"log_px_z: expected at least one sample, got shape {shape}")
    log_px_z, log_pz, log_qz_x = accumulated(log_px_z, log_pz, log_qz_x)
    return log_px_z + log_pz - log_qz_x


def _log_mean_w(log_w: Tensor, z: Tensor | None, gradient: str) -> Tensor:
    """log 1/m sum_m w, [..., m, B] to [..., B], with the gradient that `gradient` names."""
    check_choice("gradient", gradient, GRADIENTS)
    alive, dead = _alive(log_w, -2)
    if gradient == "dreg":
        if z is None:
            raise ValueError("z: expected the samples for gradient='dreg', got None")
        check_tensor("z", z)
        check_device("z", z, "log_px_z", log_w)
        if z.shape[:-1] != log_w.shape:
            shape = ", ".join(map(str, log_w.shape))
            raise ValueError(f"z: expected [{shape}, D], the axes of log_px_z and D, got {tuple(z.shape)}")
        if log_w.requires_grad and z.requires_grad:
            if not torch.compiler.is_compiling():
                if hasattr(z, "_hooked_by_dreg"):
                    raise ValueError("z: expected an alias for this bound alone, got one that another bound has hooked")
                z._hooked_by_dreg = True  # type: ignore[attr-defined]
            w = alive.detach().softmax(-2)[..., None]
            z.register_hook(lambda grad: (grad * w).to(grad.dtype))
    return alive.logsumexp(-2).masked_fill(dead, -math.inf) - math.log(log_w.shape[-2])


def _alive(log_w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """log w, with zeros where all weights along `dim` are zero, as gradients would be NaN; and the mask of these."""
    dead = (log_w == -math.inf).all(dim, keepdim=True)
    return torch.where(dead, 0.0, log_w), dead.squeeze(dim)
