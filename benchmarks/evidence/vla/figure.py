"""The picture: what is kept over what is learnt, and where drift ended, on anchors and elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from metaworld_pi0_fast.pictures import COLOURS as OF_DEMO

__all__ = ["draw"]

COLOURS = {
    "pretrained": OF_DEMO["pretrained"],
    "plain": OF_DEMO["adamw"],
    "replay": "#e6ab02",
    "kl": "#4daf4a",
    "logits": OF_DEMO["craft"],
    "hidden": "#984ea3",
}
MARKERS = {
    ("kl", 0.1): "v",
    ("kl", 1.0): "s",
    ("kl", 10.0): "^",
    ("logits", 0.05): "s",
    ("logits", 0.1): "D",
    ("logits", 0.2): "X",
}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Old success over new success, both of each method, where there are rollouts; and each method's drift.

    Args:
        result: As `command.result_of` makes it.
        path: File to write.
    """
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    over, success, drift = figure.subplots(1, 3, width_ratios=(1, 0.9, 0.9))
    success.sharey(drift)
    tried = [row for row in result["rows"] if row["old_success"] is not None]
    trained = [row for row in result["rows"] if row["kind"] != "pretrained"]
    _draw_over(over, tried)
    _draw_success(success, trained)
    _draw_drift(drift, trained, result["epsilon"])
    drift.set_yticks(range(len(trained)), [_title(row) for row in trained], fontsize=8)
    drift.tick_params(labelleft=False)
    drift.invert_yaxis()
    figure.savefig(path, dpi=110)


def _look(row: Mapping[str, Any]) -> dict[str, Any]:
    """Colour by method, shape by strength; hollow where anchors are looked at more rarely than on every step."""
    colour = COLOURS[row["kind"]]
    marker = MARKERS.get((row["kind"], row["strength"]), "o")
    return {"color": colour, "marker": marker, "mfc": colour if row["every"] in (0, 1) else "white", "ls": ""}


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['label']}, K = {row['every']}" if row["every"] else str(row["label"])


def _draw_over(axis: Axes, rows: list[Mapping[str, Any]]) -> None:
    for row in rows:
        across, up = (_margins(row, task) for task in ("new_success", "old_success"))
        look: dict[str, Any] = {"ms": 7, "elinewidth": 0.7, "capsize": 2, "label": _title(row)} | _look(row)
        axis.errorbar(row["new_success"], row["old_success"], xerr=across, yerr=up, **look)
    axis.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xlabel="new task: success", ylabel="old task: success")
    axis.set_title("success on both tasks, 95 % intervals", fontsize=10)
    axis.grid(alpha=0.25)
    if rows:
        axis.legend(fontsize=6, loc="lower left")


def _draw_success(axis: Axes, rows: list[Mapping[str, Any]]) -> None:
    for place, row in enumerate(rows):
        if row["old_success"] is None:
            continue
        for task, marker, offset in (("old", "o", -0.15), ("new", "D", 0.15)):
            rate, margins = row[f"{task}_success"], _margins(row, f"{task}_success")
            label = f"{task} task" if row is rows[0] else None
            look: dict[str, Any] = {"color": COLOURS[row["kind"]], "marker": marker, "ms": 5, "label": label}
            axis.errorbar(rate, place + offset, xerr=margins, elinewidth=0.9, capsize=2, ls="", **look)
    axis.set(xlim=(-0.04, 1.04), xlabel="success")
    axis.set_title("success on each task, 95 % intervals", fontsize=10)
    axis.grid(alpha=0.25, axis="x")
    if axis.containers:
        axis.legend(fontsize=7, loc="center left")


def _margins(row: Mapping[str, Any], task: str) -> list[list[float]]:
    """Below and above a rate; an interval's end may lie on the other side of it by a rounding error."""
    low, high = row[f"{task}_interval"]
    return [[max(row[task] - low, 0.0)], [max(high - row[task], 0.0)]]


def _draw_drift(axis: Axes, rows: list[Mapping[str, Any]], epsilon: float) -> None:
    for place, row in enumerate(rows):
        ends = [row["drift_logits_anchors"], row["drift_logits_heldout"]]
        axis.plot(ends, [place, place], color=COLOURS[row["kind"]], lw=1)
        axis.plot(ends[:1], [place], ms=7, **_look(row))
        axis.plot(ends[1:], [place], color=COLOURS[row["kind"]], marker="|", ms=11, mew=2, ls="")
        for where in ("anchors", "heldout"):
            each = row[f"drift_logits_{where}_per_seed"]
            axis.plot(each, [place] * len(each), color="black", marker=".", ms=3, ls="")
    axis.axvline(epsilon, color="black", ls="--", lw=1)
    axis.set_xscale("log")
    axis.set_xlabel(f"nats; dashed: epsilon = {epsilon:g} of CRaFT, logits")
    axis.set_title("drift: anchors (marker), held-out (bar), seeds (dots)", fontsize=10)
    axis.grid(alpha=0.25, axis="x")
