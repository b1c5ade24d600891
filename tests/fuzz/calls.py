"""The parts of a generated call, and the source of chance that all of it is drawn from."""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from support.helpers import HALVES
from torch import Tensor

SIZES = (1, 1, 2, 3, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 65, 97)
EXTREMES = (0.0, 1e-30, 300.0, 1e4, 1e10, 1e30)  # float32 holds them and not their squares


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors with values of floating point, in the order of the result."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    return [x for part in result for x in tensors_of(part)] if isinstance(result, tuple | list) else []


class Call(NamedTuple):
    """A good call. `formula` is of the same arguments, and gives the tensors of the result by their definition, to be
    computed in float64; `check` looks at what no formula gives, such as a result that is drawn."""

    function: Callable[..., Any]  # of the arguments by name, which any object may stand for
    arguments: dict[str, Any]
    formula: Callable[..., Sequence[Tensor]] | None = None
    check: Callable[[Any, dict[str, Any]], None] | None = None
    tensors: Callable[[Any], list[Tensor]] = tensors_of
    centred: tuple[str, ...] = ()
    differentiable: bool = True
    slack: float = 0.0  # what the documentation allows beside rounding
    roundings: float = 0.0  # further units of the last place, of a result's largest number
    differences: bool = False  # whether results are differences of others, with the rounding errors of the largest
    costly: tuple[str, ...] = ()  # numbers that a right call may take forever for
    either: tuple[str, ...] = ()  # a number or a tensor, where a tensor of no axes is neither
    draws: bool = False  # from torch's generator
    own_device: bool = False  # makes something on the default device, as modules do


Surface = Callable[["Draw"], Call]
SURFACES: dict[str, Surface] = {}


def surface(generate: Surface) -> Surface:
    SURFACES[generate.__name__] = generate
    return generate


class Draw(random.Random):
    """Arguments by chance. `extreme` calls have a few values that are large, tiny or equal."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.extreme = self.chance(0.15)
        self.dtypes = self.choice(
            [[torch.float32]] * 6 + [[torch.float64]] * 3 + [[d] for d in HALVES] + [[torch.float32, *HALVES]] * 2
            + [[torch.float64, torch.float32, torch.bfloat16]] * 2
        )  # fmt: skip

    def chance(self, p: float) -> bool:
        return self.random() < p

    def sizes(self, n: int, least: int = 0, most: int = 20_000) -> list[int]:
        """n sizes of a moderate product, none of them below `least`, and 0 now and then."""
        while True:
            sizes = [0 if least == 0 and self.chance(0.03) else max(least, self.choice(SIZES)) for _ in range(n)]
            if torch.Size(sizes).numel() <= most:
                return sizes

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + shift
        if self.extreme and x.numel() and self.chance(0.5):
            where = torch.randint(x.numel(), (1 + x.numel() // 8,), generator=self.generator)
            x.view(-1)[where] = self.choice(EXTREMES) * self.choice((-1, 1))
        return self.rounded(x)

    def rounded(self, x: Tensor) -> Tensor:
        """The numbers of x in one of the call's dtypes, finite there too."""
        dtype = self.choice(self.dtypes)
        return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 from low to high - 1."""
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def probabilities(self, *shape: int, dim: int = -1) -> Tensor:
        logits = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return logits.softmax(dim).to(self.choice(self.dtypes))

    def posteriors(self, *shape: int) -> dict[str, Tensor]:
        scale = self.choice((0.0, 1.0, 1.0, 1.0, 30.0))
        return {"mu": self.normal(*shape, scale=scale), "logvar": self.normal(*shape, shift=-1)}

    def samples(self, S: int, mu: Tensor, logvar: Tensor) -> Tensor:
        """z [S, D] near posteriors [N, D], S of N > 0."""
        at = torch.arange(S) % max(len(mu), 1)
        wide = (mu.double(), logvar.double().clamp(-60, 60))
        centre, spread = (x[at] if len(mu) else x.new_zeros(S, x.shape[-1]) for x in wide)
        z = centre + (0.5 * spread).exp() * torch.randn(S, mu.shape[-1], generator=self.generator, dtype=torch.float64)
        return self.rounded(z)
