"""Who computes: the choice of a backend for each device, and what `python -m fastvae info` says about it."""

import functools
import importlib
import os
from types import ModuleType, TracebackType
from typing import NamedTuple

import torch

# Best first, by device type. `reference` runs everywhere, so what stands after it is used only by name: on the CPU
# Triton's interpreter and CUDA kernels run on the host; on GPUs the CUDA library, until a committed measurement shows
# it faster than Triton.
CANDIDATES = {"cpu": ("native", "reference", "triton", "cuda"), "cuda": ("triton", "reference", "cuda")}
NAMES = ("native", "triton", "cuda", "reference")

_forced: str | None = os.environ.get("FASTVAE_BACKEND") or None
_exact_skip = {"0": False, "1": True}.get(os.environ.get("FASTVAE_EXACT_SKIP", ""))  # None: each backend's own choice


class BackendStatus(NamedTuple):
    name: str
    available: bool
    detail: str  # what it runs on, or why it is not available


def status(name: str) -> BackendStatus:
    """Whether a backend can be used here, and what it runs on or why it cannot."""
    if name == "reference":
        return BackendStatus(name, True, "plain PyTorch, any device")
    return BackendStatus(name, *importlib.import_module(f".{name}", __name__).status())


def backend_for(device: torch.device) -> ModuleType:
    """The backend that computes for tensors on this device."""
    return _choose(_forced, device.type)


@functools.cache
def _choose(forced: str | None, device_type: str) -> ModuleType:
    candidates = CANDIDATES.get(device_type, ("reference",))
    if forced is not None:
        _check_name(forced)
        if forced not in (*candidates, "reference"):
            raise RuntimeError(f"backend {forced!r} was asked for, but does not compute on {device_type} tensors")
        if not status(forced).available:
            raise RuntimeError(f"backend {forced!r} was asked for, but is not available: {status(forced).detail}")
        candidates = (forced,)
    name = next(name for name in candidates if status(name).available)
    return importlib.import_module(f".{name}", __name__)


def exact_skip(otherwise: bool = True) -> bool:
    """Whether kernels may leave out pairs that are too far apart to change a result by as much as its rounding;
    `otherwise` where nobody has said."""
    return otherwise if _exact_skip is None else _exact_skip


class use_backend:
    """Compute with one backend from here on, or within a `with` block; None goes back to the best available.

    The environment variable `FASTVAE_BACKEND` sets it from outside. The choice is the process's, not the
    thread's, because autograd runs backward functions on threads of its own.

    Args:
        name: "native", "triton", "cuda", "reference", or None.
        exact_skip: whether `agg_log_prob` may leave out pairs that are too far apart to change a result by as much as
            its rounding; `FASTVAE_EXACT_SKIP`, 0 or 1, sets that from outside. None keeps what is set, and if nothing
            is, does so on the CPU alone: on GPUs it has not been measured.

    Raises:
        ValueError: `name` is not a backend's.
        RuntimeError: the backend is not available here; the message says why.

    Example:
        >>> with fastvae.use_backend("reference"):
        ...     kl = fastvae.kl_gauss(mu, logvar)
    """

    def __init__(self, name: str | None, *, exact_skip: bool | None = None):
        global _forced, _exact_skip
        if name is not None:
            _check_name(name)
            found = status(name)
            if not found.available:
                raise RuntimeError(f"backend {name!r} is not available: {found.detail}")
        self._before = _forced, _exact_skip
        _forced = name
        if exact_skip is not None:
            _exact_skip = exact_skip

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _forced, _exact_skip
        _forced, _exact_skip = self._before


def _check_name(name: str | None) -> None:
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
