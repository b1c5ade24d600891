"""The choice of how to compute: `fastvae.use`, and its short forms `use_backend` and `precision`."""

import enum
from types import TracebackType
from typing import Any

import numpy as np

from . import NAMES, settings, status

PRECISIONS = ("exact", "tf32x3")


class _AsItIs(enum.Enum):
    """The value of a setting that was not given, as None means something of its own; torch's compiler knows enums."""

    AS_IT_IS = "as it is"


_AS_IT_IS: Any = _AsItIs.AS_IT_IS


class use:
    """Compute in this way from here on, or within a `with` block; a setting that is not given is left as it is.

    The settings are the process's, not the thread's, because autograd runs backward functions on threads of its own.
    Compiled code looks at them at each call, so they belong around it and not within; a captured CUDA graph replays
    what was captured. At the end of a `with` block the settings given to it are again what they were before.

    Args:
        backend: who computes: "native", "triton", "cuda", "reference", or None for the best available. The environment
            variable `FASTVAE_BACKEND` sets it from outside.
        exact_skip: whether `agg_log_prob` may leave out pairs that are too far apart to change a result by as much as
            its rounding: True, False, or None for what `FASTVAE_EXACT_SKIP`, 0 or 1, says from outside, and where that
            is not set, on the CPU alone: on GPUs it has not been measured.
        precision: how exactly GPUs compute: "exact", the default, or "tf32x3", by which `agg_log_prob` runs on NVIDIA's
            tensor cores; `fastvae.precision` says what that costs.

    Raises:
        ValueError: `backend` or `precision` is none of these.
        TypeError: `exact_skip` is not True, False or None.
        RuntimeError: the backend is not available here; the message says why. Nothing is changed where one is raised.

    Example:
        >>> with fastvae.use(backend="native", exact_skip=False):
        ...     log_q = fastvae.agg_log_prob(z, mu, logvar)
    """

    def __init__(
        self,
        *,
        backend: str | None = _AS_IT_IS,
        exact_skip: bool | None = _AS_IT_IS,
        precision: str = _AS_IT_IS,
    ):
        given: dict[str, Any] = {}
        if precision is not _AS_IT_IS:
            given["precision"] = _one_of(PRECISIONS, "precision", precision)
        if exact_skip is not _AS_IT_IS:
            if not (exact_skip is None or isinstance(exact_skip, (bool, np.bool_))):
                raise TypeError(f"exact_skip: expected True, False or None, got {exact_skip!r}")
            given["exact_skip"] = None if exact_skip is None else bool(exact_skip)
        if backend is not _AS_IT_IS:
            given["backend"] = None if backend is None else _available(_one_of(NAMES, "backend", backend))
        self._before = {name: getattr(settings.current, name) for name in given}
        settings.current = settings.current._replace(**given)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        settings.current = settings.current._replace(**self._before)


def _one_of(names: tuple[str, ...], argument: str, name: object) -> str:
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(names)}, got {name!r}")
    return str(name)


def _available(backend: str) -> str:
    found = status(backend)
    if not found.available:
        raise RuntimeError(f"backend {backend!r} is not available: {found.detail}")
    return backend


def use_backend(name: str | None, *, exact_skip: bool | None = None) -> use:
    """Compute with one backend from here on, or within a `with` block: `fastvae.use(backend=name)`.

    Args:
        name: "native", "triton", "cuda", "reference", or None for the best available.
        exact_skip: as in `fastvae.use`, but None keeps what is set.

    Raises:
        ValueError: `name` is not a backend's.
        TypeError: `exact_skip` is not True, False or None.
        RuntimeError: the backend is not available here; the message says why. Nothing is changed then.

    Example:
        >>> with fastvae.use_backend("reference"):
        ...     kl = fastvae.kl_gauss(mu, logvar)
    """
    return use(backend=name, exact_skip=_AS_IT_IS if exact_skip is None else exact_skip)


def precision(name: str) -> use:
    """Compute so exactly from here on, or within a `with` block: `fastvae.use(precision=name)`; "exact" is the default.

    "tf32x3" lets `agg_log_prob` of float32, bfloat16 and float16 tensors, and what is made of it (`agg_entropy`,
    mixtures), run on NVIDIA's tensor cores: squares are multiplied out, and each product is three of tf32 numbers. It
    loses digits to cancellation. With u_ijd = (|z_id - m_d| + |mu_jd - m_d|) / sigma_jd, m being a centre of the
    columns' means, log q(z_i | x_j) has an error, beyond that of the exact form, of at most

        (1 + D / 8) 2^-20 sum_d u_ijd^2 / 2   nats,

    and log q(z_i) no more than that of the columns that share in it. It would be as much if every rounding erred the
    same way; emulated with standard normal means it stays below a tenth of that: at logvar -4 at most 4e-4 nats with
    D = 10 and 2e-3 with D = 64, where the exact form errs by 1e-5. Columns more than 38 sigma from the centre are
    computed exactly.

    Only the forward pass of `agg_log_prob` by the Triton kernels on NVIDIA GPUs (and in Triton's interpreter, which the
    tests make round as tensor cores do) is affected. Elsewhere it has no effect, as what is exact is always allowed: on
    CPUs, on AMD GPUs, in float64, in gradients, which would cancel a second time, and in all other functions.

    Args:
        name: "exact" or "tf32x3".

    Raises:
        ValueError: `name` is neither.

    Example:
        >>> with fastvae.precision("tf32x3"):
        ...     log_q = fastvae.agg_log_prob(z, mu, logvar)
    """
    return use(precision=name)
