"""Reparameterized Gaussian samples, with their log-densities and KL from the same pass.

z = mu + sigma · eps, eps from the counter-based generator of `backends/philox.py`: the seed fixes the sample
on every backend, and the backward draws it again instead of storing it, unless it is asked to be kept.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends import reference
from ..backends.contract import accumulation_dtype, kl_scale, kl_shape
from .batching import leading, one_by_one
from .checks import as_rows, check_choice, check_count, check_flag, check_posterior, check_seed, promote
from .declare import declare, declare_backward, declare_random, placed
from .modes import in_a_transform
from .short import is_usual_call, unpacked

OUTPUTS = ("z", "log_q", "log_p", "kl")
_Z = (True, False, False, False, False)
_ASKED = {  # which of an op's results the usual ways to ask for OUTPUTS mean
    outputs: (*(name in outputs for name in OUTPUTS), False)
    for n in range(1, 5)
    for outputs in itertools.combinations(OUTPUTS, n)
}
_A_SEED = torch.zeros((), dtype=torch.int64, device="cpu")
_HAS_SAMPLES = (True, True, True, False, True)  # which results have an axis of samples
KL_REDUCTIONS = ("sample", "sum", "mean", "batchmean")


class GaussianSample(NamedTuple):
    """The result of `sample_gauss`; None for what was not asked for."""

    z: Tensor | None
    log_q: Tensor | None
    log_p: Tensor | None
    kl: Tensor | None


# Ops: mu, logvar [B, D]; n_samples L, or None for one sample without the axis of samples. After OUTPUTS comes the
# fifth, the noise eps [L, B, D] in the dtype of the accumulation, in which it has all its bits.


def _fake(
    mu: Tensor, logvar: Tensor, seed: Tensor, n_samples: int | None, outputs: list[bool], reduction: str
) -> list[Tensor]:
    B, D = mu.shape
    samples = () if n_samples is None else (n_samples,)
    dtype = accumulation_dtype(mu.dtype)
    results = (
        ((*samples, B, D), mu.dtype),
        ((*samples, B), dtype),
        ((*samples, B), dtype),
        (kl_shape(reduction, B, D), dtype),
        ((*samples, B, D), dtype),
    )
    return [mu.new_empty(s, dtype=d) for (s, d), want in zip(results, outputs, strict=True) if want]


def _compute(
    backend: Any,
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    n_samples: int | None,
    outputs: list[bool],
    reduction: str,
) -> list[Tensor]:
    results = backend.sample_gauss(mu, logvar, seed, 1 if n_samples is None else n_samples, outputs, reduction)
    if n_samples is None:
        for result in itertools.compress(results, itertools.compress(_HAS_SAMPLES, outputs)):
            result.squeeze_(0)  # in place: views returned by a Function could not be modified by the caller
    return results


def _compute_backward(backend: Any, *arguments: Any) -> list[Tensor]:
    *upstream, mu, logvar, seed, eps, n_samples, reduction, wanted = arguments
    if n_samples is None:
        n_samples = 1
        eps = None if eps is None else eps.unsqueeze(0)
        upstream[:3] = [None if g is None else g.unsqueeze(0) for g in upstream[:3]]  # all but the KL's
    return backend.sample_gauss_backward(upstream, mu, logvar, seed, eps, n_samples, reduction, wanted)


_sample_gauss = declare(
    "sample_gauss(Tensor mu, Tensor logvar, Tensor seed, SymInt? n_samples, bool[] outputs, str reduction) -> Tensor[]",
    _fake,
    _compute,
    formula=lambda *arguments: _compute(_Formulas, *arguments),
)
_sample_gauss_backward = declare_backward(
    "sample_gauss_backward(Tensor? d_z, Tensor? d_log_q, Tensor? d_log_p, Tensor? d_kl, Tensor mu, Tensor logvar,"
    " Tensor? seed, Tensor? eps, SymInt? n_samples, str reduction, bool[] wanted) -> Tensor[]",
    ("mu", "logvar"),
    _compute_backward,
    formula=lambda *arguments: _compute_backward(_Formulas, *arguments),
)
_draw_seed = declare_random(
    "draw_seed(Tensor like) -> Tensor",
    lambda like: like.new_empty((), dtype=torch.int64),
    lambda like: torch.empty((), dtype=torch.int64, device=like.device).random_(),
)


@_sample_gauss.differentiate
class SampleGauss(Function):
    """The autograd Function from mu, logvar [B, D] to those of z [L, B, D], log_q [L, B], log_p [L, B], kl [B] or a
    number, and eps [L, B, D], that `outputs` selects, without the axis of samples where `n_samples` is None. Its
    backward has the seed, or eps where that is a result."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        mu, logvar, seed, ctx.n_samples, ctx.outputs, ctx.reduction = inputs
        if ctx.outputs[4]:
            ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(mu, logvar, output[-1] if ctx.outputs[4] else seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = of_op = ctx.needs_input_grad[:2]
        upstream = d_z, *others = placed(grads, ctx.outputs, 5)[:4]
        if is_d_mu := ctx.n_samples is None and d_z is not None and others == [None] * 3:
            of_op = (False, wanted[1])
        gradients: list[Tensor | None] = [d_z] if is_d_mu and wanted[0] else []
        if any(of_op):
            mu, logvar, noise = unpacked(ctx)
            seed, eps = (None, noise) if ctx.outputs[4] else (noise, None)
            gradients += _sample_gauss_backward(*upstream, mu, logvar, seed, eps, ctx.n_samples, ctx.reduction, of_op)
        return placed(gradients, wanted, 6)


class _Formulas:
    """The reference's, at noise from the backend of the tensors' device."""

    @staticmethod
    def _noise(mu: Tensor, seed: Tensor, n_samples: int) -> Tensor:
        """eps `[L, B, D]`, the samples of N(0, I)."""
        zeros = torch.zeros(mu.shape, dtype=accumulation_dtype(mu.dtype), device=mu.device)
        return _sample_gauss(zeros, zeros, seed, n_samples, _Z, "sample")[0]

    @classmethod
    def sample_gauss(
        cls, mu: Tensor, logvar: Tensor, seed: Tensor, n_samples: int, outputs: Sequence[bool], reduction: str
    ) -> list[Tensor]:
        return reference.sampled(mu, logvar, cls._noise(mu, seed, n_samples), outputs, reduction)

    @classmethod
    def sample_gauss_backward(
        cls,
        upstream: Any,
        mu: Tensor,
        logvar: Tensor,
        seed: Tensor | None,
        eps: Tensor | None,
        n_samples: int,
        reduction: str,
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        if eps is None:
            assert seed is not None
            eps = cls._noise(mu, seed, n_samples)
        return reference.sampled_backward(upstream, mu, logvar, eps, reduction, wanted)


# Under vmap with randomness="different" every problem has a seed of its own. The V problems are then one of V·B rows,
# whose noise one of the seeds gives. Where they share a seed, as where it is the caller's, they share the noise, and
# are computed one by one; so are gradients, unless each problem has noise that was kept. A KL is reduced for each
# problem alone.


@_sample_gauss.batch
def _batched(V: int, in_dims: Any, *arguments: Any) -> tuple[list[Tensor], Any]:
    if in_dims[2] is None or V == 0:
        return one_by_one(_sample_gauss)(V, in_dims, *arguments)
    mu, logvar, seed = leading(arguments[:3], in_dims, V)
    n_samples, outputs, reduction = arguments[3:]
    results = _sample_gauss(mu.flatten(0, 1), logvar.flatten(0, 1), seed[0], n_samples, outputs, "sample")
    axes = list(itertools.compress(_row_axes(n_samples), outputs))
    results = [r.unflatten(axis, (V, -1)) for r, axis in zip(results, axes, strict=True)]
    if outputs[3] and reduction != "sample":
        kl = sum(outputs[:3])
        results[kl] = results[kl].sum(1) * kl_scale(reduction, *mu.shape[1:])
    return results, axes


@_sample_gauss_backward.batch
def _backward_batched(V: int, in_dims: Any, *arguments: Any) -> tuple[list[Tensor], int]:
    if (in_dims[6] is None and in_dims[7] is None) or V == 0:
        return one_by_one(_sample_gauss_backward)(V, in_dims, *arguments)
    *upstream, mu, logvar, seed, eps = leading(arguments[:8], in_dims, V)
    n_samples, reduction, wanted = arguments[8:]
    if upstream[3] is not None and reduction != "sample":
        B, D = mu.shape[1:]
        upstream[3] = (upstream[3] * kl_scale(reduction, B, D))[:, None].expand(V, B)
    *upstream, eps = (
        None if x is None else x.movedim(0, axis).flatten(axis, axis + 1)
        for x, axis in zip((*upstream, eps), _row_axes(n_samples), strict=True)
    )
    rows = mu.flatten(0, 1), logvar.flatten(0, 1)
    seed = None if seed is None else seed[0]
    gradients = _sample_gauss_backward(*upstream, *rows, seed, eps, n_samples, "sample", wanted)
    return [g.unflatten(0, (V, -1)) for g in gradients], 0


def _row_axes(n_samples: int | None) -> tuple[int, ...]:
    """The axis of rows in each of the results: after that of samples, which the KL does not have."""
    return tuple(int(has_samples and n_samples is not None) for has_samples in _HAS_SAMPLES)


def sample_gauss(
    mu: Tensor,
    logvar: Tensor,
    n_samples: int | None = None,
    *,
    outputs: tuple[str, ...] = OUTPUTS,
    reduction: str = "sample",
    seed: int | None = None,
    generator: torch.Generator | None = None,
    save_noise: bool = False,
) -> GaussianSample:
    """Samples z ~ N(mu, exp(logvar)) with log q(z|x), log N(z; 0, I) and the closed-form KL, in one pass.

    Args:
        mu: means `[..., D]`; float64, float32, bfloat16 or float16.
        logvar: log sigma², the shape of `mu`.
        n_samples: L samples per posterior on a new leading axis; None for one without that axis.
        outputs: which of `"z"`, `"log_q"`, `"log_p"`, `"kl"` to compute.
        reduction: of the KL, as in `kl_gauss`: `"sample"`, `"sum"`, `"mean"` or `"batchmean"`.
        seed: an integer that fixes the sample on every backend; None draws one from torch's generator of the
            tensors' device, so that `torch.manual_seed` governs.
        generator: the torch.Generator to draw the seed from instead (not under `torch.compile`).
        save_noise: keep eps, as much memory as z in float32, from the forward for the backward, which is then faster on
            a CPU; on a GPU, where drawing should take less time than reading (an estimate), there is little reason to.
            Samples and gradients are the same bits either way.

    Returns:
        GaussianSample: `z` `[(L,) ..., D]` in the dtype of `mu`; `log_q` and `log_p` `[(L,) ...]` and `kl`
        = KL(q ‖ N(0, I)), `[...]` or reduced to a scalar, in nats, in float32 (float64 for float64 inputs), from z
        before it is rounded to half precision. Gradients are total, at fixed noise: d log_q / d mu = 0,
        d log_q / d logvar = −½.

    Raises:
        TypeError: an input is not a floating-point tensor, or `n_samples` or `seed` not an integer.
        ValueError: shapes or devices do not match, a negative `n_samples`, an unknown name in `outputs`, an
            unknown `reduction`, or both `seed` and `generator`.

    Example:
        >>> z, _, _, kl = fastvae.sample_gauss(mu, logvar, outputs=("z", "kl"), reduction="batchmean")
        >>> loss = nell(decoder(z), x) + kl
        >>> z, log_q, log_p, _ = fastvae.sample_gauss(mu, logvar, 8, outputs=("z", "log_q", "log_p"))
        >>> log_w = decoder(z).log_prob(x) + log_p - log_q
    """
    if n_samples is None and seed is None and generator is None and save_noise is False and is_usual_call(mu, logvar):
        known = _ASKED.get(outputs) if type(outputs) is tuple and all(type(name) is str for name in outputs) else None
        if known and type(reduction) is str and reduction in KL_REDUCTIONS:
            results = iter(_sample_gauss.short(mu, logvar, _usual_seed(mu), None, known, reduction))
            return GaussianSample(*[next(results) if want else None for want in known[:4]])
    if not isinstance(outputs, (tuple, list)):
        raise TypeError(f"outputs: expected a tuple of names, got {outputs!r}")
    for name in outputs:
        check_choice("outputs", name, OUTPUTS)
    check_choice("reduction", reduction, KL_REDUCTIONS)
    asked = tuple(name in outputs for name in OUTPUTS)
    results = _sample(mu, logvar, n_samples, asked, reduction, seed, generator, save_noise)
    return GaussianSample(*placed(results, asked, 4))


def _sample(
    mu: Tensor,
    logvar: Tensor,
    n_samples: int | None,
    asked: tuple[bool, ...],
    reduction: str,
    seed: int | None,
    generator: torch.Generator | None,
    save_noise: bool,
) -> Sequence[Tensor]:
    """Compute those of z, log_q, log_p and kl that `asked` selects."""
    check_posterior(mu, logvar)
    save_noise = check_flag("save_noise", save_noise)
    if n_samples is not None:
        n_samples = check_count("n_samples", n_samples)
        if isinstance(n_samples, int) and n_samples > 2**32 and n_samples * max(1, mu.numel()) >= 2**60:
            raise ValueError(f"n_samples: expected fewer, for mu of shape {tuple(mu.shape)}, got {n_samples}")
    shape = mu.shape
    mu, logvar = promote(mu, logvar)  # type: ignore[assignment]
    if not any(asked):
        return ()
    seed_tensor = _seed(mu, seed, generator)
    keep = save_noise and (in_a_transform() or (torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad)))
    results = _sample_gauss(as_rows(mu), as_rows(logvar), seed_tensor, n_samples, (*asked, keep), reduction)
    results = results[: sum(asked)]
    if len(shape) == 2:
        return results
    samples = () if n_samples is None else (n_samples,)
    of_kl = shape[:-1] if reduction == "sample" else ()
    shapes = (samples + shape, samples + shape[:-1], samples + shape[:-1], of_kl)
    return [r.reshape(s) for r, s in zip(results, itertools.compress(shapes, asked), strict=True)]


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    n_samples: int | None = None,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    save_noise: bool = False,
) -> Tensor:
    """Reparameterized samples z = mu + exp(logvar / 2) · eps, eps ~ N(0, I) (Kingma & Welling 2014).

    Args:
        mu: means `[..., D]`; float64, float32, bfloat16 or float16.
        logvar: log sigma², the shape of `mu`.
        n_samples: L samples per posterior on a new leading axis; None for one without that axis.
        seed, generator, save_noise: as in `sample_gauss`, which draws the same z for the same seed.

    Returns:
        `[..., D]`, or `[L, ..., D]`, in the dtype of `mu`.

    Raises:
        TypeError, ValueError: as in `sample_gauss`.

    Example:
        >>> z = fastvae.reparameterize(mu, logvar)
        >>> z8 = fastvae.reparameterize(mu, logvar, 8, seed=0)  # [8, B, D]
    """
    if n_samples is None and seed is None and generator is None and save_noise is False and is_usual_call(mu, logvar):
        return _sample_gauss.short(mu, logvar, _usual_seed(mu), None, _Z, "sample")[0]
    return _sample(mu, logvar, n_samples, _Z[:4], "sample", seed, generator, save_noise)[0]


def _usual_seed(mu: Tensor) -> Tensor:
    """A seed for a usual call that has none."""
    if mu.is_cpu:
        return torch.empty_like(_A_SEED).random_()  # takes half as long as the following
    return torch.empty((), dtype=torch.int64, device=mu.device).random_()


def _seed(like: Tensor, seed: int | None, generator: torch.Generator | None) -> Tensor:
    """The seed as a 0-dim int64 tensor on the device of `like`, made without a synchronization."""
    if generator is not None:
        if seed is not None:
            raise ValueError("generator: expected None where seed is given, got both")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        if generator.device.type != like.device.type:
            raise ValueError(f"generator: expected one on the device of mu, {like.device}, got {generator.device}")
        return torch.empty((), dtype=torch.int64, device=like.device).random_(generator=generator)
    if seed is None and in_a_transform():  # the same number, by an operation that goes by vmap's `randomness`
        return torch.randint(-(2**63), 2**63 - 1, (), device=like.device) & (2**63 - 1)
    if seed is None:
        # The compiler merges equal calls, even random ones, but not empty tensors: so each call gets one of its own.
        return _draw_seed(torch.empty(0, device=like.device) if torch.compiler.is_compiling() else like)
    seed = check_seed("seed", seed)
    if seed >= 2**63:
        seed -= 2**64
    return torch.full((), seed, dtype=torch.int64, device=like.device)
