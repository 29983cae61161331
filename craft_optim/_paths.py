"""Paths whose beginning `~` becomes a home folder: shells leave it as it is after `=`."""

import os
from pathlib import Path

__all__ = ["expanded", "local"]


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
