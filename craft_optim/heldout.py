"""Drift on held-out anchors while training: it shows whether the anchors represent what must be kept.

It only reports. `CraftOptimizer(heldout=anchors)` acts on it: epsilon is then the drift on those anchors.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from craft_optim._numbers import number, whole
from craft_optim._warn import warn
from craft_optim.metrics import keyed
from craft_optim.retention import Retention, measurable

__all__ = ["RUNS_AWAY", "HeldOutDrift", "runs_away"]

# On the small pi0_fast held-out drift was 5 times epsilon and the anchors' drift where the old task stayed as good as
# it was (thousands of anchors), and 10 and 19 times epsilon with 256 and 64 anchors, where more of them helped.
RUNS_AWAY = 10.0


def runs_away(anchors: float, heldout: float, epsilon: float, factor: float = RUNS_AWAY) -> str | None:
    """A warning if drift is held on the anchors and not elsewhere; None if all is well.

    Warns if held-out drift is above `factor` times the anchors' drift, and above `factor` times epsilon.

    Args:
        anchors: Drift on the anchors.
        heldout: Drift on held-out anchors of the same kind.
        epsilon: The allowed drift.
        factor: Largest acceptable ratio.
    """
    if heldout <= factor * max(anchors, epsilon):
        return None
    return (
        f"Drift is {heldout:.3g} on held-out anchors, {anchors:.3g} on those that are trained on (epsilon "
        f"{epsilon:.3g}): the model agrees with its snapshot on these anchors, and not on others like them. Use more "
        "anchors, and more varied ones; a smaller epsilon does less."
    )


class HeldOutDrift:
    """A sink for `on_metrics` that measures drift on held-out anchors, and warns once if it runs away.

    Every `every`-th call adds `drift_anchors` and `drift_heldout` to the metrics that it passes on.

    Example:
        optimizer = CraftOptimizer(
            base, retention, on_metrics=HeldOutDrift(retention, heldout_cache, sink=JSONLWriter("metrics.jsonl"))
        )

    It runs after the base's step and changes nothing: no gradients, modes, random numbers, position or epsilon.
    `CraftOptimizer(heldout=anchors)` adapts epsilon to held-out anchors that it measures itself: the metric "heldout".
    Report on other anchors here: those that steer no longer represent unseen ones.

    With several processes, CraftOptimizer calls the sink on one only, where a wrapped or sharded model would wait for
    the others: call `measure()` yourself on every process instead.

    Args:
        retention: The closure in training, one that measures its `drift`.
        heldout: Held-out anchors of the same kind, as its `drift` takes them: a cache that was built before training.
        every: Calls per measurement; the first call measures.
        count: Largest number of anchors of each to measure on, evenly spaced. None: all.
        factor: Ratio of held-out drift to the anchors' drift, and to epsilon, above which it warns.
        name: Name of the closure's constraint, if there are several; its drifts are then called "drift_heldout/name".
        sink: Receiver of the metrics, such as `JSONLWriter`.

    Raises:
        TypeError: `retention` does not measure its drift.
        ValueError: `every`, `count` or `factor` is out of range, or `heldout` is of another kind.
        RuntimeError: In a call: several processes share the closure.
    """

    def __init__(
        self,
        retention: Retention,
        heldout: Any,
        *,
        every: int = 100,
        count: int | None = 256,
        factor: float = RUNS_AWAY,
        name: str | None = None,
        sink: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        every, count = whole("every", every), None if count is None else whole("count", count)
        factor = number("factor", factor, least=1.0, above=True, finite=False)
        self.retention, self.heldout, self.every, self.count = measurable(retention), heldout, every, count
        self.factor, self.name, self.sink = factor, name, sink
        self.retention.check_anchors(heldout)
        self._calls = 0
        self._warned = False

    def __call__(self, metrics: Mapping[str, float]) -> None:
        row = dict(metrics)
        if self._calls % self.every == 0:
            self._refuse_several()
            row |= self.measure()
            self._judge(row)
        self._calls += 1
        if self.sink is not None:
            self.sink(row)

    def measure(self) -> dict[str, float]:
        """Both current drifts, by name. With several processes each must call it, and each measures the whole."""
        return {
            keyed("drift_anchors", self.name): self.retention.drift(None, self.count),
            keyed("drift_heldout", self.name): self.retention.drift(self.heldout, self.count),
        }

    def _judge(self, row: Mapping[str, float]) -> None:
        anchors, heldout, epsilon = (row[keyed(x, self.name)] for x in ("drift_anchors", "drift_heldout", "epsilon"))
        said = runs_away(anchors, heldout, epsilon, self.factor)
        if said is not None and not self._warned:
            self._warned = True
            warn(said)

    def _refuse_several(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and self.retention.shared:
            raise RuntimeError(
                "HeldOutDrift cannot be a sink where several processes train one model: CraftOptimizer calls one of "
                "them, and its forward would wait for the others. Call `measure()` in your loop, on every process."
            )
