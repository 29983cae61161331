"""Success rates from files: what lerobot-eval writes, and plain matrices as JSON or CSV."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.matrix import Cell, SuccessMatrix

__all__ = ["matrix_of", "read_evaluation", "read_matrix"]

EVALUATION = "eval_info.json"

Task = tuple[str, int]
"""Group and number of a task, as lerobot has them"""


def read_evaluation(path: str | Path) -> dict[Task, Cell]:
    """Success on every task, as lerobot-eval has found it.

    Args:
        path: Its `eval_info.json`, or the output folder that holds it.

    Raises:
        ValueError: It is no such file.
    """
    file = Path(path) / EVALUATION if Path(path).is_dir() else Path(path)
    read = _json(file)
    rows = read.get("per_task") if isinstance(read, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file} is not what lerobot-eval of lerobot >= 0.6 writes: it has no list 'per_task'.")
    found: dict[Task, Cell] = {}
    for number, row in enumerate(rows):
        try:
            task, successes = (str(row["task_group"]), int(row["task_id"])), row["metrics"]["successes"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} is not what lerobot-eval of lerobot >= 0.6 writes: its per_task[{number}] must have "
                "'task_group', 'task_id' and metrics['successes']."
            ) from error
        if task in found:
            raise ValueError(f"{file} has task {task[1]} of {task[0]!r} twice.")
        found[task] = _cell_of_list(successes, f"{file}, per_task[{number}]")
    return found


def matrix_of(
    stages: Mapping[str, Sequence[Mapping[Task, Cell]]], trained: Mapping[str, Sequence[str]]
) -> SuccessMatrix:
    """The matrix of several evaluations.

    A task is called by its group, or "group/number" where a group has several.

    Args:
        stages: Name -> evaluations after that stage, in the order of training; of different tasks.
        trained: Stage -> tasks that it trained, by these names. The first stage may be absent.

    Raises:
        ValueError: A task was evaluated twice after one stage, a stage after the first is absent from `trained`, or
            names are unknown.
    """
    every = dict.fromkeys(task for evaluations in stages.values() for found in evaluations for task in found)
    groups: dict[str, set[int]] = {}
    for group, number in every:
        groups.setdefault(group, set()).add(number)
    names = {(group, n): group if len(groups[group]) == 1 else f"{group}/{n}" for group, n in every}
    rows: dict[str, dict[str, Cell | None]] = {}
    for stage, evaluations in stages.items():
        rows[stage] = {}
        for found in evaluations:
            for task, cell in found.items():
                if names[task] in rows[stage]:
                    raise ValueError(
                        f"Stage {stage!r} has {names[task]!r} twice: its evaluations must be of different tasks."
                    )
                rows[stage][names[task]] = cell
    return _matrix(rows, trained, list(names.values()))


def read_matrix(path: str | Path, trained: Mapping[str, Sequence[str]] | None = None) -> SuccessMatrix:
    """A matrix that was written by hand or by other programs.

    JSON: `{"stages": [{"name": "before", "trained": [], "success": {"drawer": "50/50", "button": 0.0}}, ...]}`. CSV: a
    header `stage,trained,drawer,button` and a row for each stage; several trained tasks have `;` between them, and the
    column `trained` may be absent. A cell is successes/trials ("47/50"), a rate in [0, 1], in JSON also a list of true
    and false; where it is empty, null or absent, the policy was not evaluated.

    Args:
        path: Ends with .json or .csv.
        trained: As for `matrix_of`; replaces what the file says of these stages.

    Raises:
        ValueError: The file cannot be read so, or says and is told nothing of what a stage after the first trained.
    """
    file = Path(path)
    if file.suffix not in (".json", ".csv"):
        raise ValueError(f"A matrix must be a file .json or .csv. Found {file}.")
    read = _rows_of_json(file) if file.suffix == ".json" else _rows_of_csv(file)
    rows: dict[str, dict[str, Cell | None]] = {}
    told: dict[str, Sequence[str]] = {}
    for name, tasks, success in read:
        if name in rows:
            raise ValueError(f"{file} has the stage {name!r} twice.")
        rows[name] = {task: _cell(value, f"{file}, {name}, {task}") for task, value in success.items()}
        if tasks is not None:
            told[name] = tasks
    names = dict.fromkeys(task for row in rows.values() for task in row)
    return _matrix(rows, {**told, **(trained or {})}, list(names))


def _matrix(
    rows: Mapping[str, Mapping[str, Cell | None]], trained: Mapping[str, Sequence[str]], tasks: Sequence[str]
) -> SuccessMatrix:
    if unknown := [stage for stage in trained if stage not in rows]:
        raise ValueError(f"There is no stage {unknown[0]!r} to have trained a task. The stages are {list(rows)}.")
    if silent := [stage for stage in list(rows)[1:] if stage not in trained]:
        raise ValueError(
            f"It must be said which tasks stage {silent[0]!r} trained, or that it is none of them: "
            f"--trained {silent[0]}=TASK,TASK or --trained {silent[0]}=. The tasks are {', '.join(tasks)}."
        )
    return SuccessMatrix(
        tuple(rows),
        tuple(tasks),
        tuple(tuple(trained.get(stage, ())) for stage in rows),
        tuple(tuple(row.get(task) for task in tasks) for row in rows.values()),
    )


_Row = tuple[str, Sequence[str] | None, Mapping[str, Any]]


def _rows_of_json(file: Path) -> Iterable[_Row]:
    read = _json(file)
    stages = read.get("stages") if isinstance(read, dict) else None
    if not isinstance(stages, list):
        raise ValueError(f"{file} must hold a list 'stages'. Found {type(read).__name__}.")
    for number, stage in enumerate(stages):
        name = stage.get("name") if isinstance(stage, dict) else None
        trained, success = (stage.get("trained"), stage.get("success")) if isinstance(stage, dict) else (None, None)
        fine = trained is None or (isinstance(trained, list) and all(isinstance(task, str) for task in trained))
        if not isinstance(name, str) or not isinstance(success, dict) or not fine:
            raise ValueError(
                f"{file}: stages[{number}] must have a 'name', 'success' by task and, as a list, what it has 'trained'."
            )
        yield name, trained, success


def _rows_of_csv(file: Path) -> Iterable[_Row]:
    with file.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened, skipinitialspace=True)
        columns = list(reader.fieldnames or ())
        tasks = [name for name in columns if name not in ("stage", "trained")]
        if "stage" not in columns or not tasks or len(set(columns)) < len(columns):
            raise ValueError(f"{file} must have a column 'stage' and one for each task. Found {columns}.")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{file}, line {reader.line_num}: it must have {len(columns)} cells.")
            trained = row["trained"].split(";") if "trained" in columns else None
            names = None if trained is None else [task.strip() for task in trained if task.strip()]
            yield row["stage"].strip(), names, {task: row[task].strip() for task in tasks}


def _cell(value: Any, where: str) -> Cell | None:
    if value is None or value == "":
        return None
    if isinstance(value, list):
        return _cell_of_list(value, where)
    try:
        if isinstance(value, str) and "/" in value:
            successes, _, of = value.partition("/")
            return Cell.of(int(successes), int(of))
        if isinstance(value, bool):
            raise ValueError("true and false are outcomes of single rollouts: write a list of them.")
        return Cell(float(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: a cell must be successes/trials as 47/50, or a rate in [0, 1]. Found {value!r}: {error}"
        ) from error


def _cell_of_list(outcomes: Any, where: str) -> Cell:
    if not isinstance(outcomes, list) or not outcomes or any(outcome not in (0, 1) for outcome in outcomes):
        raise ValueError(f"{where}: successes must be a list of at least one true or false. Found {outcomes!r:.60}.")
    return Cell.of(sum(map(int, outcomes)), len(outcomes))


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
