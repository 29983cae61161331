"""Results of the runs: a row per method, over its seeds, as a table to print, as Markdown and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from markdown_table import markdown_table
from metaworld_pi0_fast.summary import format_rate
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from craft_optim.evaluation.statistics import wilson

from .methods import METHODS, Method

__all__ = ["COLUMNS", "markdown", "print_table", "rows_of", "summarise", "write_csv"]

DRIFTS = tuple(f"drift_{kind}_{where}" for kind in ("logits", "hidden") for where in ("anchors", "heldout"))
COLUMNS = (
    "",
    "K",
    "seeds",
    "old: success",
    "new: success",
    "drift: anchors",
    "held-out",
    "over epsilon",
    "old: CE",
    "new: CE",
    "cost",
)


def rows_of(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per method that has a run, in the order of `METHODS`; see `summarise`."""
    by_method = {method: [run for run in runs if run["method"] == method.name] for method in METHODS}
    return [summarise(method, of_method) for method, of_method in by_method.items() if of_method]


def summarise(method: Method, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and each seed's value; success with the Wilson interval over all rollouts of all seeds.

    Args:
        method: What was run.
        runs: As `Bench.run` writes them, one per seed.

    Returns:
        `name`, `kind`, `label`, `every`, `strength`, `seeds`; of both tasks `old_success`, `old_success_interval`,
        `old_success_per_seed` (None without rollouts) and `old_ce`; drifts as `DRIFTS` names them, and `.._per_seed`;
        `over_epsilon_per_seed`, CraftOptimizer's own drift on the anchors over its epsilon, or, where epsilon is of
        held-out frames, on others of these; None for others; `cost` and
        `cost_spread`: the median of all rounds and half the quartiles' distance, None for what was not trained.
    """
    row: dict[str, Any] = {
        "name": method.name,
        "kind": method.kind,
        "label": method.label,
        "every": method.every,
        "strength": method.strength,
        "seeds": [run["seed"] for run in runs],
    }
    for task in ("old_success", "new_success"):
        found = [run[task] for run in runs if task in run]
        pooled = [success for successes in found for success in successes]
        row[task] = fmean(pooled) if pooled else None
        row[f"{task}_interval"] = wilson(sum(pooled), len(pooled)) if pooled else None
        row[f"{task}_per_seed"] = [fmean(successes) for successes in found]
    for key in ("old_ce", "new_ce", *DRIFTS):
        row[key] = fmean(run[key] for run in runs)
        row[f"{key}_per_seed"] = [run[key] for run in runs]
    held = row[f"drift_{method.kind}_anchors_per_seed"] if method.is_craft else None
    if method.heldout:
        held = [run["drift_logits_judged"] for run in runs]
    row["over_epsilon_per_seed"] = held and [drift / method.strength for drift in held]
    costs = [cost for run in runs for cost in run.get("costs", ())]
    row["cost"] = median(costs) if costs else None
    low, _, high = quantiles(costs, n=4) if len(costs) > 1 else (0.0, 0.0, 0.0)
    row["cost_spread"] = (high - low) / 2 if costs else None
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table, as text."""
    ratios = row["over_epsilon_per_seed"]
    return [
        row["label"],
        f"{row['every'] or '-'}",
        f"{len(row['seeds'])}",
        format_rate(row, "old_success"),
        format_rate(row, "new_success"),
        f"{row['drift_logits_anchors']:.4f}",
        f"{row['drift_logits_heldout']:.4f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "-",
        f"{row['old_ce']:.3f}",
        f"{row['new_ce']:.3f}",
        "-" if row["cost"] is None else f"{row['cost']:.2f}",
    ]


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """A row per method."""
    table = Table(title="old task: {old}, new task: {new}".format_map(result["tasks"]), box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in result["rows"]:
        table.add_row(*cells(row))
    console.print(table)


def markdown(result: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    return f"{markdown_table(COLUMNS, [cells(row) for row in result['rows']])}\n"


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """All that has one value per method, a row per method; intervals as two columns."""
    flat = []
    for row in rows:
        of_row = {key: value for key, value in row.items() if not key.endswith(("_interval", "_per_seed"))}
        for task in ("old_success", "new_success"):
            of_row[f"{task}_low"], of_row[f"{task}_high"] = row[f"{task}_interval"] or (None, None)
        flat.append(of_row | {"seeds": len(row["seeds"])})
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
