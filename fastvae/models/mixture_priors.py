"""Priors p(z) that are mixtures of Gaussians."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..aggregate.marginals import agg_log_prob_marginals
from ..backends.contract import accumulation_dtype
from ..ops.agg_log_prob import agg_log_prob
from ..ops.checks import check_count, check_device, check_number, check_tensor, promote
from ..ops.modes import has_values
from ..ops.pairs import ColumnWeights
from ..ops.sample_gauss import reparameterize
from ..protocols import check_posteriors
from .priors import check_dim, check_n


class _Mixture(nn.Module):
    """The methods of a mixture p(z) = sum_k w_k N(z; mu_k, diag exp(logvar_k)), given its `components`."""

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """(log w `[K]`, mu `[K, D]`, logvar `[K, D]`), differentiable."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, `[..., D]` to `[...]`, in float32 (float64 for float64 inputs), by `agg_log_prob`."""
        log_w, mu, logvar = self._components_for(z)
        joint = agg_log_prob(z.reshape(-1, z.shape[-1]), mu, logvar, weights=ColumnWeights(log_w))
        return joint.reshape(z.shape[:-1])

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        """log p_d(z_d) in nats, `[..., D]` to `[..., D]`, in float32 (float64 for float64 inputs), by
        `agg_log_prob_marginals`."""
        log_w, mu, logvar = self._components_for(z)
        rows = z.reshape(-1, z.shape[-1])
        return agg_log_prob_marginals(rows, mu, logvar, weights=ColumnWeights(log_w)).marginals.reshape(z.shape)

    def sample(self, n: int) -> Tensor:
        """Draw `[n, D]` with torch's generator; differentiable in mu and logvar.

        Raises:
            ValueError: a negative `n`.
        """
        log_w, mu, logvar = self.components()
        n = check_n(n, mu.shape[1])
        weights = log_w.detach().to(accumulation_dtype(log_w.dtype)).exp()
        chosen = torch.multinomial(weights, max(n, 1), replacement=True)[:n]
        return reparameterize(mu[chosen], logvar[chosen])

    def _components_for(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_tensor("z", z)  # before a VampPrior calls its encoder
        log_w, mu, logvar = self.components()
        check_dim(z, mu)
        return log_w, mu, logvar


class MixturePrior(_Mixture):
    """The mixture prior p(z) = sum_k w_k N(z; mu_k, diag exp(logvar_k)), learned with the VAE.

    It starts with the mean and the variance of N(0, I), half of the variance between the components and half within
    them, and with equal weights.

    Args:
        n_components: K.
        dim: D, the number of latent dimensions.
        device, dtype: of the parameters.

    Attributes:
        logits: `[K]`, whose softmax is the weights.
        mu, logvar: the components' parameters, `[K, D]` each.

    Example:
        >>> vae = fastvae.VAE(encoder, decoder, prior=fastvae.MixturePrior(50, 16))
    """

    def __init__(
        self,
        n_components: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        K, D = (
            check_count("n_components", n_components, least=1, most=2**31),
            check_count("dim", dim, least=1, most=2**31),
        )
        between = 0.5 if K > 1 else 0.0
        self.logits = nn.Parameter(torch.zeros(K, device=device, dtype=dtype))
        self.mu = nn.Parameter(math.sqrt(between) * torch.randn(K, D, device=device, dtype=dtype))
        self.logvar = nn.Parameter(torch.full((K, D), math.log(1 - between), device=device, dtype=self.mu.dtype))

    @classmethod
    def from_parameters(
        cls,
        weights: Tensor,
        means: Tensor,
        variances: Tensor,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "MixturePrior":
        """The prior with these weights `[K]`, means and variances `[K, D]`, as a fitted `GaussianMixture` has them.

        Args:
            weights, means, variances: the components' parameters.
            device: of the prior's parameters; None for that of `means`.
            dtype: of the prior's parameters; None for the widest of the tensors'. Those of a `GaussianMixture` are
                float64, and so is all that is computed with them: give float32 for a VAE in float32.

        Raises:
            TypeError: an argument is not a floating-point tensor.
            ValueError: other shapes, or weights or variances that are negative or not finite (on CPU tensors).

        Example:
            >>> gm = fastvae.GaussianMixture(50).fit(z)
            >>> prior = fastvae.MixturePrior.from_parameters(gm.weights_, gm.means_, gm.variances_, dtype=z.dtype)
        """
        given = {"weights": weights, "means": means, "variances": variances}
        for name, x in given.items():
            check_tensor(name, x)
            check_device(name, x, "weights", weights)
        if means.ndim != 2 or variances.shape != means.shape or weights.shape != means.shape[:1]:
            shapes = ", ".join(str(tuple(x.shape)) for x in given.values())
            raise ValueError(f"weights, means, variances: expected shapes (K,), (K, D) and (K, D), got {shapes}")
        for name, x in (("weights", weights), ("variances", variances)):
            if has_values(x) and x.device.type == "cpu" and not ((x >= 0) & (x < math.inf)).all():
                low, high = x.aminmax()
                raise ValueError(f"{name}: expected finite numbers >= 0, got values from {low:g} to {high:g}")
        if has_values(means) and means.device.type == "cpu" and not (means.isfinite().all() and weights.sum() > 0):
            raise ValueError(
                "weights, means: expected a weight above 0, and finite means, got none, or NaN or infinity"
            )
        parameters = [x for x in promote(weights.log(), means, variances.log()) if x is not None]
        # Parameters made under inference_mode could never be trained.
        with torch.inference_mode(False), torch.no_grad():
            device, dtype = means.device if device is None else device, parameters[0].dtype if dtype is None else dtype
            prior = cls(*means.shape, device=device, dtype=dtype)
            for parameter, value in zip(prior.parameters(), parameters, strict=True):
                parameter.copy_(value)
        return prior

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """(log w `[K]`, mu `[K, D]`, logvar `[K, D]`), differentiable."""
        return self.logits.log_softmax(0), self.mu, self.logvar


class VampPrior(_Mixture):
    """The prior p(z) = 1/K sum_k q(z|u_k): the aggregate posterior of K pseudo-inputs u, learned with the VAE.

    Each call passes the K pseudo-inputs through the encoder.

    Args:
        n_components: K.
        encoder: module or function from x `[K, ...]` to (mu, logvar), `[K, D]` each: the VAE's own.
        x: examples `[n, ...]`, n >= K, of which K drawn at random are the pseudo-inputs to start from.
        limits: (low, high) of the examples' values, to which pseudo-inputs are clamped; None for no limits.

    Attributes:
        pseudo_inputs: u, `[K, ...]`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Tomczak & Welling 2018.

    Example:
        >>> prior = fastvae.VampPrior(100, encoder, x_train, limits=(0, 1))
        >>> vae = fastvae.VAE(encoder, decoder, prior=prior)
    """

    def __init__(self, n_components: int, encoder: Any, x: Tensor, *, limits: tuple[float, float] | None = None):
        super().__init__()
        n_components = check_count("n_components", n_components, least=1, most=2**31)
        check_tensor("x", x)
        if not callable(encoder):
            raise TypeError(f"encoder: expected a module or function to (mu, logvar), got {type(encoder).__name__}")
        if len(x) < n_components:
            raise ValueError(f"x: expected at least the {n_components} examples of n_components, got {len(x)}")
        self.encoder, self.limits = encoder, None if limits is None else _checked_limits(limits)
        chosen = torch.randperm(len(x), device="cpu")[:n_components]
        self.pseudo_inputs = nn.Parameter(x.detach()[chosen.to(x.device)].clone())

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """(log w `[K]`, mu `[K, D]`, logvar `[K, D]`), differentiable."""
        u = self.pseudo_inputs if self.limits is None else self.pseudo_inputs.clamp(*self.limits)
        mu, logvar = check_posteriors(self.encoder(u), len(u))
        return mu.new_full((len(mu),), -math.log(len(mu)), dtype=accumulation_dtype(mu.dtype)), mu, logvar


def _checked_limits(limits: Any) -> tuple[float, float]:
    try:
        low, high = limits
    except (TypeError, ValueError):
        raise TypeError(f"limits: expected the pair (low, high), got {limits!r}") from None
    low, high = check_number("limits", low), check_number("limits", high)
    if not low < high:
        raise ValueError(f"limits: expected (low, high) with low < high, got {limits}")
    return low, high


def how_to_load(state_dict: Any, prior: Any, like: Tensor) -> str | None:
    """Advice on what to write before a VAE loads a state dict with a `MixturePrior`; None where its `prior` already is
    one of that size. `like` has the device and the dtype."""
    logits, mu = (state_dict.get(f"prior.{name}") for name in ("logits", "mu"))
    if not (isinstance(logits, Tensor) and isinstance(mu, Tensor) and mu.ndim == 2):
        return None
    if isinstance(prior, MixturePrior) and prior.mu.shape == mu.shape:
        return None
    options = [f"device={str(like.device)!r}"] * (like.device.type != "cpu")
    options += [f"dtype={like.dtype}"] * (like.dtype != torch.get_default_dtype())
    return (
        f"prior: the state dict has a mixture, as after fit_prior, that this VAE's {type(prior).__name__} is not;"
        f" before load_state_dict, write vae.prior = fastvae.MixturePrior({', '.join(map(str, (*mu.shape, *options)))})"
    )
