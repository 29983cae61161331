"""Plasticity against retention: CraftOptimizer, a fixed lambda and nine other methods on three small real settings.

    python benchmarks/evidence/retention_pareto.py    # minutes on two cores; writes to .benchmarks/
    python benchmarks/evidence/retention_pareto.py --full --results=benchmarks/evidence/results    # the kept results

Each setting pretrains a small network on data that ships with Python packages and fine-tunes it on other data. Methods
with a strength are swept over as many strengths each. Then one epsilon, and one lambda, are kept while the task loss
and the learning rate are scaled. `pareto/measures.py` says what plasticity, retention and dominated area are. Finished
runs are not run again, unless sources of the benchmark or of craft_optim have changed. The quick form's five strengths
make coarse fronts: areas are smaller than those of nine.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  (puts examples/ and benchmarks/ on the path)
from pareto.figure import draw
from pareto.methods import METHODS
from pareto.prepared import SETTINGS, prepare
from pareto.runs import WORK, run_all, store, versions, with_runs
from pareto.scaled import UNTUNED, references, scaled
from pareto.summary import best_strength, fronts, outcomes, targets, tried
from pareto.table import print_fronts, print_targets, print_tried
from pareto.training import Job, fine_tune
from rich.console import Console

NAME = "retention_pareto"
QUICK, FULL = (5, 1), (9, 3)  # strengths, seeds


def sweep(setting: str, seed: int, strengths: int) -> list[Job]:
    """Plain fine-tuning and all methods, with each of their strengths."""
    return [Job(setting, name, x, seed) for name, method in METHODS.items() for x in method.grid(strengths)]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--full", action="store_true", help=f"{FULL[0]} strengths instead of {QUICK[0]}, {FULL[1]} seeds")
    add("--seeds", type=int, default=None, help=f"number of seeds, counted from 0 (default: {QUICK[1]})")
    add("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS), help="default: all")
    add("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    add("--work", type=Path, default=WORK, help="where finished runs are")
    add("--results", type=Path, default=Path(".benchmarks"), help="where the JSON and the figure go")
    args = parser.parse_args(arguments)
    args.strengths, seeds = FULL if args.full else QUICK
    args.seeds = seeds if args.seeds is None else args.seeds
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, found {getattr(args, name)}")
    return args


def command_of(args: argparse.Namespace) -> str:
    """The command that makes the same results, wherever they go."""
    words = [f"python benchmarks/evidence/{NAME}.py", *["--full"] * args.full, f"--seeds={args.seeds}"]
    return " ".join(words + (["--settings", *args.settings] if args.settings != list(SETTINGS) else []))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is not there yet; writes the JSON and the figure, and prints the tables."""
    args, console = parse(arguments), Console(width=120)
    folder = store(args.work.resolve())
    pairs = list(product(args.settings, range(args.seeds)))

    jobs = [job for pair in pairs for job in sweep(*pair, args.strengths)]
    jobs += [job for setting in args.settings for job in references(setting, range(args.seeds))]
    knobs = [(setting, method, strength) for setting in args.settings for method, strength in UNTUNED]
    jobs += [job for knob in knobs for job in scaled(*knob, range(args.seeds))]
    rated = outcomes(run_all(jobs, folder, args.jobs, fine_tune, "runs"))
    # Afterwards the same with the strengths that the sweep found best
    knobs += [(setting, name, best_strength(rated, setting, name)) for setting in args.settings for name, _ in UNTUNED]
    knobs = sorted(dict.fromkeys(knobs), key=lambda knob: args.settings.index(knob[0]))
    jobs += [job for knob in knobs for job in scaled(*knob, range(args.seeds))]
    runs = run_all(jobs, folder, args.jobs, fine_tune, "best strengths")

    rated = outcomes(runs)
    of = {setting: fronts(rated, setting) for setting in args.settings}
    rows = [tried(rated, *knob) for knob in knobs]
    met = []
    for setting in args.settings:
        ours, untuned = (tried(rated, setting, *knob) for knob in UNTUNED)
        met += targets(setting, of[setting], ours, untuned)
    titles = {setting: prepare(setting, 0, folder).setting.title for setting in args.settings}
    result = {
        "command": command_of(args),
        "versions": versions(),
        "settings": titles,
        "seeds": list(range(args.seeds)),
        "strengths": args.strengths,
        "targets": [asdict(target) for target in met],
        "fronts": {setting: {name: asdict(front) for name, front in found.items()} for setting, found in of.items()},
        "robustness": [asdict(row) for row in rows],
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{NAME}.json").write_text(with_runs(result, runs), encoding="utf-8")
    draw(titles, of, rows, args.results / f"{NAME}.png")
    for setting, title in titles.items():
        print_fronts(title, of[setting], console)
    print_tried(rows, console)
    print_targets(met, console)
    console.print(f"Written to [bold]{args.results}[/bold]")
    return result


if __name__ == "__main__":
    main()
