"""The work of craft-optim convert."""

import argparse
import shlex

from craft_optim import anchors
from craft_optim.cli.output import print_code, print_table
from craft_optim.inspection import facts

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    cache = anchors.convert(args.old, args.new, layers=args.layers, overwrite=args.overwrite)
    print_table(f"Converted {args.old} to {cache.path}", facts(cache))
    print_code(f"craft-optim inspect {shlex.join([str(cache.path), '--html=anchors.html'])}")
