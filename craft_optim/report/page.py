"""The report as one HTML page that loads nothing. Charts are drawn by uPlot (MIT), which is in the page."""

import json
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from craft_optim.report.markup import Markup, asset, page, table, tag
from craft_optim.report.panels import POINTS, Curve, Group, Panel, groups, panels
from craft_optim.report.runs import Column, Run
from craft_optim.report.summary import BAND, Summary, in_text, judge, judge_all, summarise

__all__ = ["COLOURS", "render"]

_ON_WHITE = "1b6ca8 d95f02 1b9e77 8a5cc0 c2185b 7a6a00 00838f 6d4c41 3f51b5 558b2f ad1457 546e7a"
_ON_BLACK = "5fb0f0 ff9a4d 4fd1a5 b69af0 f472a8 d8c44a 4dd0e1 c9a294 9fa8ff 9ccc65 ff80ab b0bec5"

COLOURS = [f"#{colour}" for colour in _ON_WHITE.split()]
"""Those of methods, on white, in the order in which they are given out; beyond the last one they begin anew"""

_BADGES = {"held": "held", "inactive": "held, with room", "not held": "not held", "free": "not constrained"}
_FACTS = {
    "task loss": ("loss", ".3g"),
    "held-out drift": ("heldout", ".3g"),
    "steps with a pass": ("passes", ".0%"),
    "steps over epsilon": ("violated", ".0%"),
    "at the cap": ("capped", ".0%"),
    "in conflict": ("conflict", ".0%"),
    "projected": ("projected", ".0%"),
    "skipped": ("skipped", ".0f"),
    "ms per step": ("ms_per_step", ".3g"),
}
_SOURCES = {"anchors": "", "heldout": " (held out)", "average": " (average)", "batches": " (batches)"}


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
    badge = tag("span", _BADGES[verdict.kind], class_=f"badge {verdict.kind.replace(' ', '-')}")
    seeds = tag("span", f"{len(summaries)} seeds", class_="seeds") if several else Markup("")
    ratio, drift, epsilon = (_typical(summaries, name) for name in ("ratio", "drift", "epsilon"))
    if ratio is not None:
        large = [tag("b", f"{ratio:.2f}"), Markup(" &times; epsilon")]
        what = "held-out drift" if any(x.source == "heldout" for x in summaries) else "drift"
        below = f"{what} {drift:.3g} at the end, epsilon {epsilon:.3g}"
    else:
        large = [tag("b", in_text(drift)), Markup(" drift")]
        below = "at the end" if drift is not None else "not measured"
    facts = [tag("div", tag("dt", label), tag("dd", text)) for label, text in _facts(summaries).items() if text != "-"]
    return tag(
        "article",
        tag("header", _swatch(place), tag("h3", name), seeds, badge),
        tag("p", *large, class_="large"),
        tag("p", below + (", medians" if several else ""), class_="quiet"),
        tag("p", verdict.words, class_="words"),
        tag("dl", *facts, class_="facts"),
    )


def _swatch(place: int) -> Markup:
    return tag("i", class_="swatch", style=f"--c:var(--g{place % len(COLOURS)})")


def _typical(summaries: Sequence[Summary], name: str) -> float | None:
    values = [value for summary in summaries if (value := getattr(summary, name)) is not None]
    return median(values) if values else None


def _facts(summaries: Sequence[Summary]) -> dict[str, str]:
    """Label -> text; medians over the runs."""
    facts = {label: in_text(_typical(summaries, name), form) for label, (name, form) in _FACTS.items()}
    retention = any(x.retention_steps for x in summaries)
    return facts | {"skipped": f"{sum(x.skipped for x in summaries)}" if retention else "-"}


def _charts(found: Sequence[Group], drawn: Sequence[Panel]) -> Markup:
    names = []
    for place, group in enumerate(found):
        box = tag("input", type="checkbox", value=place, checked="", autocomplete="off")
        names.append(tag("label", box, _swatch(place), tag("span", group.name)))
    figures = []
    for place, panel in enumerate(drawn):
        plot = tag("div", class_="plot", role="img", aria_label=_in_words(panel, found))
        caption = tag("figcaption", panel.caption)
        figures.append(tag("figure", tag("h3", panel.title), plot, tag("output"), caption, data_panel=place))
    runs = [run for group in found for run in group.runs]
    steps = [run.steps for run in runs]
    data = {
        "groups": [group.name for group in found],
        "inks": len(COLOURS),
        "panels": [_numbers(panel) for panel in drawn],
        "first": float(min(x[0] for x in steps)),
        "last": float(max(x[-1] for x in steps)),
    }
    # Names of runs are the users': "<" would end the element
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return tag(
        "section",
        tag("h2", "Over the steps"),
        tag("p", _thinned(runs, any(len(group.runs) > 1 for group in found)), class_="quiet"),
        tag("noscript", tag("p", "The charts need JavaScript; verdicts and table do not.", class_="verdict")),
        tag("div", *names, class_="legend", role="group", aria_label="What the charts show"),
        tag("div", *figures, class_="charts"),
        tag("script", Markup(text), type="application/json", id="data"),
    )


def _thinned(runs: Sequence[Run], seeds: bool) -> str:
    longest = max(len(run.steps) for run in runs)
    several = "; of several seeds a line is their median, the shade reaches from the lowest to the highest"
    words = "Move over a chart for values, drag to zoom, double-click to see everything."
    if longest <= POINTS:
        return f"{words} Every row is drawn{several if seeds else ''}."
    return (
        f"{words} A curve has at most {POINTS} points: of {longest:,} rows a point is the mean of about "
        f"{longest / POINTS:.3g}, and the shade their range{several if seeds else ''}."
    )


def _in_words(panel: Panel, found: Sequence[Group]) -> str:
    """A chart in words, for readers who do not see it."""
    ends = [
        f"{found[curve.group].name}{f' {curve.label}' if curve.label else ''} from {curve.y[0]:.3g} to "
        f"{curve.y[-1]:.3g}, between {curve.y.min():.3g} and {curve.y.max():.3g}"
        for curve in panel.curves
        if curve.style != "faint"
    ]
    return f"{panel.title}: {'; '.join(ends)}."


def _numbers(panel: Panel) -> dict[str, Any]:
    return {
        "log": panel.log,
        "bottom": panel.bottom,
        "top": panel.top,
        "curves": [_curve(curve, panel.log) for curve in panel.curves],
        "limits": [
            {"group": limit.group, "x": _short(limit.x, 7), "y": _short(limit.y), "band": BAND}
            for limit in panel.limits
        ],
    }


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
    rows, notes = [], []
    for group, of in zip(found, summaries, strict=True):
        for run, summary in zip(group.runs, of, strict=True):
            over = "" if summary.drift is None else _SOURCES[summary.source]
            held = [in_text(summary.drift) + over, in_text(summary.epsilon), in_text(summary.ratio, ".2f")]
            facts = _facts([summary]).values()
            rows.append([run.name, _BADGES[judge(summary).kind], *held, *facts, f"{summary.steps:,}"])
            notes += [f"{run.name}: {note}" for note in run.notes]
    columns = ["run", "verdict", "drift", "epsilon", "drift / epsilon", *_FACTS, "last step"]
    told = [tag("ul", *(tag("li", note) for note in notes), class_="quiet")] if notes else []
    low, high = BAND
    words = (
        f"Held: drift at the end is at most {high:g} x epsilon; with room: below {low:g}. Drift is that over many "
        "anchors where the run measured it, else the average that epsilon is held against (average), or the median of "
        "the last anchor batches (batches). Where epsilon is of held-out anchors, drift is theirs (held out)."
    )
    return tag("section", tag("h2", "Runs"), tag("p", words, class_="quiet"), table(columns, rows), *told)
