"""Parts of all commands: their parser, the types of their options, which model."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

__all__ = [
    "AddCommand",
    "Parser",
    "UsageError",
    "add_json",
    "add_model",
    "complete",
    "completing",
    "existing_file",
    "layer",
    "positive",
    "require_folder",
    "require_one_model",
    "top_k",
    "whole",
]

AddCommand = Callable[[str, str, str], "Parser"]
"""(name, one line about it, examples) -> the command's parser"""


class UsageError(Exception):
    """A wrong argument on the command line; the message has the remedy."""


class Parser(argparse.ArgumentParser):
    """A parser with errors of one line: the usage of these commands is long, and would hide them."""

    def __init__(self, **settings: Any) -> None:
        self._spelled: dict[str, str] = {}  # with hyphens alone -> as it was added
        self.more_help: Callable[[], str] | None = None  # below the examples; made when the help is asked for
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As of the base class."""
        self._spelled |= {name.replace("_", "-"): name for name in names if name.startswith("--")}
        return super().add_argument(*names, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of the base class; `-` and `_` in the names of options are the same."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        for place, word in enumerate(given[:end]):
            name, equals, value = word.partition("=")
            given[place] = f"{self._spelled.get(name.replace('_', '-'), name)}{equals}{value}"
        return super().parse_known_args(given, namespace)

    def format_help(self) -> str:
        """As of the base class, and `more_help` below it."""
        return super().format_help() + (self.more_help() if self.more_help else "")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help has examples)\n")


def completing() -> bool:
    """True if a shell asks what may come next, see `complete`."""
    return "_ARGCOMPLETE" in os.environ


def complete(parser: Parser) -> None:
    """Answers a shell that has been told so by `eval "$(register-python-argcomplete craft-optim)"`, and ends there.

    Source: argcomplete, https://kislyuk.github.io/argcomplete/.
    """
    if completing():
        import argcomplete

        argcomplete.autocomplete(parser)


def whole(text: str) -> int:
    """A whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1. Found {text!r}.")
    return int(text)


def positive(text: str) -> float:
    """A finite number > 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0.0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0. Found {text!r}.")
    return found


def top_k(text: str) -> int | str:
    """A number of classes >= 1, or "auto" or "all"."""
    if text not in ("auto", "all") and (not text.isdecimal() or int(text) < 1):
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, auto or all. Found {text!r}.")
    return int(text) if text.isdecimal() else text


def layer(text: str) -> int | str:
    """A layer's number, or the name of a module."""
    return int(text) if text.lstrip("-").isdecimal() else text


def existing_file(text: str) -> str:
    """The path of a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}.")
    return text


def add_json(add: Callable[..., Any]) -> None:
    """Adds the option of commands that make or measure something."""
    about = "everything as JSON: to FILE, or in the place of the tables"
    add("--json", nargs="?", const="-", metavar="FILE", help=about)


def add_model(add: Callable[..., Any]) -> None:
    """The options that name a model."""
    add("--policy.path", dest="policy", metavar="PATH", help="a lerobot policy: folder or hub id")
    add("--model.path", dest="model", metavar="PATH", help="a causal language model: folder, hub id or .gguf file")
    add("--factory", metavar="FILE:FUNCTION", help="a function that returns (model, batches[, settings])")
    add("--device", default="auto", help="where the model runs (default: auto: CUDA if there is, else the CPU)")


def require_folder(option: str, file: str | None) -> None:
    """Refuses a file in a folder that is not there, or a folder, before any work; "-" is standard output."""
    if file and file != "-":
        if not Path(file).absolute().parent.is_dir():
            raise UsageError(f"{option}={file} cannot be written: there is no folder {Path(file).parent}")
        if Path(file).is_dir():
            raise UsageError(f"{option}={file} cannot be written: it is a folder. Name a file in it")


def require_one_model(args: argparse.Namespace) -> None:
    """Refuses two answers to which model."""
    if sum(map(bool, (args.policy, args.model, args.factory))) > 1:
        raise UsageError("--policy.path, --model.path and --factory exclude each other: pass one")
