"""The charts of a report as PNGs. Needs matplotlib, the extra `report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from craft_optim._paths import local
from craft_optim.evaluation.plots import require_matplotlib
from craft_optim.report.page import COLOURS
from craft_optim.report.panels import Group, Panel, groups, panels
from craft_optim.report.runs import Run

__all__ = ["draw"]

_ROOM = "#1f8a4c"  # the green of what is below epsilon, as on the page
_STYLES = {"solid": "-", "dashed": "--", "dotted": ":", "faint": "-"}


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draws each chart, and `overview.png` with all of them, into a folder, which is made; returns the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    folder = local(folder)
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
        axes = list(figure.subplots(rows, 2, squeeze=False).flat)
        for panel, axis in zip(drawn, axes, strict=False):
            _draw_panel(axis, panel, found, legend=panel is drawn[0] or any(curve.label for curve in panel.curves))
        for axis in axes[len(drawn) :]:
            axis.set_axis_off()
        files.append(folder / "overview.png")
        figure.savefig(files[-1], dpi=110)
    return files


def _colour(group: int | None) -> str:
    return "black" if group is None else COLOURS[group % len(COLOURS)]


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
        if len(panel.limits) == 1:
            axis.fill_between(limit.x, panel.bottom or 0.0, limit.y, color=_ROOM, alpha=0.1, lw=0)
    if panel.log:
        axis.set_yscale("log")
        short = panel.bottom and panel.top and panel.top < 100 * panel.bottom
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if short else (1.0,)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(panel.bottom, panel.top)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(panel.unit, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(fontsize=8, frameon=False)
