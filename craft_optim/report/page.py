"""The report as one HTML page that loads nothing. Charts are drawn by uPlot (MIT), which is in the page."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from statistics import median
from typing import Any

import numpy as np

from craft_optim.markup import Markup, page, table, tag
from craft_optim.report.colours import DARK, LIGHT, ink
from craft_optim.report.panels import POINTS, Curve, Group, Panel, groups, panels
from craft_optim.report.runs import Column, Run
from craft_optim.report.summary import BAND, Summary, judge, judge_all, summarise

__all__ = ["render"]

_BADGES = {"held": "held", "inactive": "held, with room", "not held": "not held", "free": "not constrained"}


def render(runs: Sequence[Run], title: str = "Training report") -> str:
    """The page.

    Args:
        runs: From `read_runs`; at least one.
        title: On top of it.
    """
    found = groups(runs)
    drawn = panels(found)
    summaries = [[summarise(run) for run in group.runs] for group in found]
    sections = [
        tag("header", tag("p", "craft-optim report", class_="kind"), tag("h1", title), _about(runs)),
        _verdicts(found, summaries),
        _charts(found, drawn),
        _table(found, summaries),
    ]
    return page(title, sections, _asset("uPlot.min.css") + _STYLE, _scripts())


@cache
def _asset(name: str) -> str:
    return files(__package__).joinpath("static", name).read_text(encoding="utf-8").strip()


def _scripts() -> tuple[str, ...]:
    """uPlot with its licence, which wants to be in every copy; and ours."""
    return f"/*\n{_asset('uPlot.LICENSE')}\n*/\n{_asset('uPlot.iife.min.js')}", _asset("charts.js")


def _about(runs: Sequence[Run]) -> Markup:
    longest = max(int(run.steps[-1]) for run in runs)
    return tag("p", f"{_count(len(runs), 'run')}, up to step {longest:,}", class_="quiet")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _verdicts(found: Sequence[Group], summaries: Sequence[Sequence[Summary]]) -> Markup:
    cards = [_card(place, group.name, of) for place, (group, of) in enumerate(zip(found, summaries, strict=True))]
    return tag("section", tag("h2", "Did it hold?"), tag("div", *cards, class_="cards"))


def _card(place: int, name: str, summaries: Sequence[Summary]) -> Markup:
    verdict = judge_all(summaries)
    seeds = tag("span", f"{len(summaries)} seeds", class_="seeds") if len(summaries) > 1 else Markup("")
    head = tag(
        "header",
        _swatch(place),
        tag("h3", name),
        seeds,
        tag("span", _BADGES[verdict.kind], class_=f"badge {verdict.kind.replace(' ', '-')}"),
    )
    ratio, drift = _typical(summaries, lambda x: x.ratio), _typical(summaries, lambda x: x.drift)
    epsilon = _typical(summaries, lambda x: x.epsilon)
    if ratio is not None:
        large = [tag("b", f"{ratio:.2f}"), Markup(" &times; epsilon")]
        below = f"drift {drift:.3g} at the end, epsilon {epsilon:.3g}"
    else:
        large = [tag("b", "-" if drift is None else f"{drift:.3g}"), Markup(" drift")]
        below = "at the end" if drift is not None else "not measured"
    facts = [tag("div", tag("dt", label), tag("dd", text)) for label, text in _facts(summaries) if text != "-"]
    return tag(
        "article",
        head,
        tag("p", *large, class_="large"),
        tag("p", below + (", medians" if len(summaries) > 1 else ""), class_="quiet"),
        tag("p", verdict.words, class_="words"),
        tag("dl", *facts, class_="facts"),
    )


def _swatch(place: int) -> Markup:
    return tag("i", class_="swatch", style=f"--c:{ink(place)}")


def _typical(summaries: Sequence[Summary], of: Callable[[Summary], float | None]) -> float | None:
    values = [value for value in map(of, summaries) if value is not None]
    return median(values) if values else None


def _facts(summaries: Sequence[Summary]) -> list[tuple[str, str]]:
    """Label and value; medians over the runs."""

    def share(of: Callable[[Summary], float | None]) -> str:
        value = _typical(summaries, of)
        return "-" if value is None else f"{value:.0%}"

    def number(of: Callable[[Summary], float | None], form: str = ".3g") -> str:
        value = _typical(summaries, of)
        return "-" if value is None else format(value, form)

    retention = any(x.retention_steps for x in summaries)
    return [
        ("task loss", number(lambda x: x.loss)),
        ("held-out drift", number(lambda x: x.heldout)),
        ("steps over epsilon", share(lambda x: x.violated)),
        ("at the cap", share(lambda x: x.capped)),
        ("in conflict", share(lambda x: x.conflict)),
        ("projected", share(lambda x: x.projected)),
        ("skipped", f"{sum(x.skipped for x in summaries)}" if retention else "-"),
        ("ms per step", number(lambda x: x.ms_per_step)),
    ]


def _charts(found: Sequence[Group], drawn: Sequence[Panel]) -> Markup:
    names = [
        tag(
            "label",
            tag("input", type="checkbox", value=place, checked="", autocomplete="off"),
            _swatch(place),
            tag("span", group.name),
        )
        for place, group in enumerate(found)
    ]
    figures = [
        tag(
            "figure",
            tag("h3", panel.title),
            tag("div", class_="plot", role="img", aria_label=_in_words(panel, found)),
            tag("output"),
            tag("figcaption", panel.caption),
            data_panel=place,
        )
        for place, panel in enumerate(drawn)
    ]
    runs = [run for group in found for run in group.runs]
    steps = [run.steps for run in runs]
    data = {
        "groups": [group.name for group in found],
        "inks": len(LIGHT),
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
    """What the chart shows, for readers who do not see it."""
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
    """With as many digits as can be seen."""
    return [float(f"{value:.{digits}g}") for value in column]


def _table(found: Sequence[Group], summaries: Sequence[Sequence[Summary]]) -> Markup:
    rows, notes = [], []
    for group, of in zip(found, summaries, strict=True):
        for run, summary in zip(group.runs, of, strict=True):
            verdict = judge(summary)
            numbers = dict(_facts([summary]))
            ratio = "-" if summary.ratio is None else f"{summary.ratio:.2f}"
            drift = "-" if summary.drift is None else f"{summary.drift:.3g}"
            over = "" if summary.over_anchors or summary.drift is None else " (batches)"
            epsilon = "-" if summary.epsilon is None else f"{summary.epsilon:.3g}"
            rows.append(
                [run.name, _BADGES[verdict.kind], drift + over, epsilon, ratio, *numbers.values(), f"{summary.steps:,}"]
            )
            notes += [f"{run.name}: {note}" for note in run.notes]
    columns = ["run", "verdict", "drift", "epsilon", "drift / epsilon", *dict(_facts([])), "last step"]
    told = [tag("ul", *(tag("li", note) for note in notes), class_="quiet")] if notes else []
    low, high = BAND
    words = (
        f"Held: drift at the end is at most {high:g} x epsilon; with room: below {low:g}. Drift is that over many "
        "anchors where the run measured it, else the median of its last anchor batches (batches)."
    )
    return tag("section", tag("h2", "Runs"), tag("p", words, class_="quiet"), table(columns, rows), *told)


def _variables(colours: Sequence[str]) -> str:
    return "".join(f"--g{number}: {colour}; " for number, colour in enumerate(colours))


_STYLE = (
    f"""
:root {{ {_variables(LIGHT)}}}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)}}} }}
"""
    + """
main { max-width: 1180px; }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); }
article > header h3 { overflow-wrap: anywhere; }
.swatch { width: 12px; height: 12px; border-radius: 3px; background: var(--c); flex: none; }
.seeds { color: var(--quiet); font-size: 12px; }
.badge { margin-left: auto; font-size: 12px; font-weight: 600; padding: 2px 10px; border-radius: 99px;
  color: var(--quiet); background: color-mix(in srgb, currentColor 12%, transparent); white-space: nowrap; }
.badge.held, .badge.inactive { color: var(--good); } .badge.not-held { color: var(--bad); }
.large { font-size: 18px; margin: 6px 0 0; } .large b { font-size: 32px; letter-spacing: -.02em; }
article .quiet { font-size: 13px; margin: 0 0 8px; } .words { margin: 0 0 12px; font-size: 14px; }
.facts { grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); gap: 8px 12px; padding-top: 10px;
  border-top: 1px solid var(--line); }
.facts dt { font-size: 12px; } .facts dd { font-variant-numeric: tabular-nums; font-weight: 600; }
.legend { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 10px 0;
  background: var(--page); max-height: 30vh; overflow: auto; }
.legend label { display: inline-flex; align-items: center; gap: 6px; font-size: 14px; }
.legend label { cursor: pointer; }
.legend input { margin: 0; accent-color: var(--accent); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); gap: 16px; }
.charts figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px 12px; }
.plot { height: 230px; margin: 6px 0 2px -6px; } .uplot { width: 100%; }
.uplot .u-select { background: color-mix(in srgb, var(--accent) 14%, transparent); }
.uplot .u-cursor-x { border-right: 1px dashed var(--quiet); }
output { display: block; min-height: 18px; font-size: 12px; line-height: 18px; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
th { white-space: normal; vertical-align: bottom; } th, td { padding-right: 12px; }
ul.quiet { padding-left: 18px; font-size: 13px; margin-top: 12px; }
@media (max-width: 600px) { main { padding: 24px 14px 60px; } h1 { font-size: 24px; } .large b { font-size: 28px; } }
"""
)
