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
from craft_optim.report.summary import BAND

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
        label: Name beside the method's name; "" for the panel's own.
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
        log: True for a logarithmic axis.
        limits: Epsilons to draw with the band around them.
        bottom: Lower end of the axis, `top` the upper one; None: that of the values.
    """

    key: str
    title: str
    caption: str
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
_DRIFT = {"drift_anchors": "", "drift": "average", "retention_loss": "anchor batches"}
_HELD_OUT = _Line("drift_heldout", "held out", "dotted")


@dataclass(frozen=True)
class _Chart:
    """The making of a panel.

    Attributes:
        smooth: The share of a run over which values are averaged before they are thinned; 0: not at all.
        typical: True: a point is the median of its steps instead of their mean.
        ranged: True: the range of the values is drawn.
    """

    key: str
    title: str
    caption: str
    lines: tuple[_Line, ...]
    log: bool = False
    smooth: float = 0.0
    scale: float = 1.0
    typical: bool = False
    ranged: bool = True
    bounds: tuple[float | None, float | None] = (None, None)


_LOW, _HIGH = BAND
_CHARTS = (
    _Chart("loss", "Task loss", "Moving mean over 2 % of the run.", (_Line("loss"),), smooth=0.02),
    _Chart(
        "drift",
        "Drift against epsilon",
        f"Dashed: epsilon; band: {_LOW:g} to {_HIGH:g} epsilon. Solid: over many anchors where that was measured, else "
        "the average over passes, or single anchor batches, which scatter; faint: the next of these beside it. Dotted: "
        "held-out anchors; epsilon is theirs where the run has one for them.",
        (),
        log=True,
    ),
    _Chart("lambda", "Multiplier lambda", "The weight of the retention gradient.", (_Line("lambda"),), log=True),
    _Chart(
        "cosine",
        "Cosine of task and retention gradient",
        "Below 0 a step for the task is one away from the snapshot. Moving mean over 2 % of the run.",
        (_Line("grad_cos"),),
        smooth=0.02,
    ),
    _Chart(
        "shares",
        "Conflict, projection, cap",
        "Share of steps, moving over 5 % of the run. Solid: the gradients conflict; dashed: the projection acts; "
        "dotted: lambda is at its cap.",
        _in_three_styles(conflict="conflict", projected="projected", capped="at the cap"),
        smooth=0.05,
        ranged=False,
        bounds=(0.0, 1.0),
    ),
    _Chart(
        "norms",
        "Gradient norms",
        "Solid: task; dashed: retention; dotted: merged, what the optimizer stepped on.",
        _in_three_styles(task_grad_norm="task", retention_grad_norm="retention", merged_grad_norm="merged"),
        log=True,
        smooth=0.02,
        ranged=False,
    ),
    _Chart(
        "cost",
        "Milliseconds per step",
        "Median. By the run's own clock where it has logged one; else from the times of its rows, with everything that "
        "happened between them.",
        (_Line("seconds"),),
        scale=1e3,
        typical=True,
        ranged=False,
        bounds=(0.0, None),
    ),
    _Chart(
        "interval",
        "Steps between passes",
        "K, the steps that a pass stands for.",
        (_Line("interval"),),
        bounds=(0.0, None),
    ),
    _Chart(
        "kept",
        "Share of a step that is kept",
        "Below 1 where the whole step led beyond the trust region.",
        (_Line("step_kept"),),
        bounds=(0.0, 1.0),
    ),
    _Chart("lr", "Learning rate", "As logged.", (_Line("lr"),), ranged=False, bounds=(0.0, None)),
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
        curves = [curve for curve in each if curve is not None]
        if curves:
            limits = _limits(found, points) if chart.key == "drift" else ()
            bottom, top = chart.bounds
            if chart.log:
                bottom, top = _log_range(curves, limits)
            made.append(Panel(chart.key, chart.title, chart.caption, chart.log, tuple(curves), limits, bottom, top))
    return made


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
    series = [(x, chart.scale * y) for x, y in series if len(x)]
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
    constant = {float(v) for limit in each for v in limit.y}
    if len(constant) == 1 and each:
        first, last = min(limit.x[0] for limit in each), max(limit.x[-1] for limit in each)
        return (Limit(None, np.array([first, last]), np.array([*constant, *constant])),)
    return tuple(each)


def _log_range(curves: Sequence[Curve], limits: Sequence[Limit]) -> tuple[float, float]:
    """The ends of a logarithmic axis: drift begins at rounding errors around 0, which would take most of it."""
    values = np.concatenate([c.y for c in curves if c.style != "faint"] or [c.y for c in curves])
    values = values[values > 0.0]
    if not len(values):
        return 1e-3, 1.0
    low, high = float(values.min()), float(values.max())
    if limits:
        epsilons = np.concatenate([limit.y for limit in limits])
        low, high = max(low, float(epsilons.min()) / 30), max(high, 1.5 * float(epsilons.max()))
    low = min(max(low, high / 1e6), high / 2)
    return _round_below(low / 1.1), high * 1.3


def _round_below(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten: a logarithmic axis labels its lower end."""
    power = 10.0 ** math.floor(math.log10(value))
    return float(f"{max(k for k in (1, 2, 5) if k * power <= value * (1 + 1e-9)) * power:.3g}")
