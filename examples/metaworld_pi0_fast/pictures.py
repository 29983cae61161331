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
        (drift, "drift on 64 anchors of the old task"),
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


def draw_success(summary: dict[str, Any], old: str, new: str, path: Path) -> Path:
    """Success rates before, after AdamW and after CRaFT, with 95 % Wilson intervals."""
    methods = [m for m in COLOURS if m in summary]
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        for j, task in enumerate(("old_success", "new_success")):
            rate, (low, high) = summary[method][task], summary[method][f"{task}_interval"]
            x = j + (i - (len(methods) - 1) / 2) * width
            label = LABELS[method] if j == 0 else None
            axis.bar(x, rate, width * 0.92, color=COLOURS[method], label=label)
            axis.errorbar(x, rate, [[max(rate - low, 0)], [max(high - rate, 0)]], color="black", capsize=3, lw=1)
            axis.text(x, min(high + 0.03, 1.04), f"{rate:.2f}", ha="center", fontsize=8)
    axis.set_xticks([0, 1], [f"old task\n{old}", f"new task\n{new}"])
    axis.set_ylim(0, 1.15)
    axis.set_ylabel("success rate")
    axis.set_title(f"seeds {summary['seeds']}, bars: 95 % interval", fontsize=10)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_sweep(result: dict[str, Any], path: Path) -> Path:
    """Success on both tasks, and drift on anchors and held-out frames, over epsilon; AdamW as horizontal lines."""
    rows, adamw = result["craft"], result["adamw"]
    epsilons = [row["epsilon"] for row in rows]
    figure, (success, drift) = plt.subplots(1, 2, figsize=(10, 3.8))
    for task, colour in (("old_success", COLOURS["craft"]), ("new_success", "#4daf4a")):
        rates = [row[task] for row in rows]
        low = [max(row[task] - row[f"{task}_interval"][0], 0.0) for row in rows]
        high = [max(row[f"{task}_interval"][1] - row[task], 0.0) for row in rows]
        name = task.replace("_success", " task")
        success.errorbar(epsilons, rates, [low, high], color=colour, marker="o", capsize=3, label=f"CRaFT, {name}")
        success.axhline(adamw[task], color=colour, ls=":", label=f"AdamW, {name}")
    success.set_ylim(-0.03, 1.05)
    success.set_title(f"success, {len(result['seeds'])} seeds, 95 % interval", fontsize=10)
    for key, colour, name in (
        ("drift_anchor", COLOURS["craft"], "on the anchors"),
        ("drift_heldout", "#984ea3", "on held-out frames"),
    ):
        drift.plot(epsilons, [row[key] for row in rows], color=colour, marker="o", label=f"CRaFT, {name}")
        drift.axhline(adamw[key], color=colour, ls=":", label=f"AdamW, {name}")
    drift.plot(epsilons, epsilons, color="black", lw=1, label="drift = epsilon")
    drift.fill_between(epsilons, [0.8 * e for e in epsilons], [1.25 * e for e in epsilons], color="black", alpha=0.1)
    drift.set_yscale("log")
    drift.set_title(f"final drift ({result['retention']})", fontsize=10)
    for axis in (success, drift):
        axis.set_xscale("log")
        axis.set_xlabel("epsilon")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
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
