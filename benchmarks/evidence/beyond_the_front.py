"""Variants of CraftOptimizer against a penalty with a swept lambda: one change each, paired by seed.

    python benchmarks/evidence/beyond_the_front.py                                 # three seeds; .benchmarks/
    python benchmarks/evidence/beyond_the_front.py --results=benchmarks/evidence/results    # what is in the repository

The settings, the strengths and the measures are those of `retention_pareto.py`, the seeds are not: variants were found
on those. `pareto/beyond.py` has the variants.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  (puts examples/ and benchmarks/ on the path)
from pareto.beyond import VARIANTS, vary
from pareto.methods import METHODS, Method
from pareto.prepared import SETTINGS
from pareto.runs import WORK, run_all, store, versions, with_runs
from pareto.scaled import UNTUNED, references, scaled
from pareto.summary import differences, fronts, outcomes, tried
from pareto.table import print_differences, print_tried
from pareto.training import Job, fine_tune
from rich.console import Console

NAME = "beyond_the_front"
REFERENCES = ("craft", "fixed")
SCALED = ("least_share_10", "least_share_30")  # tried under other scales and learning rates, too


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[3, 4, 5], help="two or more, for their noise; default: 3 4 5")
    add("--strengths", type=int, default=9, help="epsilons, and lambdas, of a sweep; odd")
    add("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    add("--work", type=Path, default=WORK, help="where finished runs are")
    add("--results", type=Path, default=Path(".benchmarks"), help="where the JSON goes")
    parser.set_defaults(settings=list(SETTINGS))
    args = parser.parse_args(arguments)
    if len(set(args.seeds)) < 2:
        parser.error(f"--seeds must be two or more different ones, found {args.seeds}")
    for name, least in (("strengths", 3), ("jobs", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be {least} or more, found {getattr(args, name)}")
    if args.strengths % 2 == 0:
        parser.error(f"--strengths must be odd, so that the default epsilon is among them, found {args.strengths}")
    return args


def sweeps(names: Sequence[str], methods: Mapping[str, Method], args: argparse.Namespace) -> list[Job]:
    """Jobs of these methods with all strengths, in all settings and for all seeds."""
    return [
        Job(setting, name, strength, seed)
        for setting, seed, name in product(args.settings, args.seeds, names)
        for strength in methods[name].grid(args.strengths)
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is not there yet, writes the JSON and prints the tables."""
    args, console = parse(arguments), Console(width=120)
    work, epsilon = args.work.resolve(), UNTUNED[0][1]
    knobs = [(setting, name, epsilon) for setting in args.settings for name in SCALED]
    known = [(setting, *knob) for setting in args.settings for knob in UNTUNED]
    jobs = sweeps(["plain", *REFERENCES], METHODS, args)
    jobs += [job for setting in args.settings for job in references(setting, args.seeds)]
    jobs += [job for knob in known for job in scaled(*knob, args.seeds)]
    runs = run_all(jobs, store(work), args.jobs, fine_tune, "references")
    jobs = sweeps([*VARIANTS], VARIANTS, args) + [job for knob in knobs for job in scaled(*knob, args.seeds)]
    runs += run_all(jobs, store(work, "beyond"), args.jobs, vary, "variants")
    rated = outcomes(runs)
    of = {setting: fronts(rated, setting) for setting in args.settings}
    found = {
        setting: {
            name: {reference: differences(each[name], each[reference]) for reference in REFERENCES if reference != name}
            for name in ("craft", *VARIANTS)
        }
        for setting, each in of.items()
    }
    rows = sorted((tried(rated, *knob) for knob in known + knobs), key=lambda row: args.settings.index(row.setting))
    result = {
        "command": " ".join(
            [f"python benchmarks/evidence/{NAME}.py --strengths={args.strengths} --seeds", *map(str, args.seeds)]
        ),
        "versions": versions(),
        "seeds": args.seeds,
        "strengths": args.strengths,
        "titles": {name: method.title for name, method in VARIANTS.items()},
        "differences": {
            setting: {name: {to: asdict(by) for to, by in against.items()} for name, against in each.items()}
            for setting, each in found.items()
        },
        "robustness": [asdict(row) for row in rows],
        "fronts": {setting: {name: asdict(front) for name, front in each.items()} for setting, each in of.items()},
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{NAME}.json").write_text(with_runs(result, runs), encoding="utf-8")
    for setting in args.settings:
        print_differences(f"{setting}: paired by seed", found[setting], console)
    print_tried(rows, console)
    console.print(f"Written to [bold]{args.results}[/bold]")
    return result


if __name__ == "__main__":
    main()
