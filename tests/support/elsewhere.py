"""A device that torch knows nothing of, such as a new accelerator is (its key is PrivateUse1), which runs on the CPU.

`python tests/support/elsewhere.py` computes every op there, with gradients, prints what differs from the reference on
the CPU, and says `done`; with `fake` it only has the compiler's tensors without values go through them.
"""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from support.helpers import evaluate  # noqa: E402
from support.ops import OPS, op_named  # noqa: E402

import fastvae  # noqa: E402

NAME = "elsewhere"
values: dict[int, Tensor] = {}  # the tensor on the CPU behind each storage


class There(torch.Tensor):
    @staticmethod
    def __new__(cls, here: Tensor) -> Any:
        there = torch._C._acc.create_empty_tensor(here.shape, here.dtype)
        there.__class__ = cls
        values[there.untyped_storage()._cdata] = here
        return there


def is_there(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == NAME


def here(x: Any) -> Any:
    if isinstance(x, torch.device) and x.type == NAME:
        return torch.device("cpu")
    return values[x.untyped_storage()._cdata] if is_there(x) else x


def compute(op: Any, *arguments: Any, **options: Any) -> Any:
    """Any of torch's operations, on the tensors behind."""
    inputs = {id(here(x)): x for x in tree_leaves((arguments, options)) if is_there(x)}
    behind = [
        torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None)
        if str(parameter.type) == "Tensor" and isinstance(x, (int, float))
        else tree_map(here, x)
        for parameter, x in zip(op._schema.arguments, arguments, strict=False)
    ]
    results = op(*behind, **tree_map(here, options))
    return tree_map(
        lambda y: (inputs.get(id(y)) if id(y) in inputs else There(y)) if isinstance(y, Tensor) else y, results
    )


def register() -> list[torch.library.Library]:
    """Has all of torch's operations computed so: by a fallback, and one by one those that have a kernel for any device,
    which would go on to variants that write into given memory."""
    rest, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(compute, "PrivateUse1")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        keys = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
        if name.startswith("aten::") and any(has(name, key) for key in keys) and not has(name, "PrivateUse1"):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if op is not None:
                aten.impl(name.removeprefix("aten::"), functools.partial(compute, op), "PrivateUse1")
    return [rest, aten]  # as long as these live


def differences() -> Iterator[str]:
    for name in OPS:
        op = op_named(name)
        inputs = {key: There(x.detach().clone()).requires_grad_() for key, x in op.inputs.items()}
        found = evaluate(op.fast, inputs, torch.ones_like)
        with fastvae.use_backend("reference"):
            expected = evaluate(op.fast, op.inputs, torch.ones_like)
        for n, (x, y) in enumerate(zip(found, expected, strict=True)):
            if not is_there(x) or not torch.equal(here(x.detach()), y.detach()):
                yield f"{name}: result {n}"


def fakes() -> Iterator[str]:
    for name in OPS:
        op = op_named(name)
        with FakeTensorMode():
            inputs = {
                key: torch.empty(x.shape, dtype=x.dtype, device=NAME).requires_grad_() for key, x in op.inputs.items()
            }
            step = functools.partial(evaluate, op.fast, upstream=torch.ones_like)
            found, graph = step(inputs), make_fx(step, tracing_mode="fake")(inputs)
        for n, (x, y) in enumerate(zip(found, evaluate(op.fast, op.inputs), strict=True)):
            if (x.device.type, x.shape, x.dtype) != (NAME, y.shape, y.dtype):
                yield f"{name}: result {n} is {x}"
        called = [str(node.target) for node in graph.graph.nodes if "fastvae" in str(node.target)]
        if len(called) != (0 if name == "log_prob_gauss" else 2):
            yield f"{name}: ops in the graph are {called}"


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(NAME)
    libraries = [] if "fake" in sys.argv else register()
    print(*(fakes() if "fake" in sys.argv else differences()), "done", sep="\n")
