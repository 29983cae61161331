"""The work of craft-optim train: lerobot's own command, with retention put in."""

import argparse
import sys

from craft_optim.cli.options import UsageError

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    try:
        from lerobot.scripts import lerobot_train

        from craft_optim.lerobot.plugin import TRAIN_FLAG, install
    except ImportError as error:
        raise UsageError(f"train needs lerobot ({error}): pip install 'craft-optim[lerobot]'.") from error
    sys.argv = ["lerobot-train", TRAIN_FLAG, *args.rest]
    install(sys.argv[1:], debug=args.debug)  # the flag alone would not: the module is imported already
    try:
        lerobot_train.main()
    except Exception:
        # Of what has trained for hours the traceback is not to be had again
        args.debug = args.debug or lerobot_train.craft_run.retention is not None
        raise
