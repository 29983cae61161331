"""The benchmark's outcome as tables in a terminal."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .beyond import VARIANTS
from .methods import METHODS
from .summary import LEARNED, Difference, Front, Target, Tried, standard_error

__all__ = ["print_differences", "print_fronts", "print_targets", "print_tried"]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def mean_and_error(values: Sequence[float]) -> str:
    """Mean and, of several seeds, its standard error."""
    return f"{fmean(values):.3f}" + (f" +- {standard_error(values):.3f}" if len(values) > 1 else "")


def print_fronts(title: str, of: Mapping[str, Front], console: Console) -> None:
    """A row per method, the largest area first."""
    table = _table(title, "method", "dominated area", f"R at P = {LEARNED:g}", "best min(P, R)", "drift / epsilon")
    for front in sorted(of.values(), key=lambda front: -fmean(front.area)):
        ratios = [f"{drift / strength:.2f}" for strength, *_, drift in front.points if front.method == "craft"]
        table.add_row(
            METHODS[front.method].title,
            mean_and_error(front.area),
            mean_and_error(front.at_learned),
            f"{front.best:.3f}",
            " ".join(ratios) or "-",
        )
    console.print(table)


def print_differences(title: str, of: Mapping[str, Mapping[str, Difference]], console: Console) -> None:
    """A row per variant: how much it is ahead of each reference."""
    known = METHODS | VARIANTS
    against = list(dict.fromkeys(name for row in of.values() for name in row))
    columns = [f"{what} - {known[name].title}'s" for name in against for what in ("area", f"R at P = {LEARNED:g}")]
    table = _table(title, "variant", *columns)
    for name, row in of.items():
        cells: list[str] = []
        for reference in against:
            found = row.get(reference)
            pairs = [(found.area, found.area_error), (found.at_learned, found.at_learned_error)] if found else []
            cells += [f"{value:+.3f} +- {error:.3f}" for value, error in pairs] or ["-", "-"]
        table.add_row(known[name].title, *cells)
    console.print(table)


def print_tried(rows: Sequence[Tried], console: Console) -> None:
    """A row per setting and strength."""
    title = "One strength, over task loss x 0.1, 1, 10 and learning rate x 0.3, 1, 3"
    columns = ("worst min(P, R)", "drift: from", "to", "spread", "drift / epsilon: median", "highest")
    table = _table(title, "setting", "knob", *columns)
    known = METHODS | VARIANTS
    for row in rows:
        unit = known[row.method].unit
        of_epsilon = [f"{x:.2f}" for x in (median(row.ratios), max(row.ratios))] if unit == "epsilon" else ["-", "-"]
        knob = f"{unit} = {row.strength:g}" + (f", {known[row.method].title}" if row.method in VARIANTS else "")
        drifts = (f"{min(row.drifts):.3g}", f"{max(row.drifts):.3g}", f"{row.spread:.3g}x")
        table.add_row(row.setting, knob, mean_and_error(row.worst), *drifts, *of_epsilon)
    console.print(table)


def print_targets(rows: Sequence[Target], console: Console) -> None:
    """Each target with what was found, and whether it is met."""
    table = _table("Targets", "setting", "target", "found", "met")
    for row in rows:
        table.add_row(row.setting, row.what, row.found, "yes" if row.met else "[bold red]no[/bold red]")
    console.print(table)
