"""Warnings that point at the user's line."""

import sys
import warnings


def warn(message: str) -> None:
    """Warn (`UserWarning`) about the line that called the library, however many frames of the library and of torch
    (`nn.Module`, `no_grad`) lie between."""
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastvae", "torch"):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)
