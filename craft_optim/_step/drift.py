"""Drift of one constraint: its average over passes, its growth per step, and its ratio to held-out anchors' drift.

Pure, except that it writes floats of the state.
"""

import math

from .trust import root, share_of_step

__all__ = ["DRIFT", "HELDOUT_MOST", "Drift", "at_its_least"]

# The average of L_ret and the passes in it; the largest recent growth of L_ret's root in a step, below 0 if unknown;
# for held-out anchors the drift, the logarithm of its ratio to the anchors', the measurements in that and the step of
# the next.
DRIFT = {
    "craft_drift": 0.0,
    "craft_drift_passes": 0.0,
    "craft_growth": -1.0,
    "craft_heldout": 0.0,
    "craft_heldout_quotient": 0.0,
    "craft_heldout_count": 0.0,
    "craft_heldout_next": 0.0,
}
"""The floats before the first pass"""
_OLD = 0.8  # weight of the old average of L_ret
_GROWTH_KEPT = 0.97  # on each pass
_ROOM = 0.3  # about sqrt(1.6) - 1
_LOOK_AGAIN = 16  # passes after which the growth of a step is measured again
_LOOK_AGAIN_FIRST, _FARTHER = 4, 4.0  # the same at the start, and a step's reach there in ways so far
_HELDOUT_EVERY = 25  # steps
_HELDOUT_WEIGHT = 0.3
_HELDOUT_LEAST, HELDOUT_MOST = 1.0 / 3.0, 30.0  # of the ratio
_TOO_LITTLE = 0.02  # of epsilon: drift below it says nothing about the ratio


def at_its_least(epsilon: float, heldout: float) -> bool:
    """True if the anchors' epsilon is as small as held-out drift makes it.

    Args:
        epsilon: Epsilon of the anchors.
        heldout: Epsilon of the held-out anchors.
    """
    return epsilon <= heldout / HELDOUT_MOST * (1.0 + 1e-6)  # from an exponential


class Drift:
    """Knowledge of the drift at one step.

    Args:
        state: The constraint's floats; those of `DRIFT` are read and written.
        asked_for: The requested epsilon(t), for the held-out anchors if there are any.
    """

    def __init__(self, state: dict[str, float], asked_for: float) -> None:
        self._state, self.asked_for = state, asked_for
        self._loss = 0.0  # of the pass of this step

    @property
    def epsilon(self) -> float:
        """epsilon of the anchors."""
        return self.asked_for / math.exp(self._state["craft_heldout_quotient"])

    @property
    def average(self) -> float:
        """The average of L_ret over about nine passes."""
        return self._state["craft_drift"]

    @property
    def violation(self) -> float:
        """average / epsilon."""
        return self.average / self.epsilon if self.epsilon > 0.0 else math.inf if self.average > 0.0 else 0.0

    @property
    def heldout(self) -> float:
        """The last drift on held-out anchors; NaN without one."""
        return self._state["craft_heldout"] if self._state["craft_heldout_count"] else math.nan

    @property
    def most_steps(self) -> float:
        """Number of steps in which the fastest recent growth would add 0.3 sqrt(epsilon) to the drift's root."""
        growth = self._state["craft_growth"]
        return _ROOM * root(self.epsilon) / growth if growth > 0.0 else math.inf

    def saw(self, loss: float) -> None:
        """Adds L_ret of a pass to the average."""
        passes, growth = self._state["craft_drift_passes"], self._state["craft_growth"]
        self._loss = loss
        self._state |= {
            "craft_drift": loss if passes == 0.0 else _OLD * self.average + (1.0 - _OLD) * loss,
            "craft_drift_passes": passes + 1.0,
            "craft_growth": growth * _GROWTH_KEPT if growth > 0.0 else growth,
        }

    def wants_heldout(self, step: int) -> bool:
        """True if held-out anchors are to be measured in this step."""
        return step >= self._state["craft_heldout_next"] and self.average > _TOO_LITTLE * self.epsilon

    def saw_heldout(self, loss: float, step: int) -> None:
        """Records the drift on held-out anchors, and updates epsilon of the anchors."""
        self._state["craft_heldout_next"] = float(step + _HELDOUT_EVERY)
        if not (loss > 0.0 and math.isfinite(loss)):
            return
        count, quotient = self._state["craft_heldout_count"] + 1.0, self._state["craft_heldout_quotient"]
        quotient += max(_HELDOUT_WEIGHT, 1.0 / count) * (math.log(loss / self.average) - quotient)
        least, most = math.log(_HELDOUT_LEAST), math.log(HELDOUT_MOST)
        self._state |= {
            "craft_heldout": loss,
            "craft_heldout_quotient": min(max(quotient, least), most),
            "craft_heldout_count": count,
        }

    def may_leave(self, trust: float, starting: bool) -> bool:
        """True if the next step may lead drift beyond `trust` epsilon, as far as known.

        At the start the bound is epsilon, and the pass says more about it than the average. Steps grow there with the
        learning rate's warm-up: one may lead four times as far as all before it.
        """
        growth, passes = self._state["craft_growth"], int(self._state["craft_drift_passes"])
        if growth < 0.0 or passes % (_LOOK_AGAIN_FIRST if starting else _LOOK_AGAIN) == 0:
            return True
        if starting:
            return _FARTHER * (root(max(self.average, self._loss)) + growth) >= root(self.epsilon)
        return root(self.average) + growth >= root(trust * self.epsilon)

    def share_of_step(self, before: float, after: float, starting: bool, trust: float) -> float:
        """The share of the step to keep; records how far it led.

        Args:
            before: L_ret before the step, on anchors without a gradient in this step.
            after: The same after the step.
            starting: True at the start, where the bound is epsilon itself and L_ret over several passes says more than
                the average, which lags behind.
            trust: The bound, as a multiple of epsilon.
        """
        growth = max(self._state["craft_growth"], 0.0)
        if math.isfinite(after):
            self._state["craft_growth"] = max(root(after) - root(before), growth)
        bound = (1.0 if starting else trust) * self.epsilon
        return share_of_step(before, after, max(self.average, before), bound, after if starting else 0.0)
