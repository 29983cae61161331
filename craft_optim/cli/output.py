"""Tables, code and JSON that the commands print."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["emit_json", "print_code", "print_grid", "print_table"]


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Prints labels and texts: with rich on a terminal, plain into files and pipes, whose lines must not be wrapped."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            pass
        else:
            table = Table.grid(padding=(0, 2))
            table.add_column(overflow="fold")
            for label, text in rows:
                table.add_row(Text(label, style="dim"), Text(text))
            console = Console()
            console.print(Text(f"\n{title}", style="bold"))
            console.print(table)
            return
    width = max(len(label) for label, _ in rows)
    print(f"\n{title}", *(f"  {label:{width}}  {text}" for label, text in rows), sep="\n")


def print_grid(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with a header; all columns but the first are flush right. With rich on a terminal, else plain."""
    if sys.stdout.isatty():
        try:
            from rich.box import SIMPLE_HEAD
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            pass
        else:
            table = Table(title=Text(title, style="bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
            for place, name in enumerate(header):
                table.add_column(Text(name), justify="right" if place else "left", overflow="fold")
            for row in rows:
                table.add_row(*map(Text, row))
            print()
            Console().print(table)
            return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}")
    for row in (header, *rows):
        cells = [f"{x:>{width}}" if i else f"{x:{width}}" for i, (x, width) in enumerate(zip(row, widths, strict=True))]
        print(f"  {'  '.join(cells)}".rstrip())


def print_code(code: str) -> None:
    """The lines that a user may run next."""
    print("\nNext:\n", *(f"  {line}" for line in code.splitlines()), sep="\n")


def emit_json(file: str, about: Mapping[str, Any]) -> None:
    """Writes what was measured to a file, whole or not at all, or to standard output for "-"."""
    text = json.dumps(about, indent=1, allow_nan=False)
    if file == "-":
        print(text)
    else:
        aside = Path(f"{file}.tmp")
        aside.write_text(f"{text}\n", encoding="utf-8")
        aside.replace(file)
        print(f"\nJSON: {file}")
