"""The work of craft-optim eval-mcq: scores, and the comparison of two models."""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

from craft_optim import __version__
from craft_optim.anchors.sampling import spread
from craft_optim.cli.options import UsageError, require_folder
from craft_optim.cli.output import emit_json, print_table
from craft_optim.cli.work.processes import device_of
from craft_optim.cli.work.sources import user_function

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from craft_optim.evaluation import compare, evaluate, read_questions, summarise
    from craft_optim.evaluation.mcq_report import as_json, change_rows, doubts, failures, summary_rows

    questions = read_questions(args.questions)
    if args.limit:
        questions = [questions[place] for place in spread(len(questions), args.limit)]
    names = [args.model] if args.versus is None else [args.model, args.versus]
    _check(args, names)

    results = []
    for name in names:
        scorer = _scorer(name, args)
        results.append(evaluate(_bar(questions, name), scorer))
        del scorer
        gc.collect()  # one model at a time in memory
    summaries = [summarise(each) for each in results]
    change = compare(results[0], results[1], args.score) if args.versus is not None else None

    chance = f"chance would get {summaries[0].chance:.3f}; [..]: 95 % interval"
    print_table(f"{args.questions}: {len(questions)} questions, {chance}", summary_rows(names, summaries, args.score))
    if change is not None:
        print_table(f"What has changed in {args.versus}", change_rows(change, args.score))
    if args.json:
        about = {"craft_optim": __version__, "file": args.questions, "template": args.template}
        emit_json(args.json, about | as_json(names, results, summaries, change, args.score))
    failed = [line for name, each in zip(names, results, strict=True) for line in failures(name, each)]
    # Only of the first: that the second guesses would be the finding.
    for line in [*failed, *doubts(names[0], summaries[0], args.score)]:
        print(line, file=sys.stderr)
    lost = [name for name, summary in zip(names, summaries, strict=True) if summary.failed == summary.questions]
    if lost:
        raise ValueError(f"{lost[0]} could not score a single question: the reasons are above.")


def _check(args: argparse.Namespace, names: list[str]) -> None:
    """Finds what can be wrong before the first model has worked for an hour."""
    from craft_optim.evaluation.scorers import require_checkpoint
    from craft_optim.evaluation.templates import CHAT, parse_template

    require_folder("--json", args.json)
    if any(_is_function(name) for name in names):
        device = None if args.device == "auto" else args.device
        given = {"--template": args.template, "--batch-size": args.batch_size, "--device": device}
        for option, value in given.items():
            if value is not None:
                raise UsageError(f"{option} goes with a checkpoint: of FILE:FUNCTION the function chooses it")
    if args.template not in (None, CHAT):
        try:
            parse_template(args.template)
        except ValueError as error:
            raise UsageError(f"--template: {error}") from error
    for name in names:
        if not _is_function(name):
            require_checkpoint(name)


def _is_function(name: str) -> bool:
    return not Path(name).exists() and name.rpartition(":")[2].isidentifier() and ":" in name


def _scorer(name: str, args: argparse.Namespace) -> Any:
    if not _is_function(name):
        from craft_optim.evaluation import load_scorer

        size = args.batch_size or 16
        return load_scorer(name, device=device_of(args.device), template=args.template, batch_size=size)
    scorer = user_function(name, "--model")()
    if not callable(scorer):
        raise UsageError(f"{name}: the function must return a scorer, a function of a question. Found {scorer!r}.")
    return scorer


def _bar(questions: list[Any], name: str) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return questions
    return tqdm(questions, desc=name, unit=" questions", disable=None)
