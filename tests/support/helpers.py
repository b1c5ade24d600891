"""Helpers of the tests: the formulas in broadcast form, the tolerance rule, and inputs of awkward layouts."""

import functools
import hashlib
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae import ColumnWeights

LOG_2PI = math.log(2 * math.pi)
DTYPES = (torch.float64, torch.float32)
HALVES = (torch.bfloat16, torch.float16)

# S samples, N posteriors, D dimensions: nothing that a block size divides.
SIZES = (
    (1, 1, 1),
    (1, 3, 512),
    (3, 1, 2),
    (3, 507, 2),
    (31, 31, 33),
    (31, 1271, 1),
    (97, 123, 10),
    (123, 31, 64),
    (507, 3, 129),
    (1271, 97, 2),
)

Named = dict[str, Any]  # tensors by argument, to be given as **inputs beside arguments of other types
Results = Any  # a tensor, or a sequence of them


# The formulas, broadcast: [S, N, D] and all.


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * ((z - mu) ** 2 * torch.exp(-logvar) + logvar + LOG_2PI)


def kl(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    """The KL of each dimension, [..., D], written as in textbooks but for expm1."""
    delta = logvar - prior_logvar
    return 0.5 * (torch.expm1(delta) - delta + (mu - prior_mu) ** 2 * torch.exp(-prior_logvar))


def cross(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return log_normal(z.unsqueeze(-2), mu.unsqueeze(-3), logvar.unsqueeze(-3)).sum(-1)


def aggregate(
    z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor | None = None, weights: ColumnWeights | None = None
) -> tuple[Tensor, Tensor]:
    """(joint [S], marginals [S, D]); `log_w`, where given, stands for `weights.log_w`."""
    pairs = log_normal(z.unsqueeze(-2), mu.unsqueeze(-3), logvar.unsqueeze(-3))  # [..., S, N, D]
    matrix = log_weights(log_w, weights, *pairs.shape[-3:-1]).to(pairs)
    return log_sum_exp(matrix + pairs.sum(-1), -1), log_sum_exp(matrix[..., None] + pairs, -2)


def sample(mu: Tensor, logvar: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z, log_q, log_p, kl) with eps [L, B, D]"""
    eps = eps.to(mu.dtype)
    z = mu + torch.exp(0.5 * logvar) * eps
    log_q = -0.5 * (eps**2 + logvar + LOG_2PI).sum(-1)
    zero = torch.zeros_like(mu)
    return z, log_q, log_normal(z, zero, zero).sum(-1), kl(mu, logvar, zero, zero).sum(-1)


def normals(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """The eps [L, B, D] that the backend draws in this dtype."""
    zero = torch.zeros(shape[1:], dtype=accumulated(dtype))
    return fastvae.reparameterize(zero, zero, shape[0], seed=seed)


def log_weights(log_w: Tensor | None, weights: ColumnWeights | None, S: int, N: int) -> Tensor:
    """The matrix log w_ij [S, N] that the library never forms."""
    if weights is None:
        weights = ColumnWeights(-math.log(N) if N else 0.0)
    common = weights.log_w if log_w is None else log_w
    matrix = torch.as_tensor(common, dtype=torch.float64).expand(S, N).clone()
    if weights.own is not None:
        drawn = (weights.own >= 0).nonzero()[:, 0]
        own = weights.own[drawn]
        if weights.log_w_next is not None:
            matrix[drawn, (own + 1) % N] = weights.log_w_next
        if weights.log_w_own is not None:
            matrix[drawn, own] = weights.log_w_own
    return matrix


def log_sum_exp(terms: Tensor, axis: int) -> Tensor:
    """torch.logsumexp, but with gradient 0 where every term is -inf, which is NaN there. The gradient of
    torch.logsumexp takes the shares from the rounded result, off by |result| eps: it is the measure in float32, but not
    exact enough in float64, where the shares come from the maximum instead."""
    dead = (terms == -math.inf).all(axis, keepdim=True)
    terms = terms.where(~dead, 0)
    if terms.dtype == torch.float64 and terms.shape[axis]:
        top = terms.detach().amax(axis, keepdim=True)
        top = top.where(top.isfinite(), 0)
        total = (terms - top).exp().sum(axis).log() + top.squeeze(axis)
    else:
        total = torch.logsumexp(terms, axis)
    return total.where(~dead.squeeze(axis), -math.inf)


def flattened(z: Tensor, mu: Tensor) -> Tensor:
    """z [L, *batch, B, D], L samples of each posterior, as [*batch, L * B, D]; any other z as it is."""
    return z.movedim(0, -3).flatten(-3, -2) if z.ndim == mu.ndim + 1 else z


# The tolerance rule.


def accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest(inputs: Named) -> torch.dtype:
    """The dtype that the results of these inputs are to be as exact as."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs.values()) else torch.float32


def cast(inputs: Named, dtype: torch.dtype) -> Named:
    return {name: x.detach().to(dtype).requires_grad_(x.requires_grad) for name, x in inputs.items()}


def needing_gradients(inputs: Named) -> Named:
    return {name: x.requires_grad_() for name, x in inputs.items()}


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normals that every dtype but float16 of large values holds exactly, in float64."""
    generator = torch.Generator().manual_seed(seed)
    normals = torch.randn(shape, generator=generator, device="cpu").bfloat16().double()
    return normals.to(torch.get_default_device())


def tensors(results: Results) -> list[Tensor]:
    """One tensor or several, as a list."""
    return [results] if isinstance(results, Tensor) else list(results)


def evaluate(
    function: Callable[..., Results], inputs: Named, upstream: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """The results of a function of named tensors, then the gradient of each input that requires one, under an
    upstream gradient that is random but fixed unless given."""
    upstream = upstream or (lambda output: draw(*output.shape, seed=1).to(output))
    leaves = {name: x.detach().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    outputs = tensors(function(**leaves))
    wanted = [x for x in leaves.values() if x.requires_grad]
    given = [upstream(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, wanted, given, materialize_grads=True) if wanted else ()
    return [*(o.detach() for o in outputs), *gradients]


def largest(x: Tensor) -> float:
    x = x.abs()
    return x[x.isfinite()].max().item() if x.isfinite().any() else 0.0


def nudge(inputs: Named, centred: Sequence[str], eps: float, seed: int) -> Named:
    """Half an ulp up or down for every number of the centred inputs, counted from the centre of the columns; one that
    was expanded along an axis is the same number there."""
    centre = inputs["mu"].detach().mean(-2, keepdim=True) if centred else None
    nudged = dict(inputs)
    for n, name in enumerate(centred):
        x = inputs[name].detach()
        ulp = eps * torch.exp2((x - centre).abs().log2().floor())
        numbers = [1 if size and (x == x.narrow(axis, 0, 1)).all() else size for axis, size in enumerate(x.shape)]
        nudge = draw(*numbers, seed=100 * seed + n).sign() * ulp / 2
        nudged[name] = (x + nudge).requires_grad_(inputs[name].requires_grad)
    return nudged


def _jittered(inputs: Named, seed: int) -> Named:
    """The inputs with other last bits, so that rounding errors are drawn anew."""
    eps = torch.finfo(torch.float32).eps
    return {
        name: (x.detach() * (1 + 4 * eps * draw(*x.shape, seed=100 * seed + n).float())).requires_grad_(x.requires_grad)
        for n, (name, x) in enumerate(inputs.items())
    }


def fingerprint(x: Any) -> Any:
    """A key that is equal for arguments that give the same result: tensors by their numbers, functions by their code
    and what they close over. A TypeError for other objects that hold something."""
    if isinstance(x, Tensor):
        plain = x.detach().cpu().resolve_neg().clone(memory_format=torch.contiguous_format)
        numbers = plain.flatten().view(torch.uint8).numpy().data
        return x.dtype, x.device, x.shape, x.requires_grad, hashlib.sha256(numbers).digest()
    if isinstance(x, types.FunctionType):
        inside = (cell.cell_contents for cell in x.__closure__ or ())
        return x.__code__, x.__module__, *map(fingerprint, (*inside, x.__defaults__, x.__kwdefaults__))
    if isinstance(x, tuple | list):
        return type(x), *map(fingerprint, x)
    if isinstance(x, dict):
        return type(x), *map(fingerprint, x.items())
    if x is None or isinstance(x, bool | int | float | str | types.BuiltinFunctionType | torch.dtype | torch.device):
        return type(x), repr(x)
    raise TypeError(f"{type(x).__name__} has insides")


def remembered(measure: Callable[..., Any], most: int = 64) -> Callable[..., Any]:
    """The function with its last results, by the fingerprints of its arguments: the backends, one after the other, are
    held to the same."""
    results: dict[Any, Any] = {}

    @functools.wraps(measure)
    def lookup(*arguments: Any) -> Any:
        try:
            key = fingerprint((arguments, torch.get_default_device()))
        except (TypeError, RecursionError):
            return measure(*arguments)
        if key not in results:
            if len(results) == most:
                del results[next(iter(results))]
            results[key] = measure(*arguments)
        return results[key]

    return lookup


@remembered
def _exact_and_tolerance(
    formula: Callable[..., Results],
    inputs: Named,
    centred: Sequence[str],
    upstream: Callable[[Tensor], Tensor] | None,
    margin: float,
    draws: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """The exact values and the tolerances of `Expected`."""
    wide, single = cast(inputs, torch.float64), cast(inputs, torch.float32)
    eps, eps32, eps64 = (torch.finfo(d).eps for d in (widest(inputs), torch.float32, torch.float64))

    def difference(left: list[Tensor], right: list[Tensor]) -> list[float]:
        return [largest(a.double() - b) for a, b in zip(left, right, strict=True)]

    visible = max(eps, 2**-40)  # half an ulp of float64's own would often be rounded away
    exact = evaluate(formula, wide, upstream)
    errors, changes = [], [[0.0] * len(exact)]
    for seed in range(draws):
        again = _jittered(single, seed)
        exactly = evaluate(formula, cast(again, torch.float64), upstream)
        errors.append(difference(evaluate(formula, again, upstream), exactly))
        if centred:
            nudged = evaluate(formula, nudge(wide, centred, visible, seed), upstream)
            changes.append([change * eps / visible for change in difference(nudged, exact)])
    return exact, [
        margin * (max(error) * (2 * eps + eps64) / eps32 + max(change)) + 4 * eps * x.abs().clamp(min=1)
        for x, error, change in zip(exact, zip(*errors, strict=True), zip(*changes, strict=True), strict=True)
    ]


class Expected:
    """The values that a function gives in float64, and how far from them a result may be.

    The tolerance rule (docs/architecture.md): at most twice the error of the broadcast formula in the same dtype, plus
    the change that moving each centred z and mu by half an ulp makes, plus 4 eps max(1, |result|); errors are max
    norms. The error of the formula is the largest of eight in float32, in proportion to eps (no dtype is wide enough to
    find float64's own; the exact values are no better either, hence three times instead of twice there).
    Eight draws miss the largest error now and then: a random search over cases, which finds that, takes a margin,
    and one that takes fewer draws takes a larger one.
    """

    def __init__(
        self,
        formula: Callable[..., Results],
        inputs: Named,
        centred: Sequence[str] = (),
        upstream: Callable[[Tensor], Tensor] | None = None,
        margin: float = 1.0,
        draws: int = 8,
    ):
        self.eps = torch.finfo(widest(inputs)).eps
        held_to = _exact_and_tolerance(formula, inputs, tuple(centred), upstream, margin, draws)
        self.exact, self.tolerance = map(list, held_to)

    def check(self, results: list[Tensor]) -> None:
        assert len(results) == len(self.exact)
        for n, (got, exact, tolerance) in enumerate(zip(results, self.exact, self.tolerance, strict=True)):
            assert got.shape == exact.shape, f"result {n}"
            rounded = exact.to(got.dtype)  # overflows where the dtype must
            finite = rounded.isfinite()
            torch.testing.assert_close(got[~finite], rounded[~finite], equal_nan=True, rtol=0, atol=0)
            info = torch.finfo(got.dtype)
            if info.eps > self.eps:  # the rounding of the result itself, in half precision or of a mixture of dtypes
                tolerance = tolerance + info.eps / 2 * exact.abs() + info.smallest_normal * info.eps
            error, tolerance = (got.double() - exact).abs()[finite], tolerance[finite]
            good = error <= tolerance
            assert good.all(), (
                f"result {n} of shape {tuple(got.shape)}: {(~good).sum()} of {good.numel()} errors are too large,"
                f" such as {error[~good][0]:.3g} where the rule allows {tolerance[~good][0]:.3g}"
            )


def assert_accurate(
    fast: Callable[..., Results],
    formula: Callable[..., Results],
    inputs: Named,
    centred: Sequence[str] = (),
    upstream: Callable[[Tensor], Tensor] | None = None,
    margin: float = 1.0,
) -> None:
    """Asserts that `fast` gives what `formula` gives by the tolerance rule, gradients too."""
    Expected(formula, inputs, centred, upstream, margin).check(evaluate(fast, inputs, upstream))


SEARCH_MARGIN = 2.0  # for cases that hypothesis makes up


def assert_same(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Asserts equality bit for bit, but that all NaN are equal."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_rounded_once(fast: Callable[..., Results], inputs: Named, dtype: torch.dtype) -> None:
    """Asserts that for inputs in half precision the results, and the gradients but for one rounding, are those of the
    same numbers in float32."""
    half = cast(inputs, dtype)
    got, single = evaluate(fast, half), evaluate(fast, cast(half, torch.float32))
    n_outputs = len(got) - len(inputs)
    assert_same(got, [*single[:n_outputs], *(gradient.to(dtype) for gradient in single[n_outputs:])])


# Inputs.


def wrong(x: Any) -> Any:
    """x as an argument of a type that is not allowed, on purpose: a type checker takes it for anything."""
    return x


def negated(x: Tensor) -> Tensor:
    """The numbers of x in a view that is to be negated when it is read, as complex autograd makes them; any dtype."""
    return torch._neg_view(-x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "chunked": lambda x: torch.cat((x, x), -1).chunk(2, -1)[1],
    "every third": lambda x: x.repeat_interleave(3, -1)[..., ::3],
    "unaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one column expanded": lambda x: x[..., :1].expand_as(x),
    "negated": negated,
}


def lay_out(inputs: Named, layout: str) -> Named:
    return {
        name: LAYOUTS[layout](x.detach()).requires_grad_(x.requires_grad) if x.ndim > 1 else x
        for name, x in inputs.items()
    }


def gaussians(B: int, D: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Named:
    """mu and logvar [B, D], wanting gradients."""
    mu, logvar = scale * draw(B, D, seed=10 + seed), draw(B, D, seed=11 + seed) - 1
    return needing_gradients(cast({"mu": mu, "logvar": logvar}, dtype))


def samples(S: int, N: int, D: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Named:
    """z [S, D], sample i drawn from posterior i mod N, and the posteriors, wanting gradients."""
    posteriors = cast(gaussians(N, D, torch.float64, scale, seed), torch.float64)
    z = draw(S, D, seed=12 + seed)
    if N:
        mu, logvar = (x.detach()[torch.arange(S) % N] for x in posteriors.values())
        z = mu + torch.exp(0.5 * logvar) * z
    return needing_gradients(cast({"z": z, **posteriors}, dtype))
