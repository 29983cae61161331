"""A run in numbers, and a verdict in words. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from craft_optim._step.drift import HELDOUT_MOST, at_its_least
from craft_optim.heldout import runs_away
from craft_optim.report.runs import Column, Run

__all__ = ["BAND", "Summary", "Verdict", "in_text", "judge", "judge_all", "summarise"]

BAND = (0.9, 1.1)
"""Drift / epsilon within which a constraint that binds is held"""

_LAST = 0.05  # the part of a run whose rows stand for its end
_AT_LEAST = 20  # rows, where there are as many
_COMPLETE = 0.9  # of the steps: skipped passes have no interval
_REMEDY = "raise epsilon, lower retention_every, lower the learning rate, or raise rho"  # as CraftOptimizer's warning

Source = Literal["anchors", "heldout", "average", "batches"]


@dataclass(frozen=True)
class Summary:
    """The numbers of one run; None where its rows do not tell.

    Attributes:
        loss: Task loss, mean over the end.
        passes: Retention steps, as a share of all steps.
        drift: At the end, on what epsilon is for: the anchors or held-out ones.
        source: Where `drift` is from: "anchors", many of them; "heldout", many of the held-out ones; "average", that of
            the last passes; "batches", the median of the last anchor batches.
        heldout: Drift on held-out anchors, where last measured.
        epsilon: The last.
        violated: Share of the retention steps with drift above epsilon: of the average, where there is one.
        capped: Share with lambda at its cap.
        stuck: Number with both.
        out_of_reach: True if epsilon is of held-out anchors, and the anchors' own ended as small as it gets.
        conflict: Mean share of conflicting blocks.
        projected: Mean share of blocks in which the projection acted.
        skipped: Retention passes that were not finite.
        cosine: Median of the cosine of both gradients.
        falling: True if drift still came down at the end.
        ms_per_step: Median.
    """

    name: str
    steps: int
    retention_steps: int
    passes: float | None
    loss: float | None
    drift: float | None
    source: Source
    heldout: float | None
    epsilon: float | None
    violated: float | None
    capped: float | None
    stuck: int
    out_of_reach: bool
    conflict: float | None
    projected: float | None
    skipped: int
    cosine: float | None
    falling: bool
    ms_per_step: float | None

    @property
    def ratio(self) -> float | None:
        """Drift / epsilon."""
        return None if self.drift is None or not self.epsilon else self.drift / self.epsilon


@dataclass(frozen=True)
class Verdict:
    """A judgement of whether the constraint was held, in words.

    Attributes:
        kind: "held", "not held", "inactive" (drift below the band: the constraint did not bind at the end), or "free"
            (nothing was constrained).
        words: A sentence or two, with the remedy where there is one to look for.
    """

    kind: str
    words: str


def summarise(run: Run) -> Summary:
    """The numbers of one run."""
    batch = run.measured("retention_loss")[1]
    elsewhere = run.measured("drift_heldout")[1]
    drift, source = _drift(run)
    level, bound = ("drift" if len(run.measured("drift")[1]) else "retention_loss"), "epsilon"
    above = _above(run, level, bound)
    if source == "heldout":
        level, bound = "heldout", "epsilon_heldout"
    over, epsilon = _above(run, level, bound), run.measured(bound)[1]
    skipped = run.measured("skipped")[1]
    took = run.measured("seconds")[1]
    cosine = run.measured("grad_cos")[1]
    return Summary(
        name=run.name,
        steps=int(run.steps[-1]),
        retention_steps=len(batch),
        passes=_passes(run),
        loss=_mean(_end(run.measured("loss")[1])),
        drift=drift,
        source=source,
        heldout=drift if source == "heldout" else float(elsewhere[-1]) if len(elsewhere) else None,
        epsilon=float(epsilon[-1]) if len(epsilon) else None,
        violated=_mean(over[np.isfinite(over)]),
        capped=_mean(run.measured("capped")[1]),
        stuck=int(((above == 1.0) & (run["capped"] == 1.0)).sum()),
        out_of_reach=source == "heldout" and _at_its_least(run),
        conflict=_mean(run.measured("conflict")[1]),
        projected=_mean(run.measured("projected")[1]),
        skipped=int(skipped.max()) if len(skipped) else 0,
        cosine=float(np.median(cosine)) if len(cosine) else None,
        falling=_falling(run.measured(level)[1]),
        ms_per_step=1e3 * float(np.median(took)) if len(took) else None,
    )


def _drift(run: Run) -> tuple[float | None, Source]:
    """Drift at the end, and where it is from."""
    elsewhere, steering = run.measured("drift_heldout")[1], run.measured("heldout")[1]
    if len(steering):
        return (float(elsewhere[-1]) if len(elsewhere) else _mean(_end(steering))), "heldout"
    measured = run.measured("drift_anchors")[1]
    if len(measured):
        return float(measured[-1]), "anchors"
    average, batch = run.measured("drift")[1], run.measured("retention_loss")[1]
    if len(average):
        return _mean(_end(average)), "average"
    return (float(np.median(_end(batch))) if len(batch) else None), "batches"


def _above(run: Run, level: str, bound: str) -> Column:
    """1 on rows where one column is above another, 0 where it is not, NaN without a value of either."""
    found = (run[level] > run[bound]).astype(float)
    found[~(np.isfinite(run[level]) & np.isfinite(run[bound]))] = np.nan
    return found


def _at_its_least(run: Run) -> bool:
    own, asked = run.measured("epsilon")[1], run.measured("epsilon_heldout")[1]
    return bool(len(own) and len(asked) and at_its_least(own[-1], asked[-1]))


def _passes(run: Run) -> float | None:
    """Passes / steps; None where the rows have no `interval`, or leave passes out, as those of a Trainer may."""
    steps, intervals = run.measured("interval")
    if not len(steps):
        return None
    between = float(steps[-1] - steps[0])
    if intervals[:-1].sum() < _COMPLETE * between:
        return None
    return len(steps) / (between + float(intervals[-1]))


def _end(values: Column) -> Column:
    return values[-max(_AT_LEAST, int(_LAST * len(values))) :]


def _mean(values: Column) -> float | None:
    return float(values.mean()) if len(values) else None


def _falling(drift: Column) -> bool:
    """True if the last tenth's median is 5 % below that of the tenth before."""
    part = len(drift) // 10
    return part >= 5 and bool(np.median(drift[-part:]) < 0.95 * np.median(drift[-2 * part : -part]))


def judge(summary: Summary) -> Verdict:
    """The verdict on one run."""
    drift, ratio = summary.drift, summary.ratio
    if drift is None:
        return Verdict("free", "Nothing was constrained, and no drift was measured.")
    if ratio is None:
        return Verdict("free", f"Nothing was constrained: drift ended at {drift:.3g}.")
    what = "Drift on held-out anchors" if summary.source == "heldout" else "Drift"
    ended = f"{what} ended at {drift:.3g}, {ratio:.2f} x epsilon"
    if ratio > BAND[1]:
        return Verdict("not held", f"{ended}: not held. {_why(summary)}{_heldout(summary)}")
    if ratio < BAND[0]:
        words = f"{ended}: held, with room. The constraint did not bind at the end."
        return Verdict("inactive", f"{words}{_heldout(summary)}{_skipped(summary)}")
    return Verdict("held", f"{ended}: held.{_heldout(summary)}{_skipped(summary)}")


def _why(summary: Summary) -> str:
    if summary.out_of_reach:
        return (
            f"It is more than {HELDOUT_MOST:g} times the drift on the anchors, which are held as tightly as they will "
            "be: use more anchors, and more varied ones, or raise epsilon."
        )
    if summary.stuck > 0.1 * summary.retention_steps:
        return (
            f"Lambda sat at its cap, and drift above epsilon, for {summary.stuck} of {summary.retention_steps} "
            f"retention steps: {_REMEDY}.{_skipped(summary)}"
        )
    if summary.skipped > 0.01 * summary.retention_steps:
        return f"{summary.skipped} retention passes were not finite, and left the task step alone."
    if summary.falling:
        return "Drift was still coming down: train for longer, or let the learning rate decay."
    return f"Lambda had not come to rest after {summary.retention_steps} retention steps: {_REMEDY}."


def _heldout(summary: Summary) -> str:
    drift, heldout, epsilon = summary.drift, summary.heldout, summary.epsilon
    if drift is None or heldout is None or epsilon is None or summary.source == "heldout":
        return ""
    said = runs_away(drift, heldout, epsilon)
    return "" if said is None else f" {said}"


def _skipped(summary: Summary) -> str:
    return f" Retention passes that were not finite: {summary.skipped}." if summary.skipped else ""


def judge_all(summaries: Sequence[Summary]) -> Verdict:
    """The verdict on runs of one method under several seeds.

    It is held if it is in every run; the words are those of the run with the largest drift / epsilon.
    """
    if len(summaries) == 1:
        return judge(summaries[0])
    worst = max(summaries, key=lambda x: (x.ratio is not None, x.ratio or 0.0, x.drift or 0.0))
    drifts = [x.drift for x in summaries if x.drift is not None]
    ratios = [x.ratio for x in summaries if x.ratio is not None]
    verdict = judge(worst)
    if not ratios:
        spread = f" from {min(drifts):.3g} to {max(drifts):.3g} in {len(drifts)} runs" if drifts else ""
        return Verdict("free", f"Nothing was constrained: drift ended{spread}." if drifts else verdict.words)
    held = sum(ratio <= BAND[1] for ratio in ratios)
    spread = f"from {min(ratios):.2f} to {max(ratios):.2f} x epsilon, median {median(ratios):.2f}"
    return Verdict(
        verdict.kind,
        f"Held in {held} of {len(ratios)} runs, {spread}. The largest: {verdict.words[0].lower()}{verdict.words[1:]}",
    )


def in_text(value: float | None, form: str = ".3g") -> str:
    """A number of a summary as text; "-" for None."""
    return "-" if value is None else format(value, form)
