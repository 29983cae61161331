"""Paths whose beginning `~` becomes a home folder: shells leave it as it is after `=`."""

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["expanded", "local", "require_found"]


def expanded(path: str | os.PathLike[str]) -> str:
    """The path or hub id, with a home folder instead of `~` or `~name` at its beginning.

    Raises:
        ValueError: This user has no home.
    """
    text = os.fspath(path)
    found = os.path.expanduser(text)
    if found.partition(os.sep)[0] == "~":
        raise ValueError(f"`~` stands for a home, and this user has none. Found {text!r}: set HOME, or write it out.")
    return found


def local(path: str | os.PathLike[str]) -> Path:
    """Result of `expanded` as a Path."""
    return Path(expanded(path))


def require_found(path: str, what: str, files: Iterable[str] = ()) -> None:
    """Refuses what can only be a path, and is not there; a name without folders, or of two parts, may be a hub id.

    Args:
        path: As `expanded` returns it.
        what: What it should be, for the message.
        files: Suffixes that files of this kind have, such as ".gguf".

    Raises:
        ValueError: Nothing is there.
    """
    local_only = path.startswith((".", os.sep)) or path.endswith(os.sep) or path.count(os.sep) > 1
    if (local_only or path.lower().endswith(tuple(files))) and not os.path.exists(path):
        raise ValueError(f"{path} must be {what}. Found nothing there: check the path.")
