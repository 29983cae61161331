"""Epsilon as a knob: is the drift where it says, whatever the noise, the scale, the learning rate and K?

    python benchmarks/evidence/knob.py                                         # this build alone; .benchmarks/
    python benchmarks/evidence/knob.py --against=PATH --results=benchmarks/evidence/results  # what is in the repository

PATH is a checkout of an earlier commit, which runs with K = 1, its default. The settings are those of
`retention_pareto.py`, on other seeds; runs are paired by seed. Finished runs are not run again, unless sources of the
benchmark or of craft_optim have changed.
"""

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  (puts examples/ and benchmarks/ on the path)
from pareto.prepared import SETTINGS
from pareto.runs import WORK, run_all, store, versions, with_runs
from pareto.training import Job, fine_tune
from steering.plan import cases, rates
from steering.running import MODULES, answer, run, run_elsewhere
from steering.tables import TABLES, rated

NAME = "knob"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--against", type=Path, default=None, help="folder with the `craft_optim` of an earlier commit")
    add("--seeds", nargs="+", type=int, default=[13, 14, 15], help="default: 13 14 15")
    add("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS), help="default: all")
    add("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    add("--work", type=Path, default=WORK, help="where finished runs are")
    add("--results", type=Path, default=Path(".benchmarks"), help="where the JSON goes")
    add("--answer", type=Path, default=None, help=argparse.SUPPRESS)  # of the process that has the other build
    args = parser.parse_args(arguments)
    args.work = args.work.resolve()
    if args.jobs < 1:
        parser.error(f"--jobs must be 1 or more, found {args.jobs}")
    if args.against is not None:
        args.against = args.against.resolve()
        if not (args.against / "craft_optim" / "__init__.py").is_file():
            parser.error(f"--against must be a folder that has `craft_optim`, found {args.against}")
    return args


def commit(build: Path) -> str:
    """The commit that a checkout is at."""
    command = ["git", "-C", str(build), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is not there yet, writes the JSON and prints the tables."""
    args = parse(arguments)
    if args.answer is not None:
        answer(args.answer, args.work, args.jobs)
        return {}
    folder = store(args.work, *MODULES)
    learning = [(setting, seed, lr) for setting in args.settings for seed in args.seeds for lr, _ in rates(setting)]
    jobs = [Job(setting, "plain", 0.0, seed, lr=lr) for setting, seed, lr in learning]
    plain = run_all(jobs, folder, args.jobs, fine_tune, "plain")
    ours = run_all(cases(args.settings, args.seeds), folder, args.jobs, run, "this build")
    records: list[dict[str, Any]] = [{"build": "this", **row} for row in ours]
    words = [f"python benchmarks/evidence/{NAME}.py", *["--against=PATH"] * (args.against is not None)]
    words += ["--seeds", *map(str, args.seeds), "--settings", *args.settings]
    result: dict[str, Any] = {"command": " ".join(words), "versions": versions(), "seeds": args.seeds}
    if args.against is not None:
        theirs = cases(args.settings, args.seeds, "earlier")
        found = run_elsewhere(theirs, args.against, Path(__file__).resolve(), args.work, args.jobs)
        records += [{"build": "earlier", **row} for row in found]
        result["earlier"] = commit(args.against)
    rows = rated(records, plain)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{NAME}.json").write_text(with_runs(result, rows), encoding="utf-8")
    for name, table in TABLES.items():
        print(f"{name}\n\n{table(rows)}\n")
    print(f"Written to {args.results}")
    return result | {"runs": rows}


if __name__ == "__main__":
    main()
