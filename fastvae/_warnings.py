"""Warnings that point at the user's line."""

import sys
import warnings


def warn(message: str) -> None:
    """A UserWarning about the line that called the library, through however much of it and of torch (`nn.Module`,
    `no_grad`) lies between."""
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastvae", "torch"):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)
