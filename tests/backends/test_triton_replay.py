"""What launchers of Triton's kernels do is done again without them, and comes to the same.

Kernels run in Triton's interpreter; a stand-in for their binaries takes addresses as those do.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TRITON, computing_on
from support.helpers import assert_same, evaluate, tensors
from support.ops import FUSED, KERNELS, op_named
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastvae.backends import settings
from fastvae.backends import triton as backend
from fastvae.backends.contract import COMPOSITIONS, LIKELIHOODS, OPS

pytest.importorskip("triton")
import triton
import triton.language as tl
from fastvae.kernels.triton import _launch, _replay
from triton.runtime.interpreter import InterpretedFunction

SIZES = ((5, 4, 3), (40, 20, 10))


class Binary:
    """A kernel of the interpreter for arguments of these dtypes, an address for each tensor that a plan remembers."""

    def __init__(self, run: Callable[..., None], dtypes: list[torch.dtype | None], memory: list[Tensor]):
        self.run, self.dtypes, self.memory = run, dtypes, memory
        self.addressed = 0  # launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, stream=None: self.launch(grid, arguments)

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        pairs = [(a, dtype) for a, dtype in zip(arguments, self.dtypes, strict=False) if dtype]
        self.addressed += any(type(a) is int for a, _ in pairs)
        dtypes = [*self.dtypes, *[None] * (len(arguments) - len(self.dtypes))]  # the constants come last
        given = [self.tensor(a, t) if t and type(a) is int else a for a, t in zip(arguments, dtypes, strict=True)]
        self.run(*given, grid=grid[:3])

    def tensor(self, address: int, dtype: torch.dtype) -> Tensor:
        """All there is from that address on."""
        for x in self.memory:
            start = x.data_ptr()
            end = start + x.itemsize * (1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)))
            if start <= address < end:
                n = (end - address) // dtype.itemsize
                return torch.frombuffer((ctypes.c_uint8 * (end - address)).from_address(address), dtype=dtype, count=n)
        assert address == 0
        return torch.empty(0, dtype=dtype)


@pytest.fixture
def binaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Binary]]:
    """The binaries that were made, where launches go as they do on a GPU."""
    if not _launch.INTERPRETED or torch.cuda.is_available():
        pytest.skip("for Triton's interpreter")
    made: list[Binary] = []
    memory: list[Tensor] = []  # of the plan that runs
    interpreted, run_plan = InterpretedFunction.run, _replay.Plan.run

    def interpret(*arguments: Any, **options: Any) -> None:
        with _disable_current_modes():  # what the interpreter asks torch for is no launcher's doing
            interpreted(*arguments, warmup=False, **options)

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> Binary:
        interpret(kernel, *arguments, grid=grid, **constants)
        options = {k: v for k, v in constants.items() if k not in kernel.arg_names}
        dtypes = [x.dtype if isinstance(x, Tensor) else None for x in arguments]
        made.append(Binary(functools.partial(interpret, kernel, **options), dtypes, memory))
        return made[-1]

    def run_with(plan: _replay.Plan, inputs: list[Tensor]) -> Any:
        memory[:] = inputs
        return run_plan(plan, inputs)

    def remembered(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*arguments: Any, **options: Any) -> Tensor:
            memory.append(make(*arguments, **options))
            memory[-1].untyped_storage().fill_(0xFF)  # type: ignore[attr-defined]
            return memory[-1]

        return empty

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(_replay.Plan, "run", run_with)
    makes = {name: remembered(getattr(torch, name)) for name in ("empty", "empty_strided")}
    monkeypatch.setattr(_replay, "torch", SimpleNamespace(**makes, uint8=torch.uint8))
    monkeypatch.setattr(_launch, "_specialized", lambda kernel: [(False, False)] * len(kernel.arg_names))
    monkeypatch.setattr(_launch, "target", lambda: _launch.Target("cuda", 32, False))
    device = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    monkeypatch.setattr(_launch.triton.runtime, "driver", SimpleNamespace(active=device))
    monkeypatch.setattr(_launch, "_known", {})
    monkeypatch.setattr(_replay, "_plans", {})
    monkeypatch.setattr(_replay, "_seen", set())
    with computing_on(TRITON["triton"]):
        yield made


def evaluated(name: str, sizes: tuple[int, int, int], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    op = op_named(name, torch.float32, *sizes)
    scaled = {key: (x * (1 + seed / 16)).detach().requires_grad_(x.requires_grad) for key, x in op.inputs.items()}
    return evaluate(op.fast, scaled)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", [name for name in FUSED if KERNELS[name] not in LIKELIHOODS])
def test_the_same_comes_of_it(
    name: str, sizes: tuple[int, int, int], binaries: list[Binary], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [evaluated(name, sizes, seed) for seed in range(4)]

    def replayed(launcher: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: _replay.replay(launcher, settings.current, *arguments)

    for function in [f for op in (*OPS, *COMPOSITIONS) for f in (op, f"{op}_backward")]:
        monkeypatch.setattr(backend, function, replayed(backend.on_current_device(function)))
    for seed, results in enumerate(expected):
        assert_same(evaluated(name, sizes, seed), results)
    assert _replay._plans
    assert None not in _replay._plans.values()
    assert all(binary.addressed for binary in binaries)


@triton.jit(do_not_specialize=["n"])
def _add_one(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n) + 1, i < n)


def add_one(x: Tensor, out: Tensor) -> Tensor:
    _launch.launch(_add_one, (1,), x, out, out.numel(), BLOCK=16)
    return out


KEPT = torch.zeros(4)


def two_at_once(x: Tensor) -> list[Tensor]:
    both = x.new_empty(2, *x.shape)
    return [add_one(x, out) for out in both]


NOT_REPLAYED: dict[str, Callable[..., Any]] = {
    "computes by torch": lambda x, y: add_one(x, torch.empty_like(x)) * 2,
    "writes by torch": lambda x, y: add_one(x, torch.zeros_like(x)),
    "copies": lambda x, y: add_one(x.clone(), torch.empty_like(x)),
    "gives an input": lambda x, y: (add_one(x, torch.empty_like(x)), y),
    "gives what it keeps": lambda x, y: add_one(x, KEPT),
    "reads what it keeps": lambda x, y: add_one(KEPT, torch.empty_like(x)),
    "gives one twice": lambda x, y: [add_one(x, torch.empty_like(x))] * 2,
    "gives parts of one": lambda x, y: two_at_once(x),
    "takes a part of an input": lambda x, y: add_one(x[1:], x.new_empty(3)),
}


def calls(launcher: Callable[..., Any], n: int = 4) -> None:
    """Calls, replayed and not, of new tensors each, which must come to the same."""
    for seed in range(n):
        inputs = [torch.full((4,), float(seed)), torch.full((4,), -float(seed))]
        assert_same(tensors(_replay.replay(launcher, None, *inputs)), tensors(launcher(*inputs)))


@pytest.mark.parametrize("what", NOT_REPLAYED)
def test_what_is_not_replayed(what: str, binaries: list[Binary]) -> None:
    calls(NOT_REPLAYED[what])
    assert list(_replay._plans.values()) == [None]


def through(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x + 2, by way of memory of its own, and y + 1 in the memory of a view."""
    between = x.new_empty(2, 4)
    for source in (x, y):
        add_one(source, between[0 if source is x else 1])
    return add_one(between[0], torch.empty_like(x)), add_one(y, x.new_empty(2, 2).view(4)).unflatten(0, (2, 2))


def test_what_is_replayed(binaries: list[Binary]) -> None:
    calls(through)
    (plan,) = _replay._plans.values()
    assert plan
    assert (len(plan.launches), plan.rest) == (4, 512)


def test_the_same_tensor_twice(binaries: list[Binary]) -> None:
    """It has a plan of its own, which is of no use for two, as an address does not tell which one was meant."""
    x = torch.ones(4)
    for _ in range(3):
        assert_same(_replay.replay(through, None, x, x), through(x, x))
    calls(through)
    assert len(_replay._plans) == 2
    assert None not in _replay._plans.values()


def test_a_launch_of_no_binary(binaries: list[Binary], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook of Triton may keep a binary to itself."""
    run = InterpretedFunction.run
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **options: run(*args, **options) and None)
    calls(through)
    assert list(_replay._plans.values()) == [None]


def test_much_memory_is_not_taken_at_once(binaries: list[Binary], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_replay, "LARGEST", 511)
    calls(through)
    assert list(_replay._plans.values()) == [None]


def test_what_a_plan_is_for(binaries: list[Binary]) -> None:
    """Whatever a launcher may depend on makes another plan."""
    x = torch.zeros(4)
    arguments: list[tuple[Any, ...]] = [
        (None, x),
        (None, x.double()),
        (None, torch.zeros(5)),
        (None, torch.zeros(8)[::2]),
        (None, torch.zeros(5)[1:]),
        (None, x, 1),
        (None, x, 2),
        (None, x, None),
        (None, x, (x,)),
        ("a setting", x),
    ]

    def launcher(x: Tensor, *_: Any) -> Tensor:
        return add_one(x, torch.empty(4))

    for n, each in enumerate(arguments, start=1):
        for _ in range(2):
            _replay.replay(launcher, *each)
        assert len(_replay._plans) == n, each


def test_plans_do_not_grow_without_end(binaries: list[Binary], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_replay, "MOST", 3)
    for n in range(1, 12):
        for _ in range(3):
            _replay.replay(through, n, torch.zeros(4), torch.ones(4))
        assert 1 <= len(_replay._plans) <= 3


def test_others_launches_are_not_recorded(binaries: list[Binary]) -> None:
    """Neither those of another thread nor those after a launcher that failed."""

    def beside(x: Tensor, y: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(through, x, y).result()
        return add_one(x, torch.empty_like(x))

    def failing(x: Tensor, y: Tensor) -> Tensor:
        raise ArithmeticError

    calls(beside)
    (plan,) = _replay._plans.values()
    assert plan
    assert len(plan.launches) == 1
    for _ in range(3):
        with pytest.raises(ArithmeticError):
            _replay.replay(failing, None, torch.zeros(4), torch.ones(4))
        assert _launch.observed.by is None
