"""Who computes: the choice of a backend for each device, and what `python -m fastvae info` says about it."""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import NamedTuple

import numpy as np
import torch

from .._warnings import warn
from .settings import WrongSetting, setting, switch

# Best first, by device type. `reference` runs everywhere, so what stands after it is used only by name: on the CPU
# Triton's interpreter and CUDA kernels run on the host; on GPUs the CUDA library, until a committed measurement shows
# it faster than Triton.
CANDIDATES = {"cpu": ("native", "reference", "triton", "cuda"), "cuda": ("triton", "reference", "cuda")}
NAMES = ("native", "triton", "cuda", "reference")

_forced: str | None = setting("FASTVAE_BACKEND")  # of NAMES, if use_backend has set it
_exact_skip: bool | None = None  # as use_backend has set it


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
    """The same, but for an environment variable that cannot be followed, which is a WrongSetting."""
    if name == "reference":
        return BackendStatus(name, True, "plain PyTorch, any device")
    return BackendStatus(name, *importlib.import_module(f".{name}", __name__).status())


def backend_for(device: torch.device) -> ModuleType:
    """The backend that computes for tensors on this device."""
    return _backend(_forced, device.type)


def name_for(device: torch.device) -> str:
    """The name of the backend that would compute for tensors on this device.

    Raises:
        RuntimeError: the one that was asked for cannot.
    """
    return _choose(_forced, device.type)


@functools.cache
def _backend(forced: str | None, device_type: str) -> ModuleType:
    name = _choose(forced, device_type)
    if name == "reference" and forced is None and device_type == "cpu":
        _warn_of_a_missing_library()
    return importlib.import_module(f".{name}", __name__)


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
    """Unless this is Windows, for which no wheel has it. Ops are opaque to the compiler, so it never sees this."""
    from . import native_library

    if native_library.missing() and sys.platform != "win32":
        warn(
            "fastvae computes on CPU tensors by its reference, which is slow, because its native library is missing:"
            f" {native_library.missing()}; use_backend('reference') chooses that without a warning"
        )


def wrong_settings() -> list[str]:
    """What environment variables ask for that cannot be, with the reason."""
    asked: list[Callable[[], object]] = [functools.partial(_choose, _forced, device) for device in ("cpu", "cuda")]
    asked += [functools.partial(_status, name) for name in NAMES]
    found: list[str] = []
    for ask in asked:
        try:
            ask()
        except WrongSetting as wrong:
            found.append(str(wrong))
        except RuntimeError:
            pass  # something else is wrong
    return list(dict.fromkeys(found))


def exact_skip(otherwise: bool = True) -> bool:
    """Whether kernels may leave out pairs that are too far apart to change a result by as much as its rounding;
    `otherwise` where nobody has said."""
    said = _exact_skip if _exact_skip is not None else _exact_skip_from_outside()
    return otherwise if said is None else said


@functools.cache
def _exact_skip_from_outside() -> bool | None:
    return switch("FASTVAE_EXACT_SKIP")


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
        TypeError: `exact_skip` is not True, False or None.
        RuntimeError: the backend is not available here; the message says why. Nothing is changed then.

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
        if not (exact_skip is None or isinstance(exact_skip, (bool, np.bool_))):
            raise TypeError(f"exact_skip: expected True, False or None, got {exact_skip!r}")
        self._before = _forced, _exact_skip
        _forced = name
        if exact_skip is not None:
            _exact_skip = bool(exact_skip)

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


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
