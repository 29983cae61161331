"""craft-optim report: a run's metrics as a page, and as pictures."""

import argparse
from pathlib import Path

from craft_optim.cli.options import AddCommand, UsageError
from craft_optim.cli.output import print_grid
from craft_optim.inspection import bytes_in_words
from craft_optim.report.runs import named

__all__ = ["add"]

_EXAMPLES = """\
  craft-optim report outputs/train/new_task                       # of lerobot-train with retention; writes report.html
  craft-optim report adamw=runs/a/metrics.jsonl craft=runs/b/metrics.jsonl --out=both.html --title="Both"
  craft-optim report examples/out/runs --png=pictures/

A run is a file (.jsonl of craft_optim.metrics, trainer_state.json of the Hugging Face Trainer), a folder with
such files in it, at any depth, or either of them behind NAME=. Runs of one method under several seeds are drawn
together: by the `method` and `seed` of their rows, or by names that end in seed0, seed1, ...
"""


def add(command: AddCommand) -> None:
    """The command and its options."""
    about = "Draw what runs have logged, and say whether drift was held at epsilon."
    add = command("report", _report, about, _EXAMPLES).add_argument
    add("runs", nargs="*", metavar="RUN", help="a file, a folder, or NAME= before either")
    add("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")
    add("--png", metavar="DIR", help="also every chart as a picture; needs matplotlib")
    add("--title", metavar="TEXT", help="on top of the page (default: the names of what is in it)")


def _report(args: argparse.Namespace) -> None:
    if not args.runs:
        raise UsageError("name at least one RUN: a file, or a folder with metrics.jsonl in it")
    from craft_optim.evaluation.plots import require_matplotlib
    from craft_optim.report import judge, read_runs, render, summarise
    from craft_optim.report.summary import in_text

    out = Path(args.out)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out={out} cannot be written: there is no folder {out.parent}")
    if args.png:
        require_matplotlib()
    runs = read_runs(args.runs)
    page = render(runs, args.title or ", ".join(dict.fromkeys(map(_shown, args.runs))))
    out.write_text(page, encoding="utf-8")

    rows, sentences = [], []
    for run in runs:
        summary = summarise(run)
        verdict = judge(summary)
        numbers = in_text(summary.drift), in_text(summary.ratio, ".2f"), in_text(summary.passes, ".0%")
        rows.append([run.name, f"{summary.steps}", *numbers, verdict.kind])
        sentences.append(" ".join([f"  {run.name}: {verdict.words}", *run.notes]))
    print_grid("Runs", ["run", "last step", "drift", "/ epsilon", "with a pass", "verdict"], rows)
    print("", *sentences, sep="\n")
    print(f"\nPage: {out} ({bytes_in_words(len(page.encode()))})")
    if args.png:
        from craft_optim.report.pictures import draw

        print(f"Pictures: {len(draw(runs, Path(args.png)))} in {args.png}")


def _shown(spec: str) -> str:
    """The name of a RUN in the heading of the page."""
    name, place = named(spec)
    return name or Path(place).resolve().name
