"""A run's metrics as pictures."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .environment import short

COLOURS = {"pretrained": "#8c8c8c", "adamw": "#d95f02", "craft": "#1b6ca8"}
LABELS = {"pretrained": "before", "adamw": "AdamW", "craft": "CraftOptimizer(AdamW)"}


def _smooth(values: list[float], width: int = 15) -> list[float]:
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]


def draw_curves(metrics: Path, epsilon: float, path: Path) -> Path:
    """Task loss, drift against epsilon, lambda and the conflict cosine over the steps, one thin line per seed."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["method"], row["seed"]].append(row)

    figure, ((loss, drift), (multiplier, cosine)) = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True)
    for (method, seed), run in rows.items():
        colour, label = (
            COLOURS[method],
            LABELS[method] if seed == min(s for m, s in rows if m == method) else None,
        )
        steps = [row["step"] for row in run]
        loss.plot(steps, _smooth([row["loss"] for row in run]), color=colour, label=label, lw=1)
        measured = [row for row in run if "drift_anchors" in row]
        drift.plot(
            [r["step"] for r in measured], [r["drift_anchors"] for r in measured], color=colour, label=label, lw=1.2
        )
        fresh = [row for row in run if row.get("fresh")]
        if fresh:
            at = [row["step"] for row in fresh]
            multiplier.plot(at, _smooth([row["lambda"] for row in fresh]), color=colour, lw=1)
            cosine.plot(at, _smooth([row["grad_cos"] for row in fresh]), color=colour, lw=1)
    drift.axhline(epsilon, color="black", ls="--", lw=1, label=f"epsilon = {epsilon:g}")
    drift.axhspan(0.8 * epsilon, 1.25 * epsilon, color="black", alpha=0.1, lw=0)
    drift.set_yscale("log")
    multiplier.set_yscale("log")
    cosine.axhline(0.0, color="black", lw=0.6)
    for axis, title in (
        (loss, "loss on the new task"),
        (drift, "drift on 64 anchors of the old tasks"),
        (multiplier, "multiplier lambda"),
        (cosine, "cosine of task and retention gradient"),
    ):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in (multiplier, cosine):
        axis.set_xlabel("step")
    loss.legend(fontsize=8)
    drift.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_success(summary: dict[str, Any], old: str, path: Path) -> Path:
    """Success on every task before, after AdamW and after CRaFT, with 95 % Wilson intervals; the new task first."""
    methods = [m for m in COLOURS if m in summary]
    *known, learnt = summary[methods[0]]["tasks"]
    tasks = [learnt, *known]
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.5 * len(tasks)))
    for i, method in enumerate(methods):
        row = summary[method]
        places = [place + 0.22 * (i - (len(methods) - 1) / 2) for place in range(len(tasks))]
        rates = [row["tasks"][task] for task in tasks]
        ends = [row["task_intervals"][task] for task in tasks]
        low = [max(rate - end[0], 0.0) for rate, end in zip(rates, ends, strict=True)]
        high = [max(end[1] - rate, 0.0) for rate, end in zip(rates, ends, strict=True)]
        look: dict[str, Any] = {"color": COLOURS[method], "marker": "o", "ls": "", "ms": 7, "elinewidth": 1}
        axis.errorbar(rates, places, xerr=[low, high], capsize=2, label=LABELS[method], **look)
    axis.axhline(0.5, color="black", lw=0.8)
    names = [short(task).replace("-", " ") for task in tasks]
    axis.set_yticks(range(len(tasks)), [f"{names[0]}\n(the new task)", *names[1:]])
    axis.invert_yaxis()
    axis.set(xlim=(-0.03, 1.03), xlabel="share of attempts in the simulator that solve the task; bars: 95 % interval")
    axis.set_title(f"A robot that can do {old} learns one more: {names[0]}", fontsize=11)
    axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    axis.grid(alpha=0.25, axis="x")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_films(films: dict[str, npt.NDArray[np.uint8]], path: Path, milliseconds: int = 60) -> Path:
    """Films side by side as an endless GIF, each under its method's name; the shorter ones wait at their last picture.

    Args:
        films: Method -> pictures of shape `(n, height, width, 3)`, uint8, of one size.
        path: File to write.
        milliseconds: Duration of one picture.
    """
    length = max(len(film) for film in films.values())
    height, width = next(iter(films.values())).shape[1:3]
    pictures = []
    for i in range(length):
        picture = Image.new("RGB", (width * len(films), height + 16), "white")
        for j, (method, film) in enumerate(films.items()):
            ImageDraw.Draw(picture).text((j * width + 4, 2), LABELS[method], fill=COLOURS[method])
            picture.paste(Image.fromarray(film[min(i, len(film) - 1)]), (j * width, 16))
        pictures.append(picture.quantize(96))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, optimize=True)
    return path
