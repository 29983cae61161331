"""A small pi0_fast that knows seven tasks of MetaWorld learns more of them, in many ways: what can it still do?

    python benchmarks/evidence/retention_skills.py                # three seeds: hours on two cores
    python benchmarks/evidence/retention_skills.py --quick        # two methods, few steps and rollouts, for a look
    python benchmarks/evidence/retention_skills.py --only-report  # tables, pictures and docs page of the runs so far

One more skill (scenario "button"); four pairs of tasks whose scenes look alike, of which the second is learnt; and four
tasks in turn. Every run is a process of its own and a JSON file in `--results`. Finished runs are not made again:
stopped and started anew, it goes on.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _paths
from performance_table import with_table
from retention_budget import positive
from separate_runs import finished, make_unless_done, side_by_side

from .figure import draw
from .methods import IN_PI0, IN_SCENES, IN_SEQUENCE, METHODS, Method
from .runs import SCENARIOS, Settings, run
from .summary import markdown

__all__ = ["main"]

NAME = "retention_skills"
SCRIPT = _paths.ROOT / "benchmarks" / "evidence" / f"{NAME}.py"
PAGE = _paths.ROOT / "docs" / "vla_benchmark.md"
BEGIN = f"<!-- {NAME}: written by `python benchmarks/evidence/{NAME}.py --only-report` -->\n"
END = f"<!-- end of {NAME} -->"
BEFORE, *TRAINED = METHODS
QUICK = ("adamw", "craft")
ALONE = "button"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which seeds")
    add("--steps", type=positive, default=400, help="of training, of each task")
    add("--lr", type=float, default=1e-3, help="learning rate, at its highest")
    add("--rollouts", type=positive, default=10, help="of each old task; twice as many of new ones")
    add("--episodes", type=positive, help="use the first N demonstrations of each task (default: all)")
    add("--known", type=positive, help="of the old tasks the first N alone (default: all)")
    add("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), help="default: all")
    add("--methods", nargs="+", choices=[method.name for method in TRAINED], help="default: all")
    add("--quick", action="store_true", help=f"{' and '.join(QUICK)}, one seed, {ALONE}, 100 steps, 2 rollouts")
    add("--workers", type=positive, default=2, help="runs side by side, each in a process of its own")
    add("--work", type=Path, default=_paths.WORK / NAME, help="where the anchors go")
    add("--results", type=Path, help=f"where the runs go; default: results/{NAME}, of --quick a folder in --work")
    add("--only-report", action="store_true", help="run nothing: summarise what is there")
    add("--one", choices=[method.name for method in METHODS], help="make this run alone, here: first seed and scenario")
    args = parser.parse_args(arguments)
    if not args.rollouts <= 25:
        parser.error(f"--rollouts must be in 1 to 25, for a seed has 50 goals. Found {args.rollouts}")
    if args.quick:
        args.seeds, args.scenarios, args.methods = args.seeds[:1], [ALONE], args.methods or list(QUICK)
        args.steps, args.rollouts, args.episodes = 100, 2, 4
        args.work = args.work.with_name(f"{args.work.name}-quick")
    args.results = args.results or (args.work / "results" if args.quick else _paths.RESULTS / NAME)
    return args


def run_all(args: argparse.Namespace) -> None:
    """Makes the runs that are not there yet, seed by seed, so that what there is at any time is balanced."""
    policies = {SCENARIOS[name].policy for name in args.scenarios}
    homes = {scenario.policy: name for name, scenario in reversed(SCENARIOS.items()) if scenario.policy in policies}
    for home in homes.values():
        _make(BEFORE, home, args.seeds[0], args)  # makes the anchors, too, which the others would make side by side
    before = [functools.partial(_make, BEFORE, home, seed, args) for home in homes.values() for seed in args.seeds[1:]]
    side_by_side([*before, *_jobs(args)], args.workers)


def _jobs(args: argparse.Namespace) -> Iterator[Callable[[], object]]:
    for seed in args.seeds:
        for scenario in args.scenarios:
            for method in _methods_of(scenario):
                if args.methods is None or method.name in args.methods:
                    yield functools.partial(_make, method, scenario, seed, args)


def _methods_of(scenario: str) -> list[Method]:
    if scenario == ALONE:
        return [method for method in TRAINED if not method.joint]
    names: Sequence[str] = IN_PI0 if SCENARIOS[scenario].policy == "pi0" else IN_SCENES
    if len(SCENARIOS[scenario].tasks) > 1:
        names = IN_SEQUENCE
    return [method for method in TRAINED if method.name in names]


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(args.steps, args.lr, args.rollouts, args.episodes, args.known)


def _file(method: Method, scenario: str, seed: int, args: argparse.Namespace) -> Path:
    return Path(args.results) / f"{scenario}-{method.name}-seed{seed}.json"


def _make(method: Method, scenario: str, seed: int, args: argparse.Namespace) -> None:
    settings = asdict(_settings(args))
    where = {"work": args.work, "results": args.results, "seeds": seed, "scenarios": scenario, "one": method.name}
    make_unless_done(SCRIPT, _file(method, scenario, seed, args), settings, settings | where)


def report(runs: Sequence[dict[str, Any]], results: Path) -> None:
    """Prints the tables, and draws the pictures; the page of docs/ is about the results that are kept."""
    print(markdown(runs))
    draw(runs, results.parent, results.name)
    if results.resolve() == (_paths.RESULTS / NAME).resolve():
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), markdown(runs), BEGIN, END), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs what is not there yet, then reports what there is; returns the runs."""
    args = parse(arguments)
    if args.one:
        (method,) = (method for method in METHODS if method.name == args.one)
        scenario, seed = args.scenarios[0], args.seeds[0]
        run(method, scenario, seed, _settings(args), args.work, _file(method, scenario, seed, args))
        return []
    if not args.only_report:
        run_all(args)
    runs = finished(args.results)
    report(runs, args.results)
    return runs
