"""Arguments of the ops that evaluate samples under posteriors: shapes, weights, batches."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import LogWeights, Pairs, accumulation_dtype
from .checks import accumulated, check_device, check_indices, check_number, check_posterior, check_tensor, promote
from .modes import is_known
from .short import unpacked

POSTERIORS = "Tensor z, Tensor mu, Tensor logvar"  # of an op's schema: z [S, D]; mu, logvar [N, D]
INPUTS = ("z", "mu", "logvar", "log_w")  # that may want a gradient
WEIGHTS = "Tensor? log_w, Scalar? log_w_all, Tensor? own, Scalar? log_w_own, Scalar? log_w_next"  # LogWeights


class ColumnWeights(NamedTuple):
    """The log-weights log w_ij of a weighted log-sum-exp over columns j, never held as a matrix.

    Attributes:
        log_w: the log-weight of every column: a number, or `[N]` (differentiable).
        own: `[S]` int64, the column that each sample was drawn from; −1 for none of them. None: no overrides.
        log_w_own: a number that replaces `log_w` at column own(i); None keeps `log_w` there.
        log_w_next: a number that replaces `log_w` at column (own(i) + 1) mod N, for the `mss` estimator; where
            that is the own column, `log_w_own` wins.

    A log-weight is a number or −inf. NaN or +inf in `log_w` may spread to rows that replace it.
    """

    log_w: float | Tensor
    own: Tensor | None = None
    log_w_own: float | None = None
    log_w_next: float | None = None


def log(x: float) -> float:
    """The natural logarithm, also of a symbolic batch size: the compiler takes the argument of math.log for a constant,
    and would compile again for each size."""
    if torch.compiler.is_compiling() and _let_the_compiler_take_logarithms():
        return _symbolic_log(x * 1.0)
    return math.log(x)


def _symbolic_log(x: Any) -> Any:
    if not isinstance(x, torch.SymFloat):
        return math.log(x)
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "weights: torch.export has no logarithm of a dynamic size; expected a static number of posteriors"
        )
    symbolic_log2: Any = torch._sym_log2  # type: ignore[attr-defined]
    return symbolic_log2(x) * math.log(2)  # the one logarithm of symbolic numbers


def _let_the_compiler_take_logarithms() -> bool:
    """Allow `_symbolic_log` in graphs; called only when code is traced, as this imports the compiler."""
    torch.compiler.allow_in_graph(_symbolic_log)
    return True


_let_the_compiler_take_logarithms._dynamo_marked_constant = True  # type: ignore[attr-defined]


def result(z: Tensor, *shape: int) -> Tensor:
    """An empty tensor of a shape, in the accumulation dtype."""
    return z.new_empty(shape, dtype=accumulation_dtype(z.dtype))


def as_pairs(arguments: Sequence[Any]) -> Pairs:
    """The Pairs of an op's arguments: z, mu, logvar, and then the fields of LogWeights."""
    z, mu, logvar, *weights = arguments
    return Pairs(z, mu, logvar, LogWeights(*weights))


def save(ctx: Any, inputs: tuple[Any, ...], *results: Tensor) -> None:
    z, mu, logvar, log_w, log_w_all, own, log_w_own, log_w_next = inputs
    ctx.save_for_backward(*results, z, mu, logvar, log_w, own)
    ctx.numbers = log_w_all, log_w_own, log_w_next


def restored(ctx: Any) -> tuple[Any, ...]:
    """The saved (*results, z, mu, logvar, then the fields of LogWeights). Gradients are functions of the inputs alone,
    as kernels compute the results again (architecture.md), so that derivatives go past the results."""
    *results, z, mu, logvar, log_w, own = unpacked(ctx)
    log_w_all, log_w_own, log_w_next = ctx.numbers
    results = [x.detach() for x in results]
    return (*results, z, mu, logvar, log_w, log_w_all, own, log_w_own, log_w_next)


def checked(
    z: Tensor, mu: Tensor, logvar: Tensor, weights: ColumnWeights | None = None
) -> tuple[Tensor, Tensor, Tensor, LogWeights]:
    """Check the arguments; return z [*batch, S, D], mu and logvar [*batch, N, D], of one dtype, and the weights."""
    check_posterior(mu, logvar, min_ndim=2)
    check_tensor("z", z, min_ndim=2)
    check_device("z", z, "mu", mu)
    if z.ndim == mu.ndim + 1:  # L samples per posterior: [L, *batch, B, D] to [*batch, L·B, D]
        if z.shape[1:] != mu.shape:
            raise ValueError(f"z: expected [L, *{tuple(mu.shape)}], L samples of each posterior, got {tuple(z.shape)}")
        z = z.movedim(0, -3).flatten(-3, -2)
    if z.ndim != mu.ndim or z.shape[-1] != mu.shape[-1] or z.shape[:-2] != mu.shape[:-2]:
        raise ValueError(
            f"z: expected [S, D] with mu's D and leading axes, mu being {tuple(mu.shape)}, got {tuple(z.shape)}"
        )
    log_weights = _log_weights(weights, z, mu)
    z, mu, logvar, log_w = promote(z, mu, logvar, log_weights.log_w)  # type: ignore[assignment]
    if log_w is not log_weights.log_w:
        log_weights = log_weights._replace(log_w=log_w)
    return z, mu, logvar, log_weights


def over_batches(function: Callable[..., Any], z: Tensor, mu: Tensor, logvar: Tensor, *weights: Any) -> Any:
    """Call `function` with z [S, D], mu and logvar [N, D], for each index of the batch axes before these."""
    batch = z.shape[:-2]
    if not batch:
        return function(z, mu, logvar, *weights)
    if weights and isinstance(weights[0], Tensor):  # to round the sum of the batches' gradients of log_w once
        z, mu, logvar, log_w = accumulated(z, mu, logvar, weights[0])
        weights = (log_w, *weights[1:])
    flat = [x.flatten(0, -3) for x in (z, mu, logvar)]
    # If there are no batches, one of zeros gives the shapes and the place in the graph; `together` leaves it out.
    groups = list(zip(*flat, strict=True)) or [tuple(x.sum(0) for x in flat)]
    results = [function(*group, *weights) for group in groups]

    def together(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts))[: len(flat[0])].reshape(*batch, *parts[0].shape)

    if isinstance(results[0], Tensor):
        return together(results)
    return tuple(map(together, zip(*results, strict=True)))


def _log_weights(weights: ColumnWeights | None, z: Tensor, mu: Tensor) -> LogWeights:
    if weights is None:
        return LogWeights()
    if not isinstance(weights, ColumnWeights):
        raise TypeError(f"weights: expected a ColumnWeights, got {type(weights).__name__}")
    S, N = z.shape[-2], mu.shape[-2]
    log_w, own, log_w_own, log_w_next = weights
    if isinstance(log_w, Tensor):
        check_tensor("weights.log_w", log_w, min_ndim=0)
        check_device("weights.log_w", log_w, "mu", mu)
        if log_w.shape != (N,):
            raise ValueError(f"weights.log_w: expected a number or shape ({N},), got {tuple(log_w.shape)}")
    else:
        log_w = check_number("weights.log_w", log_w)
    replaced = []
    for name, value in (("log_w_own", log_w_own), ("log_w_next", log_w_next)):
        replaced.append(None if value is None else check_number(f"weights.{name}", value))
        if value is not None and own is None:
            raise ValueError(f"weights.own: expected the own columns, since {name} is given, got None")
    if own is not None:
        _check_own(own, S, N, z)
    if isinstance(log_w, Tensor):
        return LogWeights(log_w, None, own, *replaced)
    return LogWeights(None, log_w, own, *replaced)


def _check_own(own: Tensor, S: int, N: int, z: Tensor) -> None:
    check_indices("own", own)
    check_device("own", own, "z", z)
    if own.shape != (S,):
        raise ValueError(f"own: expected shape ({S},), one column for each sample, got {tuple(own.shape)}")
    if own.device.type == "cpu" and S > 0 and is_known(own):
        low, high = (int(x) for x in own.aminmax())
        if low < -1 or high >= N:
            raise ValueError(f"own: expected columns from -1 to {N - 1}, got values from {low} to {high}")
