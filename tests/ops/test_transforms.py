"""What torch's transforms, its compiler and its exporters make of each function: the same as of its formula, or an
error that says why not. docs/transforms.md shows it, and is written by `python tests/ops/test_transforms.py`."""

import functools
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
from support.helpers import draw
from support.host_simt import ROOT
from support.ops import OPS, Op, op_named
from support.transforms import COMPILED, EAGER, EXPORTED, Function, Module, Transform, of_tensors
from torch import Tensor
from torch.utils._pytree import tree_leaves

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
        ["agg_entropy", "kl_decomposition"],
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


SIZES = {"kl_gauss": "", "reparameterize": "", "cross_log_prob": "z", "agg_log_prob": "z", "agg_entropy": "z"}


@pytest.mark.parametrize("function", SIZES)
def test_exported_with_a_dynamic_size(function: str) -> None:
    def call(*x: Tensor) -> Tensor:
        seed = {"seed": 1} if function == "reparameterize" else {}
        result: Tensor = getattr(fastvae, function)(*x, **seed)
        return result

    names = [*SIZES[function], "mu", "logvar"]
    four, nine = ([draw(n, 3, seed=k) for k in range(len(names))] for n in (4, 9))
    size = torch.export.Dim("B", min=2, max=100)

    def export() -> Any:
        return torch.export.export(Module(call), tuple(four), dynamic_shapes=(({0: size},) * len(names),))

    if function == "agg_entropy":
        with pytest.raises(RuntimeError, match=r"weights: torch\.export has no logarithm"):
            export()
    else:
        assert torch.equal(export().module()(*nine)[0], call(*nine))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_scripted(function: str) -> None:
    with pytest.raises(Exception, match=re.escape(str(refusal(SCRIPT, function)))):
        torch.jit.script(getattr(fastvae, function.partition("(")[0], FUNCTIONS[function](4, 3, 2).fast))


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
