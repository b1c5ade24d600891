"""Likelihoods p(x|z): what the decoder's output means, and the log-probability of the data under it;
`fastvae.Likelihood`, in `protocols.py`, says what a likelihood has.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..backends.contract import accumulation_dtype
from ..ops.bernoulli_log_prob import bernoulli_log_prob
from ..ops.checks import FLOATING, check_choice, check_count, check_dense, check_device, check_flag, check_number
from ..ops.modes import has_values

__all__ = ["Bernoulli", "Binomial", "Gaussian"]

REAL = (*FLOATING, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
PIECE = 2**17  # elements looked at together on a CPU, so that what comes of them stays in a cache
TABULATED = 2**10  # values of log C(n, x) at most: for a larger n, computing one for each x costs less


class Bernoulli(nn.Module):
    """Binary data, x in {0, 1}; the decoder gives logits.

    log p(x|z) = x log p + (1 − x) log(1 − p),  p = sigmoid(output)

    Not for grey values in [0, 1]: their cross-entropy is no likelihood, and the ELBO no bound.
    """

    discrete: ClassVar[bool] = True

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        x, logits = _accumulate(x, output)
        return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")

    def example_log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """The sum of `log_prob` over each example, x `[B, ...]` and output `[..., B, ...]` to `[..., B]`: on a CPU in
        one pass, but for the compiler, which fuses the terms, and for a subclass that has others."""
        if is_compiling() or getattr(self.log_prob, "__func__", None) is not Bernoulli.log_prob:
            return _summed(self.log_prob(x, output), x)
        x, logits = _accumulate(x, output)
        if logits.device.type != "cpu":
            return _summed(self.log_prob(x, logits), x)
        if x.ndim == 0:
            raise ValueError("x: expected [B, ...], got shape ()")
        return bernoulli_log_prob(x.expand(logits.shape[logits.ndim - x.ndim :]), logits)

    def mean(self, output: Tensor) -> Tensor:
        _check_real("output", output)
        return torch.sigmoid(output)

    def sample(self, output: Tensor) -> Tensor:
        return torch.bernoulli(_probabilities(output))

    def check(self, x: Tensor) -> None:
        _check_real("x", x)
        if has_values(x) and not _is_binary(x):
            low, high = x.aminmax()
            raise ValueError(
                "x: expected only 0 and 1 for the Bernoulli likelihood, got values"
                f" from {low.item():g} to {high.item():g}; for counts 0..n use likelihood='binomial' with"
                " total_count=n, for real values likelihood='gaussian', or binarize grey values in [0, 1]"
                " with torch.bernoulli(x)"
            )


class Binomial(nn.Module):
    """Counts, x in {0, 1, ..., n}; the decoder gives logits.

    log p(x|z) = log C(n, x) + x log p + (n − x) log(1 − p),  p = sigmoid(output)

    Args:
        total_count: n: 16 for scikit-learn's digits, 255 for 8-bit images.
    """

    discrete: ClassVar[bool] = True

    def __init__(self, total_count: int):
        super().__init__()
        self.total_count = check_count("total_count", total_count, least=1)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        n = self.total_count
        x, logits = _accumulate(x, output)
        # In counts: x / n would be rounded, and its error times n and the logit is a bias too.
        return self._log_choose(x) + x * F.logsigmoid(logits) + (n - x) * F.logsigmoid(-logits)

    def _log_choose(self, x: Tensor) -> Tensor:
        """log C(n, x), −inf where x is no count, from float64: the terms are large, and in float32 their rounding would
        be the same in every pixel, a bias."""
        n = self.total_count
        count = x.detach().clamp(0, n).round()
        k = torch.arange(n + 1, dtype=torch.float64, device=x.device) if n < TABULATED else count.double()
        log_choose = (math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)).to(x.dtype)
        if n < TABULATED:
            log_choose = log_choose[count.nan_to_num().long()]
        return log_choose.where(x == count, -math.inf)

    def mean(self, output: Tensor) -> Tensor:
        _check_real("output", output)
        return self.total_count * torch.sigmoid(output)

    def sample(self, output: Tensor) -> Tensor:
        p = _probabilities(output)
        return torch.binomial(torch.full_like(p, self.total_count), p)

    def check(self, x: Tensor) -> None:
        _check_real("x", x)
        n = self.total_count
        whole = x.round() if x.is_floating_point() else x
        if has_values(x) and not ((x >= 0) & (x <= n) & (x == whole)).all():
            low, high = x.aminmax()
            raise ValueError(
                f"x: expected whole numbers from 0 to {n} for the binomial likelihood with total_count={n},"
                f" got values from {low.item():g} to {high.item():g}; for other counts change total_count,"
                " for real values use likelihood='gaussian'"
            )

    def extra_repr(self) -> str:
        return f"total_count={self.total_count}"


class Gaussian(nn.Module):
    """Real data, x ~ N(output, s²), one variance s² for all elements; the decoder gives means.

    log p(x|z) = −(x − output)² / (2 s²) − ½ log(2 pi s²)

    Args:
        variance: s², a finite number > 0; where it is learned, its initial value.
        learned: learn log s² with the other parameters.
        device, dtype: of the learned parameter.

    Attributes:
        log_variance: log s²: a parameter where it is learned, otherwise a buffer in float64, which no cast of the
            module rounds.
    """

    discrete: ClassVar[bool] = False
    log_variance: Tensor

    def __init__(
        self,
        variance: float = 1.0,
        *,
        learned: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        log_variance = math.log(check_number("variance", variance, above=0.0, finite=True))
        if check_flag("learned", learned):
            self.log_variance = nn.Parameter(torch.tensor(log_variance, device=device, dtype=dtype))
        else:
            self.register_buffer("log_variance", torch.tensor(log_variance, dtype=torch.float64, device=device))

    def _apply(self, fn: Any, recurse: bool = True) -> "Gaussian":
        exact = self.log_variance
        super()._apply(fn, recurse)
        if not isinstance(exact, nn.Parameter) and not exact.is_meta:
            self.log_variance = exact.to(self.log_variance.device)
        return self

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        x, mean = _accumulate(x, output)
        log_variance = self.log_variance.to(mean.dtype)
        t = (x - mean) * torch.exp(-0.5 * log_variance)
        return -0.5 * (t * t + log_variance + math.log(2 * math.pi))

    def mean(self, output: Tensor) -> Tensor:
        _check_real("output", output)
        return output

    def sample(self, output: Tensor) -> Tensor:
        mean = _wide(output)
        return mean + torch.exp(0.5 * self.log_variance.to(mean.dtype)) * torch.randn_like(mean)

    def check(self, x: Tensor) -> None:
        """Check for real numbers: any will do."""
        _check_real("x", x)

    def extra_repr(self) -> str:
        learned = f"learned={isinstance(self.log_variance, nn.Parameter)}"
        return learned if self.log_variance.is_meta else f"variance={self.log_variance.exp().item():g}, {learned}"


LIKELIHOODS = {"bernoulli": Bernoulli, "binomial": Binomial, "gaussian": Gaussian}


def make_likelihood(likelihood: Any, **options: Any) -> Any:
    """Make a likelihood by name, with its options; an object is returned as it is."""
    if not isinstance(likelihood, str):
        if options:
            raise TypeError(f"{', '.join(options)}: goes with a likelihood by name; give it to the object")
        return likelihood
    check_choice("likelihood", likelihood, tuple(LIKELIHOODS))
    if likelihood == "binomial" and "total_count" not in options:
        raise TypeError("total_count: expected the n of the binomial likelihood's counts 0..n, got nothing")
    return LIKELIHOODS[likelihood](**options)


def example_log_prob(likelihood: Any, x: Tensor, output: Tensor) -> Tensor:
    """log p(x|z) of each example, x `[B, ...]` and output `[..., B, ...]` to `[..., B]`: the likelihood's own
    `example_log_prob`, or the sum of its `log_prob`."""
    if hasattr(likelihood, "example_log_prob"):
        log_p: Tensor = likelihood.example_log_prob(x, output)
        return log_p
    return _summed(likelihood.log_prob(x, output), x)


def _summed(terms: Tensor, x: Tensor) -> Tensor:
    """The sum over all of x's axes but the first, which are the last of `terms`."""
    return terms[..., None].flatten(terms.ndim - x.ndim + 1).sum(-1)


def _is_binary(x: Tensor) -> bool:
    """Whether all x are 0 or 1: x − x² is 0 for no other number, be it rounded or modulo 2^k."""
    if x.dtype == torch.bool or x.numel() == 0:
        return True
    x = x.detach()
    pieces = x.flatten().split(PIECE) if x.device.type == "cpu" and x.numel() > PIECE else (x,)
    return all(
        limit.item() == 0 for piece in pieces for limit in torch.addcmul(piece, piece, piece, value=-1).aminmax()
    )


def _accumulate(x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Check both, and convert them to the accumulation dtype, which is never half precision."""
    _check_real("x", x)
    output = _wide(output)
    check_device("x", x, "output", output)
    pairs = zip(reversed(x.shape), reversed(output.shape), strict=False)
    if x.ndim > output.ndim or any(n not in (1, m) for n, m in pairs):
        raise ValueError(f"x: expected to broadcast to the output's {tuple(output.shape)}, got {tuple(x.shape)}")
    return x.to(output.dtype), output


def _wide(output: Tensor) -> Tensor:
    _check_real("output", output)
    return output.to(accumulation_dtype(output.dtype))


def _probabilities(logits: Tensor) -> Tensor:
    """The probabilities to draw with, checked for NaN on CPUs alone; on a GPU torch would stop it for good."""
    p = torch.sigmoid(_wide(logits))
    if has_values(p) and p.device.type == "cpu" and p.isnan().any():
        raise ValueError("output: expected logits, got NaN")
    return p


def _check_real(name: str, x: Any) -> None:
    """Check for a dense tensor of real numbers: counts may be integers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    check_dense(name, x)
    if x.dtype not in REAL:
        raise TypeError(f"{name}: expected a tensor of real numbers, got {x.dtype}")
