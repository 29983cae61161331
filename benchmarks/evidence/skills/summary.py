"""Results of the runs: tables of one more skill, of scenes that look alike, and of tasks in turn; and what predicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from markdown_table import markdown_table
from metaworld_pi0_fast.environment import short
from scipy.stats import spearmanr
from stages.matrix import Cell, SuccessMatrix, measures

from craft_optim.evaluation.statistics import Interval, wilson

from .methods import METHODS, Method
from .runs import LOOKS_LIKE, SCENARIOS

__all__ = ["PREDICTORS", "markdown", "matrix_of", "predictions", "rows_of", "scenes_of"]

Run = Mapping[str, Any]

PREDICTORS = {
    "drift_heldout": "drift on held-out frames of the task",
    "drift_hidden": "drift of hidden states there",
    "actions_moved": "change of the actions there",
    "heldout_ce": "cross-entropy of its demonstrations",
}
"""What a run has of every old task, and what it is"""


def _of(runs: Iterable[Run], method: Method, scenario: str) -> list[Run]:
    return [run for run in runs if run["method"] == method.name and run["scenario"] == scenario]


def _old(run: Run) -> list[str]:
    """The tasks that the policy knew."""
    return list(run["stages"][0]["drift_heldout"])


def _pooled(runs: Sequence[Run], task: str, key: str = "success") -> list[bool]:
    return [success for run in runs for success in run["stages"][-1][key].get(task, ())]


def rows_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One more skill: a row per method that has a run, in the order of `METHODS`.

    Returns:
        `name`, `label`, `kind`, `seeds`; `tasks`, success of each old task over all rollouts of all seeds, `old_mean`
        and its interval (Wilson's, 95 %), `old_worst` and `worst_task`, `worst_interval`; `new` and `new_interval`;
        `drift`, on the anchors of all tasks; means over tasks of what `PREDICTORS` names; `cost`, CPU time of a step as
        a multiple of AdamW's, which is measured within the same steps, but for methods that train less: None of what
        was not trained.
    """
    (new,) = SCENARIOS["button"].tasks
    found = []
    theirs = [run for run in runs if run["method"] == "adamw" and run["scenario"] == "button"]
    for method in METHODS:
        ours = _of(runs, method, "button")
        if not ours:
            continue
        row: dict[str, Any] = {"name": method.name, "label": method.label, "kind": method.kind}
        row["seeds"] = sorted({run["seed"] for run in ours})
        each = {task: _pooled(ours, task) for task in _old(ours[0])}
        row["tasks"] = {task: fmean(of_task) for task, of_task in each.items()}
        row["old_mean"], row["old_interval"] = _rate([success for of_task in each.values() for success in of_task])
        row["worst_task"] = min(each, key=lambda task: row["tasks"][task])
        row["old_worst"], row["worst_interval"] = _rate(each[row["worst_task"]])
        row["new"], row["new_interval"] = _rate(_pooled(ours, new))
        last = [run["stages"][-1] for run in ours]
        row["drift"] = fmean(stage["drift"] for stage in last)
        for key in PREDICTORS:
            row[key] = fmean(value for stage in last for value in stage[key].values())
        row["cost"] = None
        if method.kind != "before" and (theirs or not method.trains_less):
            plain = [run["stages"][-1] for run in (theirs if method.trains_less else ours)]
            row["cost"] = _cost(last, plain)
        found.append(row)
    return found


def _cost(stages: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> float:
    return fmean(stage["seconds"] for stage in stages) / fmean(stage["plain_seconds"] for stage in plain)


def _rate(successes: Sequence[bool]) -> tuple[float, Interval]:
    return fmean(successes), wilson(sum(successes), len(successes))


def scenes_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Two tasks in scenes that look alike, of which the second was learnt: a row per pair and method.

    Returns:
        `scenario`, `label`, `seeds`; `old` and `new`, success of each task under its own instruction; `old_asked_new`
        and `new_asked_old`, success of the scene's own task where the other's instruction was given: the instruction is
        not followed that often at least; all with an `_interval`.
    """
    found = []
    for scenario, learnt in SCENARIOS.items():
        new, old = learnt.tasks[0], LOOKS_LIKE.get(learnt.tasks[0])
        if old is None or len(learnt.tasks) > 1:
            continue
        for method in METHODS:
            ours = _of(runs, method, scenario)
            if not ours or method.kind == "before":
                continue
            plain = learnt.policy == "pi0" and method.name == "craft"  # there it is not the default
            label = f"{method.label}, epsilon {f'{method.epsilon:g}'.removeprefix('0')}" if plain else method.label
            row: dict[str, Any] = {"scenario": scenario, "name": method.name, "label": label}
            row["seeds"] = sorted({run["seed"] for run in ours})
            row["old"], row["old_interval"] = _rate(_pooled(ours, old))
            row["new"], row["new_interval"] = _rate(_pooled(ours, new))
            for name, scene in (("old_asked_new", old), ("new_asked_old", new)):
                row[name], row[f"{name}_interval"] = _rate(_pooled(ours, scene, "other_instruction"))
            found.append(row)
    return found


def matrix_of(runs: Sequence[Run], method: Method) -> SuccessMatrix | None:
    """Success on every task after every task that was learnt in turn, over all seeds; None without runs."""
    ours = _of(runs, method, "sequence")
    before = _of(runs, METHODS[0], "button")
    if not ours or not before:
        return None
    learnt = SCENARIOS["sequence"].tasks
    old = _old(before[0])
    tasks = (*old, *learnt)
    rows = [_cells([run["stages"][0] for run in before], tasks)]
    rows += [_cells([run["stages"][stage] for run in ours], tasks) for stage in range(len(learnt))]
    stages = ("before", *(short(task) for task in learnt))
    trained = (tuple(short(task) for task in old), *((short(task),) for task in learnt))
    return SuccessMatrix(stages, tuple(short(task) for task in tasks), trained, tuple(rows))


def _cells(stages: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> tuple[Cell | None, ...]:
    pooled = [[success for stage in stages for success in stage["success"].get(task, ())] for task in tasks]
    return tuple(Cell.of(sum(each), len(each)) if each else None for each in pooled)


def predictions(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """How well each of `PREDICTORS` orders tasks by what became of them, over all runs that learnt one task.

    Returns:
        For each: `tasks`, Spearman's rank correlation with the success of the task, over all tasks of all runs;
        `worst`, of its highest value among the tasks of a run with the lowest success among them; and of "drift", the
        one number of a run, `worst` alone. Nothing of fewer than two runs, which have no order.
    """
    fast = [run for run in runs if SCENARIOS[run["scenario"]].policy == "pi0_fast"]
    stages = [run["stages"][-1] for run in fast if run["method"] != "before" and len(run["stages"]) == 1]
    if len(stages) < 2:
        return {}
    rates = [{task: fmean(stage["success"][task]) for task in stage["drift_heldout"]} for stage in stages]
    worst = [min(of.values()) for of in rates]
    found = {"drift": {"worst": _rank([stage["drift"] for stage in stages], worst)}}
    for key in PREDICTORS:
        values = [value for stage in stages for value in stage[key].values()]
        success = [rate for of in rates for rate in of.values()]
        highest = [max(stage[key].values()) for stage in stages]
        found[key] = {"tasks": _rank(values, success), "worst": _rank(highest, worst)}
    return found


def _rank(values: Sequence[float], success: Sequence[float]) -> float:
    return float(spearmanr(values, success).statistic)


def _with(row: Mapping[str, Any], key: str, interval: str) -> str:
    low, high = row[interval]
    return f"{row[key]:.2f} [{low:.2f}, {high:.2f}]"


def markdown(runs: Sequence[Run]) -> str:
    """The tables of the page: those that there are runs for.

    Raises:
        ValueError: There is no run.
    """
    if not runs:
        raise ValueError("There is no run to report: run without --only-report first, or name another --results.")
    parts = []
    if rows := rows_of(runs):
        parts += ["**One more task**", _skill_table(rows)]
    if scenes := scenes_of(runs):
        parts += ["**Scenes that look alike**", _scene_table(scenes)]
    matrices = {method: matrix for method in METHODS if (matrix := matrix_of(runs, method)) is not None}
    if matrices:
        parts += ["**Four tasks in turn**", _sequence_table(runs, matrices)]
    if found := predictions(runs):
        parts += ["**What predicts success**", _prediction_table(found)]
    return "\n\n".join(parts) + "\n"


def _skill_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = [
        "", "seeds", "new task", "old tasks: mean", "worst", "which", "drift: anchors", "held-out",
        "actions moved", "cost",
    ]  # fmt: skip
    lines = [
        [
            row["label"],
            f"{len(row['seeds'])}",
            _with(row, "new", "new_interval"),
            _with(row, "old_mean", "old_interval"),
            _with(row, "old_worst", "worst_interval"),
            short(row["worst_task"]),
            f"{row['drift']:.3f}",
            f"{row['drift_heldout']:.3f}",
            f"{row['actions_moved']:.3f}",
            "-" if row["cost"] is None else f"{row['cost']:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def _scene_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["", "", "seeds", "old", "new", "old, asked for the new", "new, asked for the old"]
    lines = [
        [
            row["scenario"],
            row["label"],
            f"{len(row['seeds'])}",
            *(_with(row, key, f"{key}_interval") for key in ("old", "new", "old_asked_new", "new_asked_old")),
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def _sequence_table(runs: Sequence[Run], matrices: Mapping[Method, SuccessMatrix]) -> str:
    learnt = SCENARIOS["sequence"].tasks
    header = ["", "old: mean", "worst", *(short(task) for task in learnt), "backward transfer", "forgetting", "cost"]
    lines = []
    for method, matrix in matrices.items():
        last, old = matrix.rates[-1], len(matrix.tasks) - len(learnt)
        of = {measure.name: measure.value for measure in measures(matrix)}
        stages = [stage for run in _of(runs, method, "sequence") for stage in run["stages"]]
        lines.append(
            [
                method.label,
                f"{last[:old].mean():.2f}",
                f"{last[:old].min():.2f}",
                *(f"{rate:.2f}" for rate in last[old:]),
                f"{of['backward transfer']:+.2f}",
                f"{of['forgetting']:.2f}",
                f"{_cost(stages, stages):.2f}",
            ]
        )
    return markdown_table(header, lines)


def _prediction_table(found: Mapping[str, Mapping[str, float]]) -> str:
    names = {"drift": "drift on the anchors of all tasks"} | PREDICTORS
    header = ["", "success of a task", "of the worst task"]
    lines = [
        [names[key], f"{of['tasks']:+.2f}" if "tasks" in of else "-", f"{of['worst']:+.2f}"]
        for key, of in found.items()
    ]
    return markdown_table(header, lines)
