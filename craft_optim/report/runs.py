"""Runs as columns over their steps, read from JSONL or a Trainer's state."""

import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from craft_optim._paths import local
from craft_optim.metrics import METRICS

__all__ = ["Column", "Run", "files_of", "named", "read_file", "read_runs"]

Column = NDArray[np.float64]
"""One value per step; NaN where there is none"""

_PREFIX = re.compile(r"^(eval_)?craft/")  # of our metrics in trackers' logs
_OF_TRAINER = {"learning_rate": "lr"}
_COUNTERS = ("skipped", "retention_step", "fresh")  # true also in rows that keep the values of an earlier step
_OF_RETENTION = frozenset(METRICS) - {*_COUNTERS}
_SEED = re.compile(r"[-_ ]?seed[-_= ]?(\d+)$")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: Unique in a report.
        method: Name that it shares with its repetitions under other seeds.
        seed: None if neither rows nor name say it.
        columns: Name -> values; "step" increases, "seconds" is the time of a step. Values that a row kept from an
            earlier step are NaN.
        notes: Sentences about rows that were left out.
    """

    name: str
    method: str
    seed: int | None
    file: Path
    columns: Mapping[str, Column]
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> Column:
        return self.columns["step"]

    def __getitem__(self, name: str) -> Column:
        """A column; all NaN if the run has none of this name."""
        found = self.columns.get(name)
        return np.full(len(self.steps), np.nan) if found is None else found

    def measured(self, name: str) -> tuple[Column, Column]:
        """The steps at which a column has values, and these."""
        there = np.isfinite(self[name])
        return self.steps[there], self[name][there]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line as a JSON object; None if it is no such thing."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _canonical(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row with its `step`; empty if it has none.

    A tracker's prefix goes; null becomes NaN; what a row kept from an earlier step (`fresh` = 0) is left out.
    """
    found = {
        _PREFIX.sub("", name): float("nan") if value is None else float(value)
        for name, value in row.items()
        if value is None or isinstance(value, int | float)
    }
    if found.get("fresh") == 0.0:
        found = {name: value for name, value in found.items() if name.partition("/")[0] not in _OF_RETENTION}
    step = found.get("step", found.get("retention_step"))
    return {} if step is None or not np.isfinite(step) else found | {"step": step}


class _Table:
    """Rows as they come, kept as columns: a row of a million costs its bytes, not its dictionary."""

    def __init__(self) -> None:
        self.rows = 0
        self._columns: dict[str, array[float]] = {}

    def append(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            column = self._columns.get(name)
            if column is None:
                column = self._columns[name] = array("d")
            if len(column) < self.rows:
                column.extend([np.nan] * (self.rows - len(column)))
            column.append(value)
        self.rows += 1

    def columns(self) -> tuple[dict[str, Column], int]:
        """Columns with increasing steps, and the number of rows left out, whose steps come again later.

        Of a step that was done twice the later row counts. Rows of the same step in a row are one: a Trainer writes
        one for training and one for an evaluation.
        """
        raw = {
            name: np.concatenate([np.array(column), np.full(self.rows - len(column), np.nan)])
            for name, column in self._columns.items()
        }
        steps = raw["step"]
        back = np.diff(steps, prepend=steps[:1]) < 0
        if "seconds" not in raw and "time" in raw:
            raw["seconds"] = _seconds(steps, raw["time"])
        part = np.cumsum(back)
        first_later = np.full(part[-1] + 2, np.inf)  # the first step of all parts behind this one
        for number in range(part[-1], 0, -1):
            first_later[number - 1] = min(first_later[number], steps[part == number].min())
        kept = steps < first_later[part]
        place = np.cumsum(np.diff(steps[kept], prepend=steps[kept][:1]) > 0)
        found = {}
        for name, column in raw.items():
            there = ~np.isnan(column[kept])
            found[name] = np.full(place[-1] + 1, np.nan)
            found[name][place[there]] = column[kept][there]  # of several the last one
        return found, int((~kept).sum())


def _seconds(steps: Column, times: Column) -> Column:
    """Seconds per step, from the times at which rows were written."""
    between, apart = np.diff(steps, prepend=np.nan), np.diff(times, prepend=np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((between > 0) & (apart >= 0), apart / between, np.nan)


def read_file(path: Path, name: str | None = None) -> list[Run]:
    """The runs in one file, by the `method` and `seed` of their rows; one, if rows have none.

    Args:
        name: Name of the run; None: its folder's, or the file's.

    Raises:
        ValueError: It has no row with a step and something to draw.
        OSError: It cannot be read.
    """
    tables: dict[tuple[str | None, int | None], _Table] = {}
    notes: list[str] = []
    for row in _state_rows(path) if path.suffix == ".json" else _jsonl_rows(path, notes):
        if values := _canonical(row):
            seed, method = row.get("seed"), row.get("method")
            key = (None if method is None else str(method), int(seed) if isinstance(seed, int | float) else None)
            tables.setdefault(key, _Table()).append(values)
    runs = []
    for (method, seed), of_run in tables.items():
        columns, again = of_run.columns()
        if not any(np.isfinite(column).any() for key, column in columns.items() if key not in ("step", "seed")):
            continue
        repeated = (
            f"{again} row(s) were left out, as their steps come again later in the file: they are from before the run "
            "was resumed, or from an earlier run that wrote to the same file."
        )
        own = name or _name_of(path)
        shown = method or own
        if method is None and seed is None and (ending := _SEED.search(own)):
            shown, seed = own[: ending.start()] or own, int(ending[1])
        elif name is not None and method is not None:
            shown = name if len({m for m, _ in tables}) == 1 else f"{name} {method}"
        for constraint, own_columns in _by_constraint(columns):
            called = shown if constraint is None else f"{shown}: {constraint}"
            full = called if seed is None else f"{called} seed {seed}"
            runs.append(Run(full, called, seed, path, own_columns, (*notes, *[repeated] * bool(again))))
    if not runs:
        raise ValueError(
            f"{path} has no rows that can be drawn: each must be a JSON object with `step` or `retention_step` and "
            "numbers, as craft_optim.metrics.JSONLWriter writes them."
        )
    return runs


def _by_constraint(columns: dict[str, Column]) -> Iterator[tuple[str | None, dict[str, Column]]]:
    """Each of several constraints as if it was the only one, with the columns that are of no constraint."""
    names = [name.partition("/")[2] for name in columns if name.startswith("retention_loss/")]
    if not names:
        yield None, columns
    for name in names:
        own = {key.partition("/")[0]: column for key, column in columns.items() if key.endswith(f"/{name}")}
        yield name, {key: column for key, column in columns.items() if "/" not in key} | own


def _state_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no trainer_state.json of the Hugging Face Trainer ({type(error).__name__}): a run is that, or "
            "a .jsonl of craft_optim.metrics."
        ) from error
    return ({_OF_TRAINER.get(name, name): x for name, x in row.items()} for row in history)


def _jsonl_rows(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file; a last line without an end is one, too, if it is whole. Notes say what was left out."""
    unreadable = 0
    with path.open("rb") as file:
        for line in file:
            if (row := _parsed(line)) is not None:
                yield row
            elif not line.endswith(b"\n"):
                notes.append("The last line is not complete: the run was killed in it, or is being written.")
            else:
                unreadable += bool(line.strip())
    if unreadable:
        notes.append(f"{unreadable} line(s) that are no JSON were left out.")


def _name_of(path: Path) -> str:
    """A file's own name; its folder's if it is called as all are, and the run's folder for one of lerobot-train."""
    if path.stem not in ("metrics", "trainer_state"):
        return path.stem
    folder = path.resolve().parent
    if folder.name == "craft" and ((folder / "anchors").is_dir() or (folder.parent / "checkpoints").is_dir()):
        folder = folder.parent
    return folder.name


def files_of(place: Path) -> list[Path]:
    """The files of runs at a place: itself, or all in the folder that begin like one.

    Raises:
        FileNotFoundError: There is nothing of this name, or no run in it.
    """
    if not place.is_dir():
        if not place.exists():
            raise FileNotFoundError(f"There is no run {str(place)!r}: neither a file nor a folder.")
        return [place]
    found = sorted(file for file in place.rglob("*.jsonl") if _begins_like_a_run(file))
    states = list(place.glob("checkpoint-*/trainer_state.json"))  # each has all of those before it
    found += sorted(states, key=lambda file: int(file.parent.name.rpartition("-")[2]))[-1:]
    found += [file for file in sorted(place.glob("trainer_state.json")) if not states]
    if not found:
        raise FileNotFoundError(
            f"The folder {str(place)!r} has no run: no .jsonl of rows with `step` or `retention_step`, and no "
            "trainer_state.json."
        )
    return found


def _begins_like_a_run(path: Path) -> bool:
    with path.open("rb") as file:
        return len(_canonical(_parsed(file.readline()) or {})) > 1


def read_runs(specs: Sequence[str]) -> list[Run]:
    """The runs that a command line names.

    Args:
        specs: Files, folders, or `name=` before one of them.

    Returns:
        With names that differ. A run that is there twice, alone and in a file of all, is read once.

    Raises:
        ValueError: A file holds no run, or none of a folder's does.
        OSError: A file cannot be read, or is not there.
    """
    found: list[Run] = []
    for spec in specs:
        name, place = named(spec)
        for file in files_of(local(place)):
            found += [run for run in read_file(file, name) if not any(_same(run, other) for other in found)]
    return _distinct(found)


def named(spec: str) -> tuple[str | None, str]:
    """The name before a place, if there is one, and the place."""
    name, equals, place = spec.partition("=")
    return (name, place) if equals and name and "/" not in name and not Path(spec).exists() else (None, spec)


def _same(one: Run, other: Run) -> bool:
    a, b = one.columns, other.columns
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Methods with two runs of one name get what is different in their folders' paths before them, or a number."""
    found: dict[str, Run] = {}
    twice = {run.method for run in runs if sum(run.name == other.name for other in runs) > 1}
    for run in runs:
        alike = [other.file.resolve() for other in runs if other.method == run.method]
        if run.method in twice and len({*alike}) > 1:
            below = run.file.resolve().parent.relative_to(os.path.commonpath([file.parent for file in alike]))
            before = f"{below.parts[0]}/" if below.parts else f"{run.file.stem}/"
            run = replace(run, name=f"{before}{run.name}", method=f"{before}{run.method}")
        name, number = run.name, 1
        while run.name in found:
            number += 1
            run = replace(run, name=f"{name} ({number})", method=f"{name} ({number})")
        found[run.name] = run
    return [*found.values()]
