"""Pace of retention: number of steps that a pass stands for, from the drift that passes measure. Pure.

`retention_every="auto"` begins with a pass on each step. After the start, each pass sets K from the drift d, the
average of L_ret, and the epsilon e of the constraint that is violated most:

    K <- max(K / 2, 1)           where d > 1.1 e
    K <- min(K + 3 / (4 K), 10)  where d < e
    K <- K / 2                   as often as it takes until no lambda is held down at K
    K <- 1                       where the step of the pass was shortened

A pass adds up to rho K times the task gradient, and momentum carries that on through steps without a pass. K also stays
below 0.3 sqrt(e) / v, where v is the largest recent growth of sqrt(L_ret) in a measured step (`trust`): that many such
steps would use up the room between e and 1.6 e. The next pass comes after round(K) steps. The start is the first 40
passes, or ends 20 passes after d reaches e / 2 if that is later: knowledge forgotten in the first steps does not all
come back. The state's floats hold all of it, and d is the same on all processes.
"""

from collections.abc import Mapping

from .rules import Rules

__all__ = ["MOST", "PACE", "due", "halved", "hurried", "paced", "starting"]

PACE = {"craft_every": 1.0, "craft_next": 0.0, "craft_start": 40.0, "craft_near": 0.0}
"""K; the step of the next pass; passes until the start is over; 1 once drift has come to epsilon / 2. At first."""

MOST = 10.0
"""The largest K"""
_AFTER_NEAR = 20.0
_NEAR, _ABOVE = 0.5, 1.1


def due(state: Mapping[str, float], rules: Rules) -> bool:
    """True if the next step has a pass."""
    step = int(state["craft_step"])
    if rules.retention_every == "auto":
        return step >= state["craft_next"]
    return step % rules.retention_every == 0


def hurried(state: Mapping[str, float]) -> dict[str, float]:
    """The floats after the step of a pass was shortened: the next step has a pass, and K is 1 again.

    The steps until the next pass would be as long, but unmeasured.
    """
    return {"craft_every": 1.0, "craft_next": state["craft_step"] + 1.0}


def halved(state: Mapping[str, float], steps: int) -> tuple[dict[str, float], int]:
    """The floats that make a pass for `steps` steps stand for half of them, rounded down."""
    fewer = steps // 2
    return {**state, "craft_every": float(fewer), "craft_next": state["craft_next"] - (steps - fewer)}, fewer


def starting(state: Mapping[str, float]) -> bool:
    """True while the next pass belongs to the start."""
    return state["craft_start"] > 0.0


def paced(
    state: Mapping[str, float], violation: float, rules: Rules, most: float = MOST
) -> tuple[dict[str, float], int]:
    """The floats after a pass, and the number of steps that it stands for.

    Args:
        state: `PACE`, with `craft_step`, the step of the pass.
        violation: Drift / epsilon, the largest of all constraints.
        rules: The rules, with K if it is fixed.
        most: Largest number of steps that constraints allow without a pass; see `Drift.most_steps`.
    """
    every, start, near = (state[f"craft_{name}"] for name in ("every", "start", "near"))
    if not near and violation >= _NEAR:
        near, start = 1.0, max(start, _AFTER_NEAR)
    if start > 0.0:
        every, start = 1.0, start - 1.0
    elif violation > _ABOVE:
        every = max(every / 2.0, 1.0)
    elif violation < 1.0:
        every += 0.75 / every
    every = max(min(every, most, MOST), 1.0)
    step = int(state["craft_step"])
    steps = round(every)
    if rules.retention_every != "auto":
        steps = rules.retention_every
    elif rules.total_steps is not None and step < rules.total_steps - 1:
        steps = min(steps, rules.total_steps - 1 - step)
    found = {"craft_every": every, "craft_next": float(step + steps), "craft_start": start, "craft_near": near}
    return found, steps
