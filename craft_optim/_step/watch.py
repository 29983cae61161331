"""Watch over a run: warnings about a multiplier at its cap, a failing sink, too short steps and too little reach."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from craft_optim._warn import warn
from craft_optim.metrics import Sink, keyed

from .constraint import prefix
from .drift import HELDOUT_MOST, at_its_least
from .layout import Layout
from .rules import Rules

__all__ = ["REACH_AT", "CapWatch", "HeldOutWatch", "SinkWatch", "StepWatch", "warn_of_little_reach"]

# The retention step that shows how much of the model retention reaches. Earlier gradients may rightly be zero: at the
# teacher's own weights, or for a LoRA matrix whose partner is still zero.
REACH_AT = 10
_LITTLE_REACH = 0.1
# Steps in a row with lambda at its cap and the constraint violated before a warning.
_PATIENCE_AT_CAP = 100
_LITTLE_STEP = 0.25
_BEYOND = 1.25  # of epsilon
_PATIENCE_HELDOUT = 5  # measurements
_LEAST_PATIENCE = 20  # with a large `retention_every`, as a run may have less than a hundred


class CapWatch:
    """Counts steps of each constraint with lambda at its cap and drift above epsilon; warns once."""

    def __init__(self) -> None:
        self.counts = False  # True if any constraint was at its cap on the last step
        self._at_cap: dict[str | None, int] = {}
        self._warned: set[str | None] = set()

    def look(self, name: str | None, metrics: Mapping[str, float], rules: Rules) -> None:
        """Reads the metrics of a retention step."""
        capped, drift, epsilon = (metrics[keyed(what, name)] for what in ("capped", "drift", "epsilon"))
        self._at_cap[name] = self._at_cap.get(name, 0) + 1 if capped == 1.0 and drift > epsilon else 0
        self.counts = any(self._at_cap.values())
        patience = max(_LEAST_PATIENCE, math.ceil(_PATIENCE_AT_CAP / metrics["interval"]))
        if self._at_cap[name] >= patience and name not in self._warned:
            self._warned.add(name)
            every = rules.retention_every
            rarely = "" if every in ("auto", 1) else f'leave retention_every at "auto" (now {every}); '
            warn(
                f"{prefix(name)}lambda has been at its cap for {self._at_cap[name]} retention steps while the drift "
                f"({drift:.3g}) is above epsilon ({epsilon:.3g}). The constraint is not met. Try in this order: let "
                f"the learning rate decay; {rarely}lower the learning rate; raise epsilon; raise rho (now "
                f"{rules.rho:g}), or the maximum of a controller that has one."
            )


class HeldOutWatch:
    """Warns once if held-out drift stays above epsilon with the anchors' epsilon at its minimum."""

    def __init__(self) -> None:
        self._found: dict[str | None, float] = {}
        self._beyond: dict[str | None, int] = {}

    def look(self, name: str | None, metrics: Mapping[str, float]) -> None:
        """Reads the metrics of a retention step."""
        asked, found = (metrics.get(keyed(what, name), math.nan) for what in ("epsilon_heldout", "heldout"))
        if math.isnan(found) or found == self._found.get(name):  # not measured at every step
            return
        self._found[name], epsilon = found, metrics[keyed("epsilon", name)]
        beyond = found > _BEYOND * asked and at_its_least(epsilon, asked)
        before = self._beyond.get(name, 0)
        if before < _PATIENCE_HELDOUT:
            self._beyond[name] = before + 1 if beyond else 0
        if before == _PATIENCE_HELDOUT - 1 and beyond:
            warn(
                f"{prefix(name)}Drift on held-out anchors is {found:.3g}, above epsilon ({asked:.3g}), and more than "
                f"{HELDOUT_MOST:g} times the drift on the anchors: to hold these more tightly (epsilon is "
                f"{epsilon:.3g} there, and goes no lower) does not hold others like them. Use more anchors, and more "
                "varied ones, or raise epsilon."
            )


class StepWatch:
    """Warns once if the trust region has left little of a hundred steps in a row."""

    def __init__(self) -> None:
        self._short, self._warned = 0, False

    def look(self, metrics: Mapping[str, float]) -> None:
        """Reads the metrics of a retention step."""
        self._short = self._short + 1 if metrics["step_kept"] < _LITTLE_STEP else 0
        if self._short == _PATIENCE_AT_CAP and not self._warned:
            self._warned = True
            warn(
                f"The trust region has left less than {_LITTLE_STEP:g} of each of the last {self._short} steps that "
                f"had a pass: at this learning rate a whole step leads beyond epsilon ({metrics['epsilon']:.3g}). "
                "Lower the learning rate, raise epsilon, or take more anchors per pass."
            )


class SinkWatch:
    """Calls a sink of metrics; warns once if it fails."""

    def __init__(self) -> None:
        self._failed = False

    def tell(self, sink: Sink, metrics: Mapping[str, float]) -> None:
        """Calls the sink after the step; an error must not look as if the step had failed."""
        try:
            sink(dict(metrics))
        except Exception as error:
            if not self._failed:
                self._failed = True
                warn(
                    f"`on_metrics` raised {type(error).__name__}: {error}. The step is done, and training goes on; "
                    "further errors of it are not reported. To stop a run, read `optimizer.metrics` in the loop.",
                )


def warn_of_little_reach(
    name: str | None, reached: Sequence[bool], parameters: Sequence[Tensor], names: Sequence[str], layout: Layout
) -> None:
    """Warns if retention has a gradient in a small part of the trainable elements. Collective.

    Whole tensors count: in an embedding only the rows of the anchors' tokens have a gradient.

    Args:
        name: Name of the constraint.
        reached: For each parameter, True if its retention gradient is not zero on any process.
        parameters: The optimizer's parameters.
        names: Names of the parameters, if the optimizer has them.
        layout: Layout of the processes.
    """
    sizes = [n * p.requires_grad for n, p in zip(layout.elements(parameters), parameters, strict=True)]
    share = sum(n for n, here in zip(sizes, reached, strict=True) if here) / sum(sizes)
    if share >= _LITTLE_REACH or not layout.first:
        return
    trained = [(p.requires_grad, here) for p, here in zip(parameters, reached, strict=True)]
    free = [name for name, of in zip(names, trained, strict=False) if of == (True, False)]
    warn(
        f"{prefix(name)}After {REACH_AT} retention steps the retention loss has a gradient in {share:.1%} of "
        f"the trainable elements ({trained.count((True, True))} of {sum(p for p, _ in trained)} tensors"
        f"{'; not in ' + ', '.join(free[:3]) if free else ''}): nothing holds the others. Anchor an output "
        "that depends on what is trained: logits, or hidden states behind the trained layers, not behind frozen "
        "ones only. If the others may move freely, filter this warning out.",
    )
