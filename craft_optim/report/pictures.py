"""The charts of a report as PNGs. Needs matplotlib, the extra `report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from craft_optim.evaluation.plots import require_matplotlib
from craft_optim.report.colours import LIGHT
from craft_optim.report.outcomes import Scatter
from craft_optim.report.panels import Group, Panel, groups, panels
from craft_optim.report.runs import Run
from craft_optim.report.summary import BAND

__all__ = ["draw"]

_STYLES = {"solid": "-", "dashed": "--", "dotted": ":", "faint": "-"}


def draw(runs: Sequence[Run], scatters: Sequence[Scatter], folder: Path) -> list[Path]:
    """A picture of each chart, and `overview.png` with all of the runs'.

    Args:
        runs: From `read_runs`.
        scatters: From `read_outcomes`.
        folder: Made if it is not there.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    found = groups(runs)
    drawn = panels(found)
    files = []
    for panel in drawn:
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        _draw_panel(figure.subplots(), panel, found, legend=True)
        files.append(folder / f"{panel.key}.png")
        figure.savefig(files[-1], dpi=130)
    if drawn:
        rows = (len(drawn) + 1) // 2
        figure = Figure(figsize=(11, 3.1 * rows), layout="constrained")
        axes = figure.subplots(rows, 2, squeeze=False).flat
        for number, axis in enumerate(axes):
            if number < len(drawn):
                _draw_panel(
                    axis, drawn[number], found, legend=number == 0 or any(curve.label for curve in drawn[number].curves)
                )
            else:
                axis.set_axis_off()
        files.append(folder / "overview.png")
        figure.savefig(files[-1], dpi=110)
    colours = {group.name: place for place, group in enumerate(found)}
    for number, scatter in enumerate(scatters):
        figure = Figure(figsize=(6.0, 4.6), layout="constrained")
        _draw_scatter(figure.subplots(), scatter, colours)
        files.append(folder / ("pareto.png" if len(scatters) == 1 else f"pareto-{number + 1}.png"))
        figure.savefig(files[-1], dpi=130)
    return files


def _colour(group: int | None) -> str:
    return "black" if group is None else LIGHT[group % len(LIGHT)]


def _draw_panel(axis: Any, panel: Panel, found: Sequence[Group], legend: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for curve in panel.curves:
        ink, faint = _colour(curve.group), curve.style == "faint"
        words = " ".join(filter(None, (found[curve.group].name, curve.label)))
        look = {"color": ink, "ls": _STYLES[curve.style], "lw": 0.8 if faint else 1.5, "alpha": 0.5 if faint else 1.0}
        axis.plot(curve.x, curve.y, label=words, marker="." if len(curve.x) < 3 else None, **look)
        axis.fill_between(curve.x, curve.low, curve.high, color=ink, alpha=0.08 if faint else 0.16, lw=0)
    for limit in panel.limits:
        ink, constant = _colour(limit.group), len({*limit.y}) == 1
        name = f"epsilon = {limit.y[0]:g}" if constant else "epsilon"
        axis.plot(limit.x, limit.y, color=ink, ls="--", lw=1, label=name)
        axis.fill_between(limit.x, BAND[0] * limit.y, BAND[1] * limit.y, color=ink, alpha=0.12, lw=0)
    if panel.log:
        axis.set_yscale("log")
        short = panel.bottom and panel.top and panel.top < 100 * panel.bottom
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if short else (1.0,)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(panel.bottom, panel.top)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(fontsize=8, frameon=False)


def _draw_scatter(axis: Any, scatter: Scatter, colours: dict[str, int]) -> None:
    front = scatter.front
    axis.step([p.x for p in front], [p.y for p in front], where="pre", color="grey", ls="--", lw=1)
    for method, of in scatter.sweeps.items():
        ink = _colour(colours.setdefault(method, len(colours)))
        axis.plot([p.x for p in of], [p.y for p in of], color=ink, lw=0.8, alpha=0.5)
    named = set()
    for point in scatter.points:
        ink = _colour(colours.setdefault(point.method, len(colours)))
        for ends, place in ((point.x_interval, axis.hlines), (point.y_interval, axis.vlines)):
            if ends:
                place(point.y if place == axis.hlines else point.x, *ends, color=ink, lw=1.2, alpha=0.6)
        if point.seeds:
            axis.scatter(*zip(*point.seeds, strict=True), color=ink, s=10, alpha=0.5, lw=0)
        name = None if point.method in named else point.method
        named.add(point.method)
        axis.scatter([point.x], [point.y], color=ink, s=45, edgecolors="white", label=name, zorder=3)
        axis.annotate(point.label, (point.x, point.y), (5, 5), textcoords="offset points", fontsize=7)
    axis.set_title(scatter.title, fontsize=10)
    axis.set_xlabel(scatter.x)
    axis.set_ylabel(scatter.y)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
