"""The settings that say how to compute: those of `fastvae.use`, and the environment variables that say so from outside.

A variable that is empty is as if it were not set; one that cannot be followed is an error that names it, since who sets
it wants no other way.
"""

import functools
import os
from typing import NamedTuple


class WrongSetting(RuntimeError):
    """An environment variable asks for what cannot be; the message begins with NAME=value."""


def setting(name: str) -> str | None:
    """The variable's value; None where it is not set, or empty."""
    return os.environ.get(name) or None


def switch(name: str) -> bool | None:
    """A variable that is 1 for yes and 0 for no; None where it is not set."""
    value = setting(name)
    if value not in ("0", "1", None):
        raise WrongSetting(f"{name}={value}: expected 0 or 1")
    return None if value is None else value == "1"


class Settings(NamedTuple):
    """The three that `fastvae.use` sets."""

    backend: str | None  # its name; None: the best available
    exact_skip: bool | None  # None: not set here; FASTVAE_EXACT_SKIP decides, if it is set
    precision: str  # "exact" or "tf32x3"


current = Settings(setting("FASTVAE_BACKEND"), None, "exact")  # the process's; fastvae.use changes it


def exact_skip(otherwise: bool = True) -> bool:
    """Whether kernels may leave out pairs that are too far apart to change a result by as much as its rounding;
    `otherwise` where neither `fastvae.use` nor FASTVAE_EXACT_SKIP says."""
    said = current.exact_skip
    if said is None:
        said = _exact_skip_from_outside()
    return otherwise if said is None else said


@functools.cache
def _exact_skip_from_outside() -> bool | None:
    return switch("FASTVAE_EXACT_SKIP")
