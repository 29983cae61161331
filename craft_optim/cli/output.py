"""Tables, code and JSON that the commands print. Nothing is wrapped: files and pipes take lines as they are."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["emit_json", "log_shown", "print_code", "print_grid", "print_table"]


@contextmanager
def log_shown() -> Iterator[None]:
    """Within the block what this package logs stands on standard error, warnings among it, whatever its level."""
    logger, handler = logging.getLogger("craft_optim"), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Prints labels and texts."""
    width = max(len(label) for label, _ in rows)
    print(f"\n{title}", *(f"  {label:{width}}  {text}" for label, text in rows), sep="\n")


def print_grid(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table with a header; all columns but the first are flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}")
    for row in (header, *rows):
        cells = [f"{x:>{width}}" if i else f"{x:{width}}" for i, (x, width) in enumerate(zip(row, widths, strict=True))]
        print(f"  {'  '.join(cells)}".rstrip())


def print_code(code: str, title: str = "Next:") -> None:
    """Prints the lines that a user may run next."""
    print(f"\n{title}\n", *(f"  {line}" for line in code.splitlines()), sep="\n")


def emit_json(file: str, about: Mapping[str, Any]) -> None:
    """Writes what was measured to a file, whole or not at all, or to standard output for "-"."""
    text = json.dumps(about, indent=1, allow_nan=False)
    if file == "-":
        print(text)
        return
    aside = Path(f"{file}.tmp")
    aside.write_text(f"{text}\n", encoding="utf-8")
    aside.replace(file)
    print(f"\nJSON: {file}")
