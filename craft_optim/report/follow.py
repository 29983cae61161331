"""Runs in the terminal while they train: a row each, with the last values and lines of those before."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from craft_optim.report.runs import canonical, files_of, lines, name_of, named, parsed
from craft_optim.report.summary import BAND, in_text

__all__ = ["Followed", "follow", "spark"]

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # of a sparkline
_ROWS = 400  # of the past that are shown
_BYTES = 1 << 19  # of a file's end that hold them
_BATCHES = 20  # whose median is the drift: single ones scatter


def spark(values: Sequence[float], width: int = _WIDTH) -> str:
    """Values as one line of bars, from the lowest to the highest; each bar is the mean of neighbours.

    Example:
        >>> spark([0.0, 1.0, 2.0, 3.0], width=4)
        '▁▃▆█'
    """
    if not values:
        return ""
    edges = [i * len(values) // min(width, len(values)) for i in range(min(width, len(values)) + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(_BARS[round((v - low) / (high - low) * (len(_BARS) - 1)) if high > low else 0] for v in means)


@dataclass(frozen=True)
class Followed:
    """The end of one run.

    Attributes:
        name: Name of the run.
        rows: Its last rows, at most 400.
    """

    name: str
    rows: Sequence[Mapping[str, float]]

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> "Followed":
        """The end of a JSONL file that may grow; a run that was resumed, or begun anew, starts where steps go back."""
        rows: deque[Mapping[str, float]] = deque(maxlen=_ROWS)
        for row in (canonical(parsed(line) or {}) for line in lines(path, _BYTES)):
            if rows and row and row["step"] < rows[-1]["step"]:
                rows.clear()
            if row:
                rows.append(row)
        return cls(name or name_of(path), rows)

    def past(self, name: str) -> list[float]:
        """The values of one name."""
        return [row[name] for row in self.rows if not math.isnan(row.get(name, math.nan))]

    def last(self, name: str) -> float | None:
        """The last value of one name; None if there is none."""
        return next(iter(self.past(name)[::-1]), None)

    @property
    def ms_per_step(self) -> float | None:
        """Median of the rows."""
        if took := self.past("seconds"):
            return 1e3 * median(took)
        at = [(row["step"], row["time"]) for row in self.rows if "time" in row]
        each = [(t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in pairwise(at) if s1 > s0]
        return 1e3 * median(each) if each else None


def _table(runs: Sequence[Followed], width: int) -> Table:
    bars = min(_WIDTH, (width - 92) // 2)  # what the numbers leave
    table = Table(box=None, pad_edge=False, collapse_padding=True, padding=(0, 1 if width < 100 else 2))
    for column in ("run", "step", "loss", "drift", "x epsilon", "lambda", "cos", "capped", "skipped", "ms"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for column in ("loss", "drift") if bars >= 4 else ():
        table.add_column(column, no_wrap=True, style="dim")
    for run in runs:
        losses, capped, epsilon = run.past("loss"), run.past("capped"), run.last("epsilon")
        drifts = run.past("retention_loss") or run.past("drift_anchors")
        drift = median(drifts[-_BATCHES:]) if drifts else None
        ratio = drift / epsilon if drift is not None and epsilon else None
        table.add_row(
            Text(run.name),
            in_text(run.last("step"), ".0f"),
            in_text(run.last("loss")),
            in_text(drift),
            Text(in_text(ratio, ".2f"), style="yellow" if ratio is not None and ratio > BAND[1] else "green"),
            in_text(run.last("lambda")),
            in_text(run.last("grad_cos"), ".2f"),
            in_text(sum(capped) / len(capped) if capped else None, ".0%"),
            in_text(run.last("skipped"), ".0f"),
            in_text(run.ms_per_step, ".0f"),
            *(spark(values, bars) for values in (losses, drifts) if bars >= 4),
        )
    return table


def follow(
    specs: Sequence[str],
    *,
    every: float = 1.0,
    console: Console | None = None,
    until: Callable[[], Any] = lambda: False,
) -> None:
    """Shows the runs, and new ones in folders, until it is stopped.

    On a terminal the table changes in place; elsewhere each change prints one.

    Args:
        specs: Specs of `read_runs`; they need not be there yet. Other files than JSONL do not grow, and are not shown.
        every: Seconds between two looks.
        console: The terminal; None: standard output.
        until: Asked after every look; true ends it.
    """
    console = Console() if console is None else console
    read: dict[Path, tuple[tuple[int, int], Followed]] = {}

    def look() -> bool:
        """Reads the files that have changed; whether there were any."""
        before = dict(read)
        for name, place in map(named, specs):
            for file in _files(Path(place)):
                now = file.stat().st_size, file.stat().st_mtime_ns
                if file not in read or read[file][0] != now:
                    read[file] = now, Followed.read(file, name)
        return read != before

    def shown() -> Table | Text:
        runs = [run for _, run in read.values() if run.rows]
        return _table(runs, console.width) if runs else Text(f"waiting for rows in {', '.join(specs)}", style="dim")

    if not console.is_terminal:
        while True:
            if look():
                console.print(shown())
            if until():
                return
            time.sleep(every)
    look()
    with Live(shown(), console=console, auto_refresh=False) as live:
        while not until():
            time.sleep(every)
            look()
            live.update(shown(), refresh=True)


def _files(place: Path) -> list[Path]:
    try:
        return [file for file in files_of(place) if file.suffix == ".jsonl"]
    except FileNotFoundError:
        return []
