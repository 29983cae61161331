"""Fronts, robustness and targets, computed from the records of runs. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from .measures import Point, dominated_area, plasticity, retention, retention_at
from .training import Record

__all__ = [
    "LEARNED",
    "Difference",
    "Front",
    "Outcome",
    "Target",
    "Tried",
    "best_strength",
    "differences",
    "fronts",
    "outcomes",
    "standard_error",
    "targets",
    "tried",
]

LEARNED = 0.95  # the plasticity at which retention is compared


@dataclass(frozen=True)
class Outcome:
    """A run, rated against plain fine-tuning with the same seed and learning rate."""

    setting: str
    method: str
    strength: float
    seed: int
    scale: float
    lr: float
    plasticity: float
    retention: float
    drift: float  # on all anchors
    heldout: float  # on the old test set

    @property
    def point(self) -> Point:
        """Its place in the figure."""
        return self.plasticity, self.retention

    @property
    def least(self) -> float:
        """min(plasticity, retention)."""
        return min(self.point)

    @property
    def nominal(self) -> bool:
        """True if neither task loss nor learning rate was scaled."""
        return (self.scale, self.lr) == (1.0, 1.0)


def outcomes(records: Iterable[Record]) -> list[Outcome]:
    """Rates runs; those of plain fine-tuning must be among them, of each setting, seed and learning rate."""
    rows: list[dict[str, Any]] = [dict(record) for record in records]
    plain = {(r["setting"], r["seed"], r["lr"]): r for r in rows if r["method"] == "plain" and r["scale"] == 1.0}
    rated = []
    for row in rows:
        reference = plain[row["setting"], row["seed"], row["lr"]]
        rated.append(
            Outcome(
                **{k: row[k] for k in ("setting", "method", "strength", "seed", "scale", "lr")},
                plasticity=plasticity(row["new"], before=row["new_before"], plain=reference["new"]),
                retention=retention(row["old"], before=row["old_before"], plain=reference["old"], chance=row["chance"]),
                drift=row["drift_anchors"],
                heldout=row["drift_heldout"],
            )
        )
    return rated


def standard_error(values: Sequence[float]) -> float:
    """The standard error of a mean; 0 for one value, of which nothing is known."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Front:
    """The front of a method in a setting, over all of its strengths.

    Attributes:
        method: Its name.
        points: A row per strength: strength, and means over seeds of plasticity, retention and drift on the anchors.
        area: Dominated area per seed.
        at_learned: `retention_at` the plasticity `LEARNED`, per seed.
        best: Of the strengths, the largest mean of min(plasticity, retention).
    """

    method: str
    points: list[tuple[float, float, float, float]]
    area: list[float]
    at_learned: list[float]
    best: float


def fronts(rated: Sequence[Outcome], setting: str) -> dict[str, Front]:
    """The fronts of all methods, in the order they occur in."""
    rows = [row for row in rated if row.setting == setting and row.nominal]
    return {method: _front([row for row in rows if row.method == method]) for method in dict.fromkeys(_methods(rows))}


def _methods(rows: Iterable[Outcome]) -> list[str]:
    return [row.method for row in rows]


def _front(rows: Sequence[Outcome]) -> Front:
    by_strength = _grouped(rows, lambda row: row.strength)
    by_seed = [[row.point for row in of_seed] for of_seed in _grouped(rows, lambda row: row.seed).values()]
    points = [
        (strength, fmean(r.plasticity for r in of), fmean(r.retention for r in of), fmean(r.drift for r in of))
        for strength, of in by_strength.items()
    ]
    return Front(
        method=rows[0].method,
        points=points,
        area=[dominated_area(of) for of in by_seed],
        at_learned=[retention_at(of, LEARNED) for of in by_seed],
        best=max(fmean(row.least for row in of) for of in by_strength.values()),
    )


def _grouped(rows: Sequence[Outcome], key: Callable[[Outcome], float]) -> dict[float, list[Outcome]]:
    return {value: [row for row in rows if key(row) == value] for value in sorted({key(row) for row in rows})}


def best_strength(rated: Sequence[Outcome], setting: str, method: str) -> float:
    """The strength of the sweep with the largest mean over seeds of min(plasticity, retention)."""
    rows = [row for row in rated if (row.setting, row.method) == (setting, method) and row.nominal]
    strengths = _grouped(rows, lambda row: row.strength)
    return max(strengths, key=lambda strength: fmean(row.least for row in strengths[strength]))


@dataclass(frozen=True)
class Difference:
    """How much one front is ahead of another: means over seeds of paired differences, and their standard errors.

    Attributes:
        area: Of dominated area.
        area_error: Its standard error.
        at_learned: Of retention at the plasticity `LEARNED`.
        at_learned_error: Its standard error.
    """

    area: float
    area_error: float
    at_learned: float
    at_learned_error: float


def differences(ours: Front, theirs: Front) -> Difference:
    """Our front against theirs, seed by seed.

    Raises:
        ValueError: They are of different numbers of seeds.
    """
    pairs = [
        [a - b for a, b in zip(mine, other, strict=True)]
        for mine, other in ((ours.area, theirs.area), (ours.at_learned, theirs.at_learned))
    ]
    (area, area_error), (learned, learned_error) = ((fmean(of), standard_error(of)) for of in pairs)
    return Difference(area, area_error, learned, learned_error)


@dataclass(frozen=True)
class Tried:
    """One strength in one setting, over scales of the task loss, learning rates and seeds.

    Attributes:
        setting: Its name.
        method: The method's.
        strength: The strength.
        worst: The smallest min(plasticity, retention) over scales and learning rates, per seed.
        drifts: Drift on the anchors of each run.
    """

    setting: str
    method: str
    strength: float
    worst: list[float]
    drifts: list[float]

    @property
    def spread(self) -> float:
        """Largest over smallest drift."""
        return max(self.drifts) / min(self.drifts)

    @property
    def ratios(self) -> list[float]:
        """Drift over strength, which means something where that is epsilon."""
        return [drift / self.strength for drift in self.drifts]


def tried(rated: Sequence[Outcome], setting: str, method: str, strength: float) -> Tried:
    """Gathers what was run with one strength."""
    rows = [row for row in rated if (row.setting, row.method, row.strength) == (setting, method, strength)]
    by_seed = _grouped(rows, lambda row: row.seed).values()
    return Tried(setting, method, strength, [min(r.least for r in of) for of in by_seed], [r.drift for r in rows])


@dataclass(frozen=True)
class Target:
    """Something that was to be reached, and what was found."""

    setting: str
    what: str
    found: str
    met: bool


def targets(
    setting: str, front_of: dict[str, Front], ours: Tried, untuned: Tried, margin: float = 0.03, ahead: float = 0.05
) -> list[Target]:
    """Targets of the benchmark in a setting, and what was found.

    Args:
        setting: Its name.
        front_of: As `fronts`.
        ours: CraftOptimizer with one epsilon.
        untuned: A fixed lambda of 1.
        margin: By which the dominated area may be smaller than that of the swept fixed lambda.
        ahead: By which the worst min(plasticity, retention) should be above that of `untuned`.
    """
    middle, highest = median(ours.ratios), max(ours.ratios)
    area, theirs = fmean(front_of["craft"].area), fmean(front_of["fixed"].area)
    worst, other = fmean(ours.worst), fmean(untuned.worst)
    return [
        Target(setting, "median drift / epsilon in 0.9 to 1.1", f"{middle:.3f}", 0.9 <= middle <= 1.1),
        Target(setting, "every drift / epsilon <= 1.35", f"{highest:.3f}", highest <= 1.35),
        Target(
            setting,
            f"worst min(P, R) >= that of lambda = 1, plus {ahead:g}",
            f"{worst:.3f} against {other:.3f}",
            worst >= other + ahead,
        ),
        Target(
            setting,
            f"dominated area >= that of the swept lambda, minus {margin:g}",
            f"{area:.3f} against {theirs:.3f}",
            area >= theirs - margin,
        ),
    ]
