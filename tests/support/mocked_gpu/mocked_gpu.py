"""A GPU where there is none: tensors that say they are on it and compute on the CPU.

They are ordinary CPU tensors of a class of their own, so that an operation of one of them and a tensor of the CPU fails
as it would on a GPU. What torch.cuda offers does nothing, or the simplest thing that can be told from outside: a
captured graph remembers the operations and does them again. The backends `triton` and `cuda` refuse tensors of the CPU
and compute by `reference`; Triton's kernels, launched by hand, write nothing. Times mean nothing.
"""

import contextlib
import importlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
MAY_MIX = ("aten::copy_", "aten::_copy_from", "aten::index", "aten::index_put_", "aten::index_put")  # with the CPU

PLACES = (Tensor, torch.device, str)
_makers = torch.library.Library("aten", "IMPL", "CUDA")
_to = Tensor.to
_tape: list[tuple[Any, ...]] | None = None  # of the graph that is being captured
_sync_errors = False


class GpuTensor(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:  # as all below, of torch's own for ordinary tensors alone
        return self.detach().cpu().tolist()

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"{self.detach().cpu()}, on cuda:0"

    def __format__(self, specification: str) -> str:
        return format(self.detach().cpu(), specification)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func.namespace == "fastvae":  # its function in Python, which finds the backend
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and not isinstance(x, cls) and x.ndim and func._schema.name not in MAY_MIX:
                raise RuntimeError(f"Expected all tensors to be on the same device, cuda:0 and cpu in {func}")
        if func is aten._local_scalar_dense.default:
            waits()
        return done(func, args, kwargs)


def on_gpu(x: Tensor) -> Tensor:
    return x if isinstance(x, GpuTensor) else Tensor._make_subclass(GpuTensor, x, x.requires_grad)


def done(func: Any, args: Any, kwargs: Any) -> Any:
    """Computes and gives the results on the GPU; records how they came about where a graph is captured."""
    with no_dispatch():
        results = tree_map_only(Tensor, on_gpu, func(*args, **kwargs))
    if _tape is not None:
        _tape.append((func, args, kwargs, results))
    return results


def waits(what: str = "a number of the GPU was asked for") -> None:
    if _tape is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
    if _sync_errors:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


# Tensors are made, of whatever values, by one of these two, and moved by three methods.


def empty(size: Any, **options: Any) -> Tensor:
    return on_gpu(aten.empty.memory_format(size, **{**options, "device": "cpu", "pin_memory": None}))


def empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
    return on_gpu(aten.empty_strided(size, stride, **{**options, "device": "cpu", "pin_memory": None}))


class Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, to_gpu: bool) -> Tensor:
        ctx.was_on_gpu = x.is_cuda
        if not to_gpu:
            waits("a copy to the CPU")
        with no_dispatch():
            there = torch.empty(x.shape, dtype=x.dtype, device="cpu").copy_(x.detach())
        return on_gpu(there) if to_gpu else there

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return Moved.apply(gradient, ctx.was_on_gpu), None


def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Does what Tensor.to does, for moves between the CPU and the GPU."""
    said = [*args, kwargs.pop("device", None), kwargs.pop("dtype", None)]
    places = [a.device if isinstance(a, Tensor) else torch.device(a) for a in said if isinstance(a, PLACES)]
    dtypes = [a.dtype if isinstance(a, Tensor) else a for a in said if isinstance(a, (Tensor, torch.dtype))]
    if places and (places[0].type == "cuda") != x.is_cuda:
        x = Moved.apply(x, not x.is_cuda)
    return _to(x, (dtypes or [x.dtype])[0], **kwargs)


def from_data(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A stand-in for torch.tensor or torch.as_tensor, by that function."""

    def make(data: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        device = device or (data.device if isinstance(data, Tensor) else torch.empty(0).device)
        made = function(data, dtype=dtype, device="cpu")
        made = to(made, device)
        return made.requires_grad_() if requires_grad else made

    return make


# torch.cuda


class Event:
    time = 0.0
    late = 0  # so many kernels that sleep wake up too soon

    def __init__(self, **_: Any): ...

    def record(self, *_: Any) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.time - self.time)

    def query(self) -> bool:
        Event.late -= 1
        return Event.late >= 0

    def synchronize(self) -> None:
        waits("an event")


class Stream(contextlib.nullcontext[None]):
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None:
        waits("a stream")


class CUDAGraph:
    tape: list[tuple[Any, ...]]

    def replay(self) -> None:
        with no_dispatch(), torch.no_grad():
            for func, args, kwargs, before in self.tape:
                again = tree_leaves(func(*args, **kwargs))
                if hasattr(func, "_schema") and any(r.alias_info for r in func._schema.returns):
                    continue  # in place, or a view
                for old, new in zip(tree_leaves(before), again, strict=True):
                    if isinstance(old, Tensor):
                        old.view(new.shape).copy_(new)  # which squeeze_ may have reshaped since


@contextlib.contextmanager
def graph(captured: CUDAGraph, *_: Any, **__: Any) -> Iterator[None]:
    global _tape
    captured.tape = _tape = []
    try:
        yield
    finally:
        _tape = None


def set_sync_debug_mode(mode: str) -> None:
    global _sync_errors
    _sync_errors = mode == "error"


def always(answer: Any) -> Callable[..., Any]:
    """A function of its own for each name, as torch's compiler tells them apart."""
    return lambda *_, **__: answer


def adapt_torch(_: ModuleType) -> None:
    memory = 2**36
    about = SimpleNamespace(name="mocked GPU", multi_processor_count=132, major=9, minor=0, total_memory=memory)
    here = Stream()
    answers: dict[str, Any] = {
        **dict.fromkeys(("is_available", "is_bf16_supported"), True),
        **dict.fromkeys(("_lazy_init", "init", "set_device", "_sleep", "empty_cache", "manual_seed"), None),
        **dict.fromkeys(("manual_seed_all", "reset_peak_memory_stats", "_lazy_call"), None),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "current_device"), 0),
        "is_initialized": False,  # whoever asks is about to fork
        **{"device_count": 1, "get_device_name": about.name, "get_device_capability": (9, 0)},
        **{"get_device_properties": about, "mem_get_info": (memory // 4, memory), "current_stream": here},
    }
    functions: dict[str, Any] = {
        **{"Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "graph": graph, "device": lambda _: Stream()},
        **{"stream": lambda stream: stream or here, "synchronize": lambda *_: waits("everything")},
        **{"is_current_stream_capturing": lambda: _tape is not None, "set_sync_debug_mode": set_sync_debug_mode},
        **{"get_rng_state": lambda *_: torch.get_rng_state(), "default_generators": (torch.default_generator,)},
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    torch.accelerator.current_accelerator = always(None)  # which would ask the driver
    for name, value in (functions | {name: always(answer) for name, answer in answers.items()}).items():
        setattr(torch.cuda, name, value)

    class Generator(torch.Generator):
        device = GPU

        def __new__(cls, device: Any = "cpu") -> Any:
            on_the_gpu = torch.device(device).type == "cuda"
            return torch._C.Generator.__new__(cls if on_the_gpu else torch._C.Generator, "cpu")  # type: ignore

    def compile(model: Any = None, **_: Any) -> Any:
        return model or (lambda function: function)

    changed = {
        **{"Generator": Generator, "compile": compile},
        **{"tensor": from_data(torch.tensor), "as_tensor": from_data(torch.as_tensor)},
    }
    for name, value in changed.items():
        setattr(torch, name, value)
    for name, method in {"to": to, "cuda": lambda x, *_: to(x, "cuda"), "cpu": lambda x, *_: to(x, "cpu")}.items():
        setattr(Tensor, name, method)
    _makers.impl("empty.memory_format", empty)
    _makers.impl("empty_strided", empty_strided)
    torch.__future__.set_swap_module_params_on_conversion(True)  # of Module.to
    torch.version.cuda = "13.0"


# Triton and fastvae


COMPILES = os.environ.get("MOCKED_GPU_COMPILES") == "1"  # Triton's kernels, for sm_90, though nothing is launched


def adapt_triton(jit: Any) -> None:
    compile_and_launch = jit.JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        assert all(x.is_cuda for x in args if isinstance(x, Tensor)), f"{self}: a pointer to memory of the CPU"
        if COMPILES:
            compile_and_launch(self, *args, **{**kwargs, "warmup": True})

    jit.JITFunction.run = run


def adapt_modes(modes: Any) -> None:
    modes._PLAIN += (GpuTensor,)


def computed(backend: str, name: str, refusal: str) -> Callable[..., Any]:
    """A backend's function. MOCKED_GPU_FAULTS="hang:cuda.kl_gauss,raise:triton.agg_log_prob" and such make it fail,
    "fault3:cuda.kl_gauss" in a process's third call."""
    faults = [
        f.split(":")[0] for f in os.environ.get("MOCKED_GPU_FAULTS", "").split(",") if f.endswith(f":{backend}.{name}")
    ]

    calls = itertools.count(1)

    def function(*args: Any) -> Any:
        call = next(calls)
        if not all(x.is_cuda for x in tree_leaves(args) if isinstance(x, Tensor)):
            raise RuntimeError(refusal)
        if "raise" in faults:
            raise RuntimeError(f"{name} is mocked to fail")
        if "capture" in faults and _tape is not None:
            raise RuntimeError(f"{name} has not run yet")
        if "hang" in faults:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as within CUDA, which nothing interrupts
            time.sleep(1000)
        if "fault" in faults or f"fault{call}" in faults:
            os._exit(139)
        composed, reference = (importlib.import_module(f"fastvae.backends.{m}") for m in ("composed", "reference"))
        results = done(composed.function(reference, name), args, {})
        if "noise" in faults:
            tree_map_only(Tensor, lambda x: x.mul_(1 + 1e-3 * torch.rand((), dtype=x.dtype, device=GPU)), results)
        return results

    return function


def adapt_backend_cuda(cuda: Any) -> None:
    def library() -> Any:
        path = os.environ.get("FASTVAE_CUDA_LIBRARY", "")
        if not os.path.exists(path):
            raise OSError(f"{path or cuda.LIBRARY}: cannot open shared object file")
        return SimpleNamespace(fastvae_cuda_version=lambda: b"mocked", fastvae_cuda_simulated=lambda: False)

    cuda.library = library
    for name in cuda.c.CUDA_FUNCTIONS:
        setattr(cuda, name, computed("cuda", name, "backend 'cuda' does not compute on cpu tensors"))


def adapt_backend_triton(triton: Any) -> None:
    for name in (name for each in (*triton.OPS, *triton.COMPOSITIONS) for name in (each, each + "_backward")):
        function = computed("triton", name, "backend 'triton' computes on cpu tensors only in Triton's interpreter")
        setattr(triton, name, launched(triton, name, function) if COMPILES else function)


def launched(triton: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which first launches Triton's kernels, to have them compiled; they write nothing."""

    def launch(*args: Any) -> Any:
        from support.ahead_of_time import Absent
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        driver.set_active(Absent(0, GPUTarget("cuda", 90, 32)))
        triton.on_current_device(name)(*args)
        return function(*args)

    return launch
