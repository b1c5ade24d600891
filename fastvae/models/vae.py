"""The VAE: an encoder, a decoder, a likelihood, a prior and an objective, put together."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._warnings import warn
from ..aggregate.posteriors import open_posteriors
from ..mixtures.gaussian_mixture import GaussianMixture
from ..ops.checks import as_rows, check_choice, check_count, check_flag, check_tensor, drawn_seed
from ..ops.modes import has_values
from ..ops.sample_gauss import reparameterize, sample_gauss
from ..protocols import (
    Draws,
    Likelihood,
    Objective,
    Prior,
    check_needs,
    check_posteriors,
    log_prior,
    needs_log_q,
    needs_of,
)
from .likelihoods import example_log_prob, make_likelihood
from .mixture_priors import MixturePrior, how_to_load
from .objectives import ELBO
from .priors import StandardNormal
from .steps import CountsSteps


class VAEOutput(NamedTuple):
    """The result of a forward pass of `VAE`, in nats per example; `loss` is differentiable.

    Attributes:
        loss: what to minimize, a scalar.
        nell: mean −log p(x|z), the negative expected log-likelihood, a scalar.
        kl: mean KL(q(z|x) ‖ p(z)), a scalar. It and `nell` are differentiable too, except those of `IWAE`.
        z: the samples `[B, D]`; `[k·m, B, D]` where the objective asks for several of each posterior.
        mu: the posteriors' means `[B, D]`.
        logvar: their log sigma² `[B, D]`.
        terms: all terms of the objective by name: `nell`, `kl` and `elbo`, and those of its own, of which `ess`,
            `saturation` and `mmd` are pure numbers.
    """

    loss: Tensor
    nell: Tensor
    kl: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor
    terms: dict[str, Tensor]


class LogLikelihood(NamedTuple):
    """The result of `VAE.log_likelihood`.

    Attributes:
        log_px: log p(x) of each example, in nats `[B]`; −inf where no sample gave x a probability.
        ess: the effective sample size of its importance weights `[B]`, from 1 to n_importance, 0 where log_px is −inf.
    """

    log_px: Tensor
    ess: Tensor


PROPOSALS = ("posterior", "prior")

_PARTS = {
    "encoder": ("__call__",),
    "decoder": ("__call__",),
    "likelihood": ("log_prob", "mean", "check"),
    "prior": ("log_prob", "sample"),
    "objective": ("__call__", "k", "m"),
}


class VAE(CountsSteps):
    """A variational autoencoder with diagonal Gaussian posteriors (Kingma & Welling 2014).

    Args:
        encoder: module or function from x `[B, ...]` to (mu, logvar), `[B, D]` each.
        decoder: module or function from z `[n, D]` to `[n, ...]`, the shape of x: logits for "bernoulli" and
            "binomial", means for "gaussian".
        likelihood: `"bernoulli"` for x in {0, 1}; `"binomial"` for counts 0..n, with `total_count=n`;
            `"gaussian"` for real values, with `variance=s²` (default 1), and `learned=True` to learn it.
            Or an object such as `fastvae.likelihoods.Gaussian(0.1)`.
        prior: p(z), a `fastvae.Prior`; None for `StandardNormal()`.
        objective: what computes the loss, a `fastvae.Objective`; None for `ELBO()`.
        **likelihood_options: `total_count`, `variance`, `learned`.

    A call, `vae(x)` or `vae(x, step=n)`, draws the objective's samples and returns a `VAEOutput`. It moves no counter,
    so that it may be repeated, as gradient checkpointing does, or made several times a step; in eval mode it changes
    nothing in the state dict.

    The objective's schedules are at the training step n that is given, an integer or a 0-dim integer tensor (which
    compiles to one graph); without it, at `step`, a buffer that starts at 0 and that `advance` moves.

    Raises:
        TypeError, ValueError: an argument is not as above; when called, x is empty, the encoder or the
            decoder gives other shapes than expected, or x holds values that the likelihood gives no probability to.
            Looking at values makes a GPU wait, so there only the first batch is checked, and under
            `torch.compile` none is.

    Warns:
        UserWarning: the objective has a schedule, and after many calls in training `step` is still 0.

    Example:
        >>> vae = fastvae.VAE(encoder, decoder, likelihood="binomial", total_count=16)
        >>> vae(x).loss.backward()
    """

    def __init__(
        self,
        encoder: Any,
        decoder: Any,
        *,
        likelihood: str | Likelihood = "bernoulli",
        prior: Prior | None = None,
        objective: Objective | None = None,
        **likelihood_options: Any,
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = make_likelihood(likelihood, **likelihood_options)
        self.prior = StandardNormal() if prior is None else prior
        self.objective: Any = ELBO() if objective is None else objective
        for name, needed in _PARTS.items():
            part = getattr(self, name)
            if isinstance(part, type) or not all(hasattr(part, method) for method in needed):
                raise TypeError(f"{name}: expected an object with {', '.join(needed)}, got {part!r}")
        check_needs(self.objective)
        self._checked = False

    def forward(self, x: Tensor, *, step: int | Tensor | None = None) -> VAEOutput:
        self._check(x)
        if len(x) == 0:
            raise ValueError(f"x: expected at least one example, got shape {tuple(x.shape)}")
        k, m = self.objective.k, self.objective.m
        mu, logvar = self.encode(x)
        if isinstance(self.prior, StandardNormal):
            self.prior.meet(mu)  # whatever the objective asks of it
        needs = needs_of(self.objective)
        outputs = ["z"]
        if needs_log_q(needs, self.prior):
            outputs.append("log_q")
        if "kl" in needs and type(self.prior) is StandardNormal:  # its closed form comes with z
            outputs.append("kl")
        n_samples = None if k * m == 1 else k * m
        samples, log_q, _, kl = sample_gauss(mu, logvar, n_samples, outputs=tuple(outputs), reduction="batchmean")
        assert samples is not None
        draws = Draws(
            samples.view(k, m, *mu.shape),  # a view that the objective may hook: `samples` stays as it is
            mu,
            logvar,
            log_px_z=lambda z: self.log_px_z(x, z),
            prior=self.prior,
            step=self._step(step, x.device, self.objective),
            log_qz_x=None if log_q is None else log_q.view(k, m, len(mu)),
            kl=kl,
            needs=needs,
        )
        result = self.objective(draws)
        if not (isinstance(result, tuple) and len(result) == 2 and {"nell", "kl"} <= set(result[1])):
            raise TypeError("objective: expected (loss, terms) from it, with 'nell' and 'kl' among the terms")
        loss, terms = result
        return VAEOutput(loss, terms["nell"], terms["kl"], samples, mu, logvar, terms)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The posteriors' mu and logvar, `[B, D]` each."""
        if not (isinstance(x, Tensor) and x.ndim > 0):
            raise TypeError(
                f"x: expected a tensor [B, ...], got {x.shape if isinstance(x, Tensor) else type(x).__name__}"
            )
        return check_posteriors(self.encoder(x), x.shape[0])

    def decode(self, z: Tensor) -> Tensor:
        """E[x|z] in the units of x, z `[..., D]` to `[..., *x's]`."""
        check_tensor("z", z)
        return self.likelihood.mean(self._decoder_output(z))

    def log_px_z(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) in nats, summed over all of x's axes but the first; z `[..., B, D]` to `[..., B]`, or
        `[..., 1, D]`, decoded once for all examples."""
        check_tensor("x", x)
        check_tensor("z", z, min_ndim=2)
        if z.shape[-2] not in (1, len(x)):
            raise ValueError(f"z: expected [..., {len(x)}, D], a sample for each example, got shape {tuple(z.shape)}")
        output = self._decoder_output(z)  # [..., B, *x's]
        if output.shape[z.ndim - 2] == 1:
            output = output.expand(*z.shape[:-2], len(x), *output.shape[z.ndim - 1 :])
        if output.shape[z.ndim - 2 :] != x.shape:
            raise ValueError(
                f"decoder: expected [n, *{tuple(x.shape[1:])}], the shape of x, got"
                f" [n, *{tuple(output.shape[z.ndim - 1 :])}]"
            )
        return example_log_prob(self.likelihood, x, output)

    @torch.no_grad()
    def log_likelihood(
        self, x: Tensor, n_importance: int, *, proposal: str = "posterior", batch_size: int = 4096
    ) -> LogLikelihood:
        """log p(x) of each example by importance sampling, log 1/n sum_n p(x|z_n) p(z_n) / r(z_n), without gradient.

        It is a lower bound in expectation that rises to log p(x) as n_importance grows. The effective sample size says
        whether it has got there: near 1, one sample has all the weight, and log p(x) is higher.

        Args:
            x: `[B, ...]`, any number of examples.
            n_importance: importance samples of each example.
            proposal: r(z): `"posterior"`, q(z|x), which needs few samples where it is near p(z|x); `"prior"`, p(z),
                which leaves the encoder out, decodes each sample once for up to `batch_size` examples, and needs far
                too many samples where p(z|x) is narrow. The examples' errors are then correlated.
            batch_size: how many decoder outputs are in memory at once. The result's distribution is the same.

        Raises:
            TypeError: x is not a floating-point tensor, or a number not an integer.
            ValueError: an unknown `proposal`, no samples, or x outside the likelihood's support.

        Warns:
            UserWarning: the effective sample size is below 5 (harmonic mean over the examples), so that log p(x) is too
                low by an amount that cannot be told.

        Source: Zheng, eq. 36 to 38.

        Example:
            >>> log_px, ess = vae.eval().log_likelihood(x, 5000)
            >>> bits = -log_px.mean() / math.log(2) / x[0].numel()
        """
        self._check(x)
        n_importance = check_count("n_importance", n_importance, least=1)
        batch_size = check_count("batch_size", batch_size, least=1)
        check_choice("proposal", proposal, PROPOSALS)
        log_px, ess = self._log_likelihood(x, n_importance, proposal, batch_size)
        warn_if_few(ess, n_importance)
        return LogLikelihood(log_px, ess)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Means E[x|z] of n draws z from the prior, `[n, *x's]`, from torch's generator.

        Raises:
            ValueError: a negative n, or a prior that does not know its dimension yet.
        """
        return self.decode(self._sample_prior(n))

    @torch.no_grad()
    def fit_prior(
        self,
        data: Any,
        n_components: int,
        *,
        n_samples: int = 1,
        device: torch.device | str | None = None,
        progress: bool = False,
        seed: int | None = None,
        **mixture_options: Any,
    ) -> GaussianMixture:
        """Ex-post density estimation: fits a Gaussian mixture to samples of the aggregate posterior q(z) of a trained
        VAE, and makes it the prior, so that `sample` draws where the decoder has been trained.

        The encoder and the decoder stay as they are; every later loss and log p(x) is that of the model with the new
        prior, a `MixturePrior`. Put the module in eval mode before.

        A new VAE has its first prior: before it loads a state dict saved after `fit_prior`, give it one of that size,
        `vae.prior = fastvae.MixturePrior(n_components, D)`.

        Args:
            data: the examples, as in `kl_decomposition_dataset`: an iterable of batches x, or (x, labels), such as a
                DataLoader, or one tensor or array, of which 4,096 rows are encoded at a time.
            n_components: K.
            n_samples: samples z of each example's posterior, all in memory at once.
            device: where to encode and fit; None for that of the VAE's parameters.
            progress: show a progress bar on stderr.
            seed: of the samples and of the fit; None draws one from torch's generator.
            **mixture_options: of `GaussianMixture`: `tol`, `max_iter`, `n_init`, `init`, `reg_covar`.

        Returns:
            The fitted mixture.

        Raises:
            TypeError, ValueError: as in `GaussianMixture` and `kl_decomposition_dataset`.

        Source: Ghosh et al. 2020, section 4.

        Example:
            >>> vae.eval().fit_prior(DataLoader(examples, 256), n_components=50)
            >>> images = vae.sample(64)
        """
        n_components = check_count("n_components", n_components, least=1)
        n_samples = check_count("n_samples", n_samples, least=1)
        seed = drawn_seed(seed)
        check_flag("progress", progress)
        mixture = GaussianMixture(n_components, seed=seed, **mixture_options)
        posteriors = open_posteriors(self, data, device=device, progress=progress)
        z = reparameterize(*posteriors.read(slice(None)), n_samples, seed=seed)  # [L, N, D]
        mixture.fit(z.flatten(0, 1))
        parameters = (mixture.weights_, mixture.means_, mixture.variances_)
        self.prior = MixturePrior.from_parameters(*parameters, device=z.device, dtype=z.dtype)
        return mixture

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict, as any module; where a prior made by `fit_prior` stops it, the error says what to do."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            here = next(self.parameters(), torch.empty(0, device="cpu"))
            advice = how_to_load(state_dict, self.prior, here)
            if advice is None:
                raise
            raise RuntimeError(f"{error}\n\t{advice}") from None

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x|z] at the mean of each posterior, the shape of x."""
        return self.decode(self.encode(x)[0])

    def _log_likelihood(self, x: Tensor, n_importance: int, proposal: str, batch_size: int) -> Tensor:
        """log p(x) and the effective sample size of each example, `[2, B]`, of arguments that are checked."""
        results = []
        for part in x.split(batch_size):
            posterior = self.encode(part) if proposal == "posterior" else None
            at_once = max(1, batch_size // max(1, len(part)))
            # log sum w and log sum w², [B] from the first
            total = squares = torch.full((), -math.inf, dtype=torch.float64, device=x.device)
            for first in range(0, n_importance, at_once):
                log_w = self._log_w(part, posterior, min(at_once, n_importance - first))  # [n, B]
                dtype, log_w = log_w.dtype, log_w.double()
                total = torch.logaddexp(total, log_w.logsumexp(0))
                squares = torch.logaddexp(squares, (2 * log_w).logsumexp(0))
            ess = (2 * total - squares).exp().masked_fill(total == -math.inf, 0.0)
            results.append(torch.stack((total - math.log(n_importance), ess)).to(dtype))
        return torch.cat(results, 1)

    def _log_w(self, x: Tensor, posterior: tuple[Tensor, Tensor] | None, n: int) -> Tensor:
        """n log importance weights of each example, `[n, B]`, for z drawn from its posterior, or from the prior."""
        if posterior is None:
            return self.log_px_z(x, self._sample_prior(n, x)[:, None])
        z, log_q, _, _ = sample_gauss(*posterior, n, outputs=("z", "log_q"))
        assert z is not None
        assert log_q is not None
        return self.log_px_z(x, z) + log_prior(self.prior, z) - log_q

    def _sample_prior(self, n: int, like: Tensor | None = None) -> Tensor:
        """Draw `[n, D]` from p(z), in the dtype of the parameters, or of `like` where there are none."""
        z = self.prior.sample(n)
        return z.to(next((p for p in self.parameters() if p.is_floating_point()), z if like is None else like))

    def _decoder_output(self, z: Tensor) -> Tensor:
        """The decoder's logits or means, z `[..., D]` to `[..., *x's]`; it gets all of them as one batch."""
        rows = as_rows(z)
        output = self.decoder(rows)
        if not isinstance(output, Tensor):
            raise TypeError(f"decoder: expected a tensor [n, ...], got {type(output).__name__}")
        if output.ndim == 0 or len(output) != len(rows):
            raise ValueError(f"decoder: expected [{len(rows)}, ...] for as many z, got shape {tuple(output.shape)}")
        return output.unflatten(0, z.shape[:-1]) if z.ndim > 1 else output[0]

    def _check(self, x: Tensor) -> None:
        check_tensor("x", x)
        if x.is_meta:
            home = next((p.device for p in self.parameters()), x.device)
            if home.type != "meta":
                raise ValueError(f"x: expected a tensor with values, as the VAE is on {home}, got one on meta")
        if not has_values(x) or (self._checked and x.device.type != "cpu"):
            return
        self.likelihood.check(x)
        self._checked = True


def warn_if_few(ess: Tensor, n_importance: int) -> None:
    """Warn where log p(x) rests on too small an effective sample size, that of each example being given."""
    typical = 1 / ess.reciprocal().mean()
    if typical < 5:
        warn(
            f"log_px: rests on an effective sample size of {typical:.1f} of {n_importance}, so it is too low, by an"
            " amount that cannot be told; take a larger n_importance, or another proposal"
        )
