"""Evaluation on a whole data set: the terms of the KL, the mutual information of the decoder, active units.

These functions belong to the host: they look at values, and warn (`UserWarning`) where a number cannot mean what its
name says. Nothing here is differentiable; `kl_decomposition` is, on a batch.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._warnings import warn
from ..ops.agg_log_prob import agg_log_prob
from ..ops.checks import MOST_SAMPLES, check_count, check_flag
from ..ops.interpolate import interpolate
from ..ops.pairs import ColumnWeights
from ..ops.sample_gauss import reparameterize
from ..protocols import Prior, check_prior
from .decomposition import KLDecomposition, decompose, log_conditional
from .intervals import Columns
from .marginals import agg_log_prob_marginals, check_method
from .posteriors import Posteriors, check_rows, open_posteriors, shown
from .table import affordable, tabulate


@torch.no_grad()
def kl_decomposition_dataset(
    posteriors: Any,
    encoder: Any = None,
    *,
    n_samples: int = 1,
    rows: int | Tensor | None = None,
    prior: Prior | None = None,
    analytic_conditional: bool = False,
    method: str = "auto",
    tol: float | None = None,
    chunk_size: int = 4096,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> KLDecomposition:
    """`kl_decomposition` with the whole data set for columns: the exact inner sum over all N posteriors, streamed.

    Takes O(S·N·D) time, most of it for log q(z) where the log q_d(z_d) can be tabulated, and O((S + chunk_size)·D)
    memory, S being the number of samples, however many posteriors there are. Samples are
    `reparameterize(mu[rows], logvar[rows], n_samples, seed=seed)`.

    Args:
        posteriors: mu and logvar, `[N, D]` each, as a pair of tensors or of NumPy arrays, memory-mapped ones too; or
            an iterable of such pairs, batch by batch; or with an encoder an iterable of its inputs, such as a
            DataLoader, or all of them in one tensor or array, of which it gets `chunk_size` at a time. Of a batch
            that is a tuple or a list, (x, labels), x is taken, a tensor or an array. Batches are gone through once,
            so that shuffling does no harm, and their posteriors written to temporary files: N·D·8 bytes in
            `tempfile.gettempdir()`, in float32.
        encoder: from a tensor x to (mu, logvar), such as `vae.encode`; put the module in eval mode before.
        n_samples: L, samples of each posterior that is sampled.
        rows: the posteriors to sample: None for all of them, so that S = L·N; an int for as many, drawn without
            replacement; or an int64 tensor of row numbers. Columns are all N in any case.
        prior: p(z), as in `kl_decomposition`, on `device`; None for N(0, I).
        analytic_conditional: as in `kl_decomposition`.
        method, tol: of log q_d(z_id), as in `agg_log_prob_marginals`, but that `"auto"` may tabulate on any device.
        chunk_size: columns per pass over the samples.
        device: where to encode and compute; None for where the posteriors are.
        seed: of the rows and the samples, not negative.
        progress: show a progress bar on stderr, tqdm's where it is installed.

    Returns:
        KLDecomposition in float64, by the `uniform` estimator, which is exact here but for the sampling of z:
        mi is that of the N examples, in [0, log N] up to Monte Carlo error.

    Raises:
        TypeError: `posteriors` is neither a pair nor iterable, or something is not of floating point, or is a dict or
            a masked array; or another argument is not of its kind.
        ValueError: shapes do not match, no posteriors or dimensions, `rows` past their number, a negative `seed`, a
            `device` that is not here, or more samples than can be.

    Warns:
        UserWarning: mi is within log 2 of log N, N being 5 or more. It then says how many examples there are, and
            little of the encoder: of the distribution that they come from it is an underestimate.

    Source: Zheng, eq. 17-24.

    Example:
        >>> terms = fastvae.kl_decomposition_dataset(DataLoader(data, 256), vae.eval().encode, rows=1000)
        >>> print(f"I(x; z) = {terms.mi:.2f}, TC = {terms.tc:.2f} nats")
    """
    n_samples = check_count("n_samples", n_samples, least=1, most=MOST_SAMPLES)
    chunk_size = check_count("chunk_size", chunk_size, least=1)
    seed = check_count("seed", seed, most=2**64 - 1)
    rows = check_rows(rows)
    analytic_conditional = check_flag("analytic_conditional", analytic_conditional)
    progress = check_flag("progress", progress)
    check_method(method, tol, torch.float32)
    check_prior(prior)
    stream = open_posteriors(posteriors, encoder, chunk_size=chunk_size, device=device, progress=progress)
    N = len(stream.mu)
    mu, logvar = stream.read(stream.choose(rows, seed))  # [R, D]
    check_count("n_samples", n_samples, most=MOST_SAMPLES // mu.numel())
    z = reparameterize(mu, logvar, n_samples, seed=seed)  # [L, R, D]
    conditional = log_conditional(z, mu, logvar, analytic_conditional)
    z = z.flatten(0, 1)  # [S, D]
    tol = check_method(method, tol, z.dtype)
    joint, marginals = log_q(stream, z, chunk_size=chunk_size, progress=progress, method=method, tol=tol)
    result = decompose(z, conditional, joint, marginals, prior, "uniform", N)
    warn_if_saturated(result, N)
    return result


def log_q(
    stream: Posteriors,
    z: Tensor,
    own: Tensor | None = None,
    *,
    chunk_size: int,
    progress: bool,
    method: str = "direct",
    tol: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """log 1/N sum_j q(z_i|x_j) `[S]`, and of each dimension `[S, D]`, over all N posteriors; in float64. The sum leaves
    out column own_i where `own` `[S]` is given, and none where that is -1; the marginals are then direct."""
    joint = torch.full(z.shape[:1], -math.inf, dtype=torch.float64, device=z.device)
    tabulated = _tabulated(stream, z, chunk_size, method, tol) if own is None and method != "direct" else None
    marginals = torch.full(z.shape, -math.inf, dtype=torch.float64, device=z.device) if tabulated is None else tabulated
    for columns, weights in column_chunks(stream, own, chunk_size, progress):
        if tabulated is None:
            parts = agg_log_prob_marginals(z, *columns, weights=weights, method="direct")
        else:
            parts = (agg_log_prob(z, *columns, weights=weights),)  # type: ignore[assignment]
        for total, part in zip((joint, marginals), parts, strict=False):
            torch.logaddexp(total, part.double(), out=total)
    return joint, marginals


def _tabulated(stream: Posteriors, z: Tensor, chunk_size: int, method: str, tol: float) -> Tensor | None:
    """The marginals from a table that knows all posteriors, None where it would need too many points."""
    S, N = len(z), len(stream.mu)

    def chunks() -> Iterator[tuple[Tensor, Tensor, None]]:
        for (mu, logvar), _ in column_chunks(stream, None, chunk_size, False):
            dtype = torch.promote_types(z.dtype, mu.dtype)
            yield mu.T.to(dtype).contiguous(), logvar.T.to(dtype).contiguous(), None

    most = S / 2 if method == "table" else affordable(S, N, z.dtype)
    table = tabulate(z, Columns(chunks, -math.log(N), N), tol, most) if most > 0 else None
    return None if table is None else interpolate(table, z)


def column_chunks(
    stream: Posteriors, own: Tensor | None, chunk_size: int, progress: bool
) -> Iterator[tuple[tuple[Tensor, Tensor], ColumnWeights]]:
    """(mu, logvar) of some posteriors at a time, each of weight 1/N, but of 0 for the samples that are its own."""
    N = len(stream.mu)
    for first in shown(range(0, N, chunk_size), "columns", progress):
        columns = stream.read(slice(first, first + chunk_size))
        if own is None:
            yield columns, ColumnWeights(-math.log(N))
        else:
            here = (own >= first) & (own < first + len(columns[0]))
            yield columns, ColumnWeights(-math.log(N), (own - first).where(here, -1), -math.inf)


def warn_if_saturated(terms: KLDecomposition, n_examples: int) -> None:
    if terms.saturation > 0.5 and n_examples > 4:  # of fewer, exp(mi) is a large share by rounding alone
        warn(
            f"mi: {terms.mi:.2f} nats is at the ceiling of log {n_examples} = {math.log(n_examples):.2f} that"
            f" {n_examples} examples set; of the distribution they come from it is an underestimate, and tc and agg_kl"
            " rest on the same log q(z)"
        )
