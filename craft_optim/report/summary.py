"""A run in numbers, and a verdict in words. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from craft_optim._step.drift import HELDOUT_MOST, at_its_least
from craft_optim.heldout import runs_away
from craft_optim.report.numbers import number, percent
from craft_optim.report.runs import Column, Run

__all__ = ["BAND", "LABELS", "Summary", "Verdict", "judge", "judge_all", "summarise"]

BAND = (0.9, 1.1)
"""Drift / epsilon within which a constraint that binds is held"""

_ABOVE = f"{BAND[1]:g} x epsilon"

LABELS = {
    "held": "held",
    "inactive": "held, with room",
    "narrow": "held on its own anchors alone",
    "late": "held at the end",
    "not held": "not held",
    "free": "not constrained",
}
"""The kind of a verdict, in the words of page and table"""

_LAST = 0.05  # the part of a run whose rows stand for its end
_AT_LEAST = 20  # rows, if there are as many among the recent ones
_RECENT = 0.1  # of a run's steps: what was measured in these is of the end
_COMPLETE = 0.9  # of the steps: skipped passes have no interval
_OF_THE_WAY = 0.1  # of the steps above the band: with more of them, drift was held at the end alone
_WORST_FIRST = ("not held", "narrow", "late", "held", "inactive", "free")
_SHORT = 0.75  # of a step: with less, the trust region has held the new task back
_DECAYED = 0.5  # of its largest value: a learning rate that ended below has decayed

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
        anchors: Drift at the end on the anchors, also where epsilon is for held-out ones.
        heldout: Drift on held-out anchors, where last measured.
        heldout_step: The step of that measurement, if it is from before the end.
        epsilon: The last.
        violated: Share of the steps with drift above 1.1 x epsilon: of the average, where there is one.
        peak: The largest drift / epsilon of all steps.
        kept: Mean share of a step with a pass that the trust region left.
        capped: Share of the passes with lambda at its cap.
        late: Number of the passes in the last quarter, which say why drift was not held.
        stuck: Number of these with lambda at its cap and drift above 1.1 x epsilon.
        between: Median number of steps between passes while drift was above epsilon.
        decayed: True if the learning rate ended well below its largest value.
        out_of_reach: True if epsilon is of held-out anchors, and the anchors' own ended as small as it gets.
        conflict: Mean share of conflicting blocks.
        projected: Mean share of blocks in which the projection acted.
        skipped: Passes that were not finite.
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
    anchors: float | None
    heldout: float | None
    heldout_step: int | None
    epsilon: float | None
    violated: float | None
    peak: float | None
    kept: float | None
    capped: float | None
    late: int
    stuck: int
    between: float | None
    decayed: bool | None
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
        kind: "held"; "inactive": held, and drift ended below the band, where the constraint did not bind; "late": held
            at the end, and above 1.1 x epsilon for more than a tenth of the steps; "narrow": held, and drift on
            held-out anchors ran away; "not held"; "free": nothing was constrained.
        words: A sentence or two, with the remedy where there is one to look for.
    """

    kind: str
    words: str


def summarise(run: Run) -> Summary:
    """The numbers of one run."""
    batch = run.measured("retention_loss")[1]
    at, elsewhere = run.measured("drift_heldout")
    anchors, source = _on_anchors(run)
    drift: float | None = anchors
    level, bound = ("drift" if len(run.measured("drift")[1]) else "retention_loss"), "epsilon"
    above = _times(run, level, bound) > BAND[1]  # what lambda works on
    late = np.flatnonzero(np.isfinite(run["retention_loss"]))[-max(1, len(batch) // 4) :]
    if len(run.measured("heldout")[1]):
        drift, source = (float(elsewhere[-1]) if len(elsewhere) else _mean(_end(run, "heldout"))), "heldout"
        level, bound = "heldout", "epsilon_heldout"
    times, epsilon = _times(run, level, bound), run.measured(bound)[1]
    skipped, rate = run.measured("skipped")[1], run.measured("lr")[1]
    took = run.measured("seconds")[1]
    cosine = run.measured("grad_cos")[1]
    between = run["interval"][above & np.isfinite(run["interval"])]
    return Summary(
        name=run.name,
        steps=int(run.steps[-1]),
        retention_steps=len(batch),
        passes=_passes(run),
        loss=_mean(_end(run, "loss")),
        drift=drift,
        source=source,
        anchors=anchors,
        heldout=drift if source == "heldout" else float(elsewhere[-1]) if len(elsewhere) else None,
        heldout_step=int(at[-1]) if len(at) and not _recent(run, at) else None,
        epsilon=float(epsilon[-1]) if len(epsilon) else None,
        violated=_share_above(run, times),
        peak=float(np.nanmax(times)) if np.isfinite(times).any() else None,
        kept=_mean(run.measured("step_kept")[1]),
        capped=_mean(run.measured("capped")[1]),
        late=len(late),
        stuck=int((above & (run["capped"] == 1.0))[late].sum()),
        between=float(np.median(between)) if len(between) else None,
        decayed=bool(rate[-1] < _DECAYED * rate.max()) if len(rate) else None,
        out_of_reach=source == "heldout" and _at_its_least(run),
        conflict=_mean(run.measured("conflict")[1]),
        projected=_mean(run.measured("projected")[1]),
        skipped=int(skipped.max()) if len(skipped) else 0,
        cosine=float(np.median(cosine)) if len(cosine) else None,
        falling=_falling(run.measured(level)[1]),
        ms_per_step=1e3 * float(np.median(took)) if len(took) else None,
    )


def _on_anchors(run: Run) -> tuple[float | None, Source]:
    """Drift at the end on the anchors, and where it is from."""
    at, measured = run.measured("drift_anchors")
    average, batch = run.measured("drift")[1], run.measured("retention_loss")[1]
    if len(measured) and (_recent(run, at) or not len(batch)):
        return float(measured[-1]), "anchors"
    if len(average):
        return _mean(_end(run, "drift")), "average"
    return (float(np.median(_end(run, "retention_loss"))) if len(batch) else None), "batches"


def _recent(run: Run, at: Column) -> bool:
    """True if the last measurement tells of the end."""
    first, last = run.steps[0], run.steps[-1]
    return bool(at[-1] >= last - _RECENT * (last - first))


def _times(run: Run, level: str, bound: str) -> Column:
    """One column as a multiple of another; NaN without a value of either, or where the other is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        times: Column = run[level] / run[bound]
    return np.where(np.isfinite(times), times, np.nan)


def _share_above(run: Run, times: Column) -> float | None:
    """The share of the steps above epsilon: a row stands for the steps until the next one, few where passes are."""
    there = np.isfinite(times)
    if not there.any():
        return None
    gaps = np.diff(run.steps[there])
    weights = np.append(gaps, gaps[-1:] if len(gaps) else 1.0)
    return float(np.average(times[there] > BAND[1], weights=weights))


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


def _end(run: Run, name: str) -> Column:
    """A column's last values: of a long run 5 %, at least 20; of a short one those of its last tenth, at least one."""
    at, values = run.measured(name)
    if not len(values):
        return values
    first, last = run.steps[0], run.steps[-1]
    recent = int((at >= last - _RECENT * (last - first)).sum())
    return values[-max(1, min(recent, max(_AT_LEAST, int(_LAST * len(values))))) :]


def _mean(values: Column) -> float | None:
    return float(values.mean()) if len(values) else None


def _falling(drift: Column) -> bool:
    """True if the last tenth's median is 5 % below that of the tenth before."""
    part = len(drift) // 10
    return part >= 5 and bool(np.median(drift[-part:]) < 0.95 * np.median(drift[-2 * part : -part]))


def judge(summary: Summary) -> Verdict:
    """The verdict on one run: on its end, and on the way there."""
    drift, ratio = summary.drift, summary.ratio
    if drift is None:
        return Verdict("free", "Nothing was constrained, and no drift was measured.")
    if ratio is None:
        return Verdict("free", f"Nothing was constrained: drift ended at {number(drift)}.")
    what = "Drift on held-out anchors" if summary.source == "heldout" else "Drift"
    ended = f"{what} ended at {number(drift)}, {number(ratio)} x epsilon ({number(summary.epsilon)})"
    if ratio > BAND[1]:
        return Verdict("not held", f"{ended}: not held. {_why(summary)}{_heldout(summary)}")
    above = summary.violated or 0.0
    way = f"for {percent(above)} of the steps, at most {number(summary.peak)} x" if above else "on no step"
    ended_only, beyond = above > _OF_THE_WAY, _heldout(summary)
    label = LABELS["late"] if ended_only else LABELS["held"]
    left = f"{percent(1.0 - ratio)} of epsilon was left" if ratio < BAND[0] else ""
    room = left and (f"; {left}" if ended_only else f", with room: {left}")
    held = f"{ended}: {label}{room}. On the way it was above {_ABOVE} {way}."
    if ended_only:
        held += " If the final model alone counts, that is no trouble; if not, lower the learning rate."
    kind = "narrow" if beyond else "late" if ended_only else "inactive" if room else "held"
    return Verdict(kind, f"{held}{beyond}{_cut(summary)}{_skipped(summary)}")


def _why(summary: Summary) -> str:
    if summary.out_of_reach:
        return (
            f"It is more than {HELDOUT_MOST:g} times the drift on the anchors, which are held as tightly as they will "
            "be: use more anchors, and more varied ones, or raise epsilon."
        )
    if summary.stuck > 0.1 * summary.late:
        often = "all" if summary.stuck == summary.late else f"{summary.stuck:,}"
        drift = "drift on the anchors above its own epsilon" if summary.source == "heldout" else f"drift above {_ABOVE}"
        capped = f"Lambda was at its cap, and {drift}, in {often} of the last {summary.late:,} passes"
        return f"{capped}. {_remedy(summary, 'raise rho, at the expense of the new task')}{_skipped(summary)}"
    if summary.skipped > 0.01 * summary.retention_steps:
        return f"{summary.skipped:,} passes were not finite, and left the task step alone."
    if summary.falling:
        decay = "" if summary.decayed else ", or let the learning rate decay"
        return f"Drift was still coming down: train for longer{decay}."
    return f"Lambda had not come to rest after {summary.retention_steps:,} passes. {_remedy(summary)}"


def _remedy(summary: Summary, last: str | None = None) -> str:
    """The advice of docs/troubleshooting.md in its order, less what this run has done already."""
    parts = [
        "let the learning rate decay" if summary.decayed is False else None,
        'leave retention_every at "auto"' if (summary.between or 1.0) > 1.0 else None,
        "lower the learning rate",
        "use more anchors, and more varied ones" if summary.source == "heldout" else None,
        f"raise epsilon to {number(summary.drift)}, where drift is",
        last,
    ]
    return f"Try in this order: {'; '.join(filter(None, parts))}."


def _heldout(summary: Summary) -> str:
    drift, heldout, epsilon = summary.drift, summary.heldout, summary.epsilon
    if drift is None or heldout is None or epsilon is None or summary.source == "heldout":
        return ""
    said = runs_away(drift, heldout, epsilon)
    return "" if said is None else f" {said}"


def _cut(summary: Summary) -> str:
    if summary.kept is None or summary.kept >= _SHORT:
        return ""
    return (
        f" To hold it, the trust region left {percent(summary.kept)} of the steps, which the new task lacks: lower the "
        "learning rate, train for longer, or raise epsilon."
    )


def _skipped(summary: Summary) -> str:
    return f" Passes that were not finite: {summary.skipped:,}." if summary.skipped else ""


def judge_all(summaries: Sequence[Summary]) -> Verdict:
    """The verdict on runs of one method under several seeds.

    The worst of them is the verdict; of several alike the one with the largest drift / epsilon.
    """
    if len(summaries) == 1:
        return judge(summaries[0])
    worst = min(summaries, key=lambda x: (_WORST_FIRST.index(judge(x).kind), -(x.ratio or 0.0), -(x.drift or 0.0)))
    drifts = [x.drift for x in summaries if x.drift is not None]
    ratios = [x.ratio for x in summaries if x.ratio is not None]
    verdict = judge(worst)
    if not ratios:
        spread = f" from {number(min(drifts))} to {number(max(drifts))} in {len(drifts)} runs" if drifts else ""
        return Verdict("free", f"Nothing was constrained: drift ended{spread}." if drifts else verdict.words)
    held = sum(ratio <= BAND[1] for ratio in ratios)
    spread = f"drift from {number(min(ratios))} to {number(max(ratios))} x epsilon, median {number(median(ratios))}"
    words = f"The worst: {verdict.words[0].lower()}{verdict.words[1:]}"
    return Verdict(verdict.kind, f"Held at the end in {held} of {len(ratios)} runs, {spread}. {words}")
