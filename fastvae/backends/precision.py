"""How exactly GPUs compute: in float32 throughout, or on tensor cores where that is asked for by name."""

from types import TracebackType

NAMES = ("exact", "tf32x3")

_current = "exact"


def current() -> str:
    return _current


class precision:
    """Compute so exactly from here on, or within a `with` block; "exact" is the default.

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
    CPUs, on AMD GPUs, in float64, in gradients, which would cancel a second time, and in all other functions. Like the
    backend, the choice is the process's, not the thread's. Compiled code looks at it at each call; a captured CUDA
    graph replays what was captured.

    Args:
        name: "exact" or "tf32x3".

    Raises:
        ValueError: `name` is neither.

    Example:
        >>> with fastvae.precision("tf32x3"):
        ...     log_q = fastvae.agg_log_prob(z, mu, logvar)
    """

    def __init__(self, name: str):
        global _current
        if not isinstance(name, str) or name not in NAMES:
            raise ValueError(f"precision: expected one of {', '.join(NAMES)}, got {name!r}")
        self._before = _current
        _current = str(name)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self._before
