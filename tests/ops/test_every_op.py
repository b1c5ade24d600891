"""Properties of every public function on every backend: gradients, layouts, dtypes, the compiler."""

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import Target, computing_on, reachable
from support.helpers import (
    DTYPES,
    HALVES,
    LAYOUTS,
    SEARCH_MARGIN,
    Expected,
    Results,
    assert_accurate,
    assert_same,
    cast,
    draw,
    evaluate,
    lay_out,
    negated,
    tensors,
)
from support.host_simt import ROOT
from support.ops import FUSED, KERNELS, OPS, op_named
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae.aggregate.columns import InMemory
from fastvae.aggregate.table import tabulate
from fastvae.backends import backend_for, composed, contract
from fastvae.backends.contract import REDUCTIONS, LogWeights
from fastvae.ops import short

# What the files of tests that are not of one op are about.
TOPICS = {
    "categorical",
    "compile",
    "compositions",
    "defaults",
    "derivatives",
    "early_exit",
    "errors",
    "every_op",
    "extremes",
}
TOPICS |= {"short", "tolerance_rule", "transforms", "triton_early_exit", "vmap"}


def test_every_op_of_the_contract_is_tested() -> None:
    every = {*contract.OPS, *contract.COMPOSITIONS, *contract.LIKELIHOODS}
    assert set(KERNELS.values()) - {None} == every, "tests/support/ops.py and the contract differ"


def test_files_are_of_known_ops() -> None:
    """A kernel, a declaration or a file of tests of an op that the contract does not have."""
    optional = {*contract.COMPOSITIONS, *contract.LIKELIHOODS}
    files = {
        "kernels/cpu": {path.stem.removesuffix("_backward") for path in ROOT.glob("kernels/cpu/*.cpp")}
        - {"dispatch", "parallel", *optional},
        "kernels/cuda": {path.stem for path in ROOT.glob("kernels/cuda/*.cu")} - {"interface", *optional},
        "kernels/triton": {
            path.stem for path in ROOT.glob("kernels/triton/*.py") if f"\ndef {path.stem}(" in path.read_text()
        }
        - {"philox", *optional},
        "fastvae/ops": {path.stem for path in ROOT.glob("fastvae/ops/*.py") if "declare_backward(" in path.read_text()}
        - {"declare", "interpolate", *optional},
        "tests/ops": {path.stem.removeprefix("test_") for path in ROOT.glob("tests/ops/test_*.py")} - TOPICS - optional,
    }
    assert files == {folder: set(contract.OPS) for folder in files}


@pytest.fixture(params=OPS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_gradcheck_with_gradients_for_any_inputs(backend: Target, name: str) -> None:
    op = op_named(name)
    for wanted in itertools.product((False, True), repeat=len(op.inputs)):
        if sum(wanted) in ((1, len(wanted)) if backend.slow else range(1, len(wanted) + 1)):
            inputs = [x.requires_grad_(w) for x, w in zip(op.inputs.values(), wanted, strict=True)]
            torch.autograd.gradcheck(
                lambda *x: op.fast(**dict(zip(op.inputs, x, strict=True))), inputs, fast_mode=backend.slow
            )


def test_only_the_gradients_asked_for_are_computed(backend: Target, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in FUSED:
        pytest.skip("made of torch's own operations")
    op = op_named(name)
    everything = evaluate(op.fast, op.inputs)
    n_outputs = len(everything) - len(op.inputs)
    module = backend_for(next(iter(op.inputs.values())).device)
    kernel = f"{KERNELS[name]}_backward"
    backward = composed.function(module, kernel)
    computed: list[Tensor] = []

    def spy(*arguments: object) -> list[Tensor]:
        computed[:] = backward(*arguments)
        return computed.copy()

    monkeypatch.setattr(module, kernel, spy, raising=False)
    monkeypatch.setattr(short, "_are_usual", lambda *_: False)  # in C nobody is asked
    for n, asked in enumerate(op.inputs):
        inputs = {key: x.detach().requires_grad_(key == asked) for key, x in op.inputs.items()}
        assert_same(evaluate(op.fast, inputs)[n_outputs:], [everything[n_outputs + n]])
        assert len(computed) == 1
    inputs = {key: x.detach() for key, x in op.inputs.items()}
    assert_same(evaluate(op.fast, inputs), everything[:n_outputs])


def test_zeros_that_have_no_memory(backend: Target, name: str) -> None:
    op = op_named(name)
    inputs = {key: x.detach() for key, x in op.inputs.items()}
    zeros = {key: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device) for key, x in inputs.items()}
    for key, zero in zeros.items():
        expected = evaluate(op.fast, inputs | {key: torch.zeros_like(inputs[key])})
        assert_same(evaluate(op.fast, inputs | {key: zero}), expected)


def test_an_upstream_gradient_to_be_negated(backend: Target, name: str) -> None:
    op = op_named(name)
    gradients = evaluate(op.fast, op.inputs, lambda output: negated(draw(*output.shape, seed=1).to(output)))
    assert_same(gradients, evaluate(op.fast, op.inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Target, name: str, layout: str, dtype: torch.dtype) -> None:
    op = op_named(name, dtype, S=19, N=23, D=11)
    # The terms of the KL are differences, and where one row is expanded, rounding errors of both are those of all rows.
    margin = SEARCH_MARGIN if name == "kl_decomposition" else 1.0
    assert_accurate(op.fast, op.formula, lay_out(op.inputs, layout), op.centred, margin=margin)


def test_expanded_gradient_of_a_sum(backend: Target, name: str) -> None:
    op = op_named(name, S=19, N=23, D=11)

    def upstream(output: Tensor) -> Tensor:
        return output.new_ones(()).expand_as(output)

    assert_accurate(op.fast, op.formula, op.inputs, op.centred, upstream)


def test_inputs_are_left_alone(backend: Target, name: str) -> None:
    op = op_named(name)
    before = [x.detach().clone() for x in op.inputs.values()]
    evaluate(op.fast, op.inputs)
    assert_same([x.detach() for x in op.inputs.values()], before)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_accumulates_in_float32(backend: Target, name: str, dtype: torch.dtype) -> None:
    op = op_named(name, dtype, S=19, N=23, D=129)
    results = evaluate(op.fast, op.inputs)
    Expected(op.formula, op.inputs, op.centred).check(results)
    is_sample = [name in ("reparameterize", "sample_gauss") and n == 0 for n in range(len(results))]
    n_outputs = len(results) - len(op.inputs)
    for n, result in enumerate(results):
        assert result.dtype == (dtype if n >= n_outputs or is_sample[n] else torch.float32)


def test_mixed_dtypes_promote(backend: Target, name: str) -> None:
    op = op_named(name, torch.bfloat16)
    for dtypes in itertools.islice(
        itertools.permutations((torch.bfloat16, torch.float32, torch.float64, torch.float16)), 2 if backend.slow else 12
    ):
        mixed = {key: x.detach().to(d).requires_grad_() for (key, x), d in zip(op.inputs.items(), dtypes, strict=False)}
        widest = next(iter(mixed.values())).dtype
        for x in mixed.values():
            widest = torch.promote_types(widest, x.dtype)
        results, promoted = evaluate(op.fast, mixed), evaluate(op.fast, cast(mixed, widest))
        n_outputs = len(results) - len(mixed)
        assert_same(results[:n_outputs], promoted[:n_outputs])
        for x, gradient, wide in zip(mixed.values(), results[n_outputs:], promoted[n_outputs:], strict=True):
            assert_same([gradient], [wide.to(x.dtype)])


@pytest.mark.parametrize("sizes", [(0, 4, 3), (5, 4, 0), (0, 0, 3)], ids=str)
def test_zero_sizes(backend: Target, name: str, sizes: tuple[int, int, int]) -> None:
    S, N, D = sizes
    if name in ("agg_entropy", "kl_decomposition") and N == 0:
        pytest.skip("an error: test_errors.py")
    op = op_named(name, torch.float32, S, N, D)
    assert_accurate(op.fast, op.formula, op.inputs, op.centred)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_propagates(backend: Target, name: str, dtype: torch.dtype, value: float) -> None:
    for key in op_named(name).inputs:
        if key == "log_w" and value != -math.inf:
            continue  # a log-weight is a number or -inf, as ColumnWeights says
        op = op_named(name, dtype)
        inputs = {k: x.detach() for k, x in op.inputs.items()}
        inputs[key].view(-1)[1] = value
        assert_accurate(op.fast, op.formula, inputs)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e30])
@pytest.mark.parametrize("width", [0.0, 300.0, 1e4])
def test_values_of_finite_inputs_are_never_nan(
    backend: Target, name: str, scale: float, width: float, dtype: torch.dtype
) -> None:
    """Values of finite inputs are never NaN, however large, and whatever overflows; gradients are held to |mu| <= 1e6,
    |logvar| <= 60."""
    if name == "kl_decomposition":
        pytest.skip("differences of log-densities, all of which may be -inf")
    op = op_named(name, torch.float64)
    inputs = {key: x.detach() * (width if "logvar" in key else scale) for key, x in op.inputs.items()}
    if "x" in inputs:
        inputs["x"].clamp_(0, 1)
    if "z" in inputs:
        inputs["z"][1:3] = inputs["mu"][1:3]  # t = 0, times whatever 1 / sigma is
    for result in evaluate(op.fast, cast(inputs, dtype)):
        assert not result.isnan().any()


# The compiler and the modes. The compiler sees no backend, so what it has made of a function runs on all of them.


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_compile(name: str, dynamic: bool) -> None:
    fast = op_named(name).fast
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    # Weights that depend on a symbolic batch size are the compiler's log2 times ln 2: an ulp from math.log.
    ulps = 4e-15 if dynamic and name in ("agg_entropy", "kl_decomposition") else 0
    for target in reachable():
        with computing_on(target):
            for sizes in ((5, 4, 3), (7, 6, 2)):
                inputs = op_named(name, torch.float64, *sizes).inputs
                for ours, eager in zip(evaluate(compiled, inputs), evaluate(fast, inputs), strict=True):
                    torch.testing.assert_close(ours, eager, rtol=ulps, atol=ulps)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_where_nothing_wants_a_gradient(name: str) -> None:
    compiled = torch.compile(op_named(name).fast, fullgraph=True, backend="aot_eager")
    for target in reachable():
        with computing_on(target):
            op = op_named(name)
            inputs = {key: x.detach() for key, x in op.inputs.items()}
            assert_same(evaluate(compiled, inputs), evaluate(op.fast, inputs))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_one_tensor_in_two_places(name: str) -> None:
    op = op_named(name, torch.float64, 4, 4, 3)
    fast, names = op.fast, list(op.inputs)

    def twice(**inputs: Tensor) -> Results:
        return fast(**{key: inputs.get(key, inputs[names[0]]) for key in names})

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for target in reachable():
        with computing_on(target):
            inputs = op_named(name, torch.float64, 4, 4, 3).inputs
            shared = {key: x for key, x in inputs.items() if key == names[0] or x.shape != inputs[names[0]].shape}
            for ours, eager in zip(evaluate(compiled, shared), evaluate(twice, shared), strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-13, atol=1e-13)  # gradients meet in another order


@pytest.mark.parametrize("name", ["kl_gauss", "log_prob_gauss", "agg_log_prob_marginals"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_inductor(name: str) -> None:
    compiled = torch.compile(op_named(name).fast, fullgraph=True)
    for target in reachable():
        with computing_on(target):
            op = op_named(name)
            assert_accurate(compiled, op.formula, op.inputs, op.centred)


def test_inference_mode(backend: Target, name: str) -> None:
    op = op_named(name)
    plain = {key: x.detach() for key, x in op.inputs.items()}
    with torch.inference_mode():
        inside = {key: x.clone() for key, x in plain.items()}
        results = tensors(op.fast(**inside))
        assert all(r.is_inference() for r in results)
        assert_same(results, evaluate(op.fast, plain))


@pytest.mark.parametrize("compiler", [None, "eager", "aot_eager"])
@pytest.mark.usefixtures("fresh_compiler")
def test_function_transforms(name: str, compiler: str | None) -> None:
    fast = op_named(name).fast

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        return torch.stack([o.sum() for o in tensors(fast(**inputs))]).sum()

    transformed = torch.func.grad(loss)
    if compiler:
        transformed = torch.compile(transformed, backend=compiler, fullgraph=True)
    for target in reachable():
        with computing_on(target):
            op = op_named(name)
            plain = {key: x.detach() for key, x in op.inputs.items()}
            gradients = evaluate(op.fast, op.inputs, upstream=torch.ones_like)[-len(plain) :]
            assert_same(list(transformed(plain).values()), gradients)


def test_other_defaults(backend: Target, name: str) -> None:
    """Results go by the inputs, not by what torch makes by default."""
    op = op_named(name, torch.float32)
    expected = evaluate(op.fast, op.inputs)
    upstream = [torch.ones_like(x) for x in expected[: -len(op.inputs)]]
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            outputs = tensors(op.fast(**op.inputs))
            gradients = torch.autograd.grad(outputs, list(op.inputs.values()), upstream)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same([o.detach() for o in outputs], expected[: len(outputs)])
    assert_same(gradients, evaluate(op.fast, op.inputs, torch.ones_like)[len(outputs) :])


def test_meta_tensors_give_shapes(name: str) -> None:
    op = op_named(name, torch.bfloat16)
    there = {key: x.detach().to("meta") for key, x in op.inputs.items()}
    with torch.device("meta"):
        results = op.fast(**there)
    for got, real in zip(
        tensors(results),
        evaluate(op.fast, {key: x.detach() for key, x in op.inputs.items()}),
        strict=True,
    ):
        assert (got.device.type, got.shape, got.dtype) == ("meta", real.shape, real.dtype)


def test_autocast(backend: Target, name: str) -> None:
    """Autocast: bfloat16 comes in, sums come out in float32, and gradients reach the weights."""
    op = op_named(name, torch.float32)
    weight = torch.eye(3, requires_grad=True)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        inputs = {k: x.detach() @ weight if x.shape[-1:] == (3,) else x for k, x in op.inputs.items()}
        outputs = tensors(op.fast(**inputs))
    assert all(inputs[k].dtype == torch.bfloat16 for k in ("mu", "logits") if k in inputs)
    assert_same([o.detach() for o in outputs], evaluate(op.fast, {k: x.detach() for k, x in inputs.items()}))
    torch.stack([o.float().sum() for o in outputs]).sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().sum() > 0


# The declarations behind them.


class Recorded(TorchDispatchMode):
    """The ops of this library that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fastvae":
            self.calls.setdefault(op.__name__.removesuffix(".default"), []).append(args)
        return op(*args, **(kwargs or {}))


def arguments_of_ops() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every op in torch.ops.fastvae: those of a call in its fullest form, and some that are less full."""
    with Recorded() as recorded:
        for name in FUSED:
            op = op_named(name, torch.float32)
            evaluate(op.fast, op.inputs)
    z, mu, logvar, prior = (draw(n, 3, seed=n).float() for n in (5, 4, 4, 1))
    log_w, own, seed = draw(4, seed=6).float(), torch.arange(5) % 5 - 1, torch.tensor(7)
    weights = (log_w, None, own, -0.5, 0.5)
    joint, marginals = torch.ops.fastvae.agg_log_prob_marginals(z, mu, logvar, *weights)
    many = 2 * draw(400, 3, seed=8).float()
    table = tabulate(many, InMemory(mu, logvar, LogWeights(log_w_all=-1.5)), 1e-6, math.inf)
    assert table is not None
    tabulated = (many, mu, logvar, log_w, -1.5, list(table))
    unweighted = torch.ops.fastvae.agg_log_prob(z, mu, logvar, None, -1.5, None, None, None)
    samples, eps = torch.ops.fastvae.sample_gauss(mu, logvar, seed, 2, [True, False, False, False, True], "sample")
    further: dict[str, list[tuple[Any, ...]]] = {
        "kl_gauss": [
            *((mu, logvar, prior, None, reduction) for reduction in REDUCTIONS),
            (mu, logvar, None, mu, "batchmean"),
        ],
        "kl_gauss_backward": [
            (torch.ones(4), mu, logvar, prior, mu, "sample", [True] * 4),
            (torch.ones(()), mu, logvar, None, prior, "batchmean", [False, True, False, True]),
        ],
        "sample_gauss": [
            (mu.half(), logvar.half(), seed, 1, [True, False, True, False, True], "sample"),
            (mu, logvar, seed, None, [True, False, False, True, False], "batchmean"),
        ],
        "sample_gauss_backward": [
            (samples, None, None, None, mu, logvar, seed, None, 2, "sample", [False, True]),
            (samples, None, None, None, mu, logvar, None, eps, 2, "sample", [True, True]),
            (None, None, None, torch.ones(()), mu, logvar, seed, None, None, "mean", [True, True]),
        ],
        "draw_seed": [(mu,)],
        "bernoulli_log_prob": [(mu.half().sigmoid(), logvar.half())],
        "bernoulli_log_prob_backward": [
            (torch.ones(8), mu.sigmoid(), torch.cat((mu, logvar)), wanted) for wanted in ([True, False], [False, True])
        ],
        "cross_log_prob": [(z.double(), mu.double(), logvar.double())],
        "cross_log_prob_backward": [(torch.ones(5, 4), z, mu, logvar, [True, False, True])],
        "agg_log_prob": [(z, mu, logvar, None, -1.5, None, None, None)],
        "agg_log_prob_backward": [
            (joint, unweighted, z, mu, logvar, None, -1.5, None, None, None, [True, False, False, False]),
            (joint, None, z, mu, logvar, *weights, [False, True, True, True]),
        ],
        "interpolate": [tabulated],
        "interpolate_backward": [(many.double(), *tabulated, [True, True, False, True])],
        "agg_log_prob_marginals_backward": [
            (None, marginals, joint, marginals, z, mu, logvar, *weights, [False, True, True, False]),
        ],
    }
    calls = recorded.calls
    return {op: [*calls.get(op, []), *further.get(op, [])] for op in {*calls, *further}}


def test_opcheck(backend: Target) -> None:
    arguments = arguments_of_ops()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if backend.backend == "reference" or backend.device != "cpu":
        checks.append("test_aot_dispatch_dynamic")  # takes long, as it compiles; the compiler sees no backend
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastvae::")}
    assert set(arguments) == registered
    for op, calls in arguments.items():
        for call in calls:
            given = tuple(
                x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in call
            )
            torch.library.opcheck(getattr(torch.ops.fastvae, op).default, given, test_utils=checks)
