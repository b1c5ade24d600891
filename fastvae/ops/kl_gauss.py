"""KL divergence between diagonal Gaussians, fused with its reduction.

KL(N(m, s²) ‖ N(m_p, s_p²)) = ½ (expm1(Δ) − Δ + (m − m_p)² / s_p²) per dimension, Δ = ln s² − ln s_p²
(Zheng, eq. 16, for a general diagonal prior; written so that rounding cannot make it negative).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends.contract import REDUCTIONS, accumulation_dtype, kl_scale, kl_shape
from .batching import leading
from .checks import as_rows, check_choice, check_device, check_number, check_posterior, check_tensor, promote
from .declare import declare, declare_backward, placed
from .short import is_usual_call, unpacked


def _fake(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, reduction: str) -> Tensor:
    return mu.new_empty(kl_shape(reduction, *mu.shape), dtype=accumulation_dtype(mu.dtype))


def _compute(backend: Any, *arguments: Any) -> Tensor:
    *inputs, reduction = arguments
    if inputs[0].shape[1] == 0 and reduction not in ("none", "sample"):
        inputs = [None if x is None else x[:1] for x in inputs]  # rows without dimensions are all alike
    return backend.kl_gauss(*inputs, reduction)


_kl_gauss = declare(
    "kl_gauss(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, str reduction) -> Tensor",
    _fake,
    _compute,
)
_kl_gauss_backward = declare_backward(
    "kl_gauss_backward(Tensor grad, Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar,"
    " str reduction, bool[] wanted) -> Tensor[]",
    ("mu", "logvar", "prior_mu", "prior_logvar"),
)


@_kl_gauss.differentiate
class KLGauss(Function):
    """The autograd Function of mu and logvar [B, D], and of the prior's, [1, D] or [B, D]."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.reduction = inputs[4]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        return placed(_kl_gauss_backward(grad, *unpacked(ctx), ctx.reduction, wanted), wanted, 5)


# Under vmap the V problems are one of V·B rows, each of which is reduced alone, and then with those of its problem.


def _of_each_row(reduction: str) -> str:
    return "none" if reduction in ("none", "dim") else "sample"


@_kl_gauss.batch
def _batched(V: int, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    *inputs, reduction = arguments
    inputs = leading(inputs, in_dims, V)
    B, D = inputs[0].shape[1:]
    rows = [None if x is None else x.expand(V, B, D).flatten(0, 1) for x in inputs]
    kl = _kl_gauss(*rows, _of_each_row(reduction)).unflatten(0, (V, B))
    if reduction in ("none", "sample"):
        return kl, 0
    return kl.sum(1) * kl_scale(reduction, B, D), 0


@_kl_gauss_backward.batch
def _backward_batched(V: int, in_dims: Any, *arguments: Any) -> tuple[list[Tensor], int]:
    grad, *inputs, reduction, wanted = arguments
    grad, *inputs = leading([grad, *inputs], in_dims, V)
    B, D = inputs[0].shape[1:]
    if reduction not in ("none", "sample"):
        grad = (grad * kl_scale(reduction, B, D)).unsqueeze(1)
    by_row = _of_each_row(reduction)
    grad = grad.expand(V, B, D) if by_row == "none" else grad.expand(V, B)
    # In the accumulation dtype, so that the sum of a prior's gradients over its rows is rounded once.
    rows = [None if x is None else x.to(accumulation_dtype(x.dtype)).expand(V, B, D).flatten(0, 1) for x in inputs]
    gradients = _kl_gauss_backward(grad.flatten(0, 1), *rows, by_row, wanted)
    found = [inputs[place - 1] for place in _kl_gauss_backward.results(arguments)]
    return [
        gradient.unflatten(0, (V, B)).sum_to_size(x.shape).to(x.dtype)
        for gradient, x in zip(gradients, found, strict=True)
    ], 0


def kl_gauss(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    free_bits: float = 0.0,
) -> Tensor:
    """KL divergence, in nats, of a diagonal Gaussian from a diagonal Gaussian prior, reduced.

    Args:
        mu: means `[..., D]`; float64, float32, bfloat16 or float16.
        logvar: log sigma², the shape of `mu`.
        prior_mu: the prior's means, anything that broadcasts to `mu` (`[D]`, `[B, D]`); None for 0.
        prior_logvar: the prior's log sigma², likewise.
        reduction: `"none"` `[..., D]`; `"sample"` `[...]`, summed over D; `"dim"` `[D]`, the mean over all
            other axes, each dimension's share of the KL; `"sum"`; `"mean"`, over all elements; `"batchmean"`,
            the sum over D and the mean over all other axes: the ELBO's KL term.
        free_bits: lambda, nats per dimension (Kingma et al. 2016): a dimension whose batch-mean KL is below it
            counts as lambda and gets no gradient. Of an empty batch the KL is then 0; without free bits its mean is
            NaN, as in torch.

    Returns:
        The KL in float32, or in float64 for float64 inputs. Never negative.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices do not match, an unknown `reduction`, a negative `free_bits`, or
            `free_bits` with `"none"` or `"sample"`.

    Example:
        >>> mu, logvar = encoder(x).chunk(2, dim=-1)
        >>> loss = nell + fastvae.kl_gauss(mu, logvar)
    """
    usual = prior_mu is None and prior_logvar is None and type(free_bits) is float and free_bits == 0
    if usual and type(reduction) is str and reduction in REDUCTIONS and is_usual_call(mu, logvar):
        return _kl_gauss.short(mu, logvar, None, None, reduction)
    check_posterior(mu, logvar)
    check_choice("reduction", reduction, REDUCTIONS)
    free_bits = check_number("free_bits", free_bits, least=0.0, finite=True)
    if free_bits and reduction in ("none", "sample"):
        raise ValueError(
            f"free_bits: acts on the batch mean of each dimension, so reduction={reduction!r} cannot have it"
        )
    for name, prior in (("prior_mu", prior_mu), ("prior_logvar", prior_logvar)):
        if prior is not None:
            check_tensor(name, prior, min_ndim=0)
            check_device(name, prior, "mu", mu)

    shape, D = mu.shape, mu.shape[-1]
    priors = (_to_add_up(prior, shape) for prior in (prior_mu, prior_logvar))
    mu, logvar, prior_mu, prior_logvar = promote(mu, logvar, *priors)  # type: ignore[assignment]
    arguments = (
        as_rows(mu),
        as_rows(logvar),
        _prior_rows("prior_mu", prior_mu, shape),
        _prior_rows("prior_logvar", prior_logvar, shape),
    )
    if free_bits:
        n_rows = arguments[0].shape[0]
        if n_rows == 0:
            nothing = _kl_gauss(*arguments, "sum")
            return nothing.expand(D) if reduction == "dim" else nothing
        dims = _kl_gauss(*arguments, "dim")
        dims = dims.clamp(min=min(free_bits, torch.finfo(dims.dtype).max))
        if reduction == "dim":
            return dims
        return dims.sum() * {"sum": n_rows, "mean": 1 / max(D, 1), "batchmean": 1}[reduction]
    kl = _kl_gauss(*arguments, reduction)
    if len(shape) != 2 and reduction in ("none", "sample"):
        kl = kl.reshape(shape if reduction == "none" else shape[:-1])
    return kl


def _to_add_up(prior: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Convert a half-precision prior that broadcasting repeats to the accumulation dtype, as autograd adds up its
    gradients. A prior `[B, D]` has nothing to add up, and for `[D]` the kernels do it."""
    if prior is None or accumulation_dtype(prior.dtype) == prior.dtype or prior.shape == shape:
        return prior
    if all(n == 1 for n in prior.shape[:-1]) and prior.shape[-1:] == shape[-1:]:
        return prior
    return prior.to(accumulation_dtype(prior.dtype))


def _prior_rows(name: str, prior: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The prior as [1, D], or as [B, D] where its rows differ."""
    if prior is None:
        return None
    try:
        full = prior.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to mu's {tuple(shape)}, got {tuple(prior.shape)}"
        ) from None
    if all(n == 1 for n in prior.shape[:-1]):
        return prior.reshape(1, prior.shape[-1] if prior.ndim else 1).expand(1, shape[-1])
    return as_rows(full)
