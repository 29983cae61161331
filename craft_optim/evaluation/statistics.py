"""Intervals and paired tests for counts and means of a sample. All need scipy, the extra `evaluation`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["Interval", "mcnemar", "mean_interval", "paired_difference", "wilson"]

Interval = tuple[float, float]
"""Lower and upper end"""


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """The Wilson score interval of a proportion.

    Returns:
        Both ends, in [0, 1].

    Raises:
        ValueError: There are no trials, or the successes are not among them.

    Example:
        >>> low, high = wilson(8, 10)
        >>> print(f"{low:.2f} to {high:.2f}")
        0.49 to 0.94
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"`trials` must be >= 1 and `successes` in [0, trials]. Found {successes=}, {trials=}.")
    interval = _stats().binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Student's t interval of a mean.

    Args:
        values: Independent measurements, finite.

    Returns:
        Both ends; None for fewer than two values, which show no variation.
    """
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(_stats().t.ppf((1.0 + confidence) / 2.0, len(values) - 1)) * error
    return mean - half, mean + half


def mcnemar(lost: int, won: int) -> float:
    """McNemar's test, exact and two-sided, of equally many losses and wins except by chance.

    Args:
        lost: Trials in which only the first of two succeeds.
        won: Trials in which only the second succeeds.

    Returns:
        The p-value; 1 if they differ in no trial.

    Raises:
        ValueError: A number is negative.
    """
    if min(lost, won) < 0:
        raise ValueError(f"`lost` and `won` must be >= 0. Found lost={lost}, won={won}.")
    return float(_stats().binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def paired_difference(both: int, lost: int, won: int, neither: int, confidence: float = 0.95) -> Interval:
    """The interval of a difference of two proportions of the same trials: the second's minus the first's.

    Newcombe's score interval (Statistics in Medicine 17, 1998, method 10). It has a width even if no trial differs: an
    interval from the differences alone would then claim certainty.

    Args:
        both: Trials in which both succeed.
        lost: Trials in which only the first succeeds.
        won: Trials in which only the second succeeds.
        neither: Trials in which none succeeds.

    Returns:
        Both ends, in [-1, 1].

    Raises:
        ValueError: A number is negative, or there are no trials.
    """
    if min(both, lost, won, neither) < 0 or not (trials := both + lost + won + neither):
        raise ValueError(f"Counts must be >= 0, and one of them > 0. Found {(both, lost, won, neither)}.")
    first, second = (both + lost) / trials, (both + won) / trials
    (low_1, high_1), (low_2, high_2) = (wilson(both + n, trials, confidence) for n in (lost, won))
    together = float(both * neither - lost * won)
    if together > 0.0:
        together = max(together - trials / 2, 0.0)  # Newcombe's correction for continuity
    margins = float((both + lost) * (won + neither) * (both + won) * (lost + neither))
    phi = together / math.sqrt(margins) if margins else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2.0 * phi * a * b + b * b, 0.0))

    change = second - first
    return change - distance(second - low_2, high_1 - first), change + distance(high_2 - second, first - low_1)


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(f"Intervals need scipy ({error}): pip install 'craft-optim[evaluation]'.") from error
    return stats
