"""Numbers as users pass them: Python's, NumPy's, tensors of one element. True is not a number."""

import math
import numbers
from typing import Any

__all__ = ["number", "whole"]


def number(
    name: str, value: Any, *, least: float = -math.inf, above: bool = False, finite: bool = True, or_else: str = ""
) -> float:
    """The value as a float.

    Args:
        name: Name of the argument, for messages.
        value: Any real number.
        least: Smallest allowed value.
        above: True if the value must be larger than `least`.
        finite: True if the value must be finite; else it must not be NaN.
        or_else: Alternatives to a number, for messages.

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range.
    """
    found = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        raise TypeError(f"`{name}` must be a number{or_else}. Found {name}={value!r}, of {type(value).__name__}.")
    x = float(found)
    if math.isnan(x) or (finite and math.isinf(x)) or x < least or (above and x == least):
        bound = "" if least == -math.inf else f" {'>' if above else '>='} {least:g}"
        raise ValueError(
            f"`{name}` must be a {'finite ' if finite else ''}number{bound}{or_else}. Found {name}={found!r}."
        )
    return x


def whole(name: str, value: Any, least: int | None = 1) -> int:
    """The value as an int.

    Raises:
        ValueError: It is not a whole number, or smaller than `least`.
    """
    found = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    integral = isinstance(found, numbers.Integral) and not isinstance(found, bool)
    if not integral or (least is not None and found < least):
        bound = "" if least is None else f" >= {least}"
        raise ValueError(f"`{name}` must be a whole number{bound}. Found {name}={found!r}.")
    return int(found)
