"""What torch's transforms, its compiler and its exporters make of each function: the same as of its formula, or an
error that says why not. docs/transforms.md shows it, and is written by `python tests/ops/test_transforms.py`."""

import functools
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import QUICK, TARGETS, Target
from support.host_simt import ROOT
from support.ops import OPS, Op, op_named
from torch import Tensor, func
from torch.autograd import forward_ad, functional
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastvae

PAGE = ROOT / "docs" / "transforms.md"
TABULATED = 'agg_log_prob_marginals(method="table")'


def tabulated(S: int, N: int, D: int) -> Op:
    whole = op_named("agg_log_prob_marginals", torch.float64, 8 * S, N, D)

    def by(method: str) -> Callable[..., Tensor]:
        def marginals(log_w: Tensor, **pairs: Any) -> Tensor:
            weights = fastvae.ColumnWeights(log_w)
            return fastvae.agg_log_prob_marginals(**pairs, weights=weights, method=method).marginals

        return marginals

    return Op(by("table"), by("direct"), whole.inputs)


FUNCTIONS: dict[str, Callable[[int, int, int], Op]] = {
    **{name: functools.partial(op_named, name, torch.float64) for name in OPS},
    TABULATED: tabulated,
}

# A transform: of a function of tensors to a tensor or several, at these tensors, to whatever it gives.
Function = Callable[..., Any]
Transform = Callable[..., Any]


def outputs(f: Function, *x: Tensor) -> tuple[Tensor, ...]:
    results = f(*x)
    return (results,) if isinstance(results, Tensor) else tuple(results)


def loss_of(f: Function) -> Function:
    return lambda *x: sum(output.sin().sum() for output in outputs(f, *x))


def leaves(x: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in x]


def every(x: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(x)))


def stacked(x: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.stack([t, t.flip(0), t / 2]) for t in x]


def tuples(f: Function) -> Function:
    return lambda *x: outputs(f, *x)


def nth_derivative(f: Function, x: tuple[Tensor, ...], n: int) -> Any:
    x = tuple(leaves(x))
    value = loss_of(f)(*x)
    for _ in range(n):
        gradients = torch.autograd.grad(value, x, create_graph=True)
        value = sum((g**2).sum() for g in gradients)
    return gradients


def batched_gradients(f: Function, *x: Tensor) -> Any:
    x = tuple(leaves(x))
    first = outputs(f, *x)[0]
    upstream = torch.stack([torch.ones_like(first), first.detach()])
    return torch.autograd.grad(first, x, upstream, is_grads_batched=True)


def tangents(f: Function, *x: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.cos()) for t in x]
        return [forward_ad.unpack_dual(output).tangent for output in outputs(f, *duals)]


def tangents_of_gradients(f: Function, *x: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.detach().cos()) for t in leaves(x)]
        return [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(loss_of(f)(*duals), duals)]


def gradients_of_tangents(f: Function, *x: Tensor) -> Any:
    x = tuple(leaves(x))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.detach().cos()) for t in x]
        return torch.autograd.grad(forward_ad.unpack_dual(loss_of(f)(*duals)).tangent, x)


def checkpointed(f: Function, *x: Tensor) -> Any:
    x = tuple(leaves(x))
    return torch.autograd.grad(checkpoint(loss_of(f), *x, use_reentrant=False), x)


def linearized(f: Function, *x: Tensor) -> Any:
    return func.linearize(tuples(f), *x)[1](*x)


def vmap_one_by_one(f: Function, *x: Tensor) -> list[Any]:
    """Each argument alone in a batch, whose axis is the last."""
    batches = stacked(x)
    found = []
    for n in range(len(x)):
        arguments = [batches[i].movedim(0, -1) if i == n else t for i, t in enumerate(x)]
        found.append(func.vmap(tuples(f), in_dims=tuple(-1 if i == n else None for i in range(len(x))))(*arguments))
    return found


def vmap_twice(f: Function, *x: Tensor) -> Any:
    """The first argument in one batch, the others in another."""
    first, *others = stacked(x)
    inner = func.vmap(tuples(f), in_dims=(0, *[None] * len(others)))
    return func.vmap(inner, in_dims=(None, *[0] * len(others)))(first, *others)


def second_derivative_of_vmap(f: Function, *x: Tensor) -> Any:
    return nth_derivative(func.vmap(tuples(f)), tuple(stacked(x)), 2)


def gradient(f: Function) -> Function:
    return lambda *x: func.grad(loss_of(f), argnums=every(x))(*x)


def gradient_of_gradient(f: Function) -> Function:
    return lambda *x: func.grad(lambda *x: sum((g**2).sum() for g in gradient(f)(*x)), argnums=every(x))(*x)


EAGER: dict[str, Transform] = {
    "backward(create_graph=True), then backward()": lambda f, *x: nth_derivative(f, x, 2),
    "the same, a third time": lambda f, *x: nth_derivative(f, x, 3),
    "autograd.grad(is_grads_batched=True)": batched_gradients,
    "autograd.forward_ad": tangents,
    "autograd.forward_ad of autograd.grad": tangents_of_gradients,
    "autograd.grad of autograd.forward_ad": gradients_of_tangents,
    "autograd.functional.jvp": lambda f, *x: functional.jvp(tuples(f), x, x),
    "autograd.functional.jacobian": lambda f, *x: functional.jacobian(tuples(f), x),
    "autograd.functional.jacobian(vectorize=True)": lambda f, *x: functional.jacobian(tuples(f), x, vectorize=True),
    'the same with strategy="forward-mode"': lambda f, *x: functional.jacobian(
        tuples(f), x, vectorize=True, strategy="forward-mode"
    ),
    "autograd.functional.hvp": lambda f, *x: functional.hvp(loss_of(f), x, x),
    "autograd.functional.vhp": lambda f, *x: functional.vhp(loss_of(f), x, x),
    "autograd.functional.hessian": lambda f, *x: functional.hessian(loss_of(f), x),
    "autograd.functional.hessian(vectorize=True)": lambda f, *x: functional.hessian(loss_of(f), x, vectorize=True),
    "utils.checkpoint": checkpointed,
    "func.grad": lambda f, *x: gradient(f)(*x),
    "func.grad of func.grad": lambda f, *x: gradient_of_gradient(f)(*x),
    "func.vjp": lambda f, *x: func.vjp(loss_of(f), *x)[1](x[0].new_ones(())),
    "func.jvp": lambda f, *x: func.jvp(tuples(f), x, x),
    "func.linearize": linearized,
    "func.jacrev": lambda f, *x: func.jacrev(tuples(f), argnums=every(x))(*x),
    "func.jacfwd": lambda f, *x: func.jacfwd(tuples(f), argnums=every(x))(*x),
    "func.hessian": lambda f, *x: func.hessian(loss_of(f), argnums=every(x))(*x),
    "func.jacrev of func.jacfwd": lambda f, *x: func.jacrev(func.jacfwd(loss_of(f)))(*x),
    "func.jacfwd of func.jacfwd": lambda f, *x: func.jacfwd(func.jacfwd(loss_of(f)))(*x),
    "func.vmap": lambda f, *x: func.vmap(tuples(f))(*stacked(x)),
    "func.vmap over one argument": vmap_one_by_one,
    "func.vmap of func.vmap": vmap_twice,
    "func.vmap of func.grad": lambda f, *x: func.vmap(gradient(f))(*stacked(x)),
    "func.vmap of func.hessian": lambda f, *x: func.vmap(func.hessian(loss_of(f)))(*stacked(x)),
    "func.grad of func.vmap": lambda f, *x: gradient(func.vmap(tuples(f)))(*stacked(x)),
    "backward() twice through func.vmap": second_derivative_of_vmap,
}


Compiler = Callable[[Function], Function]
COMPILED: dict[str, Callable[..., Any]] = {  # of a compiler, a function and tensors
    "torch.compile": lambda c, f, *x: c(f)(*x),
    "torch.compile of func.grad": lambda c, f, *x: c(gradient(f))(*x),
    "torch.compile of func.grad of func.grad": lambda c, f, *x: c(gradient_of_gradient(f))(*x),
    "torch.compile of func.jvp": lambda c, f, *x: c(lambda *x: func.jvp(loss_of(f), x, x))(*x),
    "torch.compile of func.jacrev": lambda c, f, *x: c(func.jacrev(loss_of(f)))(*x),
    "torch.compile of func.hessian": lambda c, f, *x: c(func.hessian(loss_of(f)))(*x),
    "torch.compile of func.vmap": lambda c, f, *x: c(func.vmap(tuples(f)))(*stacked(x)),
    "torch.compile of func.vmap of func.grad": lambda c, f, *x: c(func.vmap(gradient(f)))(*stacked(x)),
    "backward() twice through torch.compile": lambda c, f, *x: nth_derivative(c(f), x, 2),
}


class Module(torch.nn.Module):
    def __init__(self, f: Function):
        super().__init__()
        self.f = f

    def forward(self, *x: Tensor) -> Any:
        return outputs(self.f, *x)


def exported(f: Function, *x: Tensor) -> Any:
    """Exported, saved, loaded and called."""
    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(f), x), file)
    file.seek(0)
    return torch.export.load(file).module()(*x)


def traced(f: Function, *x: Tensor) -> Any:
    """Traced at other values, saved, loaded and called."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Module(f), tuple(t / 2 for t in x), check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)(*x)


EXPORTED: dict[str, Transform] = {
    "torch.export.export, saved and loaded": exported,
    "torch.jit.trace, saved and loaded": traced,
}
SCRIPT = "torch.jit.script"
ALL = [*EAGER, *COMPILED, *EXPORTED, SCRIPT]

# What is refused: the message, the transforms, the functions.
REFUSED: list[tuple[str, list[str], list[str]]] = [
    (
        "method: expected 'auto' or 'direct' where values cannot be looked at, got 'table'",
        [name for name in ALL if re.search(r"func\.|torch\.", name) and name != SCRIPT],
        [TABULATED],
    ),
    (
        "torch.compile with aot_autograd does not currently support double backward",
        ["backward() twice through torch.compile"],
        list(OPS),
    ),
    (
        "sample_gauss: cannot be recorded by torch.jit.trace; expected torch.export.export",
        ["torch.jit.trace, saved and loaded"],
        ["reparameterize", "sample_gauss"],
    ),
    (
        "n_columns: a size cannot be recorded by torch.jit.trace; expected torch.export.export",
        ["torch.jit.trace, saved and loaded"],
        ["agg_entropy"],
    ),
    (
        "Compiled functions can't take variable number of arguments or use keyword-only arguments with defaults",
        [SCRIPT],
        [name for name in FUNCTIONS if name != "log_prob_gauss"],
    ),
    ("try blocks aren't supported", [SCRIPT], ["log_prob_gauss"]),
]


def refusal(transform: str, function: str) -> str | None:
    return next(
        (why for why, transforms, functions in REFUSED if transform in transforms and function in functions), None
    )


def of_tensors(f: Callable[..., Any], names: list[str]) -> Function:
    return lambda *x: f(**dict(zip(names, x, strict=True)))


def hold(
    transform: str, function: str, ours: Transform, theirs: Transform, sizes: tuple[int, int, int] = (4, 3, 2)
) -> None:
    """Hold what a transform makes of a function against what it makes of its formula, at S samples, N posteriors and D
    dimensions."""
    op = FUNCTIONS[function](*sizes)
    names, x = list(op.inputs), tuple(t.detach() for t in op.inputs.values())
    why_not = refusal(transform, function)
    if why_not is not None:
        with pytest.raises(Exception, match=re.escape(why_not)):
            ours(of_tensors(op.fast, names), *x)
        return
    found = tree_leaves(ours(of_tensors(op.fast, names), *x))
    expected = tree_leaves(theirs(of_tensors(op.formula, names), *x))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "backend", [name for name in TARGETS if not name.startswith("native") or name in QUICK], indirect=True
)
@pytest.mark.parametrize("transform", EAGER)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_eager(backend: Target, function: str, transform: str) -> None:
    """The instruction sets do not matter here, and a table is of no kernel's."""
    if backend.slow and function == TABULATED:
        pytest.skip("a table is made by kernels that are slow here, and by no other way than on the others")
    hold(transform, function, EAGER[transform], EAGER[transform], (3, 2, 2) if backend.slow else (4, 3, 2))


def aot_eager(f: Function) -> Function:
    return torch.compile(f, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(function: str, transform: str) -> None:
    apply = COMPILED[transform]
    hold(
        transform,
        function,
        lambda f, *x: apply(aot_eager, f, *x),
        lambda f, *x: apply(lambda f: f, f, *x),
    )


@pytest.mark.parametrize("transform", EXPORTED)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_exported(function: str, transform: str) -> None:
    hold(transform, function, EXPORTED[transform], lambda f, *x: f(*x))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_scripted(function: str) -> None:
    with pytest.raises(Exception, match=re.escape(str(refusal(SCRIPT, function)))):
        torch.jit.script(getattr(fastvae, function.partition("(")[0]))


@pytest.mark.parametrize("function", ["kl_gauss", "agg_log_prob"])
def test_onnx_knows_no_such_operation(function: str, tmp_path: Path) -> None:
    op = FUNCTIONS[function](4, 3, 2)
    module = Module(of_tensors(op.fast, list(op.inputs)))
    with pytest.raises(Exception, match=f"unrecognized namespace fastvae::{function}"):
        torch.onnx.export(module, tuple(x.detach() for x in op.inputs.values()), tmp_path / "model.onnx", dynamo=False)


def table() -> str:
    """The table of docs/transforms.md, and the messages under it."""
    shown = list(dict.fromkeys(why for why, _, _ in REFUSED))
    lines = ["| | " + " | ".join(f"`{name}`" for name in FUNCTIONS) + " |", "|---|" + ":-:|" * len(FUNCTIONS)]
    for transform in ALL:
        cells = []
        for function in FUNCTIONS:
            why_not = refusal(transform, function)
            cells.append("yes" if why_not is None else f"[{shown.index(why_not) + 1}]")
        lines.append(" | ".join(["| " + CODE.sub(r"`\g<0>`", transform), *cells]) + " |")
    messages = [f"[{n}] `{why}`" + "  " for n, why in enumerate(shown, 1)]
    return "\n".join([*lines, "", *messages]) + "\n"


CODE = re.compile(r"[\w.]*\w\([^)]*\)|\w+(\.\w+)+|strategy=\S+")
BEGIN, END = "<!-- by tests/ops/test_transforms.py -->\n", "<!-- end -->\n"


def page() -> str:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]


def test_the_page_says_so() -> None:
    assert PAGE.read_text() == page(), "docs/transforms.md: python tests/ops/test_transforms.py writes it"


if __name__ == "__main__":
    PAGE.write_text(page())
