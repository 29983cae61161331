"""What a run found: one record per method and seed, their summary, and the table that is printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from craft_optim.evaluation.statistics import wilson


@dataclass(frozen=True)
class Outcome:
    """One policy, measured.

    Attributes:
        method: "pretrained", "adamw" or "craft".
        seed: Seed of the fine-tuning run.
        old_success: Whether each rollout of the old task succeeded; None if rollouts were skipped.
        new_success: The same for the new task.
        old_ce: Cross-entropy per action token on held-out frames of the old task, in nats.
        new_ce: The same for the new task.
        drift_anchor: Mean drift from the snapshot over all anchors, in the unit of epsilon.
        drift_heldout: The same on frames of the old task that are not anchors.
        ms_per_step: Wall time of a training step; None for the pretrained policy.
    """

    method: str
    seed: int
    old_success: Sequence[bool] | None
    new_success: Sequence[bool] | None
    old_ce: float
    new_ce: float
    drift_anchor: float
    drift_heldout: float
    ms_per_step: float | None


def summarise(outcomes: Iterable[Outcome], epsilon: float) -> dict[str, Any]:
    """Means over seeds per method; success rates with the Wilson interval over all rollouts of all seeds.

    Returns:
        method -> `old_success`, `old_success_interval`, `old_success_per_seed`, the same for `new_success`, and
        `old_ce`, `new_ce`, `drift_anchor`, `drift_heldout`, `epsilon`, `ms_per_step`.
    """
    by_method: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_method.setdefault(outcome.method, []).append(outcome)
    summary: dict[str, Any] = {}
    for method, runs in by_method.items():
        row: dict[str, Any] = {}
        for task in ("old_success", "new_success"):
            found = [list(s) for s in (getattr(run, task) for run in runs) if s is not None]
            pooled = [success for s in found for success in s]
            row[task] = fmean(pooled) if pooled else None
            row[f"{task}_interval"] = wilson(sum(pooled), len(pooled)) if pooled else None
            row[f"{task}_per_seed"] = [fmean(s) for s in found]
        for value in ("old_ce", "new_ce", "drift_anchor", "drift_heldout"):
            row[value] = fmean(getattr(run, value) for run in runs)
        row["drift_anchor_per_seed"] = [run.drift_anchor for run in runs]
        row["epsilon"] = epsilon
        times = [run.ms_per_step for run in runs if run.ms_per_step is not None]
        row["ms_per_step"] = fmean(times) if times else None
        summary[method] = row
    return summary


_CAPTION = "[..]: 95 % interval; CE: cross-entropy per action token on held-out frames, nats"


def format_rate(row: dict[str, Any], task: str) -> str:
    """A success rate with its 95 % interval."""
    if row[task] is None:
        return "skipped"
    low, high = row[f"{task}_interval"]
    return f"{row[task]:.2f} [{low:.2f}, {high:.2f}]"


def print_table(summary: dict[str, Any], old: str, new: str, console: Console) -> None:
    """The summary as a table; success rates with their 95 % interval."""
    methods = [m for m in ("pretrained", "adamw", "craft") if m in summary]
    title = f"old task: {old}, new task: {new}; seeds {summary['seeds']}"
    table = Table(title=title, caption=_CAPTION, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for method in methods:
        table.add_column(method, justify="right", no_wrap=True)

    def number(row: dict[str, Any], key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    for label, task in (("old task: success", "old_success"), ("new task: success", "new_success")):
        table.add_row(label, *(format_rate(summary[m], task) for m in methods))
    for label, key, form in (
        ("old task: CE", "old_ce", ".3f"),
        ("new task: CE", "new_ce", ".3f"),
        ("drift on anchors", "drift_anchor", ".4f"),
        ("drift, held-out", "drift_heldout", ".4f"),
        ("ms per step", "ms_per_step", ".0f"),
    ):
        table.add_row(label, *(number(summary[m], key, form) for m in methods))
    epsilon = f"{summary[methods[-1]]['epsilon']:g}"
    table.add_row("epsilon", *(epsilon if m == "craft" else "-" for m in methods))
    console.print(table)


def print_sweep(result: dict[str, Any], console: Console) -> None:
    """A row per epsilon, AdamW last."""
    old, new = result["tasks"]["old"], result["tasks"]["new"]
    title = f"old task: {old}, new task: {new}; retention: {result['retention']}; seeds {result['seeds']}"
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in ("epsilon", "old task", "new task", "drift", "drift / epsilon", "held out", "ms/step"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in [*result["craft"], result["adamw"]]:
        epsilon = row.get("epsilon")
        ratio = "-"
        if epsilon:
            ratios = [drift / epsilon for drift in row["drift_anchor_per_seed"]]
            ratio = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(
            "AdamW" if epsilon is None else f"{epsilon:g}",
            format_rate(row, "old_success"),
            format_rate(row, "new_success"),
            f"{row['drift_anchor']:.4f}",
            ratio,
            f"{row['drift_heldout']:.4f}",
            f"{row['ms_per_step']:.0f}",
        )
    console.print(table)
