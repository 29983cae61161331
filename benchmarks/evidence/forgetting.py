"""Success on every task after every stage of training, and what was forgotten on the way.

    python benchmarks/evidence/forgetting.py --stage before=out/eval0 --stage button=out/eval1/eval_info.json \\
        --trained button=button-press-topdown-v3 --plot=success.png
    python benchmarks/evidence/forgetting.py --matrix=success.csv --json=forgetting.json

Stages come in the order of training, each with what lerobot-eval wrote, or its folder; several with commas between,
where each is of other tasks. Tasks are called by their group, or group/number (libero_spatial/3) where a group has
several. What each stage trained has to be said; `--trained stage=` if it was none of these tasks.

A matrix is JSON or CSV; its cells are 47/50, or a rate:

    stage,trained,drawer,button
    before,drawer,50/50,0/50
    button,button,12/50,47/50

Intervals of single rates are Wilson's; those of the measures come from 10000 draws of what every rate could be, given
its rollouts. p: Fisher's exact test that nothing has changed from the first to the last stage, two-sided, not corrected
for the number of tasks. `stages/matrix.py` has the formulas.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.files import matrix_of, read_evaluation, read_matrix
from stages.matrix import Cell, SuccessMatrix, changes, measures
from stages.plot import draw_matrix

from craft_optim.cli.output import emit_json, print_grid


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables, and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", action="append", default=[], metavar="NAME=FILE[,FILE]", help="a stage and its evaluations")
    add("--trained", action="extend", nargs="+", default=[], metavar="STAGE=TASK[,TASK]", help="what a stage trained")
    add("--matrix", type=Path, metavar="FILE", help="in the place of --stage: .json or .csv")
    add("--json", type=Path, metavar="FILE", help="everything as JSON")
    add("--plot", type=Path, metavar="FILE", help="success as a heat map")
    args = parser.parse_args(arguments)
    if bool(args.stage) == bool(args.matrix):
        parser.error("pass what was evaluated: --stage NAME=FILE for each stage, or --matrix=FILE")
    try:
        trained = _named("--trained", args.trained)
        if args.matrix:
            matrix = read_matrix(args.matrix, trained)
        else:
            files = _named("--stage", args.stage)
            matrix = matrix_of({name: [read_evaluation(file) for file in of] for name, of in files.items()}, trained)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print_tables(matrix)
    if args.json:
        emit_json(str(args.json), record(matrix))
    if args.plot:
        draw_matrix(matrix, args.plot)
        print(f"\nPlot: {args.plot}")


def _named(option: str, given: Sequence[str]) -> dict[str, list[str]]:
    """NAME=VALUE[,VALUE] by name."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, values = text.partition("=")
        if not name or not equals:
            raise ValueError(f"{option} must be NAME=VALUE. Found {text!r}.")
        if name in found:
            raise ValueError(f"{option} names {name!r} twice: put commas between its values.")
        found[name] = [value for value in values.split(",") if value]
        if option == "--stage" and not found[name]:
            raise ValueError(f"--stage {name}= needs a file: {name}=OUT/eval_info.json.")
    return found


def record(matrix: SuccessMatrix) -> dict[str, Any]:
    """Everything that is measured, in the types of JSON; intervals are those of 95 %."""

    def cell(value: Cell | None) -> dict[str, Any] | None:
        return None if value is None else {**asdict(value), "interval": value.interval()}

    return {
        "tasks": matrix.tasks,
        "stages": [
            {"name": name, "trained": trained, "success": dict(zip(matrix.tasks, map(cell, row), strict=True))}
            for name, trained, row in zip(matrix.stages, matrix.trained, matrix.cells, strict=True)
        ],
        "changes": [
            {"task": x.task, "before": cell(x.before), "after": cell(x.after), "p_value": x.p_value}
            for x in changes(matrix)
        ],
        "measures": [asdict(measure) for measure in measures(matrix)],
    }


def print_tables(matrix: SuccessMatrix) -> None:
    """Success after each stage, changes from the first to the last, means over tasks."""
    found = measures(matrix)

    def words(cell: Cell | None) -> str:
        if cell is None:
            return "-"
        interval = cell.interval()
        return f"{cell.rate:.2f}" if interval is None else f"{cell.rate:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"

    columns = zip(*matrix.cells, strict=True)
    rows = [
        [task, *(f"{words(x)}{' *' if task in on else '  '}" for x, on in zip(cells, matrix.trained, strict=True))]
        for task, cells in zip(matrix.tasks, columns, strict=True)
    ]
    title = "Success after each stage; [..]: 95% interval; *: trained there"
    print_grid(title, ["task", *(f"{stage}  " for stage in matrix.stages)], rows)
    own = {measure.name: measure.each for measure in found}
    rows = [
        [
            x.task,
            "-" if x.before is None else f"{x.before.rate:.2f}",
            "-" if x.after is None else f"{x.after.rate:.2f}",
            "-" if x.before is None or x.after is None else f"{x.after.rate - x.before.rate:+.2f}",
            "-" if x.p_value is None else f"{x.p_value:.2g}",
            _or_dash(own["forgetting"], x.task),
        ]
        for x in changes(matrix)
    ]
    header = ["task", matrix.stages[0], matrix.stages[-1], "change", "p", "forgotten"]
    print_grid(f"From {matrix.stages[0]} to {matrix.stages[-1]}", header, rows)
    signs = {"backward transfer": "+", "forward transfer": "+"}
    rows = []
    for measure in found:
        number, interval = "-", ""
        if measure.value is not None:
            sign = signs.get(measure.name, "")
            number = f"{measure.value:{sign}.2f}"
            if measure.interval is not None:
                interval = f"[{measure.interval[0]:{sign}.2f}, {measure.interval[1]:{sign}.2f}]"
        rows.append([measure.name, number, interval, str(len(measure.each))])
    print_grid("Means over tasks", ["measure", "value", "95% interval", "tasks"], rows)
    print()
    for measure in found:
        print(f"  {measure.name}: {measure.meaning}{'' if measure.each else '; no task here'}")
        for task, why in measure.left_out.items():
            print(f"    without {task}: {why}")


def _or_dash(each: Mapping[str, float], task: str) -> str:
    return f"{each[task]:.2f}" if task in each else "-"


if __name__ == "__main__":
    main()
