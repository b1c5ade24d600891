"""Gaussian mixtures with diagonal covariances, under the names that scikit-learn's users know."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import em
from .backends.contract import accumulation_dtype
from .em import Mixture
from .information import entropy
from .ops._checks import check_choice, check_count, check_device, check_number, check_tensor
from .ops.sampling import reparameterize

INITS = ("kmeans++", "random")


class _Run(NamedTuple):
    """A fit from one start."""

    mixture: Mixture
    trace: list[float]
    converged: bool
    n_reseeded: int


class GaussianMixture:
    """A mixture of Gaussians with diagonal covariances, fitted by expectation maximization.

        p(x) = sum_k weights_k N(x; means_k, diag variances_k)

    The responsibilities `[S, K]` are never formed (`fastvae.em` has the maths): besides the points themselves a fit
    takes O(S + K·D) memory. Points are tensors on any device, float64, float32, bfloat16 or float16; the kernels
    compute in float32 where that is accurate, sums are in float64.

    Args:
        n_components: K.
        tol: EM has converged when mean log p(x) changes by less, in nats.
        max_iter: EM steps at most, from each start.
        n_init: how many starts; the fit with the largest `lower_bound_` is kept.
        init: `"kmeans++"`: the means are points far apart (Arthur & Vassilvitskii 2007), the variances those of the
            points about the nearest; `"random"`: they are any points, and the variances those of all points; or the
            parameters to start from, (weights `[K]`, means `[K, D]`, variances `[K, D]`).
        reg_covar: added to each variance.
        seed: of the starts; None draws them from torch's generator.

    Attributes:
        weights_, means_, variances_: the parameters, `[K]`, `[K, D]` and `[K, D]`, in float64 on the points' device.
        converged_: whether the change fell below `tol`.
        n_iter_: EM steps taken.
        lower_bound_: the last of `lower_bounds_`.
        lower_bounds_: mean log p(x) before each EM step, in nats: never falling, but for rounding, where `reg_covar` is
            0 and nothing was re-seeded.
        n_reseeded_: how often a component that had lost all its points was started again, at the point that the
            others explain worst.
        n_batches_: batches seen by `partial_fit`.

    Raises:
        TypeError, ValueError: an argument is not as above; of `fit`: points that are not finite, or fewer than K; and
            where `reg_covar` is 0, a component all of whose points have the same value in a dimension.

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
        for name, count in (("n_components", n_components), ("max_iter", max_iter), ("n_init", n_init)):
            check_count(name, count, least=1)
        for name, number in (("tol", tol), ("reg_covar", reg_covar)):
            check_number(name, number, least=0.0)
        if seed is not None:
            check_count("seed", seed)
        if isinstance(init, tuple | list):
            init = _checked_start(init, n_components)
        else:
            check_choice("init", init, INITS)
        self.n_components, self.tol, self.max_iter, self.n_init = n_components, tol, max_iter, n_init
        self.init, self.reg_covar, self.seed = init, reg_covar, seed

    def fit(self, x: Tensor) -> "GaussianMixture":
        """Fit to points `[S, D]`; returns itself."""
        x = self._checked(x)
        generator = self._generator()
        starts = 1 if isinstance(self.init, Mixture) else self.n_init
        best = max((self._run(x, generator) for _ in range(starts)), key=lambda run: run.trace[-1])
        self._keep(best.mixture, best.trace, x.dtype)
        self.converged_, self.n_reseeded_, self.n_batches_ = best.converged, best.n_reseeded, 0
        return self

    def partial_fit(self, x: Tensor) -> "GaussianMixture":
        """One step of stochastic EM on a batch `[B, D]`; returns itself. For data that do not fit into memory.

        The statistics of the M-step become (1 − gamma) · old + gamma · the batch's, with gamma = (t + 1)^−0.6 at batch
        t = 1, 2, ...: t counts the batches since the first, which the start is made from, or since `fit`.
        `lower_bounds_` is of each batch before it was learned from, and a component that a batch has no points of
        keeps its mean and variance.

        Source: Cappé & Moulines 2009.
        """
        started = hasattr(self, "weights_")
        x = self._checked(x, least=1 if started else self.n_components)
        mixture = self._fitted(x) if started else self._start(x, self._generator())
        t = self.n_batches_ + 1 if started else 1
        gamma = (t + 1) ** -0.6
        n, means, variances, log_likelihood = em.moments(x, mixture)
        old, new = (1 - gamma) * mixture.weights, gamma * n / len(x)
        weights = old + new
        share = (new / weights.clamp(min=torch.finfo(weights.dtype).tiny))[:, None]
        # The moments of two parts together: the mean of the variances, and the variance of the means.
        moved = means - mixture.means
        within = (1 - share) * (mixture.variances - self.reg_covar).clamp(min=0) + share * variances
        variances = within + share * (1 - share) * moved**2
        mixture = self._regularized(weights / weights.sum(), mixture.means + share * moved, variances, x.dtype)
        self._keep(mixture, [*(self.lower_bounds_ if started else []), float(log_likelihood)], x.dtype)
        self.converged_, self.n_batches_ = False, t
        self.n_reseeded_ = self.n_reseeded_ if started else 0
        return self

    def fit_predict(self, x: Tensor) -> Tensor:
        """`fit`, then `predict`."""
        return self.fit(x).predict(x)

    def predict(self, x: Tensor) -> Tensor:
        """The component most likely to have made each point, `[S]` int64."""
        return torch.cat([log_joint.argmax(1) for log_joint in em.log_joint(*self._points(x))])

    def predict_proba(self, x: Tensor) -> Tensor:
        """The responsibilities r_ik = p(k|x_i), `[S, K]`: the one method that forms them, by `cross_log_prob`."""
        points, mixture = self._points(x)
        parts = [log_joint.softmax(1) for log_joint in em.log_joint(points, mixture)]
        return torch.cat(parts).to(accumulation_dtype(x.dtype))

    def score_samples(self, x: Tensor) -> Tensor:
        """log p(x_i) in nats, `[S]`, in float32 (float64 for float64 points)."""
        return em.log_prob(*self._points(x))

    def score(self, x: Tensor) -> float:
        """mean log p(x_i) in nats, the incomplete-data log-likelihood (Basics VAE, eq. 4)."""
        return self.score_samples(x).mean(dtype=torch.float64).item()

    def complete_log_likelihood(self, x: Tensor, q: Tensor | None = None) -> float:
        """mean_i sum_k q_ik [log weights_k + log N(x_i; means_k, variances_k)] in nats: that of the complete data, the
        points and the components they are from, expected under q.

        Args:
            x: points `[S, D]`.
            q: a distribution over components for each point, `[S, K]`; None for the E-step's, `predict_proba`.

        Source: Basics VAE, eq. 5, with its log w_k.
        """
        points, mixture = self._points(x)
        expected = (points.shape[0], len(mixture.weights))
        if q is not None:
            check_tensor("q", q)
            check_device("q", q, "x", x)
            if q.shape != expected:
                raise ValueError(f"q: expected shape {expected}, a row for each point, got {tuple(q.shape)}")
        total, first = 0.0, 0
        for log_joint in em.log_joint(points, mixture):
            rows = slice(first, first := first + len(log_joint))
            q_rows = log_joint.softmax(1) if q is None else q[rows].to(log_joint.dtype)
            possible = q_rows > 0  # a component that q gives nothing adds nothing, be its own weight 0
            total += (q_rows * log_joint.masked_fill(~possible, 0.0)).sum(dtype=torch.float64).item()
        return total / len(points)

    def elbo(self, x: Tensor, q: Tensor) -> float:
        """mean log p(x) − KL(q ‖ p(k|x)) in nats, as `complete_log_likelihood` + H(q): a lower bound of `score` for any
        q `[S, K]`, which an E-step makes equal to it, and an M-step raises (Basics VAE, eq. 7)."""
        return self.complete_log_likelihood(x, q) + entropy(q).mean(dtype=torch.float64).item()

    def sample(self, n_samples: int = 1, *, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """(points `[n, D]`, in the dtype of those it was fitted to, the components they are from `[n]`)."""
        check_count("n_samples", n_samples, least=1)
        mixture = self._fitted()
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
        labels = torch.multinomial(mixture.weights.cpu(), n_samples, True, generator=generator)
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

    def _run(self, x: Tensor, generator: torch.Generator | None) -> _Run:
        """EM from one start."""
        mixture = self._start(x, generator)
        trace: list[float] = []
        n_reseeded = 0
        for _ in range(self.max_iter):
            n, means, variances, log_likelihood = em.moments(x, mixture)
            empty = (n == 0).nonzero()[:, 0]
            if len(empty):
                worst = em.log_prob(x, mixture).topk(len(empty), largest=False).indices
                n[empty], means[empty], variances[empty] = len(x) / len(n), x[worst].double(), em.variance(x)
                n_reseeded += len(empty)
            mixture = self._regularized(n / n.sum(), means, variances, x.dtype)
            trace.append(float(log_likelihood))
            if len(trace) > 1 and abs(trace[-1] - trace[-2]) < self.tol and not len(empty):
                return _Run(mixture, trace, True, n_reseeded)
        return _Run(mixture, trace, False, n_reseeded)

    def _start(self, x: Tensor, generator: torch.Generator | None) -> Mixture:
        K, D = self.n_components, x.shape[1]
        if isinstance(self.init, Mixture):
            if self.init.means.shape[1] != D:
                raise ValueError(f"init: expected means [{K}, {D}], got shape {tuple(self.init.means.shape)}")
            return Mixture(*(parameter.to(x.device) for parameter in self.init))
        overall = em.variance(x)
        if self.init == "kmeans++":
            means, pooled = em.seed_components(x, K, generator)
            pooled = pooled.where(pooled > 0, overall)  # 0 where every point is a seed
        else:
            rows = torch.randperm(len(x), generator=generator, device="cpu")[:K]
            means, pooled = x[rows.to(x.device)].double(), overall
        return self._regularized(torch.full_like(pooled[:1], 1 / K).expand(K), means, pooled.expand(K, D), x.dtype)

    def _regularized(self, weights: Tensor, means: Tensor, variances: Tensor, dtype: torch.dtype) -> Mixture:
        """The mixture with `reg_covar` in it; without, a variance that points of a dtype cannot have is an error."""
        variances = variances + self.reg_covar
        alike = variances <= (torch.finfo(dtype).eps * means) ** 2
        if self.reg_covar == 0 and alike.any():
            k, d = alike.nonzero()[0].tolist()
            raise ValueError(
                f"reg_covar: expected more than 0, or fewer components, as the points of component {k} are all the same"
                f" in dimension {d}, got {self.reg_covar}"
            )
        return Mixture(weights, means, variances)

    def _keep(self, mixture: Mixture, trace: list[float], dtype: torch.dtype) -> None:
        self.weights_, self.means_, self.variances_ = mixture
        self.lower_bounds_, self.lower_bound_, self.n_iter_ = trace, trace[-1], len(trace)
        self._dtype = dtype

    def _generator(self) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator("cpu").manual_seed(self.seed)

    def _fitted(self, x: Tensor | None = None) -> Mixture:
        if not hasattr(self, "weights_"):
            raise RuntimeError("fit: expected to be called before, as there are no parameters yet")
        if x is not None:
            check_device("x", x, "means_", self.means_)
            if x.ndim != 2 or x.shape[1] != self.means_.shape[1]:
                raise ValueError(f"x: expected points [S, {self.means_.shape[1]}], got shape {tuple(x.shape)}")
        return Mixture(self.weights_, self.means_, self.variances_)

    def _points(self, x: Tensor) -> tuple[Tensor, Mixture]:
        check_tensor("x", x)
        return x.detach(), self._fitted(x)

    def _checked(self, x: Tensor, least: int | None = None) -> Tensor:
        """The points to fit to."""
        check_tensor("x", x)
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"x: expected points [S, D], got shape {tuple(x.shape)}")
        least = self.n_components if least is None else least
        if len(x) < least:
            raise ValueError(f"x: expected at least {least} points, got {len(x)}")
        x = x.detach()
        low, high = x.aminmax(dim=0)
        if not (low.isfinite() & high.isfinite()).all():
            raise ValueError("x: expected finite points, got NaN or infinity")
        return x


def _checked_start(init: Any, n_components: int) -> Mixture:
    if len(init) != 3 or not all(isinstance(parameter, Tensor) for parameter in init):
        raise TypeError("init: expected a name, or the tensors (weights [K], means [K, D], variances [K, D])")
    weights, means, variances = (parameter.detach().double() for parameter in init)
    K = n_components
    if weights.shape != (K,) or means.ndim != 2 or len(means) != K or variances.shape != means.shape:
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in init)
        raise ValueError(f"init: expected shapes ({K},), ({K}, D) and ({K}, D), got {shapes}")
    if not (variances > 0).all():
        raise ValueError(f"init: expected variances above 0, got {variances.min().item():.3g}")
    if not (weights >= 0).all() or abs(weights.sum().item() - 1) > 1e-3:
        raise ValueError(f"init: expected weights >= 0 that add up to 1, got {weights.tolist()}")
    return Mixture(weights / weights.sum(), means, variances)
