"""The picture: what is learnt against what is kept, a mark per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from .methods import EPSILON

__all__ = ["draw"]

COLOURS = {"craft": "#1b7837", "plain": "#b2182b", "kl": "#2166ac"}
OTHERS = "#777777"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws drift on prompts that are no anchors, and answers in the format asked for, over what was learnt.

    Args:
        rows: Of `rows_of`.
        path: File to write.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    drift, formats = figure.subplots(1, 2)
    trained = [row for row in rows if row["kind"] != "before"]
    (before,) = (row for row in rows if row["kind"] == "before")
    for row in trained:
        _mark(drift, row, row["drift_heldout"], slanted=False)
        _mark(formats, row, row["formats"], slanted=True)
    _line(drift, EPSILON, f"epsilon {EPSILON:g}")
    drift.set(yscale="log", ylabel="drift on other prompts, nats per token (less is better)")
    drift.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    drift.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    drift.yaxis.set_minor_formatter(NullFormatter())
    drift.set_title("How far its answers elsewhere have moved", fontsize=10)
    _line(formats, before["formats"], "before")
    formats.set(ylabel="48 answers: share in the format asked for (more is better)", ylim=(-0.05, 1.0))
    formats.set_title("Does it still do as it is told?", fontsize=10)
    for axis in (drift, formats):
        axis.set(xlabel="learnt of the new task: fall of its cross-entropy, nats per token", xlim=(-0.35, 1.25))
        axis.set_xticks([0.0, 0.2, 0.4, 0.6, 0.8])
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def _line(axis: Axes, level: float, text: str) -> None:
    axis.axhline(level, color="black", lw=1, ls="--")
    axis.annotate(text, (-0.35, level), textcoords="offset points", xytext=(4, 3), fontsize=8)


def _mark(axis: Axes, row: Mapping[str, Any], value: float, *, slanted: bool) -> None:
    """Slanted labels where many marks are at one height."""
    colour = COLOURS.get(row["kind"], OTHERS)
    axis.plot(row["gain"], value, marker="o", ls="", color=colour)
    look: dict[str, Any] = {"ha": "right", "va": "center", "xytext": (-7, 0)}
    if slanted:
        look = {"ha": "left", "va": "bottom", "rotation": 30, "rotation_mode": "anchor", "xytext": (5, 4)}
    axis.annotate(row["label"], (row["gain"], value), textcoords="offset points", fontsize=7, color=colour, **look)
