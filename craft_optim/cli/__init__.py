"""The command line: craft-optim build-anchors, inspect, drift and so on.

    craft-optim plan --policy.path=lerobot/pi0fast-base --batch-size=8 --gpu 24 80
    craft-optim build-anchors anchors/ --policy.path=lerobot/pi0fast-base --dataset.repo_id=you/old_task --count=512
    craft-optim build-anchors anchors/ --factory=my_script.py:anchors
    craft-optim inspect anchors/ --html=anchors.html
    craft-optim drift anchors/ --policy.path=outputs/checkpoints/last/pretrained_model --epsilon=0.05
    craft-optim report outputs/train/new_task

The options of a command are in the module of its name here, and what it does in the one in `work`, which is imported
when it is run: torch and lerobot take seconds, and no help needs them.

The same as `python -m craft_optim.cli`. Exit status: 0, 1 for what went wrong, 2 for wrong arguments.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from craft_optim import __version__
from craft_optim._paths import expanded
from craft_optim.cli import build_anchors, convert, demo, drift, eval_mcq, inspect, plan, report, train
from craft_optim.cli.options import Parser, UsageError, complete

__all__ = ["main"]

_COMMANDS = (demo, plan, build_anchors, inspect, convert, eval_mcq, drift, train, report)


def _parser() -> Parser:
    parser = Parser(
        prog="craft-optim", description="Fine-tune without losing what a model could do: anchors, and what was kept."
    )
    parser.add_argument("--version", action="version", version=f"craft-optim {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, about: str, examples: str) -> Parser:
        made = commands.add_parser(name, help=about, description=about, epilog=f"examples:\n\n{examples}")
        made.set_defaults(parser=made)
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return made

    for module in _COMMANDS:
        module.add(add_command)
    return parser


def _at_home(argument: str) -> str:
    """An argument with the homes in it: `~/x`, `--option=~/x`, `NAME=~/x`, and after commas."""
    return re.sub("(^|[=,])(~[^,]*)", lambda found: found[1] + expanded(found[2]), argument)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Without the program's name. None: those of the process.

    Returns:
        The exit status: 0, or 1 after a message.

    Raises:
        SystemExit: With status 2 for wrong arguments; after --help and --version with 0.
    """
    parser = _parser()
    complete(parser)
    given = sys.argv[1:] if arguments is None else [*arguments]
    try:
        args, rest = parser.parse_known_args(given if given[:1] == ["train"] else [*map(_at_home, given)])
    except ValueError as error:
        parser.error(str(error).rstrip("."))
    args.rest = rest
    if rest and not getattr(args, "takes_rest", False):
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        import_module(f"{__name__}.work.{args.command.replace('-', '_')}").run(args)
    except UsageError as error:
        args.parser.error(str(error).rstrip("."))
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"craft-optim {args.command}: stopped{getattr(args, 'stopped', '')}", file=sys.stderr)
        return 130
    except Exception as error:
        expected = isinstance(error, ValueError | OSError | ImportError)
        if args.debug or not (expected or _is_ours(args)):
            raise
        said = " ".join(str(error).split())  # of other packages' lines the last is seldom what says most
        said = said if expected else f"{type(error).__name__}: {said[:600]}"
        print(f"craft-optim {args.command}: {said} (--debug shows where)", file=sys.stderr)
        return 1
    return 0


def _is_ours(args: argparse.Namespace) -> bool:
    """False if the command runs a function of the user's, FILE:FUNCTION, whose errors he wants to see whole."""
    given = [getattr(args, name, None) or [] for name in ("factory", "factories", "model", "versus")]
    return not any(":" in one for names in given for one in ([names] if isinstance(names, str) else names))
