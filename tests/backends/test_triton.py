"""Features of the Triton kernels alone: tiles of several sizes, ranges of columns put together, panels that are far.

That they compute what every backend must is tested with each op; here they are made to choose as they would for larger
problems, or on a larger GPU, than the interpreter can finish.
"""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TRITON, Target, computing_on
from support.ahead_of_time import CASES
from support.helpers import (
    HALVES,
    Expected,
    Named,
    aggregate,
    assert_accurate,
    assert_same,
    cast,
    cross,
    evaluate,
    gaussians,
    needing_gradients,
    normals,
    sample,
    samples,
    tensors,
)
from support.ops import op_named
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae import ColumnWeights

pytest.importorskip("triton")
from fastvae.kernels.triton import _launch, agg_log_prob, grids, packing, sample_gauss
from triton.runtime.interpreter import GridExecutor

from fastvae.backends import composed
from fastvae.backends import triton as triton_backend
from fastvae.backends.contract import TERMS, LogWeights, Pairs

PAIRS = ("cross_log_prob", "agg_log_prob", "agg_log_prob_marginals")


@pytest.fixture(params=TRITON)
def backend(request: pytest.FixtureRequest) -> Iterator[Target]:
    with computing_on(TRITON[request.param]) as target:
        yield target


@pytest.fixture(params=PAIRS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fresh_grids() -> Iterator[None]:
    """The choice of grids is made again, and not remembered."""
    grids._grid.cache_clear()
    yield
    grids._grid.cache_clear()


@pytest.fixture(params=[2, 5])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh_grids: None) -> int:
    """A given number of ranges of whatever passes by, some of them empty."""
    monkeypatch.setattr(grids, "_splits", lambda *_: request.param)
    return request.param


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch, fresh_grids: None) -> None:
    """A GPU so large that everything is small."""
    monkeypatch.setattr(grids, "multiprocessors", lambda _: 10**6)
    monkeypatch.setattr(grids, "_splits", lambda *_: 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ranges_are_put_together(backend: Target, name: str, splits: int, dtype: torch.dtype) -> None:
    op = op_named(name, dtype, S=131, N=260, D=5)
    Expected(op.formula, op.inputs, op.centred).check(evaluate(op.fast, op.inputs))


def test_a_row_may_have_no_weight_in_some_ranges(backend: Target, splits: int) -> None:
    """Own columns alone have weights: all but one range are empty sums."""
    inputs = samples(140, 270, 3, torch.float32)
    own = torch.arange(140) * 7 % 270
    own[3] = -1
    weights = ColumnWeights(-math.inf, own, 0.0)
    results = evaluate(lambda **x: fastvae.agg_log_prob_marginals(**x, weights=weights), inputs)
    drawn = {"z": inputs["z"], **{key: inputs[key][own.clamp(min=0)] for key in ("mu", "logvar")}}
    joint = fastvae.log_prob_gauss(**{key: x.detach() for key, x in drawn.items()})
    assert results[0][3] == -math.inf
    assert (results[1][3] == -math.inf).all()
    assert (results[2][3] == 0).all()
    torch.testing.assert_close(results[0][own >= 0], joint[own >= 0])
    assert all(r.isfinite().all() for r in results[2:])


@pytest.mark.parametrize("D", [1, 33])
def test_small_tiles(backend: Target, name: str, D: int, small_tiles: None) -> None:
    op = op_named(name, torch.float32, S=37, N=150, D=D)
    Expected(op.formula, op.inputs, op.centred).check(evaluate(op.fast, op.inputs))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_tiles_in_half_precision(backend: Target, name: str, dtype: torch.dtype, small_tiles: None) -> None:
    op = op_named(name, dtype, S=19, N=140, D=5)
    Expected(op.formula, op.inputs, op.centred).check(evaluate(op.fast, op.inputs))


@pytest.mark.parametrize("name", PAIRS[1:])
def test_gradcheck_of_ranges(backend: Target, name: str, monkeypatch: pytest.MonkeyPatch, fresh_grids: None) -> None:
    monkeypatch.setattr(grids, "_splits", lambda *_: 2)
    op = op_named(name, torch.float64, S=2, N=130, D=2)
    others = {key: x.detach() for key, x in op.inputs.items() if key != "z"}
    assert torch.autograd.gradcheck(lambda z: op.fast(z=z, **others), (op.inputs["z"],))


@pytest.mark.parametrize("programs", [1, 4], ids=["one program", "parts"])
@pytest.mark.parametrize("outputs", [("z",), ("log_q", "kl"), ("z", "log_q", "log_p", "kl")], ids=str)
def test_samples_of_a_tile_in_one_program_or_more(
    backend: Target, outputs: tuple[str, ...], programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_gauss, "FULL", programs)
    eps = normals(70, 5, 6, dtype=torch.float32, seed=3)

    def formula(mu: Tensor, logvar: Tensor) -> list[Tensor]:
        named = fastvae.GaussianSample(*sample(mu, logvar, eps))._asdict()
        return [named[output] for output in outputs]

    def fast(mu: Tensor, logvar: Tensor) -> list[Tensor]:
        return [x for x in fastvae.sample_gauss(mu, logvar, 70, outputs=outputs, seed=3) if x is not None]

    assert_accurate(fast, formula, gaussians(5, 6, torch.float32))


def far_panels(dtype: torch.dtype) -> Named:
    """Three panels of columns of which the second has one column far off, and a sample at it; two of samples."""
    inputs = {key: x.detach() for key, x in samples(150, 300, 4, torch.float64).items()}
    inputs["mu"][200, 1] = 3e5
    inputs["z"][140] = inputs["mu"][200]
    return needing_gradients(cast(inputs, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_some_panels_are_far(backend: Target, name: str, dtype: torch.dtype) -> None:
    n = PAIRS.index(name)  # of results, or none
    inputs = far_panels(dtype)
    Expected(lambda **x: aggregate(**x)[:n] if n else cross(**x), inputs, ("z", "mu")).check(
        evaluate(getattr(fastvae, name), inputs)
    )


def test_an_outlier_costs_the_others_no_digits(backend: Target) -> None:
    """The centre leaves the largest and the smallest mean out, so a far column changes nothing for other panels."""
    plain = {key: x.detach() for key, x in samples(40, 300, 4, torch.float32).items()}
    moved = {key: x.clone() for key, x in plain.items()}
    moved["mu"][200] = 1e7
    for inputs in (plain, moved):
        inputs["log_w"] = torch.zeros(300)
        inputs["log_w"][200] = -math.inf

    def fast(z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor) -> Tensor:
        return fastvae.agg_log_prob(z, mu, logvar, weights=ColumnWeights(log_w))

    error = (fast(**moved) - fast(**plain)).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps * fast(**plain).abs().max()


def test_same_bits_whatever_else_is_asked_for(backend: Target, splits: int) -> None:
    """A gradient does not depend on which others are wanted, nor on the run."""
    op = op_named("agg_log_prob", torch.float32, S=131, N=150, D=7)
    everything = evaluate(op.fast, op.inputs)
    assert_same(evaluate(op.fast, op.inputs), everything)
    for n, asked in enumerate(op.inputs):
        inputs = {key: x.detach().requires_grad_(key == asked) for key, x in op.inputs.items()}
        assert_same(evaluate(op.fast, inputs)[1:], [everything[1 + n]])


@pytest.mark.parametrize("given", ["mi agg_kl tc dim_kl prior_factorization kl entropy", "mi tc", "dim_kl", "kl"])
@pytest.mark.parametrize(("sizes", "dtype"), [((70, 35, 5), torch.float64), ((33, 33, 33), torch.float32)], ids=str)
def test_compositions_are_what_they_are_composed_of(
    backend: Target, sizes: tuple[int, int, int], dtype: torch.dtype, given: str
) -> None:
    """More than a tile of posteriors, or of dimensions, and several samples of each, with gradients of a few terms."""
    names = (f"{op}{direction}" for op in PAIRS[1:] for direction in ("", "_backward"))
    others = SimpleNamespace(**{name: getattr(triton_backend, name) for name in names})
    S, N, D = sizes
    own = torch.arange(S) % N
    weights = LogWeights(normals(1, N, dtype=dtype, seed=1)[0], None, own, -0.5, 0.5)
    z, logvar = normals(D, S, dtype=dtype, seed=2).T, normals(N, D, dtype=dtype, seed=3) - 1
    pairs = Pairs(z, normals(N, 2 * D, dtype=dtype, seed=4)[:, ::2], logvar, weights)

    def same(name: str, *arguments: Any) -> list[Tensor]:
        ours = tensors(getattr(triton_backend, name)(*arguments))
        expected = tensors(composed.function(others, name)(*arguments))
        for x, y in zip(ours, expected, strict=True):
            error = 32 * torch.finfo(dtype).eps * y.abs().max().item()
            torch.testing.assert_close(x, y, rtol=0.0, atol=error)
        return ours

    same("agg_entropy", pairs)
    *terms, joint, marginals = same("kl_decomposition", pairs)
    upstream = [x + 1 if name in given.split() else None for x, name in zip(terms, TERMS[:-1], strict=False)]
    for wanted in ([True] * 4, [False, True, False, False], [False, False, False, True]):
        same("agg_entropy_backward", terms[0], pairs, wanted)
        same("kl_decomposition_backward", upstream, joint, marginals, pairs, wanted)


@pytest.mark.parametrize("S", [64, 1000, 16384, 10**6])
@pytest.mark.parametrize("N", [64, 1000, 16384, 10**6])
def test_grids_cover_everything_and_fill_the_chip(S: int, N: int) -> None:
    g = grids.grid(S, N, 64, torch.float32, torch.device("meta"), grids.Kind())
    RO, RP, TO, TP = (g.config[key] for key in ("RO", "RP", "TO", "TP"))
    assert TO * TP == grids.THREADS
    assert packing.PANEL.value % (RO * TO) == packing.PANEL.value % (RP * TP) == 0
    assert g.blocks * RO * TO >= S
    assert g.splits * g.tiles * RP * TP >= N
    assert (g.splits - 1) * g.tiles * RP * TP < N or g.splits == 1
    waves = g.programs / (2 * 132)
    work = S * N / 128**2
    assert waves / math.ceil(waves) > 0.85 or work < 8 * 264, (g, waves)


def test_other_tiles_give_the_same(backend: Target) -> None:
    """Tiles that FASTVAE_AUTOTUNE=1 would try give the same."""
    op = op_named("agg_log_prob", torch.float32, S=150, N=140, D=5)
    expected = Expected(op.formula, {key: x.detach() for key, x in op.inputs.items()}, op.centred)
    own = torch.arange(150) % 141 - 1
    weights = LogWeights(op.inputs["log_w"].detach(), None, own, -0.5, 0.5)
    z, mu, logvar = (op.inputs[key].detach() for key in ("z", "mu", "logvar"))
    pairs = Pairs(z, mu, logvar, weights)
    chosen = []
    for config in grids.configs(10**4, 10**4, torch.float32):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(agg_log_prob, "fastest", lambda run, configs, *problem, c=config: run(c))
            expected.check([agg_log_prob.agg_log_prob(pairs, False, False)])
        chosen.append(grids.grid(10**4, 10**4, 5, torch.float32, torch.device("meta"), grids.Kind(), **config).config)
    assert len({tuple(c.items()) for c in chosen}) == len(chosen) > 1


class Operations(TorchDispatchMode):
    """The operations of torch that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


ALLOCATIONS = {"empty", "empty_like", "new_empty"}
VIEWS = {"detach", "expand", "select", "slice", "unbind", "view"}


@pytest.mark.skipif(not _launch.INTERPRETED, reason="launches kernels on tensors that have no memory")
@pytest.mark.parametrize("case", CASES)
def test_a_launcher_allocates_and_launches_alone(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher allocates, views and launches, and has torch compute nothing."""
    launched = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))
    with Operations() as operations:
        CASES[case].launch()
    assert CASES[case].kernel in launched
    assert operations.names <= ALLOCATIONS | VIEWS


class Compiler:
    """A kernel of Triton, that counts what it compiles and what is launched, where there is no GPU."""

    arg_names = ("x", "y", "n", "one", "scale", "BLOCK", "WIDE")
    __name__ = "a kernel"
    params = tuple(
        SimpleNamespace(do_not_specialize=name == "n", do_not_specialize_on_alignment=name in ("y", "one"))
        for name in arg_names
    )

    def __init__(self) -> None:
        self.compiled = 0
        self.launched: list[tuple[object, ...]] = []

    fn = property(id)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def compile_and_launch(*arguments: object, **constants: object) -> object:
            self.compiled += 1
            self.launched.append((grid, *arguments, *(constants[name] for name in self.arg_names[len(arguments) :])))
            return Binary(self)

        return compile_and_launch


class Binary:
    def __init__(self, compiler: Compiler):
        self.compiler = compiler

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.compiler.launched.append((grid[:1], *arguments))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    monkeypatch.setattr(_launch, "target", lambda: _launch.Target("cuda", 32, False))
    monkeypatch.setattr(_launch, "_known", {})
    device = SimpleNamespace(get_current_device=lambda: 0)
    monkeypatch.setattr(_launch.triton.runtime, "driver", SimpleNamespace(active=device))
    return Compiler()


def test_a_launch_finds_the_binary_again(compiler: Compiler) -> None:
    """A launch finds the binary again by what Triton compiles for."""
    x, unaligned = torch.zeros(9), torch.zeros(9)[1:]
    launches: list[tuple[tuple[Any, ...], dict[str, int], bool]] = [
        ((x, None, 100, 7, 1.0), {"BLOCK": 16, "WIDE": 0}, True),
        ((x.clone(), None, 2**31 - 1, 8, math.nan), {"BLOCK": 16, "WIDE": 0}, False),
        ((x, None, 1, 7, 1.0), {"BLOCK": 16, "WIDE": 0}, False),
        ((x, None, 100, 1, 1.0), {"BLOCK": 16, "WIDE": 0}, True),
        ((x, None, 2**31, 7, 1.0), {"BLOCK": 16, "WIDE": 0}, True),
        ((x, x, 100, 7, 1.0), {"BLOCK": 16, "WIDE": 0}, True),
        ((x, unaligned, 100, 7, 1.0), {"BLOCK": 16, "WIDE": 0}, False),
        ((unaligned, None, 100, 7, 1.0), {"BLOCK": 16, "WIDE": 0}, True),
        ((x.double(), None, 100, 7, 1.0), {"BLOCK": 16, "WIDE": 0}, True),
        ((x, None, 100, 7, 1.0), {"BLOCK": 32, "WIDE": 0}, True),
        ((x, None, 7, 7, 2.0), {"BLOCK": 32, "WIDE": 0}, False),
    ]
    for arguments, constants, compiles in launches:
        before = compiler.compiled
        _launch.launch(compiler, (3,), *arguments, **constants)
        assert (compiler.compiled > before) == compiles, (arguments, constants)
        last = compiler.launched[-1]
        assert last[0] == (3,)
        assert all(a is b for a, b in zip(last[1:6], arguments, strict=True))
        assert last[6:] == (constants["BLOCK"], constants["WIDE"])
    assert len(compiler.launched) == len(launches)


def test_a_first_launch_while_a_graph_is_captured(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first launch is not captured, and says what to do; what has run before is captured."""
    x = torch.zeros(4)
    _launch.launch(compiler, (1,), x, None, 4, 7, 1.0, BLOCK=16, WIDE=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    _launch.launch(compiler, (1,), x, None, 5, 7, 1.0, BLOCK=16, WIDE=0)
    assert len(compiler.launched) == 2
    with pytest.raises(RuntimeError, match=r"CUDA graph is being captured.*run what is captured once before"):
        _launch.launch(compiler, (1,), x.double(), None, 5, 7, 1.0, BLOCK=16, WIDE=0)
    assert (compiler.compiled, len(compiler.launched)) == (1, 2)
