"""Batches of calls: what an op makes of the tensors of `torch.vmap`, and of those in which autograd batches gradients.

A batching rule goes from the size of the batch, the axis that is the batch's in each argument (None where it has none)
and the arguments, to the results and the batch's axis in each, or one for all.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Rule = Callable[..., tuple[Any, Any]]


def one_by_one(call: Callable[..., Any]) -> Rule:
    """The rule that calls once for each index of the batch."""

    def rule(size: int, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        (flat, structure), (dims, _) = tree_flatten(arguments), tree_flatten(in_dims)

        def at(i: int) -> Any:
            # If there are no indices, one of zeros gives the shapes, and is left out.
            pairs = zip(flat, dims, strict=True)
            one = [x if dim is None else x.select(dim, i) if size else x.sum(dim) for x, dim in pairs]
            return call(*tree_unflatten(one, structure))

        results = [at(i) for i in range(max(1, size))]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:size], 0
        return type(results[0])(torch.stack(parts)[:size] for parts in zip(*results, strict=True)), 0

    return rule


def leading(tensors: Sequence[Any], in_dims: Sequence[int | None], size: int) -> list[Any]:
    """The tensors with the batch's axis before all others; expanded to it where they have none."""
    return [
        x if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=False)
    ]


def in_autograds_batch(rule: Rule, *arguments: Any) -> Any:
    """Call the rule for arguments that `autograd.grad(is_grads_batched=True)` has batched, by which
    `functional.jacobian(vectorize=True)` goes. These are tensors of a kind of their own."""
    flat, structure = tree_flatten(arguments)
    level, size, flat, dims = _without_a_level(flat)
    results, axes = rule(size, tree_unflatten(dims, structure), *tree_unflatten(flat, structure))
    if isinstance(results, Tensor):
        return torch._add_batch_dim(results, axes, level)
    axes = [axes] * len(results) if isinstance(axes, int) else axes
    return type(results)(torch._add_batch_dim(r, axis, level) for r, axis in zip(results, axes, strict=True))


def _without_a_level(values: Sequence[Any]) -> tuple[int, int, list[Any], list[int | None]]:
    """A level at which values are batched, the size of that batch, the values without it, and the axis that was its in
    each. Torch gives no access to these tensors but the removal of a level, which adds an axis of the size asked for,
    here 1, where a tensor does not have it."""
    for level in range(1, 65):  # all there may be
        without = {n: torch._remove_batch_dim(x, level, 1, 0) for n, x in enumerate(values) if is_in_autograds_batch(x)}
        size = next((len(x) for x in without.values() if len(x) != 1 or not is_in_autograds_batch(x)), None)
        if size is not None:
            has_it = {n for n, x in without.items() if len(x) == size}
            flat = [without[n] if n in has_it else x for n, x in enumerate(values)]
            return level, size, flat, [0 if n in has_it else None for n in range(len(values))]
    raise RuntimeError("fastvae: batches of one in batches of one, which autograd does not tell apart")


def is_in_autograds_batch(x: Any) -> bool:
    return isinstance(x, Tensor) and is_legacy_batchedtensor(x)
