"""The KL of a whole data set of posteriors, term by term, with all of them as columns.

This module belongs to the host: it looks at values, and warns (`UserWarning`) where a number cannot mean what its name
says. Nothing here is differentiable; `kl_decomposition` is, on a batch.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .._warnings import warn
from ..ops.checks import MOST_SAMPLES, check_count, check_flag, drawn_seed
from ..ops.sample_gauss import reparameterize
from ..protocols import Prior, check_prior
from .columns import Streamed
from .decomposition import KLDecomposition, decompose, log_conditional
from .marginals import check_method, log_densities
from .posteriors import check_rows, open_posteriors, prior_of


@torch.no_grad()
def kl_decomposition_dataset(
    source: Any,
    data: Any = None,
    *,
    n_samples: int = 1,
    rows: int | Tensor | None = None,
    prior: Prior | None = None,
    analytic_conditional: bool = False,
    method: str = "auto",
    tol: float | None = None,
    batch_size: int = 4096,
    device: torch.device | str | None = None,
    seed: int | None = 0,
    progress: bool = False,
) -> KLDecomposition:
    """`kl_decomposition` with the whole data set as columns: the exact inner sum over all N posteriors, streamed.

    Takes O(S·N·D) time, most of it for log q(z) where the log q_d(z_d) can be tabulated, and O((S + batch_size)·D)
    memory, S being the number of samples, however many posteriors there are. Samples are
    `reparameterize(mu[rows], logvar[rows], n_samples, seed=seed)`.

    Args:
        source: without `data`, the posteriors: mu and logvar, `[N, D]` each, as a pair of tensors or of NumPy arrays,
            memory-mapped ones too, or an iterable of such pairs, batch by batch. With `data`, a `VAE`, or an encoder, a
            function or module from a tensor x to (mu, logvar); put a module in eval mode before.
        data: the examples to encode: an iterable of batches, such as a DataLoader or a tuple of tensors, or one tensor
            or array, of which `batch_size` rows are encoded at a time. From a batch that is a tuple or a list, (x,
            labels), x is taken, a tensor or an array. Batches, of examples or of posteriors, are read once, so that
            shuffling does no harm, and the posteriors are written to temporary files: N·D·8 bytes in
            `tempfile.gettempdir()`, in float32.
        n_samples: L, samples of each posterior that is sampled.
        rows: the posteriors to sample: None for all of them, so that S = L·N; an int for that many, drawn without
            replacement; or an int64 tensor of row numbers. The columns are all N in any case.
        prior: p(z), as in `kl_decomposition`, on `device`; None for the VAE's, and without a VAE for N(0, I).
        analytic_conditional: as in `kl_decomposition`.
        method, tol: for log q_d(z_id), as in `agg_log_prob_marginals`, except that `"auto"` may tabulate on any device.
        batch_size: how many rows of an array are encoded, and how many posteriors are columns, at once.
        device: where to encode and compute; None for where a module's parameters, or else the posteriors, are.
        seed: for the choice of rows and the samples; None draws one from torch's generator.
        progress: show a progress bar on stderr, tqdm's where it is installed.

    Returns:
        KLDecomposition in float64, by the `uniform` estimator, which is exact here except for the sampling of z:
        mi is that of the N examples, in [0, log N] up to Monte Carlo error.

    Raises:
        TypeError: `source` is neither posteriors nor, with `data`, a VAE or an encoder; a part of the posteriors is not
            of floating point, or `data` no tensors or arrays; masked arrays; or another argument is of a wrong type.
        ValueError: a VAE or an encoder without `data`; shapes do not match, no posteriors or dimensions, `rows` past
            their number, a `seed` beyond 64 bits, a `device` that this machine does not have, or too many samples.

    Warns:
        UserWarning: mi is within log 2 of log N, for N of 5 or more. It then says how many examples there are, and
            little about the encoder: for the distribution that they come from it is an underestimate.

    Source: Zheng, eq. 17-24.

    Example:
        >>> terms = fastvae.kl_decomposition_dataset(vae.eval(), DataLoader(examples, 256), rows=1000)
        >>> print(f"I(x; z) = {terms.mi:.2f}, TC = {terms.tc:.2f} nats")
    """
    n_samples = check_count("n_samples", n_samples, least=1, most=MOST_SAMPLES)
    batch_size = check_count("batch_size", batch_size, least=1)
    seed = drawn_seed(seed)
    rows = check_rows(rows)
    analytic_conditional = check_flag("analytic_conditional", analytic_conditional)
    progress = check_flag("progress", progress)
    check_method(method, tol, torch.float32)
    prior = prior_of(source, prior)
    check_prior(prior)
    stream = open_posteriors(source, data, batch_size=batch_size, device=device, progress=progress)
    N = len(stream.mu)
    mu, logvar = stream.read(stream.choose(rows, seed))  # [R, D]
    check_count("n_samples", n_samples, most=MOST_SAMPLES // mu.numel())
    z = reparameterize(mu, logvar, n_samples, seed=seed)  # [L, R, D]
    conditional = log_conditional(z, mu, logvar, analytic_conditional)  # [S], or a scalar
    z = z.flatten(0, 1)  # [S, D]
    joint, marginals = log_densities(
        z,
        Streamed(stream, batch_size=batch_size, progress=progress),
        method=method,
        tol=check_method(method, tol, z.dtype),
    )
    assert joint is not None
    result = decompose(z, conditional, joint, marginals.double(), prior, "uniform", N)
    warn_if_saturated(result, N)
    return result


def warn_if_saturated(terms: KLDecomposition, n_examples: int) -> None:
    """Warn where the mutual information is at its ceiling, the log of the number of examples."""
    if terms.saturation > 0.5 and n_examples > 4:  # with fewer, rounding alone can make it this large
        warn(
            f"mi: {terms.mi:.2f} nats is at the ceiling of log {n_examples} = {math.log(n_examples):.2f} that"
            f" {n_examples} examples set; of the distribution they come from it is an underestimate, and tc and agg_kl"
            " rest on the same log q(z)"
        )
