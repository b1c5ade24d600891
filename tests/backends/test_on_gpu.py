"""Tests that need a GPU: streams, CUDA graphs, no synchronization, memory, several devices. Skipped without one."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import Target, computing_on
from support.helpers import assert_same, evaluate, tensors
from support.ops import FUSED, op_named
from torch import Tensor

import fastvae
from fastvae.backends import philox

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with computing_on(Target(request.param, device="cuda")):
        yield request.param


@pytest.fixture(params=FUSED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def training_step(name: str, S: int = 129, N: int = 97, D: int = 33) -> Callable[[], list[Tensor]]:
    """Forward and backward on inputs that stay where they are."""
    op = op_named(name, torch.float32, S, N, D)
    leaves = {key: x.detach().clone().requires_grad_() for key, x in op.inputs.items()}
    upstream = [torch.randn_like(o) for o in tensors(op.fast(**leaves))]

    def step() -> list[Tensor]:
        outputs = tensors(op.fast(**leaves))
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, list(leaves.values()), upstream)]

    return step


def captured(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def test_again(name: str) -> None:
    """The same comes of what is remembered of a call and done again."""
    step = training_step(name)
    expected = step()
    for _ in range(4):
        assert_same(step(), expected)


def test_cuda_graph(name: str) -> None:
    step = training_step(name)
    graph, results = captured(step)
    expected = step()
    for r in results:
        r.fill_(torch.nan)
    graph.replay()
    assert_same(results, expected)


def test_a_first_call_within_a_capture(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of Triton would have to be compiled: it says so, and captures nothing of it; nothing is broken then.
    Those in CUDA C++ are loaded, and captured."""
    step = training_step(name)
    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if backend == "triton":
        launch = pytest.importorskip("fastvae.kernels.triton._launch")
        if not launch._known:
            pytest.skip("nothing was launched")
        from fastvae.kernels.triton import _replay

        with monkeypatch.context() as patch:  # as in a process that has launched nothing
            patch.setattr(launch, "_known", {})
            patch.setattr(_replay, "_plans", {})
            with pytest.raises(RuntimeError, match="while which no kernel can be compiled"), torch.cuda.graph(graph):
                step()
    else:
        with torch.cuda.graph(graph):
            results = step()
        graph.replay()
        assert_same(results, expected)
    assert_same(step(), expected)


def test_a_graph_draws_anew_at_each_replay() -> None:
    """A graph draws anew at each replay, and its backward draws what its forward drew."""
    mu, logvar = torch.zeros(97, 33), torch.zeros(97, 33, requires_grad=True)

    def step() -> list[Tensor]:
        z = fastvae.reparameterize(mu, logvar)
        return [z.detach(), *torch.autograd.grad(z, logvar, torch.ones_like(z))]

    graph, (z, d_logvar) = captured(step)
    seen = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(d_logvar, z / 2)
        seen.append(z.clone())
    assert not any((a == b).any() for a, b in itertools.pairwise(seen))


def test_nothing_synchronizes(name: str) -> None:
    step = training_step(name)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_current_stream(name: str) -> None:
    """Work is queued behind what the current stream is doing, and nowhere else."""
    op = op_named(name, torch.float32, 129, 97, 33)
    expected = evaluate(op.fast, op.inputs)
    late = {key: torch.full_like(x, torch.nan) for key, x in op.inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for key, x in op.inputs.items():
            late[key].copy_(x.detach())
        results = evaluate(op.fast, {key: x.requires_grad_() for key, x in late.items()})
    stream.synchronize()
    assert_same(results, expected)


def test_same_bits_every_time(name: str) -> None:
    step = training_step(name, 1271, 1271, 67)
    first = step()
    for _ in range(50):
        assert_same(step(), first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_device_that_is_not_current(name: str) -> None:
    op = op_named(name, torch.float32)
    there = {key: x.detach().to("cuda:1").requires_grad_() for key, x in op.inputs.items()}
    with torch.device("cuda:1"):
        results = evaluate(op.fast, there)
    assert torch.cuda.current_device() == 0
    assert all(r.device.index == 1 for r in results)


def peak(step: Callable[[], object]) -> int:
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def test_memory_does_not_grow_with_the_pairs() -> None:
    """A single [S, N] matrix would be 256 MiB."""
    z, mu, logvar = (torch.randn(8192, 10, requires_grad=True) for _ in range(3))

    def step() -> tuple[Tensor, ...]:
        joint, marginals = fastvae.agg_log_prob_marginals(z, mu, logvar)
        return torch.autograd.grad(joint.sum() + marginals.sum(), (z, mu, logvar))

    assert peak(step) < 64 * 2**20


def test_more_elements_than_32_bits_count() -> None:
    """The last rows of a KL and of a sample past 2^31 elements, against those rows alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("there is no room for it")
    B, D = 2**25 + 3, 64
    mu, logvar = torch.empty(B, D, dtype=torch.bfloat16).normal_(), torch.empty(B, D, dtype=torch.bfloat16).normal_()
    last = slice(B - 5, None)
    kl = functools.partial(fastvae.kl_gauss, reduction="sample")
    assert_same([kl(mu, logvar)[last]], [kl(mu[last], logvar[last])])
    elements = fastvae.kl_gauss(mu, logvar, reduction="none")
    assert_same([elements[last]], [fastvae.kl_gauss(mu[last], logvar[last], reduction="none")])
    del elements
    z = fastvae.reparameterize(mu.zero_(), logvar.zero_(), seed=3)[last].float()
    expected = philox.standard_normal(torch.tensor(3), (B - 5) * D, 5 * D).reshape(5, D)
    torch.testing.assert_close(z, expected.bfloat16().float(), rtol=2**-7, atol=1e-5)


def test_more_elements_of_columns_than_32_bits_count() -> None:
    """The last columns, past 2^31 elements, which alone have weights, against those columns alone."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("there is no room for it")
    N, D, last = 2**25 + 3, 66, 5
    z = torch.randn(3, D).bfloat16()
    mu, logvar = torch.empty(N, D, dtype=torch.bfloat16).normal_(), torch.zeros(N, D, dtype=torch.bfloat16)
    log_w = torch.full((N,), -torch.inf)
    log_w[-last:] = 0.5
    for precision in ("exact", "tf32x3"):
        with fastvae.precision(precision):
            got = fastvae.agg_log_prob(z, mu, logvar, weights=fastvae.ColumnWeights(log_w.bfloat16()))
        expected = fastvae.agg_log_prob(z.float(), mu[-last:].float(), logvar[-last:].float())
        tolerance = 1e-5 if precision == "exact" else 1e-3
        torch.testing.assert_close(got, expected + 0.5 + math.log(last), rtol=tolerance, atol=tolerance)
