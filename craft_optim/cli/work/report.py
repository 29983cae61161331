"""The work of craft-optim report: the page, pictures, and a table of verdicts."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from craft_optim.cli.options import UsageError, require_folder
from craft_optim.cli.output import emit_json, print_grid
from craft_optim.evaluation.plots import require_matplotlib
from craft_optim.inspection import bytes_in_words
from craft_optim.report import Run, Summary, Verdict, judge, read_runs, render, summarise
from craft_optim.report.numbers import number, percent
from craft_optim.report.runs import named
from craft_optim.report.summary import LABELS

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if not args.runs:
        raise UsageError("name at least one RUN: a file, or a folder with metrics.jsonl in it")
    out = Path(args.out)
    require_folder("--out", args.out)
    require_folder("--json", args.json)
    if args.png:
        require_matplotlib()
    runs = read_runs(args.runs)
    page = render(runs, args.title or ", ".join(dict.fromkeys(map(_shown, args.runs))))
    out.write_text(page, encoding="utf-8")
    pictures: list[Path] = []
    if args.png:
        from craft_optim.report.pictures import draw

        pictures = draw(runs, Path(args.png))

    summaries = [summarise(run) for run in runs]
    verdicts = [judge(summary) for summary in summaries]
    if args.json:
        each = [
            {
                "method": run.method,
                "seed": run.seed,
                "file": str(run.file),
                "verdict": verdict.kind,
                "words": verdict.words,
                **asdict(summary),
                "ratio": summary.ratio,
                "notes": list(run.notes),
            }
            for run, summary, verdict in zip(runs, summaries, verdicts, strict=True)
        ]
        emit_json(args.json, {"page": str(out), "pictures": [str(file) for file in pictures], "runs": each})
    if args.json != "-":
        _print(runs, summaries, verdicts)
        print(f"\nPage: {out} ({bytes_in_words(len(page.encode()))})")
        if pictures:
            print(f"Pictures: {len(pictures)} in {args.png}")


def _print(runs: Sequence[Run], summaries: Sequence[Summary], verdicts: Sequence[Verdict]) -> None:
    rows, sentences = [], []
    for run, summary, verdict in zip(runs, summaries, verdicts, strict=True):
        drifts = number(summary.drift), number(summary.ratio), percent(summary.violated), number(summary.heldout)
        rows.append([run.name, f"{summary.steps:,}", *drifts, percent(summary.passes), LABELS[verdict.kind]])
        sentences.append(" ".join([f"  {run.name}: {verdict.words}", *run.notes]))
    columns = ["run", "last step", "drift", "/ epsilon", "steps above", "held-out", "with a pass", "verdict"]
    print_grid("Runs", columns, rows)
    print("", *sentences, sep="\n")


def _shown(spec: str) -> str:
    """The name of a RUN in the heading of the page."""
    name, place = named(spec)
    return name or Path(place).resolve().name
