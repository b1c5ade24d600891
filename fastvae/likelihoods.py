"""Likelihoods p(x|z): what the decoder's output means, and the log-probability of the data under it.

A likelihood has `log_prob(x, output)`, elementwise, in nats; `mean(output)`, E[x|z] in the units of x;
`check(x)`, which refuses data that it gives no probability to; `sample(output)`, an x drawn from p(x|z); and
`discrete`, whether `log_prob` is of a probability or of a density. Each is complete, constants included, so that
an ELBO is a bound on log p(x) and not on something proportional to it.
"""

import math
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends.contract import accumulation_dtype
from .ops._checks import check_choice, check_count, check_number


class Likelihood(Protocol):
    """What `VAE` and its evaluation ask of a likelihood. `output` is the decoder's; `x` broadcasts against it."""

    discrete: ClassVar[bool]

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """log p(x|z) of each element, in float32 (float64 for float64 outputs)."""

    def mean(self, output: Tensor) -> Tensor:
        """E[x|z], the shape of `output`."""

    def check(self, x: Tensor) -> None:
        """Raise a ValueError where x lies outside the likelihood's support."""

    def sample(self, output: Tensor) -> Tensor:
        """x drawn from p(x|z) by torch's generator, the shape of `output`, in the dtype of `log_prob`."""


class Bernoulli(nn.Module):
    """Binary data, x in {0, 1}; the decoder gives logits.

    log p(x|z) = x log p + (1 − x) log(1 − p),  p = sigmoid(output)

    Not for grey values in [0, 1]: their cross-entropy is no likelihood, and the ELBO no bound.
    """

    discrete: ClassVar[bool] = True

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        x, logits = _accumulate(x, output)
        return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")

    def mean(self, output: Tensor) -> Tensor:
        return torch.sigmoid(output)

    def sample(self, output: Tensor) -> Tensor:
        return torch.bernoulli(torch.sigmoid(_wide(output)))

    def check(self, x: Tensor) -> None:
        if not ((x == 0) | (x == 1)).all():
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
        check_count("total_count", total_count, least=1)
        self.total_count = int(total_count)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        n = self.total_count
        x, logits = _accumulate(x, output)
        log_choose = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        return log_choose - n * F.binary_cross_entropy_with_logits(logits, (x / n).expand_as(logits), reduction="none")

    def mean(self, output: Tensor) -> Tensor:
        return self.total_count * torch.sigmoid(output)

    def sample(self, output: Tensor) -> Tensor:
        p = torch.sigmoid(_wide(output))
        return torch.binomial(torch.full_like(p, self.total_count), p)

    def check(self, x: Tensor) -> None:
        n = self.total_count
        if not ((x >= 0) & (x <= n) & (x == x.round())).all():
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
        variance: s², or where it starts.
        learned: learn log s² with the other parameters (as `log_variance`).
    """

    discrete: ClassVar[bool] = False

    def __init__(self, variance: float = 1.0, *, learned: bool = False):
        super().__init__()
        check_number("variance", variance, least=0.0)
        if not 0 < variance < math.inf:
            raise ValueError(f"variance: expected a finite number > 0, got {variance}")
        self.log_variance: Tensor
        if learned:
            self.log_variance = nn.Parameter(torch.tensor(math.log(variance)))
        else:
            self.register_buffer("log_variance", torch.tensor(math.log(variance)))

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        x, mean = _accumulate(x, output)
        log_variance = self.log_variance.to(mean.dtype)
        t = (x - mean) * torch.exp(-0.5 * log_variance)
        return -0.5 * (t * t + log_variance + math.log(2 * math.pi))

    def mean(self, output: Tensor) -> Tensor:
        return output

    def sample(self, output: Tensor) -> Tensor:
        mean = _wide(output)
        return mean + torch.exp(0.5 * self.log_variance.to(mean.dtype)) * torch.randn_like(mean)

    def check(self, x: Tensor) -> None:
        """Any real number will do."""

    def extra_repr(self) -> str:
        return f"variance={self.log_variance.exp().item():g}, learned={self.log_variance.requires_grad}"


LIKELIHOODS = {"bernoulli": Bernoulli, "binomial": Binomial, "gaussian": Gaussian}


def make_likelihood(likelihood: Any, **options: Any) -> Any:
    """A likelihood by name, with its options; an object is passed through."""
    if not isinstance(likelihood, str):
        if options:
            raise TypeError(f"{', '.join(options)}: goes with a likelihood by name; give it to the object")
        return likelihood
    check_choice("likelihood", likelihood, tuple(LIKELIHOODS))
    if likelihood == "binomial" and "total_count" not in options:
        raise TypeError("total_count: expected the n of the binomial likelihood's counts 0..n, got nothing")
    return LIKELIHOODS[likelihood](**options)


def _accumulate(x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that sums are done in: never in half precision."""
    output = _wide(output)
    return x.to(output.dtype), output


def _wide(output: Tensor) -> Tensor:
    return output.to(accumulation_dtype(output.dtype))
