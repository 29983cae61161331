"""Pictures: success of every task before and after, by method; and success after each of several tasks in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from metaworld_pi0_fast.environment import short
from stages.plot import draw_matrix

from .methods import METHODS
from .runs import SCENARIOS
from .summary import matrix_of, rows_of

__all__ = ["draw"]


def draw(runs: Sequence[Mapping[str, Any]], folder: Path, name: str) -> None:
    """Draws one more skill to `folder/name.png`, and of "sequence" each method to `folder/name-METHOD.png`."""
    if rows := rows_of(runs):
        _draw_tasks(rows, folder / f"{name}.png")
    for method in METHODS:
        if (matrix := matrix_of(runs, method)) is not None:
            draw_matrix(matrix, folder / f"{name}-{method.name}.png")


def _draw_tasks(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows are methods, columns tasks; the new one first, mean and worst of the old ones last."""
    (new,) = SCENARIOS["button"].tasks
    old = [short(task) for task in rows[0]["tasks"]]
    columns = [f"NEW: {short(new)}", *old, "old: mean", "old: worst"]
    values = [[row["new"], *row["tasks"].values(), row["old_mean"], row["old_worst"]] for row in rows]
    figure = Figure(figsize=(11, 1.8 + 0.34 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(values, vmin=0.0, vmax=1.0, cmap="RdYlBu", aspect="auto")
    for place, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "black" if 0.15 < value < 0.85 else "white"
            axis.text(column, place, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=9)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9)
    for between in (0.5, len(old) + 0.5):
        axis.axvline(between, color="white", lw=4)
    axis.set_title("Share of rollouts that solve each task after the new one was learned", fontsize=11)
    figure.savefig(path, dpi=110)
