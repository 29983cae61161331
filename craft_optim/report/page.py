"""The report as one HTML page that loads nothing. Charts are drawn by uPlot (MIT), which is in the page."""

import json
import re
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from craft_optim.report.markup import Markup, asset, folded, page, table, tag
from craft_optim.report.numbers import duration, number, percent
from craft_optim.report.panels import POINTS, Curve, Group, Limit, Panel, groups, panels
from craft_optim.report.runs import Column, Run
from craft_optim.report.summary import BAND, LABELS, Summary, judge, judge_all, summarise

__all__ = ["COLOURS", "render"]

_ON_WHITE = "1b6ca8 d95f02 1b9e77 8a5cc0 c2185b 7a6a00 00838f 6d4c41 3f51b5 558b2f ad1457 546e7a"
_ON_BLACK = "5fb0f0 ff9a4d 4fd1a5 b69af0 f472a8 d8c44a 4dd0e1 c9a294 9fa8ff 9ccc65 ff80ab b0bec5"

COLOURS = [f"#{colour}" for colour in _ON_WHITE.split()]
"""Those of methods, on white, in the order in which they are given out; beyond the last one they begin anew"""

_FACTS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "task loss": ("loss", number),
    "held-out drift": ("heldout", number),
    "steps above epsilon": ("violated", percent),
    "steps with a pass": ("passes", percent),
    "kept of a step": ("kept", percent),
    "lambda at its cap": ("capped", percent),
    "in conflict": ("conflict", percent),
    "projected": ("projected", percent),
    "passes not finite": ("skipped", number),
    "time per step": ("ms_per_step", duration),
}
_LARGE = ("loss", "heldout")  # of these, shown large already
_SOURCES = {
    "anchors": "",
    "heldout": " (held-out)",
    "average": " (average of the last passes)",
    "batches": " (median of the last passes)",
}
_FIRST = ("drift", "loss")  # charts; the others are folded


def render(runs: Sequence[Run], title: str = "Training report") -> str:
    """The page of at least one run."""
    found = groups(runs)
    drawn = panels(found)
    summaries = [[summarise(run) for run in group.runs] for group in found]
    longest = max(int(run.steps[-1]) for run in runs)
    about = f"{len(runs)} run{'' if len(runs) == 1 else 's'}, up to step {longest:,}"
    sections = [
        tag("header", tag("p", "craft-optim report", class_="kind"), tag("h1", title), tag("p", about, class_="quiet")),
        _verdicts(found, summaries),
        _notes(runs),
        _charts(found, drawn),
        _table(found, summaries),
    ]
    light, dark = _variables(_ON_WHITE), _variables(_ON_BLACK)
    style = [asset("uPlot.min.css"), light, f"@media (prefers-color-scheme: dark) {{ {dark} }}", asset("report.css")]
    # uPlot with its licence, which wants to be in every copy; and ours
    scripts = (f"/*\n{asset('uPlot.LICENSE')}\n*/\n{asset('uPlot.iife.min.js')}", asset("charts.js"))
    return page(title, sections, "\n".join(style), scripts)


def _variables(colours: str) -> str:
    """The colours as CSS, of which the page takes those of the reader's light or dark."""
    return f":root {{ {''.join(f'--g{number}: #{colour}; ' for number, colour in enumerate(colours.split()))}}}"


def _verdicts(found: Sequence[Group], summaries: Sequence[Sequence[Summary]]) -> Markup:
    cards = [_card(place, group.name, of) for place, (group, of) in enumerate(zip(found, summaries, strict=True))]
    return tag("section", tag("h2", "Did it hold?"), tag("div", *cards, class_="cards"))


def _card(place: int, name: str, summaries: Sequence[Summary]) -> Markup:
    verdict, several = judge_all(summaries), len(summaries) > 1
    badge = tag("span", LABELS[verdict.kind], class_=f"badge {verdict.kind.replace(' ', '-')}")
    seeds = tag("span", f"{len(summaries)} seeds, medians", class_="seeds") if several else Markup("")
    facts = _facts(summaries, [label for label, (of, _) in _FACTS.items() if of not in _LARGE])
    numbers = [tag("div", tag("dt", label), tag("dd", text)) for label, text in facts.items() if text != "-"]
    return tag(
        "article",
        tag("header", _swatch(place), tag("h3", name), seeds, badge),
        tag("div", *_large(summaries), class_="numbers"),
        tag("p", _unbroken(verdict.words), class_="words"),
        folded("More numbers", tag("dl", *numbers, class_="facts")) if numbers else Markup(""),
    )


def _large(summaries: Sequence[Summary]) -> list[Markup]:
    """The numbers that count: drift on what epsilon is for, drift on the others, and the task's loss."""
    epsilon, elsewhere = _typical(summaries, "epsilon"), summaries[0].source == "heldout"
    words = {"anchors": "drift", "heldout": "held-out drift"}
    made = []
    for name in ("heldout", "anchors") if elsewhere else ("anchors", "heldout"):
        drift, step = _typical(summaries, name), _typical(summaries, "heldout_step")
        older = "" if step is None or name != "heldout" else f" at step {step:,.0f}"
        if drift is None:
            made.append(_number("–", "", f"{words[name]}: not measured"))
        elif epsilon and (name == "heldout" or not elsewhere):
            about = f"{words[name]} {number(drift)}{older}"
            made.append(_number(number(drift / epsilon), Markup(" &times; epsilon"), about))
        else:
            made.append(_number(number(drift), "", words[name] + older))
    loss = _typical(summaries, "loss")
    return made if loss is None else [*made, _number(number(loss), "", "task loss")]


def _number(value: str, unit: str, about: str) -> Markup:
    return tag("div", tag("p", tag("b", value), unit), tag("small", about))


def _unbroken(words: str) -> str:
    """Numbers stay on one line with what they are numbers of."""
    return re.sub(r"(?<=\d) (?=%|x\b)", "\u00a0", words)


def _swatch(place: int) -> Markup:
    return tag("i", class_="swatch", style=f"--c:var(--g{place % len(COLOURS)})")


def _typical(summaries: Sequence[Summary], name: str) -> float | None:
    values = [value for summary in summaries if (value := getattr(summary, name)) is not None]
    return median(values) if values else None


def _facts(summaries: Sequence[Summary], labels: Sequence[str] = tuple(_FACTS)) -> dict[str, str]:
    """Label -> text; medians over the runs."""
    facts = {label: _FACTS[label][1](_typical(summaries, _FACTS[label][0])) for label in labels}
    retention = any(x.retention_steps for x in summaries)
    return facts | {"passes not finite": f"{sum(x.skipped for x in summaries):,}" if retention else "-"}


def _notes(runs: Sequence[Run]) -> Markup:
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    return tag("ul", *(tag("li", note) for note in notes), class_="quiet") if notes else Markup("")


def _charts(found: Sequence[Group], drawn: Sequence[Panel]) -> Markup:
    legend = []
    for place, group in enumerate(found):
        box = tag("input", type="checkbox", value=place, checked="", autocomplete="off")
        legend.append(tag("label", box, _swatch(place), tag("span", group.name)))
    large: list[Markup] = []
    others: list[Markup] = []
    for place, panel in enumerate(drawn):
        plot = tag("div", class_="plot", role="img", aria_label=_in_words(panel, found))
        head = tag("header", tag("h3", panel.title), tag("output"))
        figure = tag("figure", head, plot, tag("figcaption", panel.caption), data_panel=place)
        (large if panel.key in _FIRST else others).append(figure)
    runs = [run for group in found for run in group.runs]
    steps = [run.steps for run in runs]
    data = {
        "groups": _short_names([group.name for group in found]),
        "inks": len(COLOURS),
        "panels": [_numbers(panel) for panel in drawn],
        "first": float(min(x[0] for x in steps)),
        "last": float(max(x[-1] for x in steps)),
    }
    # Names of runs are the users': "<" would end the element
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    several = len(found) > 1
    return tag(
        "section",
        tag("h2", "Over the steps"),
        tag("noscript", tag("p", "The charts need JavaScript; verdicts and table do not.", class_="verdict")),
        tag("div", *legend, class_="legend", role="group", aria_label="Shown in the charts") if several else Markup(""),
        tag("div", *large, class_="charts large"),
        tag("p", _thinned(runs, any(len(group.runs) > 1 for group in found)), class_="quiet"),
        folded("Why? Lambda, gradients, time", tag("div", *others, class_="charts")) if others else Markup(""),
        tag("script", Markup(text), type="application/json", id="data"),
    )


def _short_names(names: Sequence[str]) -> list[str]:
    """Names of methods less the run that all of them are constraints of."""
    runs = {name.rpartition(": ")[0] for name in names}
    return [name.rpartition(": ")[2] for name in names] if len(names) > 1 and len(runs) == 1 else list(names)


def _thinned(runs: Sequence[Run], seeds: bool) -> str:
    longest = max(len(run.steps) for run in runs)
    several = (
        " Of several seeds a line is the median; the shade reaches from the lowest to the highest." if seeds else ""
    )
    words = "Move over a chart for values, drag to zoom, double-click to see everything."
    if longest <= POINTS:
        return f"{words} Every row is drawn.{several}"
    return (
        f"{words} A line has at most {POINTS} points: of {longest:,} rows a point is the mean of about "
        f"{number(longest / POINTS)}, and the shade is their range.{several}"
    )


def _in_words(panel: Panel, found: Sequence[Group]) -> str:
    """A chart in words, for readers who do not see it."""
    ends = [
        f"{found[curve.group].name}{f' {curve.label}' if curve.label else ''} from {number(curve.y[0])} to "
        f"{number(curve.y[-1])}, between {number(curve.y.min())} and {number(curve.y.max())}"
        for curve in panel.curves
        if curve.style != "faint"
    ]
    return f"{panel.title}: {'; '.join(ends)}."


def _numbers(panel: Panel) -> dict[str, Any]:
    return {
        "unit": panel.unit,
        "log": panel.log,
        "large": panel.key in _FIRST,
        "bottom": panel.bottom,
        "top": panel.top,
        "curves": [_curve(curve, panel.log) for curve in panel.curves],
        "limits": [
            {"group": limit.group, "label": _epsilon(limit), "x": _short(limit.x, 7), "y": _short(limit.y)}
            for limit in panel.limits
        ],
    }


def _epsilon(limit: Limit) -> str:
    return f"epsilon {number(limit.y[0])}" if len({*limit.y}) == 1 else "epsilon"


def _curve(curve: Curve, log: bool) -> dict[str, Any]:
    def values(column: Column) -> list[float | None]:
        # On a logarithmic axis there is no place for drift that is rounding below 0
        return [None if log and value <= 0.0 else value for value in _short(column)]

    made = {"group": curve.group, "label": curve.label, "style": curve.style, "x": _short(curve.x, 7)}
    made["y"] = values(curve.y)
    if not (np.array_equal(curve.low, curve.y) and np.array_equal(curve.high, curve.y)):
        made |= {"low": values(curve.low), "high": values(curve.high)}
    return made


def _short(column: Column, digits: int = 4) -> list[float]:
    """Values with as many digits as can be seen."""
    return [float(f"{value:.{digits}g}") for value in column]


def _table(found: Sequence[Group], summaries: Sequence[Sequence[Summary]]) -> Markup:
    rows = []
    for group, of in zip(found, summaries, strict=True):
        for run, summary in zip(group.runs, of, strict=True):
            over = "" if summary.drift is None else _SOURCES[summary.source]
            held = [number(summary.drift) + over, number(summary.epsilon), number(summary.ratio)]
            rows.append(
                [run.name, LABELS[judge(summary).kind], *held, *_facts([summary]).values(), f"{summary.steps:,}"]
            )
    columns = ["run", "verdict", "drift", "epsilon", "drift / epsilon", *_FACTS, "last step"]
    low, high = BAND
    words = (
        f"Held: drift at the end is at most {high:g} x epsilon; with room: below {low:g}. Steps above epsilon: above "
        f"{high:g} x epsilon; with more than a tenth of them, drift was held at the end alone. "
        "Drift is over many anchors where the run measured it, else over the last passes. Where epsilon is for "
        "held-out anchors, drift is theirs."
    )
    return tag(
        "section", folded("All numbers, and the words for them", tag("p", words, class_="quiet"), table(columns, rows))
    )
