"""The drift of one constraint: its average over passes, what a step adds to it, and its quotient to held-out anchors'.

Pure but for the floats of the state, in which it writes.
"""

import math

from .trust import root, share_of_step

__all__ = ["DRIFT", "HELDOUT_MOST", "Drift", "at_its_least"]

# The average of L_ret and the passes in it; the most that a step of late has added to L_ret's root, below 0 if unknown;
# of held-out anchors the drift, the logarithm of its quotient to the anchors', the measurements in that and the step of
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
_OLD = 0.8  # weight of what was, in the average of L_ret
_GROWTH_KEPT = 0.97  # on each pass
_ROOM = 0.3  # about sqrt(1.6) - 1
_LOOK_AGAIN = 16  # passes after which the growth of a step is measured anew
_LOOK_AGAIN_FIRST, _FARTHER = 4, 4.0  # the same in the start, and how far a step may lead there, in ways so far
_HELDOUT_EVERY = 25  # steps
_HELDOUT_WEIGHT = 0.3
_HELDOUT_LEAST, HELDOUT_MOST = 1.0 / 3.0, 30.0  # of the quotient
_TOO_LITTLE = 0.02  # of epsilon: drift below it says nothing of the quotient


def at_its_least(epsilon: float, heldout: float) -> bool:
    """True if the anchors' epsilon is as small as held-out drift makes it.

    Args:
        epsilon: Of the anchors.
        heldout: That of the held-out anchors.
    """
    return epsilon <= heldout / HELDOUT_MOST * (1.0 + 1e-6)  # from an exponential


class Drift:
    """What is known of it at one step.

    Args:
        state: The constraint's floats, of which it reads and writes those of `DRIFT`.
        asked_for: epsilon(t), of the held-out anchors where there are any.
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
        """The average of L_ret: over about nine passes."""
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
        """The number of steps of which the fastest of late would add 0.3 sqrt(epsilon) to the drift's root."""
        growth = self._state["craft_growth"]
        return _ROOM * root(self.epsilon) / growth if growth > 0.0 else math.inf

    def saw(self, loss: float) -> None:
        """Takes L_ret of a pass into the average."""
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
        """Takes the drift on held-out anchors, and with it epsilon of the others."""
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
        """True if the step that comes may lead drift beyond `trust` epsilon, as far as is known.

        In the start beyond epsilon, of which the pass says more than the average. Steps become longer there, as the
        learning rate is warmed up: one may lead as far as four times all that came before.
        """
        growth, passes = self._state["craft_growth"], int(self._state["craft_drift_passes"])
        if growth < 0.0 or passes % (_LOOK_AGAIN_FIRST if starting else _LOOK_AGAIN) == 0:
            return True
        if starting:
            return _FARTHER * (root(max(self.average, self._loss)) + growth) >= root(self.epsilon)
        return root(self.average) + growth >= root(trust * self.epsilon)

    def share_of_step(self, before: float, after: float, starting: bool, trust: float) -> float:
        """The share of the step to keep; takes note of how far it led.

        Args:
            before: L_ret before the step, of anchors that no gradient of this step is of.
            after: The same after it.
            starting: True in the start, where the bound is epsilon itself and a look over several passes says more
                than the average, which has yet to come up.
            trust: The bound, as a multiple of epsilon.
        """
        growth = max(self._state["craft_growth"], 0.0)
        if math.isfinite(after):
            self._state["craft_growth"] = max(root(after) - root(before), growth)
        bound = (1.0 if starting else trust) * self.epsilon
        return share_of_step(before, after, max(self.average, before), bound, after if starting else 0.0)
