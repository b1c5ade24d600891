"""The short way of usual calls: in C, in Python, and around both the same."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Target
from support.helpers import DTYPES, assert_same, draw
from torch import Tensor

import fastvae
from fastvae.backends import native_library
from fastvae.ops import short

B, D = 37, 11
CALLS: dict[str, Callable[..., list[Tensor]]] = {
    **{
        f"kl_gauss {reduction}": lambda z, mu, logvar, reduction=reduction: [
            fastvae.kl_gauss(mu, logvar, reduction=reduction)
        ]
        for reduction in ("none", "sample", "dim", "sum", "mean", "batchmean")
    },
    "reparameterize": lambda z, mu, logvar: [fastvae.reparameterize(mu, logvar)],
    "sample_gauss": lambda z, mu, logvar: list(fastvae.sample_gauss(mu, logvar)),  # type: ignore[arg-type]
    "z and kl": lambda z, mu, logvar: list(
        fastvae.sample_gauss(mu, logvar, outputs=("z", "kl"), reduction="batchmean")[::3]  # type: ignore[arg-type]
    ),
    "agg_log_prob": lambda z, mu, logvar: [fastvae.agg_log_prob(z, mu, logvar)],
    "agg_log_prob_marginals": lambda z, mu, logvar: list(fastvae.agg_log_prob_marginals(z, mu, logvar)),
    "agg_entropy": lambda z, mu, logvar: [fastvae.agg_entropy(z, mu, logvar, dataset_size=99, estimator="mss")],
    "kl_decomposition": lambda z, mu, logvar: list(fastvae.kl_decomposition(z, mu, logvar, dataset_size=99)[:7]),
}


@pytest.fixture(params=CALLS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def inputs(dtype: torch.dtype, wanted: tuple[bool, ...] = (True, True, True)) -> list[Tensor]:
    z, mu, logvar = (draw(B, D, seed=n).to(dtype) for n in range(3))
    return [x.requires_grad_(want) for x, want in zip((mu + z, mu, logvar / 2 - 1), wanted, strict=True)]


def evaluated(name: str, leaves: list[Tensor], usual: bool = True) -> list[Tensor]:
    torch.manual_seed(1)
    results = CALLS[name](*leaves)
    differentiable = [r for r in results if r.requires_grad]
    upstream = [draw(*r.shape, seed=9).to(r) for r in differentiable]
    wanted = [x for x in leaves if x.requires_grad]
    gradients = torch.autograd.grad(differentiable, wanted, upstream, allow_unused=True) if differentiable else []
    return [*(r.detach() for r in results), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize(
    "wanted", [(True, True, True), (False, True, False), (True, False, True), (False, False, False)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_bits_of_the_general_way(
    backend: Target, name: str, dtype: torch.dtype, wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = evaluated(name, inputs(dtype, wanted))
    monkeypatch.setattr(short, "_are_usual", lambda *_: False)
    assert_same(given, evaluated(name, inputs(dtype, wanted)))


def test_takes_the_short_way(name: str) -> None:
    """A result's node is of a short Function; of other tensors it is not."""
    usual = CALLS[name](*inputs(torch.float32))
    assert all(type(r.grad_fn).__name__.startswith("Short") for r in usual if r.requires_grad)
    halves = CALLS[name](*(x.detach().half().requires_grad_() for x in inputs(torch.float32)))
    assert not any(type(r.grad_fn).__name__.startswith("Short") for r in halves)


@pytest.mark.parametrize("layout", ["halves of one", "expanded", "transposed"])
def test_layouts(backend: Target, name: str, layout: str) -> None:
    leaves = inputs(torch.float32)

    def laid_out() -> list[Tensor]:
        if layout == "halves of one":
            return [torch.cat((x, x), 1).chunk(2, 1)[1] for x in leaves]
        if layout == "expanded":
            return [x[:1].expand(B, D) for x in leaves]
        return [x.T.contiguous().T for x in leaves]

    def gradients(tensors: list[Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        results = [r for r in CALLS[name](*tensors) if r.requires_grad]
        upstream = [draw(*r.shape, seed=9).to(r) for r in results]
        return [g for g in torch.autograd.grad(results, tensors, upstream, allow_unused=True) if g is not None]

    tensors = laid_out()
    found, expected = gradients(tensors), gradients([x.detach().contiguous().requires_grad_() for x in tensors])
    if backend.backend == "reference":  # torch adds up by layout
        torch.testing.assert_close(found, expected)
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("kind", ["expanded", "negated", "strided", "zeros without memory"])
def test_upstream_gradients(backend: Target, name: str, kind: str) -> None:
    leaves = inputs(torch.float64)
    torch.manual_seed(1)
    results = [r for r in CALLS[name](*leaves) if r.requires_grad]
    plain = [draw(*r.shape, seed=9).to(r) for r in results]

    def odd(g: Tensor) -> Tensor:
        if kind == "expanded":
            return g.new_ones(()).expand_as(g)
        if kind == "negated":
            return torch._neg_view(-g)
        if kind == "strided":
            return torch.stack((g, g), -1)[..., 0]
        return torch._efficientzerotensor(g.shape, dtype=g.dtype)

    odds = [odd(g) for g in plain]
    dense = [torch.zeros_like(g) if kind == "zeros without memory" else g.resolve_neg().contiguous() for g in odds]
    found, expected = (
        torch.autograd.grad(results, leaves, given, allow_unused=True, retain_graph=True) for given in (odds, dense)
    )
    assert_same([g for g in found if g is not None], [g for g in expected if g is not None])


def test_backends_and_instruction_sets_change_between_calls() -> None:
    if native_library.missing():
        pytest.skip(native_library.missing())
    leaves = inputs(torch.float32)
    joint = fastvae.agg_log_prob(*leaves)
    with fastvae.use_backend("reference"):
        (by_reference,) = torch.autograd.grad(joint.sum(), leaves[:1], retain_graph=True)
        of_reference = fastvae.agg_log_prob(*leaves)
    torch.testing.assert_close(of_reference, joint)
    (by_native,) = torch.autograd.grad(joint.sum(), leaves[:1])
    torch.testing.assert_close(by_reference, by_native)
    assert not torch.equal(by_reference, by_native)
    in_use = native_library.instruction_set()
    try:
        for each in native_library.instruction_sets():
            native_library.use_instruction_set(each)
            torch.testing.assert_close(fastvae.agg_log_prob(*leaves), joint)
    finally:
        native_library.use_instruction_set(in_use)


def test_nothing_is_left_behind(name: str) -> None:
    """References are given back: the objects and the memory of calls are as many after a thousand as after one."""
    leaves = inputs(torch.float32)

    def tensors_alive() -> int:
        gc.collect()
        return sum(isinstance(x, Tensor) for x in gc.get_objects())

    def references() -> list[int]:
        return [sys.getrefcount(x) for x in (*leaves, None, short._PLAIN)]

    evaluated(name, leaves)
    before = tensors_alive()
    changes = []
    for _ in range(3):  # what others let go meanwhile, they let go once
        counts = references()
        for _ in range(1000):
            evaluated(name, leaves)
        changes.append([abs(after - count) for after, count in zip(references(), counts, strict=True)])
        assert tensors_alive() <= before
    assert max(map(min, zip(*changes, strict=True))) < 500, changes


def test_in_python_alone() -> None:
    """The same tests where nothing is in C."""
    if os.environ.get("FASTVAE_CALLS") == "0":
        assert short.module() == "FASTVAE_CALLS=0"
        return
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))],
        env={**os.environ, "FASTVAE_CALLS": "0", "PYTEST_XDIST_WORKER": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:]


def test_in_c() -> None:
    if native_library.missing() or os.environ.get("FASTVAE_CALLS") == "0":
        pytest.skip("there is nothing to be in C for")
    assert not isinstance(short.module(), str), short.module()
    assert type(short.module().bind("kl_gauss", print)).__name__ == "builtin_function_or_method"  # type: ignore
    assert short.module().bind("no_op", print) is None  # type: ignore[union-attr]
