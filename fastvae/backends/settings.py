"""The environment variables that say how to compute. One that is empty is as if it were not set; one that cannot be
followed is an error that names it, since who sets it wants no other way."""

import os


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
