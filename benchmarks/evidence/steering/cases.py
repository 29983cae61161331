"""One run: what its outcome depends on, and what is measured on the way."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

__all__ = ["Case", "Found", "Record", "keywords"]

Record = dict[str, str | float]


@dataclass(frozen=True)
class Case:
    """The choices that a run's outcome depends on, beside the build that it runs with.

    Attributes:
        setting: Of `pareto.prepared.SETTINGS`, or "parameter" or "network" of `problems`.
        seed: Of all that is drawn.
        every: "auto", or 1.
        epsilon: The drift to allow.
        share: Of the anchors, in each pass.
        lr: Factor on the learning rate.
        scale: Factor on the task loss.
        noise: Standard deviation of the noise on L_ret, of "parameter".
        projection: As of `craft_optim.Rules`.
        heldout: The half of the old test set that epsilon is about, "even" or "odd"; empty for the anchors.
    """

    setting: str
    seed: int
    every: str
    epsilon: float = 0.05
    share: float = 1.0
    lr: float = 1.0
    scale: float = 1.0
    noise: float = 0.0
    projection: str = "violated"
    heldout: str = ""

    @property
    def name(self) -> str:
        """Its name in file names."""
        return "-".join(f"{x:g}" if isinstance(x, float) else str(x) for x in asdict(self).values() if x != "")


def keywords(case: Case) -> dict[str, Any]:
    """What `CraftOptimizer` gets beside epsilon; of held-out anchors nothing."""
    return {"retention_every": "auto" if case.every == "auto" else int(case.every), "projection": case.projection}


class Found:
    """The drift after each step, and how many had a pass.

    Args:
        drift: Measures it, over all anchors.
    """

    def __init__(self, drift: Callable[[], float]) -> None:
        self._drift, self._path, self._passes = drift, list[float](), 0

    def passed(self, metrics: Mapping[str, float]) -> None:
        """A sink for `CraftOptimizer(on_metrics=...)`."""
        self._passes += 1

    def stepped(self) -> None:
        """Takes note of the drift after a step."""
        self._path.append(self._drift())

    def record(self, case: Case) -> Record:
        """The case, and of the drift, in nats, the last, the highest and the mean over the second half."""
        steps = len(self._path)
        return asdict(case) | {
            "steps": steps,
            "passes": self._passes,
            "final": self._path[-1],
            "highest": max(self._path),
            "mean": fmean(self._path[steps // 2 :]),
        }
