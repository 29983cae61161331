"""The one way in which the pages and the tables of `craft-optim report` and `inspect` write numbers.

static/charts.js has the same rules for the axes and values of charts.
"""

import math

__all__ = ["duration", "number", "percent"]


def number(value: float | None) -> str:
    """Three digits, with commas from a thousand on; an exponent only where zeros would have to be counted.

    Example:
        >>> number(0.05239), number(12345.0), number(0.0), number(1.5e-5), number(None)
        ('0.0524', '12,300', '0', '1.5e-5', '-')
    """
    if value is None:
        return "-"
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.3g}")
    if not 1e-4 <= abs(rounded) < 1e6:
        mantissa, _, power = f"{rounded:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{rounded:,.6f}".rstrip("0").rstrip(".")


def percent(share: float | None) -> str:
    """A share as a percentage, which is 0 % or 100 % only where it is none or all.

    Example:
        >>> percent(0.912), percent(0.001), percent(0.999), percent(1.0)
        ('91 %', '<1 %', '>99 %', '100 %')
    """
    if share is None:
        return "-"
    if 0.0 < share < 0.005:
        return "<1 %"
    return ">99 %" if 0.995 <= share < 1.0 else f"{share:.0%}".replace("%", " %")


def duration(milliseconds: float | None) -> str:
    """Milliseconds, or seconds from one second on.

    Example:
        >>> duration(55.61), duration(9700.0)
        ('55.6 ms', '9.7 s')
    """
    if milliseconds is None:
        return "-"
    return f"{number(milliseconds)} ms" if milliseconds < 1e3 else f"{number(milliseconds / 1e3)} s"
