"""What a run found: one record per method and seed, their summary, and the table that is printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from craft_optim.evaluation.statistics import wilson

from .environment import short


@dataclass(frozen=True)
class Outcome:
    """One policy, measured.

    Attributes:
        method: "pretrained", "adamw" or "craft".
        seed: Seed of the fine-tuning run.
        old_success: Whether each rollout of each old task succeeded; None if rollouts were skipped.
        new_success: The same for the new task.
        old_ce: Cross-entropy per action token on held-out frames of the old tasks, in nats.
        new_ce: The same for the new task.
        drift_anchor: Mean drift from the snapshot over all anchors, in the unit of epsilon.
        drift_heldout: The same on frames of the old tasks that are not anchors.
        ms_per_step: Wall time of a training step; None for the pretrained policy.
    """

    method: str
    seed: int
    old_success: Mapping[str, Sequence[bool]] | None
    new_success: Mapping[str, Sequence[bool]] | None
    old_ce: float
    new_ce: float
    drift_anchor: float
    drift_heldout: float
    ms_per_step: float | None


def summarise(outcomes: Iterable[Outcome], epsilon: float) -> dict[str, Any]:
    """Means over seeds per method; success rates with the Wilson interval over all rollouts of all seeds.

    Returns:
        method -> `old_success`, over the rollouts of all old tasks, `old_success_interval`, `old_success_per_seed`, the
        same for `new_success`; `tasks`, success by task, and `task_intervals`; `old_mean` and `old_worst`, of the old
        tasks; None without rollouts; and `old_ce`, `new_ce`, `drift_anchor`, `drift_heldout`, `epsilon`, `ms_per_step`.
    """
    by_method: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_method.setdefault(outcome.method, []).append(outcome)
    summary: dict[str, Any] = {}
    for method, runs in by_method.items():
        row: dict[str, Any] = {}
        for task in ("old_success", "new_success"):
            found = [of_tasks for of_tasks in (getattr(run, task) for run in runs) if of_tasks is not None]
            each = [[success for of_task in of_tasks.values() for success in of_task] for of_tasks in found]
            pooled = [success for of_seed in each for success in of_seed]
            row[task] = fmean(pooled) if pooled else None
            row[f"{task}_interval"] = wilson(sum(pooled), len(pooled)) if pooled else None
            row[f"{task}_per_seed"] = [fmean(of_seed) for of_seed in each]
        row |= _by_task(runs)
        for value in ("old_ce", "new_ce", "drift_anchor", "drift_heldout"):
            row[value] = fmean(getattr(run, value) for run in runs)
        row["drift_anchor_per_seed"] = [run.drift_anchor for run in runs]
        row["epsilon"] = epsilon
        times = [run.ms_per_step for run in runs if run.ms_per_step is not None]
        row["ms_per_step"] = fmean(times) if times else None
        summary[method] = row
    return summary


def _by_task(runs: Sequence[Outcome]) -> dict[str, Any]:
    if any(run.old_success is None or run.new_success is None for run in runs):
        return {"tasks": None, "task_intervals": None, "old_mean": None, "old_worst": None}
    pooled: dict[str, list[bool]] = {}
    for run in runs:
        for task, successes in chain((run.old_success or {}).items(), (run.new_success or {}).items()):
            pooled.setdefault(task, []).extend(successes)
    tasks = {task: fmean(successes) for task, successes in pooled.items()}
    old = [tasks[task] for task in runs[0].old_success or {}]
    intervals = {task: wilson(sum(successes), len(successes)) for task, successes in pooled.items()}
    return {"tasks": tasks, "task_intervals": intervals, "old_mean": fmean(old), "old_worst": min(old)}


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
    title = f"keep {old}, learn {new}; seeds {summary['seeds']}"
    table = Table(title=title, caption=_CAPTION, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for method in methods:
        table.add_column(method, justify="right", no_wrap=True)

    def number(row: dict[str, Any], key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    for label, task in (("new task: success", "new_success"), ("old tasks: success", "old_success")):
        table.add_row(label, *(format_rate(summary[m], task) for m in methods))
    *old_tasks, _ = summary[methods[0]]["tasks"] or [""]
    for task in old_tasks:
        table.add_row(f"  {short(task)}", *(f"{summary[m]['tasks'][task]:.2f}" for m in methods))
    for label, key, form in (
        ("old tasks: worst", "old_worst", ".2f"),
        ("old tasks: CE", "old_ce", ".3f"),
        ("new task: CE", "new_ce", ".3f"),
        ("drift on anchors", "drift_anchor", ".4f"),
        ("drift, held-out", "drift_heldout", ".4f"),
        ("ms per step", "ms_per_step", ".0f"),
    ):
        table.add_row(label, *(number(summary[m], key, form) for m in methods))
    epsilon = f"{summary[methods[-1]]['epsilon']:g}"
    table.add_row("epsilon", *(epsilon if m == "craft" else "-" for m in methods))
    console.print(table)
