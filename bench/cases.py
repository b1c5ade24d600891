"""The one table of what is raced: every op with its inputs, sizes, work and peers. The suites, the races on GPUs, the
checks there and the report read this."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae
from fastvae.backends.contract import REDUCTIONS

from . import dataset, peers, training
from .harness import listed
from .inputs import binary_images, population, posteriors, samples_and_posteriors

FORWARD, BACKWARD, BOTH, STEP = "forward", "backward", "forward + backward", "step"
Size = tuple[int, int]
Contestants = dict[str, Callable[..., Any] | str]  # by name, fastvae first; a string says why there is none


class Op(NamedTuple):
    """An op to measure.

    contestants: the contestants by name, made for a size (B, D). inputs: the tensors, made from B, D, a seed and a
    device; where there are samples z, they come first. sizes: by mode, smallest first, on a CPU. elements: the number
    at a size that the cost is in proportion to. ceiling: the field of `harness.Ceilings` that bounds the op. work: by
    mode, how many of its units an element needs. exact, rowwise and hidden: as in `accuracy.Truth`; without `exact` the
    reference backend is the truth. part: takes a contestant and gives the part of it that is checked, where all of it
    in float64 would take too long. forward_only: contestants that have no gradient. backward_only: contestants of that
    mode alone. yardsticks: contestants that compute something else, of which only the time counts. checked: the
    function of the inputs that is checked on a GPU, if that is more than what is raced. on_gpu: the peers that are
    raced on a GPU too, at a size near the ceiling.
    """

    contestants: Callable[[int, int], Contestants]
    inputs: Callable[..., tuple[Tensor, ...]]
    sizes: dict[str, list[Size]]
    elements: Callable[[int, int], float]
    ceiling: str = ""
    work: dict[str, float] = {}  # noqa: RUF012
    exact: Callable[..., Any] | None = None
    rowwise: int = 0
    hidden: Callable[..., tuple[Tensor, ...]] | None = None
    part: Callable[..., Any] | None = None
    forward_only: tuple[str, ...] = ()
    backward_only: tuple[str, ...] = ()
    yardsticks: tuple[str, ...] = ()
    checked: Callable[..., Any] | None = None
    on_gpu: tuple[str, ...] = ()

    @property
    def function(self) -> Callable[..., Any]:
        """Fastvae's, where it is the same at every size."""
        found = self.contestants(1, 1)["fastvae"]
        assert not isinstance(found, str)
        return found

    @property
    def of_pairs(self) -> bool:
        """Whether each of B samples meets each of B posteriors."""
        return self.elements(2, 1) == 4 * self.elements(1, 1)


class Case(NamedTuple):
    """An op at a size in a mode."""

    name: str  # of the op
    size: Size
    mode: str

    @property
    def op(self) -> Op:
        return (OPS | COMPOSED | VARIANTS)[self.name]

    @property
    def is_small(self) -> bool:
        """Whether kernels are a small part of it: a call is then timed cold too."""
        return self.mode == BOTH and self.size in (*SMALL, *SMALL_PAIRS)

    def __str__(self) -> str:
        return f"{self.name}-{self.mode}-{self.size[0]}x{self.size[1]}"


def cases(name: str) -> Iterator[Case]:
    """The cases of an op, smallest first; the modes of a size follow each other, and share what is compiled."""
    op = (OPS | COMPOSED)[name]
    sizes = sorted({size for sizes in op.sizes.values() for size in sizes}, key=lambda size: op.elements(*size))
    return (Case(name, size, mode) for size in sizes for mode in op.sizes if size in op.sizes[mode])


def smallest(case: Case) -> bool:
    return case == next(other for other in cases(case.name) if other.mode == case.mode)


# The contestants.


def _always(**contestants: Callable[..., Any] | str) -> Callable[[int, int], Contestants]:
    return lambda B, D: dict(contestants)


def _kl_of_all_reductions(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    return tuple(fastvae.kl_gauss(mu, logvar, reduction=reduction) for reduction in REDUCTIONS)


def _on_tensor_cores(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    with fastvae.precision("tf32x3"):
        return fastvae.agg_log_prob(z, mu, logvar)


def _noise(function: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor]:
    """The sample of N(0, I)."""
    return (listed(function(*map(torch.zeros_like, inputs)))[0],)


def _sample_exactly(mu: Tensor, logvar: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
    z = mu + eps * torch.exp(0.5 * logvar)
    log_q = -0.5 * (eps.square() + logvar + peers.LOG_2PI).sum(-1)
    kl = 0.5 * (torch.expm1(logvar) - logvar + mu.square()).sum(-1)
    return z, log_q, -0.5 * (z.square() + peers.LOG_2PI).sum(-1), kl


def _z_and_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    z, _, _, kl = fastvae.sample_gauss(mu, logvar, outputs=("z", "kl"), reduction="batchmean")
    assert z is not None and kl is not None  # noqa: PT018
    return z, kl


def _z_and_kl_exactly(mu: Tensor, logvar: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
    z, _, _, kl = _sample_exactly(mu, logvar, eps)
    return z, kl.mean()


def _decomposition(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    terms = fastvae.kl_decomposition(z, mu, logvar)
    return terms.mi, terms.tc, terms.dim_kl


def _pairs(B: int, D: int) -> float:
    return float(B) * B * D


def _exponentials(B: int, D: int) -> float:
    return float(B) * B * (D + 1)


def _elements(B: int, D: int) -> float:
    return float(B) * D


def _steps(trained: training.Training, sizes: list[Size], elements: Callable[[int, int], float]) -> Op:
    contestants: Any = trained.contestants
    return Op(
        contestants,
        binary_images,
        {STEP: sizes},
        elements,
        exact=trained.truth,
        hidden=lambda step, x: step.hidden(x),
    )


ELEMENTWISE: list[Size] = [(128, 32), (1024, 32), (8192, 64), (65536, 128)]
SMALL: list[Size] = [(64, 10), (128, 32), (256, 64)]  # what a training step has, of which kernels are a tenth
SMALL_PAIRS: list[Size] = [(64, 10), (128, 10), (256, 10)]
STEPS: list[Size] = [(64, 10), (128, 10), (256, 10), (512, 10)]

# Work per element: FMAs, 2 forward and 6 backward; exponentials, one each way, of which a pair's joint needs one too;
# bytes that must move.
OPS: dict[str, Op] = {
    "kl_gauss": Op(
        _always(
            fastvae=fastvae.kl_gauss,
            eager=peers.kl_formula,
            compiled=peers.compiled_kl,
            torch_distributions=peers.kl_distributions,
        ),
        posteriors,
        {FORWARD: ELEMENTWISE, BACKWARD: ELEMENTWISE[2:3], BOTH: sorted({*ELEMENTWISE, *SMALL})},
        _elements,
        "bandwidth",
        {FORWARD: 8, BACKWARD: 16, BOTH: 24},
        checked=_kl_of_all_reductions,
        on_gpu=("eager", "compiled"),
    ),
    "reparameterize": Op(
        _always(
            fastvae=fastvae.reparameterize,
            eager=peers.reparameterize_formula,
            compiled=peers.compiled_reparameterize,
            torch_distributions=peers.reparameterize_distributions,
            fastvae_save_noise=functools.partial(fastvae.reparameterize, save_noise=True),
        ),
        posteriors,
        {FORWARD: ELEMENTWISE, BACKWARD: ELEMENTWISE[2:3], BOTH: sorted({*ELEMENTWISE, *SMALL})},
        _elements,
        "bandwidth",
        {FORWARD: 12, BACKWARD: 16, BOTH: 28},
        exact=lambda *x: _sample_exactly(*x)[0],
        rowwise=2,
        hidden=_noise,
        backward_only=("fastvae_save_noise",),
        checked=functools.partial(fastvae.reparameterize, seed=1),
        on_gpu=("eager", "compiled"),
    ),
    "sample_gauss": Op(
        _always(
            fastvae=fastvae.sample_gauss,
            eager=peers.sample_formula,
            compiled=peers.compiled_sample,
            torch_distributions=peers.sample_distributions,
            fastvae_save_noise=functools.partial(fastvae.sample_gauss, save_noise=True),
        ),
        posteriors,
        {FORWARD: ELEMENTWISE[::2], BACKWARD: ELEMENTWISE[2:3], BOTH: ELEMENTWISE[::2]},
        _elements,
        "bandwidth",
        {FORWARD: 12, BACKWARD: 16, BOTH: 28},
        exact=_sample_exactly,
        rowwise=2,
        hidden=_noise,
        backward_only=("fastvae_save_noise",),
        checked=functools.partial(fastvae.sample_gauss, n_samples=2, seed=1),
    ),
    "cross_log_prob": Op(
        _always(
            fastvae=fastvae.cross_log_prob,
            eager_broadcast=peers.cross_broadcast,
            eager_gemm=peers.cross_gemm,
            compiled_broadcast=peers.compiled_cross_broadcast,
            compiled_gemm=peers.compiled_cross_gemm,
            keops="reduces over columns, never gives the matrix",
            torch_distributions=peers.cross_distributions,
        ),
        samples_and_posteriors,
        {FORWARD: [(256, 10), (1024, 32), (4096, 32)], BACKWARD: [(1024, 32)], BOTH: [(256, 10), (1024, 32)]},
        _pairs,
        "fma",
        {FORWARD: 2, BACKWARD: 6, BOTH: 8},
        rowwise=1,
    ),
    "agg_log_prob": Op(
        _always(
            fastvae=fastvae.agg_log_prob,
            eager_broadcast=peers.agg_broadcast,
            eager_gemm=peers.agg_gemm,
            compiled_broadcast=peers.compiled_broadcast,
            compiled_gemm=peers.compiled_gemm,
            keops=peers.agg_keops,
            torch_distributions=peers.agg_distributions,
            sklearn_gmm=peers.agg_sklearn,
            matrix_product=peers.matrix_product,
        ),
        samples_and_posteriors,
        {
            FORWARD: [
                *((64, 32), (256, 10), (1024, 32), (1024, 64)),
                *((2048, 32), (4096, 32), (4096, 128)),
            ],
            BACKWARD: [(1024, 32)],
            BOTH: [*SMALL_PAIRS, (64, 32), (1024, 32), (2048, 32), (4096, 32)],
        },
        _pairs,
        "fma",
        {FORWARD: 2, BACKWARD: 6, BOTH: 8},
        rowwise=1,
        forward_only=("sklearn_gmm", "matrix_product"),
        yardsticks=("matrix_product",),
        on_gpu=("compiled_gemm", "compiled_broadcast"),
    ),
    "agg_log_prob_marginals": Op(
        _always(
            fastvae=fastvae.agg_log_prob_marginals,
            eager_broadcast=peers.marginals_broadcast,
            compiled_marginals=peers.compiled_marginals,
            keops=peers.marginals_keops,
            torch_distributions=peers.marginals_distributions,
            sklearn_gmm="gives the joint only",
        ),
        samples_and_posteriors,
        {
            FORWARD: [(64, 32), (256, 10), (1024, 32), (1024, 128), (2048, 32), (4096, 32)],
            BACKWARD: [(1024, 32)],
            BOTH: [(64, 32), (256, 10), (1024, 32), (2048, 32), (4096, 32), (16384, 32)],
        },
        _exponentials,
        "exponentials",
        {FORWARD: 1, BACKWARD: 1, BOTH: 2},
        rowwise=1,
        on_gpu=("compiled_marginals",),
    ),
}

# What is made of many ops.
COMPOSED: dict[str, Op] = {
    "z_and_kl": Op(
        _always(fastvae=_z_and_kl, eager=peers.z_and_kl_formula, compiled=peers.compiled_z_and_kl),
        posteriors,
        {BOTH: SMALL},
        _elements,
        "bandwidth",
        {BOTH: 28},
        exact=_z_and_kl_exactly,
        hidden=_noise,
    ),
    "agg_entropy": Op(
        _always(
            fastvae=fastvae.agg_entropy,
            eager_broadcast=peers.entropy_broadcast,
            eager_gemm=peers.entropy_gemm,
            compiled_broadcast=peers.compiled_entropy_broadcast,
            compiled_gemm=peers.compiled_entropy_gemm,
        ),
        samples_and_posteriors,
        {BOTH: SMALL_PAIRS},
        _pairs,
        "fma",
        {BOTH: 8},
    ),
    "kl_decomposition": Op(
        _always(
            fastvae=_decomposition,
            eager_broadcast=peers.decomposition_broadcast,
            compiled_broadcast=peers.compiled_decomposition,
        ),
        samples_and_posteriors,
        {BOTH: SMALL_PAIRS},
        _exponentials,
        "exponentials",
        {BOTH: 2},
    ),
    "training_step": _steps(training.BETA_TCVAE, [*STEPS, (1024, 10), (2048, 10)], _pairs),
    "training_step_elbo": _steps(training.ELBO, STEPS, _elements),
    "full_dataset": Op(
        dataset.contestants,
        dataset.drawn,
        {FORWARD: [(1_000, 10), (4_000, 10), (16_000, 10), (60_000, 10)]},
        _exponentials,
        "exponentials",
        {FORWARD: 1},
        exact=dataset.peer(peers.marginals_broadcast),
        part=dataset.first_rows,
    ),
}

# The joint on other inputs, by other means, or against another peer, on GPUs.
JOINT = OPS["agg_log_prob"]
VARIANTS: dict[str, Op] = {
    **{
        f"agg_log_prob, {active} active, logvar {logvar}": JOINT._replace(
            inputs=functools.partial(population, active=active, logvar=logvar)
        )
        for active, logvar in ((20, -3), (64, 0))
    },
    "agg_log_prob, tf32x3": JOINT._replace(contestants=_always(fastvae=_on_tensor_cores)),
    "agg_log_prob, attention": JOINT._replace(
        contestants=_always(fastvae=fastvae.agg_log_prob, flex_attention=peers.agg_attention)
    ),
}
