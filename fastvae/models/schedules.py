"""Weights of the objectives that may follow the training step.

A weight is a number, or a schedule: a function of the training step. The step comes as a 0-dim tensor: a schedule
written with tensor operations compiles, and does not make a GPU wait. The training loop counts it, by `vae.advance()`,
or gives it, by `vae(x, step=n)`. A lambda cannot be pickled, and neither can a model that has it as a schedule; a
function at the top level of a module can, and so can an object with `__call__`.
"""

import copy
import functools
import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..backends.contract import accumulation_dtype
from ..ops.checks import check_number
from ..protocols import Draws

Weight = float | Callable[[Tensor], float | Tensor]


@dataclass(frozen=True)
class Scheduled:
    """A frozen dataclass that may have schedules among its fields."""

    def schedules(self) -> list[str]:
        """The names of the weights that follow the step."""
        return self._schedules.copy()

    @functools.cached_property
    def _schedules(self) -> list[str]:
        return [field.name for field in fields(self) if callable(getattr(self, field.name))]

    def _now(self, name: str, draws: Draws) -> float | Tensor:
        """The weight `name` at the step of the draws."""
        weight = getattr(self, name)
        if not callable(weight):
            return weight
        value = weight(draws.step)
        if not isinstance(value, Tensor):
            return check_number(name, value)
        if value.ndim:
            raise ValueError(f"{name}: expected a scalar from the schedule, got shape {tuple(value.shape)}")
        return value.to(accumulation_dtype(draws.log_px_z.dtype))  # a float64 schedule must not change the loss's dtype

    def _convert(self, **checked: Any) -> None:
        """Store the values that the checks returned, though the dataclass is frozen."""
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        pickler = sys._getframe(1).f_globals.get("__name__", "")
        for name in () if "cloudpickle" in pickler or "dill" in pickler else self.schedules():  # these take lambdas
            try:
                pickle.dumps(getattr(self, name))
            except Exception as error:
                raise pickle.PicklingError(
                    f"{name}: expected a schedule that can be pickled, such as a function at the top level of a module,"
                    f" or an object of a small class with __call__, got {getattr(self, name)!r}: {error}"
                ) from error
        return self.__dict__

    def __copy__(self) -> "Scheduled":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scheduled":
        """Copy without `__getstate__`, which refuses lambdas: they can be copied."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied._convert(**{name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied


def check_weight(name: str, weight: Any, least: float = 0.0, most: float = math.inf) -> Weight:
    """Check for a finite number, returned as a Python float, or a schedule, returned as it is."""
    if callable(weight) and not isinstance(weight, type):
        return weight
    return check_number(name, weight, least=least, most=most, finite=True)
