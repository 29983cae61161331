"""Results of the runs: a row per method, over its seeds, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markdown_table import markdown_table

from craft_optim.evaluation.statistics import Interval, paired_difference

from .methods import METHODS, Method
from .setup import CACHES

__all__ = ["markdown", "rows_of"]

Run = Mapping[str, Any]


def rows_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per method that has a run, in the order of `METHODS`; see `summarise`.

    Raises:
        ValueError: There is no run of the model before training, or none of AdamW.
    """
    of: dict[str, list[Run]] = {
        method.name: [run for run in runs if run["method"] == method.name] for method in METHODS
    }
    if not of["before"] or not of["adamw"]:
        raise ValueError('There must be runs of "before" and "adamw", which the others are compared with.')
    return [summarise(method, of[method.name], of["before"][0], of["adamw"]) for method in METHODS if of[method.name]]


def summarise(method: Method, runs: Sequence[Run], before: Run, adamw: Sequence[Run]) -> dict[str, Any]:
    """Means over seeds, and each seed's value.

    Returns:
        `name`, `label`, `kind`, `cache`, `seeds`; `gain`, the fall of the new task's cross-entropy, in nats, and
        `share`, of AdamW's; `drift_..` as `CACHES` names them, and `.._per_seed`; `own_answers`, how much less likely
        it finds what it said to held-out prompts, nats per token; `words` and `formats`, shares; `words_change` and its
        interval of 95 %, over all seeds' answers; `cost` and `memory`, CPU time of a step and memory beyond the weights
        as multiples of AdamW's, None of what was not trained; `peak`, the largest average of drift on the way, of
        "craft".
    """
    seeds = [run["seed"] for run in runs]
    gain = fmean(before["new_ce"] - run["new_ce"] for run in runs)
    row: dict[str, Any] = {"name": method.name, "label": method.label, "kind": method.kind, "cache": method.cache}
    row |= {"seeds": seeds, "gain": gain}
    row["share"] = gain / fmean(before["new_ce"] - run["new_ce"] for run in adamw)
    for key in (*(f"drift_{name}" for name in CACHES), "own_answers"):
        row[key] = fmean(run[key] for run in runs)
        row[f"{key}_per_seed"] = [run[key] for run in runs]
    row["words"] = fmean(right for run in runs for right in run["words"])
    row["words_change"], row["words_interval"] = _change(before["words"], [run["words"] for run in runs])
    row["formats"] = fmean(right for run in runs for answers in run["formats"].values() for right in answers)
    for key, measured in (("cost", "seconds"), ("memory", "gib")):
        theirs = fmean(run[measured] for run in adamw)
        row[key] = fmean(run[measured] for run in runs) / theirs if measured in runs[0] else None
    if method.kind == "craft":
        row["peak"] = max(step["drift"] for run in runs for step in run["constraint"])
    return row


def _change(before: Sequence[bool], after: Sequence[Sequence[bool]]) -> tuple[float, Interval]:
    """The difference of two shares of right answers to the same questions, after minus before, and its interval."""
    pairs = [pair for answers in after for pair in zip(before, answers, strict=True)]
    counts = [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
    return (counts[2] - counts[1]) / len(pairs), paired_difference(*counts)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the page."""
    header = [
        "", "seeds", "new task: gain", "of AdamW's", "drift: anchors", "most on the way", "held-out", "own answers",
        "words right", "change", "formats", "cost", "memory",
    ]  # fmt: skip
    lines = []
    for row in rows:
        low, high = row["words_interval"]
        trained = row["cost"] is not None
        lines.append(
            [
                row["label"],
                f"{len(row['seeds'])}",
                f"{row['gain']:.3f}" if trained else "-",
                f"{row['share']:.2f}" if trained else "-",
                f"{row['drift_self' if row['cache'] == 'self' else 'drift_anchors']:.3f}" if trained else "-",
                f"{row['peak']:.3f}" if "peak" in row else "-",
                f"{row['drift_heldout']:.3f}" if trained else "-",
                f"{row['own_answers']:.3f}" if trained else "-",
                f"{row['words']:.3f}",
                f"{row['words_change']:+.3f} [{low:+.3f}, {high:+.3f}]" if trained else "-",
                f"{row['formats']:.2f}",
                f"{row['cost']:.2f}" if trained else "-",
                f"{row['memory']:.2f}" if trained else "-",
            ]
        )
    return markdown_table(header, lines)
