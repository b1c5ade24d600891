"""Interfaces to extend: a prior, a likelihood, an objective and its argument; and checks that name what is missing."""

from collections.abc import Callable, Collection
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .ops.checks import check_tensor


class Prior(Protocol):
    """The interface of a prior, for `VAE` and the objectives.

    Optional: `kl(mu, logvar)`, the closed form of KL(q(z|x) ‖ p(z)), its batch mean in nats, for mu and logvar
    `[B, D]`; free bits need it with `reduction="dim"` too, the mean of each dimension, `[D]`. The library's own priors
    that have it take the options of `kl_gauss`. Without it an objective takes the Monte Carlo form, the mean of
    log q(z|x) − log p(z).
    """

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, z `[S, D]` to `[S]`."""

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        """log p_d(z_d) of each dimension in nats, z `[S, D]` to `[S, D]`."""

    def sample(self, n: int) -> Tensor:
        """Draw n samples, `[n, D]`."""


class Likelihood(Protocol):
    """The interface of a likelihood, for `VAE` and evaluation. `output` is the decoder's; `x` broadcasts against it.

    Optional: `example_log_prob(x, output)`, the sum of `log_prob` over x's axes but the first, x `[B, ...]` and output
    `[..., B, ...]` to `[..., B]`, where that takes less than the terms. A subclass of one that has it
    overrides both, or neither.

    Attributes:
        discrete: whether `log_prob` is of a probability, and not of a density.
    """

    discrete: ClassVar[bool]

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """log p(x|z) of each element, in nats, in float32 (float64 for float64 outputs). It is complete, constants
        included, so that an ELBO is a bound on log p(x) and not on something proportional to it."""

    def mean(self, output: Tensor) -> Tensor:
        """E[x|z], in the units of x and the shape of `output`."""

    def check(self, x: Tensor) -> None:
        """Raise a ValueError where x lies outside the likelihood's support."""

    def sample(self, output: Tensor) -> Tensor:
        """Draw x from p(x|z) with torch's generator, the shape of `output`, in the dtype of `log_prob`."""


NEEDS = ("log_qz_x", "kl")  # the terms of Draws that may rest on log q(z|x)


class Draws:
    """The argument of an objective: k·m samples z of each posterior of a batch, and the terms computed from them.

    The terms `log_px_z`, `log_pz`, `log_qz_x` and `kl` are computed when they are first asked for, so that an objective
    pays only for those that it uses.

    Attributes:
        z: `[k, m, B, D]`, the input of the decoder and the prior. Of the samples' terms only `log_qz_x` reaches the
            posteriors' parameters past z, so that a hook on z sees all of the others' gradients.
        mu, logvar: the posteriors' means and log sigma², `[B, D]`.
        prior: p(z).
        step: training steps so far, 0-dim int64.
    """

    def __init__(
        self,
        z: Tensor,
        mu: Tensor,
        logvar: Tensor,
        *,
        log_px_z: Callable[[Tensor], Tensor],  # from z [k, m, B, D] to [k, m, B]
        prior: Prior,
        step: Tensor,
        log_qz_x: Tensor | None = None,  # [k, m, B]; None where the objective does not need it
        kl: Tensor | None = None,  # the closed form, where it came with z
        needs: Collection[str] = NEEDS,  # those of NEEDS that the objective uses
    ):
        if z.ndim != 4 or z.shape[2:] != mu.shape or 0 in z.shape[:3]:
            raise ValueError(f"z: expected [k, m, B, D] with mu's B > 0 and D, {tuple(mu.shape)}, got {tuple(z.shape)}")
        self.z, self.mu, self.logvar, self.prior, self.step = z, mu, logvar, prior, step
        self._needs = needs
        self._likelihood = log_px_z
        self._log_px_z: Tensor | None = None
        self._log_pz: Tensor | None = None
        self._kl = kl
        self._log_qz_x = None if log_qz_x is None else _of_samples("log_qz_x", log_qz_x, z)

    @property
    def log_px_z(self) -> Tensor:
        """log p(x|z), `[k, m, B]`."""
        if self._log_px_z is None:
            self._log_px_z = _of_samples("log_px_z", self._likelihood(self.z), self.z)
        return self._log_px_z

    @property
    def log_pz(self) -> Tensor:
        """log p(z), `[k, m, B]`."""
        if self._log_pz is None:
            self._log_pz = log_prior(self.prior, self.z)
        return self._log_pz

    @property
    def log_qz_x(self) -> Tensor:
        """log q(z|x), `[k, m, B]`, from z before it was rounded to half precision; its gradient is total, at fixed
        noise. It is computed when z is drawn, and so only for an objective that has it in `needs`."""
        if "log_qz_x" not in self._needs or self._log_qz_x is None:
            raise _not_declared("log_qz_x")
        return self._log_qz_x

    @property
    def kl(self) -> Tensor:
        """mean KL(q(z|x) ‖ p(z)), a scalar: the closed form where the prior has one, otherwise mean log q(z|x) − log
        p(z). An objective that uses the KL has `"kl"` in `needs`."""
        if "kl" not in self._needs:
            raise _not_declared("kl")
        if self._kl is None:
            if has_closed_form(self.prior):
                self._kl = self.prior.kl(self.mu, self.logvar)  # type: ignore[attr-defined]
            elif self._log_qz_x is not None:
                self._kl = (self._log_qz_x - self.log_pz).mean()
            else:
                raise ValueError("log_qz_x: expected log q(z|x), as the prior has no closed form of the KL, got None")
        return self._kl


def _not_declared(name: str) -> RuntimeError:
    """The error for a term that an objective asks for and has not in `needs`, be it there by chance or not."""
    return RuntimeError(f"objective: asks for {name}, and so expected {name!r} among what it needs")


def _of_samples(name: str, log_density: Any, z: Tensor) -> Tensor:
    check_tensor(name, log_density)
    if log_density.shape != z.shape[:-1]:
        raise ValueError(f"{name}: expected shape {tuple(z.shape[:-1])}, got {tuple(log_density.shape)}")
    return log_density


class Objective(Protocol):
    """The interface of an objective, for `VAE`: how many samples it wants, and a loss computed from them.

    Attributes:
        k, m: the numbers of samples of each posterior, k outside the logarithm and m inside it; m is 1 for the ELBO.
        needs: those of `"log_qz_x"` and `"kl"` that it uses, the terms of `Draws` that may rest on log q(z|x). Where
            they do, the VAE computes log q(z|x) in the same pass as z; for an objective without this attribute it
            always does.

    Example:
        >>> class Doubled:
        ...     k = m = 1
        ...     needs = ("kl",)
        ...     def __call__(self, draws):
        ...         nell, kl = -draws.log_px_z.mean(), draws.kl
        ...         return nell + 2 * kl, {"nell": nell, "kl": kl}
    """

    @property
    def k(self) -> int:
        """Samples of the bound, whose mean is taken."""

    @property
    def m(self) -> int:
        """Samples inside the logarithm of each."""

    def __call__(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and its terms by name, `"nell"` and `"kl"` among them."""


def needs_of(objective: Any) -> Collection[str]:
    """Those of NEEDS that an objective declares; all where it declares none."""
    return getattr(objective, "needs", NEEDS)


def check_needs(objective: Any) -> None:
    """Raise an error if an objective says that it needs something else than there is."""
    needs = needs_of(objective)
    if not isinstance(needs, tuple | list | set | frozenset) or not all(name in NEEDS for name in needs):
        raise ValueError(f"objective: expected needs to be a tuple of {' and '.join(map(repr, NEEDS))}, got {needs!r}")


def needs_log_q(needs: Collection[str], prior: Prior) -> bool:
    """Whether the draws of an objective that declares `needs` must have log q(z|x)."""
    return "log_qz_x" in needs or ("kl" in needs and not has_closed_form(prior))


def has_closed_form(prior: Prior) -> bool:
    return hasattr(prior, "kl")


def check_posteriors(posteriors: Any, n: int) -> tuple[Tensor, Tensor]:
    """Check the result of an encoder for n inputs, and return it: mu and logvar, `[n, D]` each."""
    if not (isinstance(posteriors, tuple | list) and len(posteriors) == 2):
        raise TypeError(f"encoder: expected the pair (mu, logvar), got {type(posteriors).__name__}")
    mu, logvar = posteriors
    check_tensor("encoder's mu", mu)
    check_tensor("encoder's logvar", logvar)
    if not (mu.ndim == 2 and mu.shape[0] == n and mu.shape == logvar.shape):
        shapes = f"{tuple(mu.shape)} and {tuple(logvar.shape)}"
        raise ValueError(f"encoder: expected mu and logvar of one shape [{n}, D], got {shapes}")
    return mu, logvar


def check_prior(prior: Prior | None) -> None:
    """Check that a prior has `log_prob` and `marginal_log_prob`; None stands for N(0, I)."""
    if prior is None:
        return
    if isinstance(prior, type):
        raise TypeError(f"prior: expected an object, such as {prior.__name__}(), got the class")
    if not (hasattr(prior, "log_prob") and hasattr(prior, "marginal_log_prob")):
        raise TypeError(f"prior: expected an object with log_prob and marginal_log_prob, got {type(prior).__name__}")


def check_log_prob(method: str, log_p: Tensor, shape: torch.Size) -> Tensor:
    """Check the result of a prior's method, which must not broadcast to something else, and return it."""
    if not isinstance(log_p, Tensor):
        raise TypeError(f"prior: expected a tensor from {method}, got {type(log_p).__name__}")
    if log_p.shape != shape:
        raise ValueError(f"prior: expected {tuple(shape)} from {method}, got {tuple(log_p.shape)}")
    return log_p


def log_prior(prior: Prior, z: Tensor) -> Tensor:
    """log p(z), z `[..., D]` to `[...]`."""
    rows = z.flatten(0, -2)
    return check_log_prob("log_prob", prior.log_prob(rows), rows.shape[:1]).view(z.shape[:-1])
