"""The tables of docs/findings.md and docs/tables.md, from the results of three benchmarks.

python benchmarks/evidence/findings.py   # writes the pages' tables from benchmarks/evidence/results

They are `retention_pareto.py`, `beyond_the_front.py` and `knob.py`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any

import _paths
from markdown_table import markdown_table
from pareto.beyond import VARIANTS
from pareto.methods import METHODS
from pareto.summary import standard_error
from performance_table import with_table
from steering.tables import TABLES as OF_KNOB

__all__ = ["PAGES", "TABLES", "marks", "read_results", "updated"]

# Page -> its tables: what a user needs, and what is behind it.
PAGES = {
    _paths.ROOT / "docs" / "findings.md": (
        "pareto-fronts", "pareto-robustness", "variants-robustness", "knob-noise", "knob-price", "knob-heldout",
    ),
    _paths.ROOT / "docs" / "tables.md": (
        "pareto-targets", "variants-against-craft", "variants-against-fixed",
        "knob-learned", "knob-parameter", "knob-scale",
    ),
}  # fmt: skip

Results = Mapping[str, Any]


def read_results() -> dict[str, Any]:
    """Name of the command -> its JSON."""
    names = ("retention_pareto", "beyond_the_front", "knob")
    return {name: json.loads((_paths.RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ± {standard_error(values):.3f}"


def fronts(results: Results) -> str:
    """Dominated area and retention at high plasticity of each method, the largest mean area first."""
    of = results["retention_pareto"]["fronts"]
    names = sorted(
        next(iter(of.values())), key=lambda name: -fmean(fmean(found[name]["area"]) for found in of.values())
    )
    header = ["", *(f"{setting}: area" for setting in of), *(f"{setting}: R" for setting in of)]
    rows = []
    for name in names:
        areas = [_mean(found[name]["area"]) for found in of.values()]
        rows.append(
            [METHODS[name].title, *areas, *(f"{fmean(found[name]['at_learned']):.3f}" for found in of.values())]
        )
    return markdown_table(header, rows)


def robustness(results: Results, command: str) -> str:
    """Worst results and drifts of one strength under other scales of the task loss and other learning rates."""
    header = [
        "",
        "knob",
        "worst min(P, R)",
        "drift, nats",
        "spread",
        "median drift / epsilon",
        "highest",
    ]
    known, rows = METHODS | VARIANTS, []
    for row in results[command]["robustness"]:
        drifts, unit = row["drifts"], known[row["method"]].unit
        ratios = [drift / row["strength"] for drift in drifts]
        of_epsilon = [f"{median(ratios):.2f}", f"{max(ratios):.2f}"] if unit == "epsilon" else ["-", "-"]
        of_variant = f", {VARIANTS[row['method']].title}" if row["method"] in VARIANTS else ""
        knob, span = f"{unit} = {row['strength']:g}{of_variant}", f"{min(drifts):.2g} to {max(drifts):.2g}"
        rows.append([row["setting"], knob, _mean(row["worst"]), span, f"{max(drifts) / min(drifts):.3g}", *of_epsilon])
    return markdown_table(header, rows)


def targets(results: Results) -> str:
    """Targets, and whether they were met."""
    found = results["retention_pareto"]["targets"]
    rows = [[row["setting"], row["what"], row["found"], "yes" if row["met"] else "**no**"] for row in found]
    return markdown_table(["", "target", "found", "met"], rows)


def _signed(value: float, error: float) -> str:
    text = f"{value:+.3f} ± {error:.3f}"
    return f"**{text}**" if abs(value) > 2.0 * error and f"{abs(value):.3f}" != "0.000" else text


def variants(results: Results, reference: str) -> str:
    """How far each variant is ahead of a reference, paired by seed; bold: by more than two standard errors."""
    kept = results["beyond_the_front"]
    of, titles = kept["differences"], {"craft": METHODS["craft"].title} | kept["titles"]
    header = ["", *(f"{setting}: area" for setting in of), *(f"{setting}: R" for setting in of)]
    rows = []
    for name, title in titles.items():
        if name == reference:
            continue
        by = [each[name][reference] for each in of.values()]
        areas = [_signed(x["area"], x["area_error"]) for x in by]
        rows.append([title, *areas, *(_signed(x["at_learned"], x["at_learned_error"]) for x in by)])
    return markdown_table(header, rows)


def knob(results: Results, table: Callable[[Any], str]) -> str:
    """A table of `knob.py`."""
    return table(results["knob"]["runs"])


TABLES: dict[str, Callable[[Results], str]] = {
    "pareto-fronts": fronts,
    "pareto-robustness": partial(robustness, command="retention_pareto"),
    "pareto-targets": targets,
    "variants-against-craft": partial(variants, reference="craft"),
    "variants-robustness": partial(robustness, command="beyond_the_front"),
    "variants-against-fixed": partial(variants, reference="fixed"),
    **{f"knob-{name}": partial(knob, table=table) for name, table in OF_KNOB.items()},
}


def marks(name: str) -> tuple[str, str]:
    """The comments around a table."""
    return f"<!-- {name}: written by `python benchmarks/evidence/findings.py` -->\n", f"<!-- end of {name} -->"


def updated(text: str, names: Sequence[str], results: Results) -> str:
    """The page with these tables of these results."""
    for name in names:
        text = with_table(text, f"{TABLES[name](results)}\n", *marks(name))
    return text


if __name__ == "__main__":
    for page, names in PAGES.items():
        page.write_text(updated(page.read_text(encoding="utf-8"), names, read_results()), encoding="utf-8")
