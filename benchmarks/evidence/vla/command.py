"""Ways to fine-tune a small pi0_fast on a second robot task: AdamW, replay, a KL penalty, CraftOptimizer.

    python benchmarks/evidence/retention_vla.py                 # three seeds: one to two hours
    python benchmarks/evidence/retention_vla.py --only-report   # table, picture, JSON and docs page of the runs so far
    python benchmarks/evidence/retention_vla.py --seeds=1 --steps=100 --rollouts=5 --work=/tmp/vla --results=/tmp/vla

Drawer to button in MetaWorld, as `examples/pi0_fast_craft.py`: the same network, data, learning rate, anchors and
epsilons. Every run is a JSON file in `--work`. Finished runs are not run again: stopped and started anew, it goes on.
"""

import argparse
import functools
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _paths
from metaworld_pi0_fast import NEW_TASK, OLD_TASK
from performance_table import with_table
from retention_budget import ROUND, positive
from rich.console import Console
from six_experiments import EPSILON
from six_experiments_support.commands import Steps

from .figure import draw
from .methods import METHODS
from .runs import Bench
from .summary import markdown, print_table, rows_of, write_csv

NAME = "retention_vla"
PAGE = _paths.ROOT / "docs" / "vla_benchmark.md"
BEGIN = f"<!-- {NAME}: written by `python benchmarks/evidence/{NAME}.py --only-report` -->\n"
END = "<!-- end -->"
WIDTH = 160  # columns of the printed table; without a terminal there would be 80, and the numbers cut off
PACKAGES = ("torch", "lerobot", "transformers", "metaworld", "mujoco")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=positive, default=3, help="number of seeds, counted from 0; one after the other")
    add("--steps", type=positive, default=800, help="fine-tuning steps")
    add("--rollouts", type=int, default=20, help="episodes per task and run, each on a goal of its own; 0 for none")
    add("--rounds", type=positive, default=3, help=f"rounds per run that measure costs, of {ROUND} steps or more")
    add("--episodes", type=positive, default=None, help="use the first N demonstrations of each task (default: all)")
    add("--methods", nargs="+", choices=[method.name for method in METHODS], default=None, help="default: all")
    add("--workers", type=positive, default=2, help="rollout processes")
    add("--work", type=Path, default=_paths.WORK / NAME, help="where the runs go")
    add("--results", type=Path, default=_paths.RESULTS, help="where the summary goes")
    add("--only-report", action="store_true", help="run nothing: summarise what is in --work")
    args = parser.parse_args(arguments)
    if not 0 <= args.rollouts <= 50:
        parser.error(f"--rollouts must be in 0 to 50, the goals of one seed. Found {args.rollouts}")
    return args


def run_all(args: argparse.Namespace, console: Console) -> None:
    """Makes the runs that are not there yet, seed by seed, so that what there is at any time is balanced."""
    settings = {name: getattr(args, name) for name in ("steps", "rollouts", "rounds", "episodes")}
    steps = Steps(args.work, settings, console)
    (args.work / "found").mkdir(exist_ok=True)
    methods = [method for method in METHODS if args.methods is None or method.name in args.methods]
    with Bench(args.work, **settings, workers=args.workers) as bench:
        for seed in range(args.seeds):
            for method in methods:
                name = f"{method.name}-seed{seed}"
                steps.call(name, functools.partial(bench.run, method, seed, args.work / "found" / f"{name}.json"))


def result_of(work: Path) -> dict[str, Any]:
    """The results in a folder so far.

    Raises:
        FileNotFoundError: No run has been finished there.
    """
    files = sorted((work / "found").glob("*.json"))
    if not files:
        raise FileNotFoundError(f"`--work` has no finished run. Found {work}: run without --only-report first.")
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {
        "command": f"python benchmarks/evidence/{NAME}.py",
        "settings": json.loads((work / "settings.json").read_text(encoding="utf-8")),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "tasks": {"old": OLD_TASK, "new": NEW_TASK},
        "epsilon": EPSILON["logits"],
        "rows": rows_of(runs),
        "runs": runs,
    }


def report(result: dict[str, Any], results: Path, console: Console) -> None:
    """Writes JSON, CSV and the picture, and prints the table; the page of docs/ is about the results that are kept."""
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_csv(result["rows"], results / f"{NAME}.csv")
    draw(result, results / f"{NAME}.png")
    if results.resolve() == _paths.RESULTS:
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), markdown(result), BEGIN, END), encoding="utf-8")
    print_table(result, console)
    console.print(f"Written to [bold]{results}[/bold]")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is not there yet, then reports what there is; returns what the JSON has."""
    args, console = parse(arguments), Console()
    console.width = max(console.width, WIDTH)
    args.work = args.work.resolve()
    if not args.only_report:
        run_all(args, console)
    result = result_of(args.work)
    report(result, args.results, console)
    return result
