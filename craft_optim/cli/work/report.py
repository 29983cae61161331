"""The work of craft-optim report: the page, pictures, and a table of verdicts."""

import argparse
from pathlib import Path

from craft_optim.cli.options import UsageError
from craft_optim.cli.output import print_grid
from craft_optim.inspection import bytes_in_words
from craft_optim.report.runs import named

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
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
