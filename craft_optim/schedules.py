"""epsilon(t): how much drift is allowed at step t.

Ramps go from `start` to `end` with q = min(t / steps, 1). A schedule is any callable `step -> epsilon`; your own
function is one, too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from craft_optim._numbers import number, whole

__all__ = ["Constant", "Cosine", "Exponential", "Linear", "Schedule", "as_schedule", "epsilon_at"]

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """The same epsilon on every step.

    Args:
        value: The allowed drift, in the units of the retention loss; finite and >= 0.
    """

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", number("epsilon", self.value, least=0.0))

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class _Ramp:
    """The fields and checks that the ramps from `start` to `end` share."""

    start: float
    end: float
    steps: int
    _positive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            object.__setattr__(self, name, number(name, getattr(self, name), least=0.0, above=self._positive))
        object.__setattr__(self, "steps", whole("steps", self.steps))

    def _progress(self, step: int) -> float:
        return min(max(step, 0) / self.steps, 1.0)


class Linear(_Ramp):
    """epsilon(t) = start - (start - end) q.

    Args:
        start: epsilon at step 0.
        end: epsilon from step `steps` on.
        steps: Length of the ramp in optimizer steps. If epsilon decays, end by the middle of training.
    """

    def __call__(self, step: int) -> float:
        return self.start - (self.start - self.end) * self._progress(step)


class Cosine(_Ramp):
    """epsilon(t) = end + (start - end)(1 + cos(pi q)) / 2. Arguments as for `Linear`."""

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * self._progress(step))) / 2.0


class Exponential(_Ramp):
    """epsilon(t) = start (end / start)^q, which reaches `end` at q = 1; both ends must be > 0.

    Arguments as for `Linear`.
    """

    _positive = True

    def __call__(self, step: int) -> float:
        return float(self.start * (self.end / self.start) ** self._progress(step))


def as_schedule(epsilon: float | Schedule) -> Schedule:
    """Returns `epsilon` as a callable; makes a number a `Constant`.

    Raises:
        ValueError: If a number is negative or not finite.
        TypeError: If `epsilon` is neither a number nor callable.
    """
    if callable(epsilon):
        return epsilon
    try:
        return Constant(epsilon)
    except TypeError:
        found = type(epsilon).__name__
        raise TypeError(f"`epsilon` must be a number or a callable step -> float. Found {found}.") from None


def epsilon_at(epsilon: float | Schedule, step: int) -> float:
    """The value of a number or schedule at `step`, checked.

    Args:
        epsilon: A number, a schedule of this module, or any callable step -> float.
        step: Optimizer steps taken so far, from 0.

    Raises:
        TypeError: If the value is not a number.
        ValueError: If the value is negative or not finite.
    """
    return number(f"epsilon({step})", as_schedule(epsilon)(step), least=0.0)
