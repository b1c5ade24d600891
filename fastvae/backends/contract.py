"""The kernel contract: what every backend computes.

A backend is a module with the functions of `Backend`, and `status`; it may have those of `Compositions` and
`Likelihoods` as well. The functions take detached tensors on one device, allocate their results, and know nothing of
autograd or estimators. Shapes: S samples, N posteriors (columns), D dimensions, L samples per posterior, B batch.
Results are in the accumulation dtype, but for samples and gradients, which come in the dtype of the tensors they belong
to. `wanted` says which of the backward's inputs need a gradient; the result lists those, in order. Backward functions
recompute what they need.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

REDUCTIONS = ("none", "sample", "dim", "sum", "mean", "batchmean")
# Of the KL; numbers, but for dim_kl [D].
TERMS = ("mi", "agg_kl", "tc", "dim_kl", "prior_factorization", "kl", "entropy", "saturation")


class LogWeights(NamedTuple):
    """log w_ij of the weighted log-sum-exp: `log_w[j]` (or `log_w_all`, or −log N where both are None), but for
    sample i drawn from column o = own[i]: `log_w_own` at j = o, else `log_w_next` at j = (o + 1) mod N, where
    these are not None. An `own[i]` outside [0, N) means: drawn from none of them."""

    log_w: Tensor | None = None  # [N]
    log_w_all: float | None = None
    own: Tensor | None = None  # [S] int64
    log_w_own: float | None = None
    log_w_next: float | None = None

    def common(self, n_columns: int) -> float:
        """The log-weight of every column where there is no `log_w`."""
        if self.log_w_all is not None:
            return self.log_w_all
        return -math.log(n_columns) if n_columns else -math.inf


class Pairs(NamedTuple):
    """Samples z `[S, D]` under posteriors mu and logvar `[N, D]`, and the log-weights of these."""

    z: Tensor
    mu: Tensor
    logvar: Tensor
    weights: LogWeights = LogWeights()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """S, N, D"""
        N, D = self.mu.shape
        return self.z.shape[0], N, D

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Those that may want a gradient."""
        return self.z, self.mu, self.logvar, self.weights.log_w


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 accumulates in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kl_shape(reduction: str, B: int, D: int) -> tuple[int, ...]:
    """The shape of a reduced KL; "dim" is the batch mean of each dimension."""
    return {"none": (B, D), "sample": (B,), "dim": (D,)}.get(reduction, ())


def kl_scale(reduction: str, B: int, D: int) -> float:
    """The factor of the sum over the reduced axes; the mean of nothing is NaN, as in torch."""
    count = {"dim": B, "batchmean": B, "mean": B * D}.get(reduction, 1)
    return 1.0 / count if count else math.nan


class Backend(Protocol):
    """A backend, and its functions: for each op one of its name and one for its gradients. Priors are [1, D] or [B, D],
    None for 0; `mu` and `logvar` are [B, D]; `seed` is a 0-dim int64 tensor."""

    def status(self) -> tuple[bool, str]:
        """Returns whether it can compute here, and on what, or why not."""

    def kl_gauss(
        self, mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, reduction: str
    ) -> Tensor: ...

    def kl_gauss_backward(
        self,
        grad: Tensor,
        mu: Tensor,
        logvar: Tensor,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        reduction: str,
        wanted: Sequence[bool],
    ) -> list[Tensor]: ...

    def sample_gauss(
        self, mu: Tensor, logvar: Tensor, seed: Tensor, n_samples: int, outputs: Sequence[bool], reduction: str
    ) -> list[Tensor]:
        """Returns z [L, B, D], log_q [L, B], log_p [L, B], kl and the noise eps [L, B, D], those that `outputs` asks
        for; the KL is [B], where `reduction` is "sample", or a number."""

    def sample_gauss_backward(
        self,
        upstream: Sequence[Tensor | None],
        mu: Tensor,
        logvar: Tensor,
        seed: Tensor | None,
        eps: Tensor | None,
        n_samples: int,
        reduction: str,
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """`upstream` has the gradients of z, log_q, log_p and kl. One of `seed` and `eps` is None: the noise is read
        where the forward's is given, else drawn again, to the same bits."""

    def cross_log_prob(self, pairs: Pairs) -> Tensor:
        """Returns log q(z_i | x_j) [S, N]; the weights of the pairs have no part in it."""

    def cross_log_prob_backward(self, grad: Tensor, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]: ...

    def agg_log_prob(self, pairs: Pairs) -> Tensor:
        """Returns the joint [S]."""

    def agg_log_prob_backward(
        self, d_joint: Tensor, joint: Tensor | None, pairs: Pairs, wanted: Sequence[bool]
    ) -> list[Tensor]:
        """Returns the gradients; where `joint` is None, the joint is computed too and returned before them."""

    def agg_log_prob_marginals(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Returns the joint [S] and the marginals [S, D]."""

    def agg_log_prob_marginals_backward(
        self,
        upstream: Sequence[Tensor | None],
        joint: Tensor,
        marginals: Tensor,
        pairs: Pairs,
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """`upstream` has the gradients of the joint and of the marginals."""


class Compositions(Protocol):
    """What a backend may compute in one call that its other functions can be put together to (composed.py)."""

    def agg_entropy(self, pairs: Pairs) -> Tensor:
        """Returns the mean of −joint, a number."""

    def agg_entropy_backward(self, d_entropy: Tensor, pairs: Pairs, wanted: Sequence[bool]) -> list[Tensor]: ...

    def kl_decomposition(self, pairs: Pairs) -> list[Tensor]:
        """Returns the terms of the KL from N(0, I), in the order of `TERMS`, then the joint [S] and the marginals
        [S, D]. Sample i is from posterior i mod N, and S is a multiple of N."""

    def kl_decomposition_backward(
        self,
        upstream: Sequence[Tensor | None],
        joint: Tensor,
        marginals: Tensor,
        pairs: Pairs,
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """`upstream` has the gradients of the terms but for the saturation, the last."""


class Likelihoods(Protocol):
    """What a backend may compute in one pass that torch's operations do in several (composed.py)."""

    def bernoulli_log_prob(self, x: Tensor, logits: Tensor) -> Tensor:
        """Returns sum_m x l − log(1 + e^l) [R], of x [B, M] and logits [R, M]. Row r of the logits meets row r mod B of
        x, and R is a multiple of B."""

    def bernoulli_log_prob_backward(
        self, grad: Tensor, x: Tensor, logits: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor]: ...


# Every op has a function of its name, and one for its gradients.
OPS, COMPOSITIONS, LIKELIHOODS = (
    tuple(n for n in vars(p) if f"{n}_backward" in vars(p)) for p in (Backend, Compositions, Likelihoods)
)
