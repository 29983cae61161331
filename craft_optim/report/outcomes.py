"""What methods came to: how much each learnt and how much it kept, read from JSON for a scatter of both.

The documented form, higher is better on both axes; everything but `points` with `method`, `x` and `y` may be left out:

    {"title": "Two tasks", "x": "new task: success", "y": "old task: success",
     "points": [{"method": "CRaFT", "label": "epsilon = 0.03", "setting": "drawer", "seed": 0, "x": 0.9, "y": 1.0,
                 "x_interval": [0.8, 0.95], "y_interval": [0.93, 1.0]}]}

Points that share setting, method and label are one, at the median of their seeds. Results of this repository's examples
and benchmarks are understood as they are: any JSON in which objects have `new_success` and `old_success`, or
`plasticity` and `retention`; their method is `method`, `name` or `label`, or the key that they stand under.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["Outcome", "Scatter", "read_outcomes"]

# (of x, of y), and what the axes are called
_PAIRS = {
    ("x", "y"): ("what was learnt", "what was kept"),
    ("new_success", "old_success"): ("new task: success", "old task: success"),
    ("plasticity", "retention"): ("plasticity: what was learnt", "retention: what was kept"),
}
_KNOBS = ("epsilon", "lambda", "strength")


@dataclass(frozen=True)
class Outcome:
    """A method at one setting of its knob.

    Attributes:
        method: Gives the colour.
        label: What tells it from other points of the method; may be "".
        x: How much was learnt, median over seeds.
        y: How much was kept.
        x_interval: Both ends; None if there is none.
        y_interval: The same of y.
        seeds: (x, y) of each seed; empty for one.
    """

    method: str
    label: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    seeds: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Scatter:
    """Outcomes that can be compared.

    Attributes:
        title: The setting, or what the file calls itself; may be "".
        x: What the axis to the right is.
        y: What the axis upwards is.
        points: At least one.
    """

    title: str
    x: str
    y: str
    points: tuple[Outcome, ...]

    @property
    def sweeps(self) -> dict[str, list[Outcome]]:
        """The points of each method that has three or more, in their order: its knob was turned."""
        by_method: dict[str, list[Outcome]] = {}
        for point in self.points:
            by_method.setdefault(point.method, []).append(point)
        return {method: of for method, of in by_method.items() if len(of) >= 3}

    @property
    def front(self) -> list[Outcome]:
        """The points that no other one beats, or equals, on both axes while it is better on one; by x."""

        def beaten(p: Outcome) -> bool:
            return any(q.x >= p.x and q.y >= p.y and (q.x > p.x or q.y > p.y) for q in self.points)

        return sorted((p for p in self.points if not beaten(p)), key=lambda p: (p.x, -p.y))


def read_outcomes(path: Path) -> list[Scatter]:
    """A scatter for each setting in a file.

    Raises:
        ValueError: It is no JSON, or nothing in it has both values.
        OSError: It cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    names = content if isinstance(content, dict) else {}
    title = names.get("title", "")
    found: dict[tuple[str, tuple[str, str]], list[tuple[str, str, Mapping[str, Any]]]] = {}
    for under, pair, row in _rows(content, path.stem):
        setting = str(row.get("setting", title))
        method = str(row.get("method") or row.get("name") or row.get("label") or under)
        label = str((row.get("label") if "method" in row else None) or _knob(row))
        found.setdefault((setting, pair), []).append((method, label, row))
    if not found:
        raise ValueError(
            f"{path} has nothing for a scatter: no object with `x` and `y`, `new_success` and `old_success`, or "
            "`plasticity` and `retention` that are numbers."
        )
    scatters = []
    for (setting, pair), rows in found.items():
        x, y = (
            str(names[axis]) if isinstance(names.get(axis), str) else default
            for axis, default in zip("xy", _PAIRS[pair], strict=True)
        )
        scatters.append(Scatter(setting, x, y, tuple(_points(rows, *pair))))
    return scatters


def _rows(content: Any, under: str) -> Iterator[tuple[str, tuple[str, str], Mapping[str, Any]]]:
    """(the key above, which pair, the object) of all objects with both values, wherever they are."""
    if isinstance(content, dict) and isinstance(content.get("fronts"), dict):
        yield from _rows(_of_fronts(content), under)
    elif isinstance(content, list):
        for part in content:
            yield from _rows(part, under)
    elif isinstance(content, dict):
        for pair in _PAIRS:
            if all(_is_number(content.get(name)) for name in pair):
                yield under, pair, content
                return
        for key, part in content.items():
            yield from _rows(part, under if key == "points" else key)


def _of_fronts(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of benchmarks/retention_pareto.py: a row per strength, whose other parts would be drawn a second time."""
    titles = content.get("settings", {})
    return [
        {
            "setting": titles.get(setting, setting),
            "method": method,
            **dict(zip(("strength", "plasticity", "retention"), point, strict=False)),
        }
        for setting, fronts in content["fronts"].items()
        for method, front in fronts.items()
        for point in front["points"]
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _knob(row: Mapping[str, Any]) -> str:
    name = next((name for name in _KNOBS if _is_number(row.get(name))), None)
    return "" if name is None else f"{name} = {row[name]:g}"


def _points(rows: Sequence[tuple[str, str, Mapping[str, Any]]], x: str, y: str) -> Iterator[Outcome]:
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    labels = {method: {other for name, other, _ in rows if name == method} for method, *_ in rows}
    for method, label, row in rows:
        label = label if len(labels[method]) > 1 or row.get("label") == label else ""  # a knob that was not turned
        alike.setdefault((method, label), []).append(row)
    for (method, label), of in alike.items():
        if len(of) > 1:
            seeds = [(float(row[x]), float(row[y])) for row in of]
            yield Outcome(method, label, median(s[0] for s in seeds), median(s[1] for s in seeds), seeds=tuple(seeds))
            continue
        (row,) = of
        each = tuple(zip(row.get(f"{x}_per_seed") or (), row.get(f"{y}_per_seed") or (), strict=False))
        yield Outcome(
            method,
            label,
            float(row[x]),
            float(row[y]),
            _interval(row.get(f"{x}_interval")),
            _interval(row.get(f"{y}_interval")),
            each if len(each) > 1 else (),
        )


def _interval(found: Any) -> tuple[float, float] | None:
    return (float(found[0]), float(found[1])) if isinstance(found, list) and len(found) == 2 else None
