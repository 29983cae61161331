"""The record of `comparison` as pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = ["draw_all"]

COLOURS = {
    "pretrained": "#8c8c8c",
    "adamw": "#d95f02",
    "logits": "#1b6ca8",
    "hidden": "#4daf4a",
    "hidden-both": "#984ea3",
}
DPI = 100


def draw_all(record: Mapping[str, Any], folder: Path) -> None:
    """Draws success (if there were rollouts), questions, drift over steps and drift by layer.

    Args:
        record: As `compare` returns it.
        folder: Where `success.png`, `mcq.png`, `drift.png` and `layers.png` go.
    """
    methods = record["methods"]
    if methods["pretrained"]["success"] is not None:
        draw_success(record, folder / "success.png")
    draw_questions(methods, folder / "mcq.png")
    draw_drift(record, folder / "drift.png")
    draw_layers(methods, record["epsilon"]["hidden"], folder / "layers.png")


def draw_success(record: Mapping[str, Any], path: Path) -> None:
    """Success on both tasks, with 95 % Wilson intervals."""
    groups = {f"{key} task\n{task}": key for key, task in record["tasks"].items()}
    bars = {
        name: [(row["success"][key]["rate"], row["success"][key]["interval"]) for key in groups.values()]
        for name, row in record["methods"].items()
    }
    _grouped(record["methods"], list(groups), bars, "success rate", path)


def draw_questions(methods: Mapping[str, Any], path: Path) -> None:
    """Accuracy on all questions, with 95 % Wilson intervals, and on each kind of question."""
    kinds = list(methods["pretrained"]["mcq"]["by_question"])
    bars = {
        name: [(row["mcq"]["accuracy"], row["mcq"]["interval"])]
        + [(row["mcq"]["by_question"][kind], None) for kind in kinds]
        for name, row in methods.items()
    }
    _grouped(methods, ["all", *kinds], bars, "questions: right", path, methods["pretrained"]["mcq"]["chance"])


def _grouped(
    methods: Mapping[str, Any],
    groups: list[str],
    bars: Mapping[str, list[tuple[float, Any]]],
    title: str,
    path: Path,
    chance: float | None = None,
) -> None:
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axis = figure.subplots()
    width = 0.84 / len(bars)
    for place, (name, values) in enumerate(bars.items()):
        for group, (value, interval) in enumerate(values):
            x = group + (place - (len(bars) - 1) / 2) * width
            label = methods[name]["label"] if group == 0 else None
            axis.bar(x, value, width * 0.92, color=COLOURS[name], label=label)
            top = value
            if interval is not None:
                low, top = interval
                axis.errorbar(x, value, [[max(value - low, 0)], [max(top - value, 0)]], color="black", capsize=2, lw=1)
            axis.text(x, top + 0.02, f"{value:.2f}", ha="center", fontsize=7)
    if chance is not None:
        axis.axhline(chance, color="black", ls="--", lw=1, label="chance")
    axis.set_xticks(range(len(groups)), groups)
    axis.set_ylim(0, 1.12)
    axis.set_ylabel(title)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=DPI)


def draw_drift(record: Mapping[str, Any], path: Path) -> None:
    """Drift on held-out frames over the steps, a panel per kind; on anchors as a thin line."""
    figure = Figure(figsize=(10.0, 3.9), layout="constrained")
    for axis, (kind, epsilon) in zip(figure.subplots(1, 2), record["epsilon"].items(), strict=True):
        for name, row in record["methods"].items():
            for number, curve in enumerate(row.get("curves", ())):
                label = row["label"] if number == 0 else None
                if heldout := curve["heldout"].get(kind):
                    axis.plot(curve["steps"], heldout, color=COLOURS[name], marker="o", ms=3, lw=1.3, label=label)
                if anchors := curve.get("anchors", {}).get(kind):
                    thin = f"{row['label']}: on anchors" if number == 0 else None
                    axis.plot(curve["steps"], anchors, color=COLOURS[name], ls=":", lw=1.1, label=thin)
        axis.axhline(epsilon, color="black", ls="--", lw=1, label=f"epsilon = {epsilon:g}")
        axis.set_yscale("log")
        axis.set_xlabel("step")
        unit = "nats" if kind == "logits" else "share of the teacher's variance"
        axis.set_title(f"{kind}: drift on held-out frames, {unit}", fontsize=9)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=DPI)


def draw_layers(methods: Mapping[str, Any], epsilon: float, path: Path) -> None:
    """Drift of hidden states by layer and span, on held-out frames of the old task."""
    figure = Figure(figsize=(8.0, 3.8), layout="constrained")
    axis = figure.subplots()
    for name, row in methods.items():
        if layers := row.get("layers"):
            axis.plot(list(layers), list(layers.values()), color=COLOURS[name], marker="o", lw=1.2, label=row["label"])
    axis.axhline(epsilon, color="black", ls="--", lw=1, label=f"epsilon = {epsilon:g}")
    axis.set_yscale("log")
    axis.set_ylabel("share of the teacher's variance", fontsize=9)
    axis.tick_params(axis="x", labelsize=8, rotation=15)
    axis.set_title("drift of hidden states on held-out frames of the old task, by layer", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)
