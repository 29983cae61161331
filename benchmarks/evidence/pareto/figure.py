"""The benchmark's outcome as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .methods import METHODS
from .summary import Front, Tried

__all__ = ["draw"]

_STRONG = {"craft": "#d62728", "fixed": "#1f77b4"}
_OTHERS = ("#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#ff7f0e", "#7f7f7f", "black")
_COLOURS = _STRONG | dict(zip((name for name in METHODS if name not in _STRONG), _OTHERS, strict=True))


def draw(titles: Mapping[str, str], of: Mapping[str, Mapping[str, Front]], rows: Sequence[Tried], path: Path) -> None:
    """Plasticity over retention of all methods, and below the drifts of one strength under other scales and rates.

    Args:
        titles: Setting -> what it is.
        of: Setting -> method -> front; means over seeds are drawn.
        rows: Of the robustness part.
        path: Where the PNG goes.
    """
    figure = Figure(figsize=(4.6 * len(titles), 8.2), layout="constrained")
    axes = figure.subplots(2, len(titles), squeeze=False, gridspec_kw={"height_ratios": [1.5, 1.0]})
    for (setting, title), above, below in zip(titles.items(), *axes, strict=True):
        _draw_fronts(above, of[setting])
        above.set_title(title, fontsize=10)
        _draw_drifts(below, [row for row in rows if row.setting == setting])
    axes[0][0].set_ylabel("plasticity: share of plain fine-tuning's gain")
    axes[1][0].set_ylabel("drift on the anchors at the end, nats")
    axes[0][0].legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)


def _draw_fronts(axis: Any, of: Mapping[str, Front]) -> None:
    for name, front in of.items():
        strong = name in _STRONG
        axis.plot(
            [point[2] for point in front.points],
            [point[1] for point in front.points],
            color=_COLOURS[name],
            label=METHODS[name].title,
            marker="o" if METHODS[name].unit else "*",
            ms=(6 if strong else 4) if METHODS[name].unit else 10,
            lw=2.2 if strong else 1.0,
            zorder=3 if strong else 2,
        )
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="retention")
    axis.grid(alpha=0.25)


def _draw_drifts(axis: Any, rows: Sequence[Tried]) -> None:
    for place, row in enumerate(rows):
        axis.plot([place] * len(row.drifts), row.drifts, marker="o", ls="", ms=5, alpha=0.6, color=_COLOURS[row.method])
        if row.method == "craft":
            axis.plot([place - 0.35, place + 0.35], [row.strength] * 2, color="black", ls="--", lw=1)
    axis.set_yscale("log")
    axis.set_xticks(range(len(rows)), [f"{METHODS[row.method].unit}\n{row.strength:g}" for row in rows], fontsize=9)
    axis.set_xlabel("nine pairs of task-loss scale and learning rate; dashed: epsilon", fontsize=9)
    axis.set_xlim(-0.6, len(rows) - 0.4)
    axis.grid(alpha=0.25, axis="y")
