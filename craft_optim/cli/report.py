"""craft-optim report: a run's metrics as a page, and as pictures."""

from craft_optim.cli.options import AddCommand, add_json

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
    add = command("report", about, _EXAMPLES).add_argument
    add("runs", nargs="*", metavar="RUN", help="a file, a folder, or NAME= before either")
    add("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")
    add("--png", metavar="DIR", help="also every chart as a picture; needs matplotlib")
    add_json(add)
    add("--title", metavar="TEXT", help="on top of the page (default: the names of what is in it)")
