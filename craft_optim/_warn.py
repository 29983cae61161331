"""Warnings that point at the user's line that caused them, not into torch's wrappers around `step`."""

import sys
import warnings

__all__ = ["CraftWarning", "warn"]

_NOT_THE_USER = ("craft_optim", "torch")


class CraftWarning(UserWarning):
    """The warnings of this package."""


def warn(message: str) -> None:
    """Issues a CraftWarning for the nearest caller outside of this package and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, CraftWarning, stacklevel=level)
