"""Gaussian mixtures with diagonal covariances, under the names that scikit-learn's users know."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._warnings import warn
from ..backends.contract import accumulation_dtype
from ..ops.categorical import entropy
from ..ops.checks import (
    MOST_SAMPLES,
    check_choice,
    check_count,
    check_device,
    check_number,
    check_seed,
    check_tensor,
    drawn_seed,
)
from ..ops.sample_gauss import reparameterize
from . import em
from . import runs as em_runs
from .em import Mixture

INITS = ("kmeans++", "random")


class GaussianMixture:
    """A mixture of Gaussians with diagonal covariances, fitted by expectation maximization.

        p(x) = sum_k weights_k N(x; means_k, diag variances_k)

    The responsibilities `[S, K]` are never formed (`fastvae.em` has the maths): besides the points themselves a fit
    takes O(S + K·D) memory. Points are tensors on any device, float64, float32, bfloat16 or float16; the kernels
    compute in float32 where that is accurate, sums are in float64.

    Args:
        n_components: K.
        tol: EM has converged when mean log p(x) changes by less, in nats; 0 takes all `max_iter` steps.
        max_iter: EM steps at most, from each start.
        n_init: how many starts; the fit with the largest `lower_bound_` is kept.
        init: `"kmeans++"`: the means are points far apart (Arthur & Vassilvitskii 2007); `"random"`: they are any
            points. All components have the variance of the points about their nearest mean. Or the parameters to
            start from, tensors (weights `[K]`, means `[K, D]`, variances `[K, D]`).
        reg_covar: added to each variance, and so the whole variance of a component with one point.
        seed: of the starts; None draws one from torch's generator.

    Arguments are kept as they are given, and checked by `fit` and `partial_fit`.

    Attributes:
        weights_, means_, variances_: the parameters, `[K]`, `[K, D]` and `[K, D]`, in float64 on the points' device.
        converged_: whether the change fell below `tol`.
        n_iter_: EM steps taken.
        lower_bound_: the last of `lower_bounds_`.
        lower_bounds_: mean log p(x) before each EM step, in nats: never falling, except by rounding, where `reg_covar`
            is 0 and nothing was re-seeded.
        n_reseeded_: how often a component that had lost all its points was started again, at the point that the
            others explain worst.
        n_batches_: batches seen by `partial_fit`.

    Raises:
        TypeError, ValueError: in `fit` and `partial_fit`: an argument is not as above; points fewer than K, or so far
            apart that the squares overflow; where `reg_covar` is 0, a component all of whose points have the same
            value in a dimension. In every method: points that are not finite, or not `[S, D]`; no points, where the
            result is a mean over them; a point so far out that log p(x) overflows, where the result rests on p(k|x).
        RuntimeError: a method that needs parameters, before they were fitted.

    Warns:
        UserWarning: in `fit`, and in `partial_fit` when it starts: there are fewer distinct points than K. In `fit`:
            the run that is kept was ended by `max_iter` before its change fell below a `tol` above 0.

    Source: Basics VAE, section 1; Dempster et al. 1977.

    Example:
        >>> mixture = fastvae.GaussianMixture(10, n_init=3).fit(z)
        >>> mixture.score(held_out), mixture.predict(held_out)
    """

    weights_: Tensor
    means_: Tensor
    variances_: Tensor
    converged_: bool
    n_iter_: int
    lower_bound_: float
    lower_bounds_: list[float]
    n_reseeded_: int
    n_batches_: int
    _dtype: torch.dtype  # of the points

    def __init__(
        self,
        n_components: int = 1,
        *,
        tol: float = 1e-3,
        max_iter: int = 100,
        n_init: int = 1,
        init: str | tuple[Tensor, Tensor, Tensor] = "kmeans++",
        reg_covar: float = 1e-6,
        seed: int | None = None,
    ):
        self.n_components, self.tol, self.max_iter, self.n_init = n_components, tol, max_iter, n_init
        self.init, self.reg_covar, self.seed = init, reg_covar, seed

    def fit(self, x: Tensor) -> "GaussianMixture":
        """Fit to points `[S, D]`; returns itself."""
        options = self._options()
        x = em_runs.points_to_fit(x, least=options.n_components)
        em_runs.warn_if_few(x, options.n_components)
        generator = options.generator()
        starts = 1 if isinstance(options.init, Mixture) else options.n_init
        best = max((em_runs.run(x, options, generator) for _ in range(starts)), key=lambda fitted: fitted.trace[-1])
        if not best.converged and options.tol > 0:
            change = f"{abs(best.trace[-1] - best.trace[-2]):.3g} nats" if len(best.trace) > 1 else "not known yet"
            warn(
                f"max_iter: EM has not converged, as the change of mean log p(x) at step {options.max_iter}, the last,"
                f" is {change}, and tol {options.tol:g}; take more steps, a larger tol, or other starts"
            )
        self._keep(best.mixture, best.trace, x.dtype, best.converged, best.n_reseeded, 0)
        return self

    def partial_fit(self, x: Tensor) -> "GaussianMixture":
        """One step of stochastic EM on a batch `[B, D]`; returns itself. For data that do not fit into memory.

        The statistics of the M-step become (1 − gamma) · old + gamma · the batch's, with gamma = (t + 1)^−0.6 at batch
        t = 1, 2, ...: t counts the batches since the first, which the start is made from, or since `fit`.
        `lower_bounds_` has the mean log p(x) of each batch from before the step on it, and a component without points
        in a batch keeps its mean and variance.

        Source: Cappé & Moulines 2009.
        """
        options, started = self._options(), hasattr(self, "weights_")
        x = em_runs.points_to_fit(x, least=1 if started else options.n_components)
        if not started:
            em_runs.warn_if_few(x, options.n_components)
        mixture = self._fitted(x) if started else em_runs.start(x, options, options.generator())
        t = self.n_batches_ + 1 if started else 1
        gamma = (t + 1) ** -0.6
        n, means, variances, log_likelihood = em_runs.step(x, mixture)
        old, new = (1 - gamma) * mixture.weights, gamma * n / len(x)
        weights = old + new
        share = (new / weights.clamp(min=torch.finfo(weights.dtype).tiny))[:, None]
        # The moments of two parts together: the mean of the variances, and the variance of the means.
        moved = means - mixture.means
        within = (1 - share) * (mixture.variances - options.reg_covar).clamp(min=0) + share * variances
        variances = within + share * (1 - share) * moved**2
        mixture = em_runs.regularized(
            weights / weights.sum(), mixture.means + share * moved, variances, x.dtype, options
        )
        trace = [*(self.lower_bounds_ if started else []), log_likelihood]
        self._keep(mixture, trace, x.dtype, False, self.n_reseeded_ if started else 0, t)
        return self

    def fit_predict(self, x: Tensor) -> Tensor:
        """`fit`, then `predict`."""
        return self.fit(x).predict(x)

    def predict(self, x: Tensor) -> Tensor:
        """The component most likely to have made each point, `[S]` int64."""
        return torch.cat([log_joint.argmax(1) for log_joint in _shared(*self._points(x))])

    def predict_proba(self, x: Tensor) -> Tensor:
        """The responsibilities r_ik = p(k|x_i), `[S, K]`: the one method that forms them, by `cross_log_prob`."""
        points, mixture = self._points(x)
        parts = [log_joint.softmax(1) for log_joint in _shared(points, mixture)]
        return torch.cat(parts).to(accumulation_dtype(x.dtype))

    def score_samples(self, x: Tensor) -> Tensor:
        """log p(x_i) in nats, `[S]`, in float32 (float64 for float64 points)."""
        return em.log_prob(*self._points(x))

    def score(self, x: Tensor) -> float:
        """mean log p(x_i) in nats, the incomplete-data log-likelihood (Basics VAE, eq. 4)."""
        points, mixture = self._points(x, least=1)
        return em.log_prob(points, mixture).mean(dtype=torch.float64).item()

    def complete_log_likelihood(self, x: Tensor, q: Tensor | None = None) -> float:
        """mean_i sum_k q_ik [log weights_k + log N(x_i; means_k, variances_k)] in nats: the log-likelihood of the
        complete data, the points and the components they are from, expected under q.

        Args:
            x: points `[S, D]`.
            q: a distribution over components for each point, `[S, K]`; None for the E-step's, `predict_proba`.
                Its rows have to add up to 1, which is not checked.

        Source: Basics VAE, eq. 5, with its log w_k.
        """
        points, mixture = self._points(x, least=1)
        if q is not None:
            q = _checked_shares(q, points, len(mixture.weights))
        total, first = 0.0, 0
        for log_joint in _shared(points, mixture) if q is None else em.log_joint(points, mixture):
            rows = slice(first, first := first + len(log_joint))
            q_rows = log_joint.softmax(1) if q is None else q[rows].to(log_joint.dtype)
            possible = q_rows > 0  # where q is 0 the term is 0, even if the component's weight is 0 too
            total += (q_rows * log_joint.masked_fill(~possible, 0.0)).sum(dtype=torch.float64).item()
        return total / len(points)

    def elbo(self, x: Tensor, q: Tensor) -> float:
        """mean log p(x) − KL(q ‖ p(k|x)) in nats, as `complete_log_likelihood` + H(q): a lower bound of `score` for any
        q `[S, K]`. An E-step makes the bound equal to `score`, and an M-step raises it (Basics VAE, eq. 7)."""
        points, mixture = self._points(x, least=1)
        q = _checked_shares(q, points, len(mixture.weights))
        return self.complete_log_likelihood(x, q) + entropy(q.double()).mean().item()

    def sample(self, n: int = 1, *, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw points `[n, D]`, in the dtype of those in the fit; returns them and their components `[n]`. For a `seed`
        of None torch's generator draws one."""
        n = check_count("n", n, least=1, most=MOST_SAMPLES)
        seed = drawn_seed(seed)
        mixture = self._fitted()
        generator = torch.Generator("cpu").manual_seed(seed)
        labels = torch.multinomial(mixture.weights.cpu(), n, True, generator=generator)
        labels = labels.to(mixture.means.device)
        x = reparameterize(mixture.means[labels], mixture.variances[labels].log(), seed=seed)
        return x.to(self._dtype), labels

    def bic(self, x: Tensor) -> float:
        """The Bayesian information criterion, −2 sum log p(x_i) + parameters · log S, in nats; lower is better."""
        return -2 * self.score(x) * len(x) + self._n_parameters() * math.log(len(x))

    def aic(self, x: Tensor) -> float:
        """Akaike's information criterion, −2 sum log p(x_i) + 2 · parameters, in nats; lower is better."""
        return -2 * self.score(x) * len(x) + 2 * self._n_parameters()

    def _n_parameters(self) -> int:
        return 2 * self.means_.numel() + len(self.weights_) - 1

    def _options(self) -> em_runs.Options:
        K = check_count("n_components", self.n_components, least=1)
        init = self.init
        if isinstance(init, tuple | list):
            init = em_runs.checked_start(init, K)
        else:
            check_choice("init", init, INITS)
        return em_runs.Options(
            n_components=K,
            tol=check_number("tol", self.tol, least=0.0, finite=True),
            max_iter=check_count("max_iter", self.max_iter, least=1),
            n_init=check_count("n_init", self.n_init, least=1),
            init=init,
            reg_covar=check_number("reg_covar", self.reg_covar, least=0.0, finite=True),
            seed=None if self.seed is None else check_seed("seed", self.seed),
        )

    def _keep(
        self,
        mixture: Mixture,
        trace: list[float],
        dtype: torch.dtype,
        converged: bool = False,
        n_reseeded: int = 0,
        n_batches: int = 0,
    ) -> None:
        """Set what a fit sets, all at once: a signal's handler may raise between two statements."""
        vars(self).update(
            weights_=mixture.weights,
            means_=mixture.means,
            variances_=mixture.variances,
            converged_=converged,
            n_iter_=len(trace),
            lower_bound_=trace[-1],
            lower_bounds_=trace,
            n_reseeded_=n_reseeded,
            n_batches_=n_batches,
            _dtype=dtype,
        )

    def _fitted(self, x: Tensor | None = None) -> Mixture:
        if not hasattr(self, "weights_"):
            raise RuntimeError("fit: expected to be called before, as there are no parameters yet")
        if x is not None:
            check_device("x", x, "means_", self.means_)
            if x.ndim != 2 or x.shape[1] != self.means_.shape[1]:
                raise ValueError(f"x: expected points [S, {self.means_.shape[1]}], got shape {tuple(x.shape)}")
        return Mixture(self.weights_, self.means_, self.variances_)

    def _points(self, x: Tensor, least: int = 0) -> tuple[Tensor, Mixture]:
        """Check the points that a fitted mixture is asked about; return both."""
        check_tensor("x", x)
        mixture = self._fitted(x)
        return em_runs.finite_points(x, least), mixture


def _shared(x: Tensor, mixture: Mixture) -> Iterator[Tensor]:
    """Yield `em.log_joint`, checking that each point has a density in some component, so that p(k|x) is known."""
    for log_joint in em.log_joint(x, mixture):
        if (log_joint.amax(1) == -math.inf).any():
            raise ValueError(em_runs.overflow(x, -math.inf))
        yield log_joint


def _checked_shares(q: Any, x: Tensor, n_components: int) -> Tensor:
    """Check for a distribution over components for each point; that its rows add up to 1 is not checked."""
    check_tensor("q", q)
    check_device("q", q, "x", x)
    if q.shape != (len(x), n_components):
        raise ValueError(f"q: expected shape {(len(x), n_components)}, a row for each point, got {tuple(q.shape)}")
    if not ((q >= 0) & q.isfinite()).all():
        raise ValueError("q: expected probabilities, got negative ones, NaN or infinity")
    return q.detach()
