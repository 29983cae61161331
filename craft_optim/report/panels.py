"""The charts of a report, as numbers: which curves, thinned for drawing, one per method. Pure; drawn as a page or PNGs.

A method with several seeds is one curve: their median, and the range from the lowest to the highest. Of one run a point
is the mean of the steps that it stands for, and the range is theirs.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from craft_optim.report.runs import Column, Run

__all__ = ["POINTS", "Curve", "Group", "Limit", "Panel", "groups", "panels"]

POINTS = 240
"""The most that a curve has"""


@dataclass(frozen=True)
class Group:
    """A method: runs that differ in nothing but the seed.

    Attributes:
        constrained: True if they have an epsilon.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def constrained(self) -> bool:
        return _has(self, "epsilon")


@dataclass(frozen=True)
class Curve:
    """A line with the range around it.

    Attributes:
        group: Place of its method among the groups.
        label: Name beside the method's name; "" where a method has one line.
        style: "solid", "dashed", "dotted" or "faint".
        low: Lower end of the range, `high` the upper one; as long as y.
    """

    group: int
    label: str
    style: str
    x: Column
    y: Column
    low: Column
    high: Column


@dataclass(frozen=True)
class Limit:
    """epsilon over the steps.

    Attributes:
        group: Whose it is; None if all constrained methods have it.
    """

    group: int | None
    x: Column
    y: Column


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        caption: How to read it.
        unit: What is on its axis.
        log: True for a logarithmic axis.
        limits: Epsilons, below which is the room that drift may use.
        bottom: Lower end of the axis, `top` the upper one; None: that of the values.
    """

    key: str
    title: str
    caption: str
    unit: str
    log: bool
    curves: tuple[Curve, ...]
    limits: tuple[Limit, ...] = ()
    bottom: float | None = None
    top: float | None = None


@dataclass(frozen=True)
class _Line:
    column: str
    label: str = ""
    style: str = "solid"


def _in_three_styles(**labels: str) -> tuple[_Line, ...]:
    styles = zip(labels.items(), ("solid", "dashed", "dotted"), strict=True)
    return tuple(_Line(column, label, style) for (column, label), style in styles)


# The first of these that a run has is drawn, the next one faint beside it
_DRIFT = {"drift_anchors": "anchors", "drift": "average", "retention_loss": "batches"}
_MEANING = {
    "anchors": "drift on many anchors",
    "average": "drift over the last passes",
    "batches": "drift on the anchors of single passes, which scatters",
    "held-out": "drift on anchors that are not trained on",
}
_HELD_OUT = _Line("drift_heldout", "held-out", "dashed")


@dataclass(frozen=True)
class _Chart:
    """The making of a panel.

    Attributes:
        unit: What is on its axis; "s" becomes "ms" where all values are below 1.
        log: None: logarithmic where the values are far apart.
        smooth: The share of a run over which values are averaged before they are thinned; 0: not at all.
        typical: True: a point is the median of its steps instead of their mean.
        ranged: True: the range of the values is drawn.
    """

    key: str
    title: str
    caption: str
    unit: str
    lines: tuple[_Line, ...]
    log: bool | None = False
    smooth: float = 0.0
    typical: bool = False
    ranged: bool = True
    bounds: tuple[float | None, float | None] = (None, None)


_CHARTS = (
    _Chart(
        "drift",
        "Drift",
        "",
        "drift",
        (),
    ),
    _Chart(
        "loss", "Task loss", "Moving mean over 2 % of the run.", "task loss", (_Line("loss"),), log=None, smooth=0.02
    ),
    _Chart("lambda", "Lambda", "The weight of the retention gradient.", "lambda", (_Line("lambda"),), log=True),
    _Chart(
        "cosine",
        "Cosine of task and retention gradient",
        "Below 0 a step for the task leads away from the snapshot. Moving mean over 2 % of the run.",
        "cosine",
        (_Line("grad_cos"),),
        smooth=0.02,
    ),
    _Chart(
        "shares",
        "Conflict, projection, cap",
        "How often the gradients conflict, the projection acts, and lambda is at its cap. Moving mean over 5 % of the "
        "run.",
        "share of passes",
        _in_three_styles(conflict="conflict", projected="projected", capped="at the cap"),
        smooth=0.05,
        ranged=False,
        bounds=(0.0, 1.0),
    ),
    _Chart(
        "norms",
        "Gradient norms",
        "Merged: the gradient that the optimizer stepped on.",
        "norm",
        _in_three_styles(task_grad_norm="task", retention_grad_norm="retention", merged_grad_norm="merged"),
        log=True,
        smooth=0.02,
        ranged=False,
    ),
    _Chart(
        "cost",
        "Time per step",
        "Median. By the run's own clock where it has logged one; else from the times of its rows, with everything that "
        "happened between them.",
        "s",
        (_Line("seconds"),),
        typical=True,
        ranged=False,
        bounds=(0.0, None),
    ),
    _Chart(
        "interval",
        "Steps between passes",
        "K, the steps that a pass stands for.",
        "steps",
        (_Line("interval"),),
        bounds=(0.0, None),
    ),
    _Chart(
        "kept",
        "Share of a step that is kept",
        "Below 1 where the whole step led beyond the trust region.",
        "share",
        (_Line("step_kept"),),
        bounds=(0.0, 1.0),
    ),
    _Chart("lr", "Learning rate", "As logged.", "learning rate", (_Line("lr"),), ranged=False, bounds=(0.0, None)),
)


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by method: those with an epsilon first, else in their order."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.method, []).append(run)
    found = [Group(name, tuple(of)) for name, of in by_name.items()]
    return sorted(found, key=lambda group: not group.constrained)


def panels(found: Sequence[Group], points: int = POINTS) -> list[Panel]:
    """The charts that the runs have values for.

    Args:
        points: The most that a curve may have, >= 2.
    """
    made = []
    for chart in _CHARTS:
        each = (
            _curve(place, group, line, chart, points)
            for place, group in enumerate(found)
            for line in _lines(chart, group)
        )
        curves = tuple(curve for curve in each if curve is not None)
        if not curves:
            continue
        unit, log, (bottom, top) = chart.unit, chart.log, chart.bounds
        if log is None:
            values = np.concatenate([curve.y for curve in curves])
            log = bool(values.min() > 0.0 and values.max() > _FAR * values.min())
        limits = _limits(found, points) if chart.key == "drift" else ()
        if chart.key == "drift":
            log, bottom, top = _drift_axis(curves, limits)
        elif log:
            bottom, top = _log_range(curves)
        elif unit == "s" and max(curve.y.max() for curve in curves) < 1.0:
            unit, curves = "ms", tuple(_scaled(curve, 1e3) for curve in curves)
        caption = chart.caption or _of_drift(curves, limits)
        made.append(Panel(chart.key, chart.title, caption, unit, log, curves, limits, bottom, top))
    return made


def _of_drift(curves: Sequence[Curve], limits: Sequence[Limit]) -> str:
    """The caption of the lines that are there."""
    room = ["Green: the room below epsilon."] if len(limits) == 1 else []
    shown = {curve.label: " (thin)" if curve.style == "faint" else "" for curve in curves}
    parts = [f"{x.capitalize()}{shown[x]}: {text}." for x, text in _MEANING.items() if x in shown]
    return " ".join([*room, *parts])


def _scaled(curve: Curve, factor: float) -> Curve:
    return replace(curve, y=factor * curve.y, low=factor * curve.low, high=factor * curve.high)


def _lines(chart: _Chart, group: Group) -> tuple[_Line, ...]:
    """The lines of a chart: those of drift are by what was measured."""
    if chart.key != "drift":
        return chart.lines
    known = [name for name in _DRIFT if _has(group, name)]
    shown = [_Line(name, _DRIFT[name], style) for name, style in zip(known, ("solid", "faint"), strict=False)]
    heldout = _HELD_OUT if _has(group, "drift_heldout") else replace(_HELD_OUT, column="heldout")
    return *shown, heldout


def _has(group: Group, column: str) -> bool:
    return any(np.isfinite(run[column]).any() for run in group.runs)


def _curve(place: int, group: Group, line: _Line, chart: _Chart, points: int) -> Curve | None:
    series = [run.measured(line.column) for run in group.runs]
    series = [(x, y) for x, y in series if len(x)]
    if not series:
        return None
    edges = _edges([x for x, _ in series], points)
    smooth = [(x, _moving(y, round(chart.smooth * len(y)))) for x, y in series]
    binned = [_binned(x, y, edges, np.median if chart.typical else np.mean) for x, y in smooth]
    x, y = _across([b[0] for b in binned], np.nanmean), _across([b[1] for b in binned], np.nanmedian)
    if not chart.ranged:
        low = high = y
    elif len(series) > 1:
        low, high = _across([b[1] for b in binned], np.nanmin), _across([b[1] for b in binned], np.nanmax)
    else:
        low, high = (_binned(*series[0], edges, of)[1] for of in (np.min, np.max))
    there = np.isfinite(y)
    return Curve(place, line.label, line.style, x[there], y[there], low[there], high[there])


def _edges(steps: Sequence[Column], points: int) -> Column:
    """The beginnings of bins: every step that there is, or evenly spread ones if those are too many."""
    each = np.unique(np.concatenate(steps))
    return each if len(each) <= points else np.linspace(each[0], each[-1], points + 1)[:-1]


def _binned(x: Column, y: Column, edges: Column, of: Callable[..., Any]) -> tuple[Column, Column]:
    """The mean step and a statistic of each bin; NaN for those without a value."""
    place = np.searchsorted(edges, x, side="right") - 1
    filled, starts = np.unique(place, return_index=True)
    steps, values = np.full(len(edges), np.nan), np.full(len(edges), np.nan)
    for number, part, among in zip(filled, np.split(y, starts[1:]), np.split(x, starts[1:]), strict=True):
        steps[number], values[number] = among.mean(), of(part)
    return steps, values


def _moving(y: Column, width: int) -> Column:
    """Centred moving mean, narrower at both ends."""
    if width < 2:
        return y
    total = np.concatenate([[0.0], np.cumsum(y)])
    place = np.arange(len(y))
    first, last = np.maximum(place - width // 2, 0), np.minimum(place + (width + 1) // 2, len(y))
    moved: Column = (total[last] - total[first]) / (last - first)
    return moved


def _across(rows: Sequence[Column], of: Callable[..., Any]) -> Column:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of bins in which no seed has a value
        found: Column = of(np.stack(rows), axis=0)
    return found


def _limits(found: Sequence[Group], points: int) -> tuple[Limit, ...]:
    """The epsilon of each constrained method, or the one that they share."""
    each = []
    for place, group in enumerate(found):
        if group.constrained:
            name = "epsilon_heldout" if _has(group, "epsilon_heldout") else "epsilon"
            run = next(run for run in group.runs if np.isfinite(run[name]).any())
            x, y = run.measured(name)
            steps, values = _binned(x, y, _edges([x], points), np.mean)
            there = np.isfinite(values)
            each.append(Limit(place, steps[there], values[there]))
    values = np.concatenate([limit.y for limit in each]) if each else np.array([])
    if each and np.ptp(values) <= 1e-9 * values.max():  # means of one number may differ in their last digits
        first, last = min(limit.x[0] for limit in each), max(limit.x[-1] for limit in each)
        return (Limit(None, np.array([first, last]), np.full(2, values[0])),)
    return tuple(each)


_FAR = 20.0  # times the smallest value: on a plain axis a curve that ends there is a line on the ground
_NEAR = 4.0  # times epsilon: as far as drift can go on a plain axis, and what is below epsilon still be seen
_ROOM = 5.0  # epsilon is so many times the lower end of a logarithmic axis, or more


def _drift_axis(curves: Sequence[Curve], limits: Sequence[Limit]) -> tuple[bool, float, float]:
    """True if it is logarithmic, and its ends: epsilon has room below it, and lies on neither end."""
    highest = max(float(curve.y.max()) for curve in curves)
    epsilons = np.concatenate([limit.y for limit in limits]) if limits else np.array([])
    epsilons = epsilons[epsilons > 0.0]
    if not len(epsilons) or highest <= _NEAR * epsilons.min():
        return False, 0.0, 1.1 * max(highest, 1.1 * float(epsilons.max(initial=0.0))) or 1.0
    low, high = float(epsilons.min()), max(highest, float(epsilons.max()))
    lowest = _drawn(curves).min(initial=low)  # rounding errors around 0 would take most of the axis
    return True, _round_below(min(max(float(lowest), low / 30), low / _ROOM)), 1.5 * high


def _log_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """The ends of a logarithmic axis, of six decades at most."""
    values = _drawn(curves)
    if not len(values):
        return 1e-3, 1.0
    low, high = float(values.min()), float(values.max())
    low = min(max(low, high / 1e6), high / 2)
    return _round_below(low / 1.1), high * 1.3


def _drawn(curves: Sequence[Curve]) -> Column:
    """Values that have a place on a logarithmic axis; of faint curves only if there are no others."""
    values = np.concatenate([c.y for c in curves if c.style != "faint"] or [c.y for c in curves])
    above: Column = values[values > 0.0]
    return above


def _round_below(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten: a logarithmic axis labels its lower end."""
    power = 10.0 ** math.floor(math.log10(value))
    return float(f"{max(k for k in (1, 2, 5) if k * power <= value * (1 + 1e-9)) * power:.3g}")
