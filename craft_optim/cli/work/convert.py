"""The work of craft-optim convert."""

import argparse
import shlex

from craft_optim import anchors
from craft_optim.cli.options import require_folder
from craft_optim.cli.output import emit_json, print_code, print_table
from craft_optim.inspection import as_json, facts

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    require_folder("--json", args.json)
    cache = anchors.convert(args.old, args.new, layers=args.layers, overwrite=args.overwrite)
    if args.json:
        emit_json(args.json, as_json(cache))
    if args.json == "-":
        return
    print_table(f"Converted {args.old} to {cache.path}", facts(cache))
    print_code(f"craft-optim inspect {shlex.join([str(cache.path), '--html=anchors.html'])}")
