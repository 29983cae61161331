"""craft-optim eval-mcq: does a fine-tuned model still know the answers?"""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

from craft_optim import __version__
from craft_optim.anchors.sampling import spread
from craft_optim.cli.options import AddCommand, UsageError, device_of, existing_file, whole
from craft_optim.cli.output import emit_json, print_table
from craft_optim.cli.sources import user_function

__all__ = ["add"]

_EXAMPLES = """\
  craft-optim eval-mcq questions.jsonl --model=outputs/checkpoints/last/pretrained_model
  craft-optim eval-mcq questions.jsonl --model=lerobot/pi0fast-base \\
      --versus=outputs/checkpoints/last/pretrained_model --json=mcq.json      # what has fine-tuning cost?
  craft-optim eval-mcq questions.jsonl --model=my_script.py:scorer

A line of questions.jsonl, image_path relative to it and only where there is a picture:

  {"image_path": "ice.png", "question": "What is this?", "choices": ["ice", "fire"], "answer_index": 0}

A model is a pi0_fast of lerobot, or a language model or vision-language model of transformers, by folder or hub id,
adapters included; or a function without arguments that returns a scorer: question -> one ChoiceScore of
craft_optim.evaluation for each choice.

Templates end where the choice begins. Unless told otherwise pi0_fast and PaliGemma are asked as PaliGemma was taught,
"answer en {question}\\n{choice}"; other vision-language models in their chat template; and language models
"Question: {question}\\nAnswer: {choice}".

A choice counts by the mean log-likelihood of its tokens, or by their sum. A question is answered rightly if the right
choice is above all others: ties, and questions that could not be scored, count as wrong.
"""


def add(command: AddCommand) -> None:
    """The command and its options."""
    about = "Ask multiple-choice questions: how much does a model know, and how much does it still know?"
    add = command("eval-mcq", _eval, about, _EXAMPLES).add_argument
    add("questions", metavar="QUESTIONS", type=existing_file, help="JSONL file with a question per line")
    model = "folder, hub id or FILE:FUNCTION"
    add("--model", "--policy.path", dest="model", metavar="MODEL", required=True, help=f"whom to ask: {model}")
    add("--versus", metavar="MODEL", help="a second model, compared with the first: what has it lost?")
    template = 'with {question} and, at its end, {choice}; or "chat" (default: by the model)'
    add("--template", metavar="TEXT", help=template)
    score = "mean over a choice's tokens, or sum (default: normalized)"
    add("--score", choices=["normalized", "sum"], default="normalized", help=score)
    add("--limit", type=whole, metavar="N", help="N questions, evenly spread over the file (default: all)")
    add("--batch-size", type=whole, metavar="N", help="choices of a question per forward (default: 16)")
    add("--device", default="auto", help="where models run (default: auto: CUDA if there is, else the CPU)")
    add("--json", metavar="FILE", help="write summary, comparison and every question's scores")


def _eval(args: argparse.Namespace) -> None:
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

    if args.json and (Path(args.json).is_dir() or not Path(args.json).absolute().parent.is_dir()):
        raise UsageError(f"--json must be a file in a folder that is there. Found {args.json}")
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
