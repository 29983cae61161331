"""craft-optim forgetting: success on every task after every stage of training, and what was lost on the way."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from craft_optim.cli.options import AddCommand, UsageError, add_json, existing_file, require_folders, whole
from craft_optim.cli.output import emit_json, print_grid
from craft_optim.evaluation.forgetting import Cell, Change, Measure, SuccessMatrix, changes, measures
from craft_optim.evaluation.plots import draw_matrix, require_matplotlib
from craft_optim.evaluation.success_files import matrix_of, read_evaluation, read_matrix

__all__ = ["add"]

_EXAMPLES = """\
Stages in the order of training, each with what lerobot-eval wrote, or its folder; several with commas between, where
each is of other tasks. What each stage trained has to be said; of the first one, what the policy already was good at:

  craft-optim forgetting --stage before=out/eval0 --stage drawer=out/eval1 --stage button=out/eval2/eval_info.json \\
      --trained drawer=drawer-open-v3 button=button-press-topdown-v3 --plot=success.png

Tasks are called by their group, or group/number (libero_spatial/3) where a group has several. A stage that trained none
of these tasks: --trained stage= and nothing behind it.

A matrix of your own, as JSON or CSV; cells are 47/50, or a rate (--trials says of how many rollouts):

  craft-optim forgetting --matrix=success.csv

  stage,trained,drawer,button
  before,,0/50,0/50
  drawer,drawer,49/50,1/50
  button,button,12/50,47/50

Intervals: of single rates Wilson's, of the measures from 10000 draws of what every rate could be, given its rollouts.
p: Fisher's exact test that nothing has changed from the first to the last stage, two-sided, not corrected for the
number of tasks.
"""


def add(command: AddCommand) -> None:
    """The command and its options."""
    about = "Say what a policy has forgotten over the stages of its training, from its success on every task."
    add = command("forgetting", _forgetting, about, _EXAMPLES).add_argument
    add("--stage", action="append", metavar="NAME=FILE[,FILE]", help="a stage and its evaluations; once for each")
    add("--trained", action="extend", nargs="+", metavar="STAGE=TASK[,TASK]", help="the tasks that a stage trained")
    add("--matrix", type=existing_file, metavar="FILE", help="in the place of --stage: a matrix, .json or .csv")
    add("--trials", type=whole, metavar="N", help="of --matrix: rollouts behind a rate that is given without")
    add("--confidence", type=_share, default=0.95, metavar="P", help="of the intervals (default: 0.95)")
    add("--seed", type=int, default=0, help="of the draws behind intervals (default: 0)")
    add_json(add)
    add("--plot", metavar="FILE", help="draw success as a heat map; needs matplotlib")


def _share(text: str) -> float:
    """A number in (0, 1)."""
    with suppress(ValueError):
        if 0.0 < float(text) < 1.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number in (0, 1). Found {text!r}.")


def _forgetting(args: argparse.Namespace) -> None:
    require_folders(args)
    if args.plot:
        require_matplotlib()
    matrix = _matrix(args)
    changed, found = changes(matrix), measures(matrix, args.confidence, args.seed)
    if args.json != "-":
        _print(matrix, changed, found, args.confidence)
    if args.json:
        emit_json(args.json, _record(matrix, changed, found, args.confidence))
    if args.plot:
        draw_matrix(matrix, args.plot)
        print(f"\nPlot: {args.plot}", file=sys.stderr if args.json == "-" else sys.stdout)


def _matrix(args: argparse.Namespace) -> SuccessMatrix:
    if bool(args.stage) == bool(args.matrix):
        raise UsageError("pass what was evaluated: --stage NAME=FILE for each stage, or --matrix=FILE")
    trained = _named("--trained", args.trained or [])
    if args.matrix:
        return read_matrix(args.matrix, trained, args.trials)
    if args.trials:
        raise UsageError("--trials goes with --matrix: what lerobot-eval writes has them")
    stages = {name: [read_evaluation(path) for path in paths] for name, paths in _named("--stage", args.stage).items()}
    if empty := [name for name, read in stages.items() if not read]:
        raise UsageError(f"--stage {empty[0]}= needs a file: {empty[0]}=OUT/eval_info.json")
    return matrix_of(stages, trained)


def _named(option: str, given: Sequence[str]) -> dict[str, list[str]]:
    """NAME=VALUE[,VALUE] by name."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, values = text.partition("=")
        if not name or not equals:
            raise UsageError(f"{option} must be NAME=VALUE. Found {text!r}")
        if name in found:
            raise UsageError(f"{option} names {name!r} twice: put commas between its values")
        found[name] = [value for value in values.split(",") if value]
    return found


def _record(
    matrix: SuccessMatrix, changed: Sequence[Change], found: Sequence[Measure], confidence: float
) -> dict[str, Any]:
    """Everything, in the types of JSON."""

    def cell(value: Cell | None) -> dict[str, Any] | None:
        return None if value is None else {**asdict(value), "interval": value.interval(confidence)}

    return {
        "confidence": confidence,
        "tasks": matrix.tasks,
        "stages": [
            {"name": name, "trained": trained, "success": dict(zip(matrix.tasks, map(cell, row), strict=True))}
            for name, trained, row in zip(matrix.stages, matrix.trained, matrix.cells, strict=True)
        ],
        "changes": [
            {"task": x.task, "before": cell(x.before), "after": cell(x.after), "p_value": x.p_value} for x in changed
        ],
        "measures": [asdict(measure) for measure in found],
    }


def _print(matrix: SuccessMatrix, changed: Sequence[Change], found: Sequence[Measure], confidence: float) -> None:
    def words(cell: Cell | None) -> str:
        if cell is None:
            return "-"
        interval = cell.interval(confidence)
        return f"{cell.rate:.2f}" if interval is None else f"{cell.rate:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"

    columns = zip(*matrix.cells, strict=True)
    rows = [
        [task, *(f"{words(x)}{' *' if task in on else '  '}" for x, on in zip(cells, matrix.trained, strict=True))]
        for task, cells in zip(matrix.tasks, columns, strict=True)
    ]
    title = f"Success after each stage; [..]: {confidence:.0%} interval; *: trained there"
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
        for x in changed
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
    print_grid("Means over tasks", ["measure", "value", f"{confidence:.0%} interval", "tasks"], rows)
    print()
    for measure in found:
        print(f"  {measure.name}: {measure.meaning}{'' if measure.each else '; no task here'}")
        for task, why in measure.left_out.items():
            print(f"    without {task}: {why}")


def _or_dash(each: Mapping[str, float], task: str) -> str:
    return f"{each[task]:.2f}" if task in each else "-"
