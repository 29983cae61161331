"""Constraints by name: closures and settings, one for all or one for each, and what of the state is whose.

Without names there is one constraint, whose name is None here. Of the constraint `name` each metric and each float of
the state is called "what/name", without names "what".
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from craft_optim.dual import Controller, make_controller
from craft_optim.schedules import Schedule, epsilon_at
from craft_optim.several import MOST

__all__ = [
    "PER_CONSTRAINT",
    "Closure",
    "Closures",
    "Constraint",
    "by_name",
    "check_names",
    "constraints_at",
    "controllers",
    "each",
    "keyed",
    "of",
    "own_state",
    "put_together",
]

T = TypeVar("T")
Closure = Callable[[], Tensor]
Closures = Closure | Mapping[str, Closure]

# The metrics that each constraint has its own of, called "what/name" if it has a name.
PER_CONSTRAINT = (
    "retention_loss",
    "epsilon",
    "lambda",
    "violation",
    "grad_dot",
    "grad_cos",
    "conflict",
    "projected",
    "retention_grad_norm",
    "capped",
)
# Those of which the value without a name is the largest. For the others it is that of the constraint with the largest
# violation.
_LARGEST = ("conflict", "projected", "capped")


class Constraint(NamedTuple):
    """One constraint at one step.

    Attributes:
        name: None if it is the only one and has none.
        closure: Returns its loss.
        epsilon: What its loss may be.
        controller: Of its multiplier.
    """

    name: str | None
    closure: Closure
    epsilon: float
    controller: Controller

    @property
    def prefix(self) -> str:
        """Of messages about it."""
        return "" if self.name is None else f"Constraint {self.name!r}: "


def by_name(closures: Any) -> dict[str | None, Closure]:
    """The closures by their names; empty for None.

    Raises:
        TypeError: If one cannot be called, or a name is not a string.
        ValueError: If there is none, too many, or a name that keys cannot be made of.
    """
    if closures is None:
        return {}
    if not isinstance(closures, Mapping):
        _check_callable(closures, "`retention_closure`")
        return {None: closures}
    if not closures:
        raise ValueError("`retention_closure` must name at least one closure, or be None. Found an empty mapping.")
    for name, closure in closures.items():
        if not isinstance(name, str):
            raise TypeError(f"Names in `retention_closure` must be strings. Found {name!r}.")
        if not name or "/" in name:
            raise ValueError(
                'Names in `retention_closure` must not be empty or contain "/": metrics are called "lambda/name". '
                f"Found {name!r}."
            )
        _check_callable(closure, f"`retention_closure[{name!r}]`")
    if len(closures) > MOST:
        raise ValueError(
            f"`retention_closure` may name at most {MOST} closures, since each is a pass of its own. Found "
            f"{len(closures)}. Put those that may share an epsilon into one `craft_optim.anchors.CombinedRetention`."
        )
    return dict(closures)


def _check_callable(closure: object, what: str) -> None:
    if not callable(closure):
        raise TypeError(
            f"{what} must be callable without arguments and return the retention loss, or be None. "
            f"Found {type(closure).__name__}."
        )


def each(value: Any, convert: Callable[[Any], T]) -> T | dict[str, T]:
    """The converted value, or those of a mapping."""
    if isinstance(value, Mapping):
        return {name: convert(x) for name, x in value.items()}
    return convert(value)


def controllers(
    dual: str | Controller | Mapping[str, str | Controller],
    initial: float | Mapping[str, float],
    *,
    learning_rate: float,
    maximum: float,
) -> Controller | dict[str, Controller]:
    """The controller of all, or those of each name in either mapping."""

    def make(name: str | None) -> Controller:
        return make_controller(of(dual, name), initial=of(initial, name), learning_rate=learning_rate, maximum=maximum)

    names = next((list(x) for x in (dual, initial) if isinstance(x, Mapping)), None)
    if names is None:
        return make(None)
    check_names(names, {"`lambda_init`": initial})
    return {name: make(name) for name in names}


def check_names(names: Iterable[str | None], settings: Mapping[str, object]) -> None:
    """Raises ValueError unless every setting that is a mapping has just these names.

    Args:
        names: Of the constraints.
        settings: What the setting is called -> its value.
    """
    names = list(names)
    for setting, value in settings.items():
        if not isinstance(value, Mapping):
            continue
        if None in names:
            raise ValueError(
                f"{setting} has the names {list(value)}, but `retention_closure` has none: pass it as a mapping with "
                "the same names, or one value for it."
            )
        missing, unknown = [x for x in names if x not in value], [x for x in value if x not in names]
        if missing or unknown:
            raise ValueError(
                f"{setting} must have the names of the constraints, {names}, or be one value for all. Found "
                f"{list(value)}: missing {missing}, unknown {unknown}."
            )


def constraints_at(
    step: int,
    closures: Mapping[str | None, Closure],
    epsilon: Schedule | Mapping[str, Schedule],
    controller: Controller | Mapping[str, Controller],
) -> list[Constraint]:
    """All of them at one step.

    Raises:
        ValueError: If an epsilon is negative or not finite.
    """
    return [
        Constraint(name, closure, epsilon_at(of(epsilon, name), step), of(controller, name))
        for name, closure in closures.items()
    ]


def of(value: Any, name: str | None) -> Any:
    """What is for one constraint."""
    return value[name] if isinstance(value, Mapping) else value


def keyed(what: str, name: str | None) -> str:
    """What a metric or a float of the state is called."""
    return what if name is None else f"{what}/{name}"


def own_state(state: Mapping[str, float], name: str | None) -> dict[str, float]:
    """The floats of one constraint, as they are called without names."""
    parts = ((key.partition("/"), value) for key, value in state.items())
    return {what: value for (what, _, of), value in parts if (of or None) == name}


def put_together(rows: Mapping[str | None, Mapping[str, float]]) -> dict[str, float]:
    """`PER_CONSTRAINT` of all constraints: under their names, and without a name for the whole."""
    worst = max(rows.values(), key=lambda row: -math.inf if math.isnan(row["violation"]) else row["violation"])
    whole = dict(worst) | {what: max(row[what] for row in rows.values()) for what in _LARGEST}
    return whole | {keyed(what, name): x for name, row in rows.items() if name is not None for what, x in row.items()}
