"""Who computes: the choice of a backend for each device, and what `python -m fastvae info` says about it."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from .._warnings import warn
from . import settings
from .contract import Backend
from .settings import WrongSetting, switch

# Best first, by device type. `reference` runs everywhere, so what stands after it is used only by name: on the CPU
# Triton's interpreter and CUDA kernels run on the host; on GPUs the CUDA library, until a committed measurement shows
# it faster than Triton.
CANDIDATES = {"cpu": ("native", "reference", "triton", "cuda"), "cuda": ("triton", "reference", "cuda")}
NAMES = ("native", "triton", "cuda", "reference")

if TYPE_CHECKING:  # a backend is what the contract says; triton's functions are made when they are asked for
    from . import cuda, native, reference

    _native: Backend = native
    _cuda: Backend = cuda
    _reference: Backend = reference


class BackendStatus(NamedTuple):
    name: str
    available: bool
    detail: str  # what it runs on, or why it is not available


def status(name: str) -> BackendStatus:
    """Whether a backend can be used here, and what it runs on or why it cannot."""
    try:
        return _status(name)
    except RuntimeError as error:
        return BackendStatus(name, False, str(error))


def _status(name: str) -> BackendStatus:
    """The same, but raises WrongSetting for an environment variable that cannot be followed."""
    return BackendStatus(name, *_module(name).status())


def _module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f".{name}", __name__))


def backend_for(device: torch.device) -> Backend:
    """The backend that computes for tensors on this device."""
    return _backend(settings.current.backend, device.type)


def name_for(device: torch.device) -> str:
    """The name of the backend that would compute for tensors on this device.

    Raises:
        RuntimeError: the one that was asked for cannot.
    """
    return _choose(settings.current.backend, device.type)


@functools.cache
def _backend(forced: str | None, device_type: str) -> Backend:
    name = _choose(forced, device_type)
    if name == "reference" and forced is None and device_type == "cpu":
        _warn_of_a_missing_library()
    return _module(name)


@functools.cache
def _choose(forced: str | None, device_type: str) -> str:
    switch("FASTVAE_EXACT_SKIP")  # a wrong one is said at the first call, not at the first that looks at it
    candidates = CANDIDATES.get(device_type, ("reference",))
    if forced is None:
        return next(name for name in candidates if _status(name).available)
    if forced not in NAMES:
        raise WrongSetting(f"FASTVAE_BACKEND={forced}: expected one of {', '.join(NAMES)}")
    if forced not in (*candidates, "reference"):
        raise RuntimeError(f"backend {forced!r} was asked for, but does not compute on {device_type} tensors")
    if not _status(forced).available:
        raise WrongSetting(f"FASTVAE_BACKEND={forced}: it is not available: {_status(forced).detail}")
    return forced


def _warn_of_a_missing_library() -> None:
    """Warns where the native library is missing, except on Windows, for which no wheel has it. torch.compile takes ops
    as they are, so it never sees this."""
    from . import native_library

    if native_library.missing() and sys.platform != "win32":
        warn(
            "fastvae computes on CPU tensors by its reference, which is slow, because its native library is missing:"
            f" {native_library.missing()}; use_backend('reference') chooses that without a warning"
        )


def wrong_settings() -> list[str]:
    """The environment variables that ask for what cannot be, each with the reason."""
    forced = settings.current.backend
    asked: list[Callable[[], object]] = [functools.partial(_choose, forced, device) for device in ("cpu", "cuda")]
    asked += [functools.partial(_status, name) for name in NAMES]
    asked.append(functools.partial(switch, "FASTVAE_CALLS"))
    found: list[str] = []
    for ask in asked:
        try:
            ask()
        except WrongSetting as wrong:
            found.append(str(wrong))
        except RuntimeError:
            pass  # something else is wrong
    return list(dict.fromkeys(found))
