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
    figure = Figure(figsize=(13, 5), layout="constrained")
    drift, formats = figure.subplots(1, 2)
    trained = [row for row in rows if row["kind"] != "before"]
    (before,) = (row for row in rows if row["kind"] == "before")
    drift.set(yscale="log", ylabel="drift on other prompts, nats per token (less is better)")
    drift.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    drift.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    drift.yaxis.set_minor_formatter(NullFormatter())
    drift.set_title("How far its answers elsewhere have moved", fontsize=10)
    formats.set(ylabel="48 answers: share in the format asked for (more is better)", ylim=(-0.05, 1.0))
    formats.set_title("Does it still do as it is told?", fontsize=10)
    for axis, key in ((drift, "drift_heldout"), (formats, "formats")):
        axis.set(xlabel="learnt of the new task: fall of its cross-entropy, nats per token", xlim=(-0.05, 1.5))
        axis.set_xticks([0.0, 0.2, 0.4, 0.6, 0.8])
        axis.grid(alpha=0.25)
        _marks(axis, trained, key)
    _line(drift, EPSILON, f"epsilon {EPSILON:g}")
    _line(formats, before["formats"], "before")
    figure.savefig(path, dpi=110)


def spaced(values: Sequence[float], gap: float) -> list[float]:
    """Heights for labels of these values: in their order, at least `gap` apart, and as a whole as high as they are.

    Example:
        >>> [round(x, 2) for x in spaced([0.5, 0.0, 0.52], 0.1)]
        [0.46, 0.0, 0.56]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    blocks: list[tuple[list[int], float]] = []  # labels that touch, and the height of the middle one
    for i in order:
        members, middle = [i], values[i]
        while blocks:
            below, height = blocks[-1]
            if middle - height >= gap * (len(below) + len(members)) / 2.0 - 1e-9:
                break
            blocks.pop()
            members = below + members
            middle = sum(values[j] for j in members) / len(members)
        blocks.append((members, middle))
    placed = {j: middle + gap * (n - (len(of) - 1) / 2.0) for of, middle in blocks for n, j in enumerate(of)}
    return [placed[i] for i in range(len(values))]


def _line(axis: Axes, level: float, text: str) -> None:
    axis.axhline(level, color="black", lw=1, ls="--")
    axis.annotate(text, (-0.05, level), textcoords="offset points", xytext=(4, 3), fontsize=8)


def _marks(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """A mark for each row, and its label in a column to the right of all."""
    for row in rows:
        axis.plot(row["gain"], row[key], marker="o", ls="", color=COLOURS.get(row["kind"], OTHERS))
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)
    to_axes = axis.transData + axis.transAxes.inverted()  # heights as shares of the axes' own
    at = [float(to_axes.transform((row["gain"], row[key]))[1]) for row in rows]
    for row, height in zip(rows, spaced(at, 0.043), strict=True):
        colour = COLOURS.get(row["kind"], OTHERS)
        axis.annotate(
            row["label"],
            (row["gain"], row[key]),
            xytext=(0.63, height),
            textcoords="axes fraction",
            fontsize=7.5,
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.5, "shrinkB": 3},
        )
