"""Controllers of the multiplier lambda: pure functions of (state, violation).

A controller is called on each retention step with that step's retention loss and epsilon. It returns the multiplier to
use in this step's merge and the state to keep for the next one. The state is a small dict of finite Python floats, so
that any checkpoint format can hold it. Where its multiplier is held down, it may be called once more, with a smaller
`cap` or fewer `steps`; the state of the last call is kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from craft_optim._numbers import number

__all__ = ["AugmentedLagrangian", "Controller", "DualAscent", "MultiplicativePI", "NuPI", "Update", "make_controller"]


class Update(NamedTuple):
    """The answer of a controller.

    Attributes:
        multiplier: lambda for this step's merge, >= 0, never above `cap`.
        state: The state to pass at the next retention step.
        capped: True if `cap`, or a bound of the controller's own, held the multiplier down.
    """

    multiplier: float
    state: dict[str, float]
    capped: bool


class Controller(Protocol):
    """The interface that `CraftOptimizer(dual=...)` accepts."""

    def initial_state(self) -> dict[str, float]:
        """The state before the first update: finite floats, with the same keys for the whole run."""
        ...

    def __call__(
        self,
        state: Mapping[str, float],
        *,
        loss: float,
        epsilon: float,
        cap: float = math.inf,
        unit: float = 1.0,
        steps: int = 1,
    ) -> Update:
        """Computes one update.

        Args:
            state: State of the previous update.
            loss: L_ret on this pass's anchors, finite.
            epsilon: The allowed drift, finite and >= 0.
            cap: The largest multiplier that will be used, >= 0.
            unit: |g_t| / |g_r|: the multiplier at which both gradients are equally long. 0 or infinite if a gradient is
                missing.
            steps: Optimizer steps that this pass stands for, up to the next pass.
        """
        ...


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _check(owner: Any, *names: str, low: float = 0.0, open_low: bool = False) -> None:
    for name in names:
        try:
            value = number(name, getattr(owner, name), least=low, above=open_low)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{type(owner).__name__}: {error}") from None
        object.__setattr__(owner, name, value)


def log_violation(loss: float, epsilon: float) -> float:
    """log(loss / epsilon), with its limits: -inf for loss <= 0, +inf for epsilon = 0 < loss."""
    if loss <= 0.0:
        return -math.inf
    if epsilon == 0.0:
        return math.inf
    return math.log(loss) - math.log(epsilon)


@dataclass(frozen=True)
class MultiplicativePI:
    """PI control of the relative violation, on the logarithm of retention's share of a step (the default, `dual="pi"`).

    With u the geometric mean of |g_t| / |g_r| over passes and K the steps that a pass stands for:

        lambda = min(K s exp(kp clip(log(L_ret / epsilon), -4, 2)) u, cap)
        s      = clip(s exp(ki K' clip(L_ret / epsilon - 1, -1, 30)), 1e-3, 1e6)

    K' is the K of the previous pass. s grows by at most e^3 per pass, and not beyond three times the share that the cap
    allows, cap |g_r| / (K |g_t|). Let h be the average of lambda / cap over about thirty passes. Where h > 1/2, s falls
    at least as fast as this:

        s      = s exp(-ki K' (2 h - 1))

    One pass may use the whole cap, as a heavy batch does; passes in a row may use half of it. At a constrained optimum
    both gradients are equally long. If drift is above epsilon with more retention than that, the cause is the noise of
    steps that are too long: a larger lambda does not lower it, but costs learning. `Update.capped` reports this from h
    = 0.45 on.

    s is a share: at s = 1, L_ret = epsilon and K = 1 both gradients are equally long in the merge. So the units of the
    task loss, of L_ret and of the parameters are all in u, which is measured. The integral sums L_ret / epsilon - 1,
    not its logarithm: it settles where the *mean* of L_ret is epsilon, however noisy the batches are. Until L_ret
    reaches epsilon / 2, u is that of each pass alone, because |g_r| grows from 0; afterwards it is a mean over up to
    ten passes.

    Args:
        initial: s at the start, in [1e-3, 1e6].
        ki: Integral gain per optimizer step, >= 0.
        kp: Proportional gain, >= 0.
        least_share: Smallest lambda |g_r| / (K |g_t|), as far as the cap allows, also while drift is below epsilon; >=
            0. Epsilon is then only a bound: drift may settle below it. For tasks that need almost no drift: 0.1 cost
            next to nothing where measured (docs/findings.md), 0.3 did cost.
    """

    initial: float = 1.0
    ki: float = 0.1
    kp: float = 1.0
    least_share: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "initial", open_low=True)
        _check(self, "ki", "kp", "least_share")

    def initial_state(self) -> dict[str, float]:
        return {"integral": _clip(self.initial, *_SHARES), "log_unit": 0.0, "passes": 0.0, "steps": 1.0, "used": 0.0}

    def __call__(
        self,
        state: Mapping[str, float],
        *,
        loss: float,
        epsilon: float,
        cap: float = math.inf,
        unit: float = 1.0,
        steps: int = 1,
    ) -> Update:
        integral, log_unit, passes, used = (state[name] for name in ("integral", "log_unit", "passes", "used"))
        if passes > 0.0 or loss >= _NEAR * epsilon:
            passes += 1.0
        if 0.0 < unit < math.inf:
            log_unit += max(1.0 - _SLOWEST, _PASSES / (_PASSES + passes)) * (math.log(unit) - log_unit)
        error = log_violation(loss, epsilon)
        wanted = steps * integral * math.exp(_clip(self.kp * _clip(error, -4.0, 2.0) + log_unit, -700.0, 700.0))
        # By the steps before, which this batch had no part in: one that is heavy by chance must not weigh itself. And
        # also while lambda is held down: a heavy batch has a large |g_r| and so a small cap, and to leave out just
        # these would move the mean above epsilon.
        grown = integral * math.exp(_clip(self.ki * state["steps"] * _excess(loss, epsilon), -50.0, _MOST_GROWTH))
        allowed = _SLACK * cap / unit / steps if 0.0 < unit < math.inf else 0.0
        if 0.0 < cap < math.inf:
            used = _USED * used + (1.0 - _USED) * min(wanted / cap, 1.0)
        if used > _LASTING:
            grown = min(grown, integral * math.exp(-self.ki * state["steps"] * (used / _LASTING - 1.0)))
        integral = _clip(min(grown, max(integral, allowed)), *_SHARES)
        state = {
            "integral": integral,
            "log_unit": log_unit,
            "passes": passes,
            "steps": float(steps),
            "used": used,
        }
        held = wanted > cap or used > _NEARLY * _LASTING or integral == _SHARES[1]
        least = self.least_share * steps * unit if unit < math.inf else 0.0  # without g_r nothing helps
        return Update(min(max(wanted, least), cap), state, held)


_SHARES = (1e-3, 1e6)
_NEAR = 0.5  # of epsilon
_MOST_GROWTH, _SLACK = 3.0, 3.0
_SLOWEST, _PASSES = 0.9, 10.0
_USED, _LASTING = 0.97, 0.5  # weight of the old average; share of the cap
_NEARLY = 0.9  # h goes up and down where it is held


def _excess(loss: float, epsilon: float) -> float:
    """clip(loss / epsilon - 1, -1, 30)."""
    if epsilon == 0.0:
        return 30.0 if loss > 0.0 else -1.0
    return _clip(loss / epsilon - 1.0, -1.0, 30.0)


@dataclass(frozen=True)
class DualAscent:
    """Projected gradient ascent on the dual, the published rule (`dual="ascent"`).

        lambda_{t+1} = clip(lambda_t + eta (L_ret - epsilon), 0, lambda_max)    no increase while capped

    The merge uses min(lambda_t, cap). eta has the unit 1 / L_ret^2 x task loss: it has to be tuned per problem.

    Args:
        initial: lambda_0, >= 0.
        learning_rate: eta, >= 0.
        maximum: lambda_max.
    """

    initial: float = 1.0
    learning_rate: float = 0.1
    maximum: float = 1e4

    def __post_init__(self) -> None:
        _check(self, "initial", "learning_rate", "maximum")

    def initial_state(self) -> dict[str, float]:
        return {"multiplier": _clip(self.initial, 0.0, self.maximum)}

    def __call__(
        self, state: Mapping[str, float], *, loss: float, epsilon: float, cap: float = math.inf, **_: Any
    ) -> Update:
        multiplier, error = state["multiplier"], loss - epsilon
        capped, following = multiplier > cap, multiplier
        if not (capped and error > 0.0):
            following = _clip(multiplier + self.learning_rate * error, 0.0, self.maximum)
        return Update(min(multiplier, cap), {"multiplier": following}, capped)


@dataclass(frozen=True)
class NuPI:
    """The nuPI controller: additive PI on an exponential moving average of the violation (`dual="nupi"`).

    With e_t = L_ret - epsilon and xi_t = nu xi_{t-1} + (1 - nu) e_t, xi_0 = e_0:

        lambda_t = clip(lambda_0 + kp xi_t + ki sum_{s <= t} e_s, 0, lambda_max)

    The running sum is clipped to [0, lambda_max] so that it cannot wind up, and does not grow while `cap` or lambda_max
    holds lambda down.
    Source: Sohrabi et al. 2024, "On PI controllers for updating Lagrange multipliers", arXiv:2406.04558.

    Args:
        initial: lambda_0, >= 0.
        ki: Integral gain, >= 0.
        kp: Proportional gain, >= 0.
        nu: Smoothing in [0, 1).
        maximum: lambda_max.
    """

    initial: float = 1.0
    ki: float = 0.1
    kp: float = 1.0
    nu: float = 0.0
    maximum: float = 1e4

    def __post_init__(self) -> None:
        _check(self, "initial", "ki", "kp", "nu", "maximum")
        if not 0.0 <= self.nu < 1.0:
            raise ValueError(f"NuPI: `nu` must be in [0, 1). Found nu={self.nu!r}.")

    def initial_state(self) -> dict[str, float]:
        return {"integral": _clip(self.initial, 0.0, self.maximum), "average": 0.0, "seeded": 0.0}

    def __call__(
        self, state: Mapping[str, float], *, loss: float, epsilon: float, cap: float = math.inf, **_: Any
    ) -> Update:
        error = loss - epsilon
        average = self.nu * state["average"] + (1.0 - self.nu) * error if state["seeded"] else error
        integral = _clip(state["integral"] + self.ki * error, 0.0, self.maximum)
        wanted, most = max(integral + self.kp * average, 0.0), min(cap, self.maximum)
        capped = wanted > most
        if capped and error > 0.0:
            integral = state["integral"]
        return Update(min(wanted, most), {"integral": integral, "average": average, "seeded": 1.0}, capped)


@dataclass(frozen=True)
class AugmentedLagrangian:
    """Method of multipliers for an inequality (`dual="augmented_lagrangian"`).

    The penalty (max(0, mu + c (L_ret - epsilon))^2 - mu^2) / (2 c) has the gradient lambda g_r with

        lambda = clip(mu + c (L_ret - epsilon), 0, lambda_max)
        mu     = clip(mu + eta (L_ret - epsilon), 0, lambda_max)

    Source: Hestenes 1969; Nocedal & Wright, Numerical Optimization, ch. 17.

    Args:
        initial: mu_0, >= 0.
        learning_rate: eta, >= 0.
        penalty: c, > 0.
        maximum: lambda_max.
    """

    initial: float = 1.0
    learning_rate: float = 0.1
    penalty: float = 1.0
    maximum: float = 1e4

    def __post_init__(self) -> None:
        _check(self, "initial", "learning_rate", "maximum")
        _check(self, "penalty", open_low=True)

    def initial_state(self) -> dict[str, float]:
        return {"multiplier": _clip(self.initial, 0.0, self.maximum)}

    def __call__(
        self, state: Mapping[str, float], *, loss: float, epsilon: float, cap: float = math.inf, **_: Any
    ) -> Update:
        error = loss - epsilon
        mu = state["multiplier"]
        wanted, most = max(mu + self.penalty * error, 0.0), min(cap, self.maximum)
        capped = wanted > most
        if not (capped and error > 0.0):
            mu = _clip(mu + self.learning_rate * error, 0.0, self.maximum)
        return Update(min(wanted, most), {"multiplier": mu}, capped)


_CONTROLLERS: dict[str, tuple[type[Any], str]] = {
    "pi": (MultiplicativePI, "ki"),
    "ascent": (DualAscent, "learning_rate"),
    "nupi": (NuPI, "ki"),
    "augmented_lagrangian": (AugmentedLagrangian, "learning_rate"),
}


def make_controller(
    dual: str | Controller, *, initial: float | None = None, gain: float | None = None, maximum: float | None = None
) -> Controller:
    """A controller by its name, or the given object as it is.

    Args:
        dual: Name, "pi", "ascent", "nupi" or "augmented_lagrangian"; or an object with the interface of `Controller`,
            which has the other three already.
        initial: lambda at the start; for "pi", retention's share. None, here and below: the default of the class.
        gain: Gain of the integral or ascent term.
        maximum: Upper bound of lambda; "pi" has none but the cap.

    Raises:
        ValueError: If the name is unknown, a value is out of its range, or "pi" is given a maximum.
        TypeError: If `dual` is neither a name nor a controller.
    """
    if not isinstance(dual, str):
        if callable(dual) and hasattr(dual, "initial_state"):
            return dual
        raise TypeError(f"`dual` must be a name or a controller object. Found {type(dual).__name__}.")
    if dual not in _CONTROLLERS:
        names = ", ".join(map(repr, _CONTROLLERS))
        raise ValueError(f"`dual` must be one of {names}, or a controller. Found dual={dual!r}.")
    kind, name_of_gain = _CONTROLLERS[dual]
    if maximum is not None and kind is MultiplicativePI:
        raise ValueError(
            f"`maximum` is a bound of lambda in the units of both losses, and dual='pi' has none of these. Found "
            f"maximum={maximum!r}: set `rho`, the bound of retention's share of a step, or leave it out."
        )
    given = {"initial": initial, name_of_gain: gain, "maximum": maximum}
    controller: Controller = kind(**{name: value for name, value in given.items() if value is not None})
    return controller
