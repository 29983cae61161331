"""Runs in the terminal while they train: a row each, with the last values and what they have come from."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from craft_optim.report.runs import Tail, canonical, files_of, name_of, named
from craft_optim.report.summary import BAND

__all__ = ["Followed", "follow", "spark"]

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # of a sparkline
_ROWS = 400  # of the past that are kept
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


class Followed:
    """The last values of one file.

    Args:
        path: JSONL; it may grow.
        name: What to call it; None: after its folder, or itself.

    Attributes:
        name: Of the run.
        last: Name -> its last value.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or name_of(path)
        self.last: dict[str, float] = {}
        self._tail, self._restarts = Tail(path), 0
        self._past: deque[Mapping[str, float]] = deque(maxlen=_ROWS)

    def update(self) -> bool:
        """Reads what has been added; whether there was anything."""
        before = len(self._past), self.last.get("step")
        for row in map(canonical, self._tail.rows()):
            if self._tail.restarts != self._restarts or row.get("step", 0.0) < self.last.get("step", 0.0):
                # A run that was resumed, or begun anew, in the same file
                self._restarts = self._tail.restarts
                self._past.clear()
                self.last = {}
            if row:
                self._past.append(row)
                self.last |= {name: value for name, value in row.items() if value == value}
        return before != (len(self._past), self.last.get("step"))

    def past(self, name: str) -> list[float]:
        """The values of one name that are kept."""
        return [row[name] for row in self._past if row.get(name, float("nan")) == row.get(name)]

    @property
    def ms_per_step(self) -> float | None:
        """Median of what is kept."""
        if took := self.past("seconds"):
            return 1e3 * median(took)
        at = [(row["step"], row["time"]) for row in self._past if "time" in row]
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
        last = run.last

        def number(name: str, form: str = ".3g", last: Mapping[str, float] = last) -> str:
            return format(last[name], form) if name in last else "-"

        drifts = run.past("retention_loss") or run.past("drift_anchors")
        drift = median(drifts[-_BATCHES:]) if drifts else None
        epsilon, cost = last.get("epsilon"), run.ms_per_step
        ratio = drift / epsilon if drift is not None and epsilon else None
        table.add_row(
            Text(run.name),
            number("step", ".0f"),
            number("loss"),
            "-" if drift is None else f"{drift:.3g}",
            "-" if ratio is None else Text(f"{ratio:.2f}", style="yellow" if ratio > BAND[1] else "green"),
            number("lambda"),
            number("grad_cos", ".2f"),
            "-" if not (capped := run.past("capped")) else f"{sum(capped) / len(capped):.0%}",
            number("skipped", ".0f"),
            "-" if cost is None else f"{cost:.0f}",
            *(spark(values, bars) for values in (run.past("loss"), drifts) if bars >= 4),
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
        specs: As of `read_runs`; they need not be there yet. Files of other kinds than JSONL do not grow, and are not
            shown.
        every: Seconds between two looks.
        console: Where to.
        until: Asked after every look; true ends it.
    """
    console = Console() if console is None else console
    followed: dict[Path, Followed] = {}

    def look() -> bool:
        for name, place in map(named, specs):
            for file in _files(Path(place)):
                followed.setdefault(file, Followed(file, name))
        changed = [run.update() for run in followed.values()]
        return any(changed)

    def shown() -> Table | Text:
        runs = [run for run in followed.values() if run.last]
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
