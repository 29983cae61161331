"""Results of multiple-choice questions as tables, sentences and JSON."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from craft_optim.evaluation.mcq import Comparison, Result, Score, Summary
from craft_optim.evaluation.statistics import Interval

__all__ = ["as_json", "change_rows", "doubts", "failures", "summary_rows"]

_UNIT: dict[Score, str] = {"normalized": "nats per token", "sum": "nats"}
_WORDS: dict[Score, str] = {"normalized": "mean over the tokens", "sum": "sum over the tokens"}


def summary_rows(names: Sequence[str], summaries: Sequence[Summary], score: Score) -> list[tuple[str, str]]:
    """Table of one model, or several side by side: labels and texts. Intervals are those of 95 %."""
    other: Score = "sum" if score == "normalized" else "normalized"
    measures = [summary.by(score) for summary in summaries]
    rows = [
        ("Model", list(names)),
        ("Could not be scored", [f"{summary.failed} of {summary.questions}" for summary in summaries]),
        (f"Accuracy, by the {_WORDS[score]}", [_with(m.accuracy, m.accuracy_interval) for m in measures]),
        ("  of those that could be scored", [_number(m.accuracy_answered) for m in measures]),
        (f"Accuracy, by the {_WORDS[other]}", [_number(summary.by(other).accuracy) for summary in summaries]),
        (f"Margin, {_UNIT[score]}", [_with(m.margin, m.margin_interval, sign=True) for m in measures]),
        ("Ties, which count as wrong", [str(m.ties) for m in measures]),
    ]
    width = max(len(text) for _, texts in rows for text in texts)
    return [(label, "  ".join(f"{text:{width}}" for text in texts).rstrip()) for label, texts in rows]


def change_rows(change: Comparison, score: Score) -> list[tuple[str, str]]:
    """Table of the questions that the second model has lost and won: labels and texts."""
    return [
        ("Right before, wrong now", f"{change.lost} of {change.both + change.lost}"),
        ("Wrong before, right now", f"{change.won} of {change.won + change.neither}"),
        ("Accuracy", _with(change.accuracy, change.accuracy_interval, sign=True)),
        ("McNemar's test, exact", f"p = {change.p_value:.2g}"),
        (f"Margin, {_UNIT[score]}", _with(change.margin, change.margin_interval, sign=True)),
        *([("Scored by one of them only", str(change.failed_in_one))] if change.failed_in_one else []),
    ]


def doubts(name: str, summary: Summary, score: Score) -> list[str]:
    """Sentences with reasons to doubt a model's numbers."""
    low, high = summary.by(score).accuracy_interval
    if low > summary.chance:
        return []
    where = "below" if high < summary.chance else "not above"
    return [
        f"{name} is {where} chance ({summary.chance:.2f}): these questions, asked this way, do not show what it knows. "
        "Another --template may."
    ]


def failures(name: str, results: Sequence[Result], most: int = 5) -> list[str]:
    """Lines with the reasons why questions could not be scored, the most frequent first."""
    reasons = Counter(result.failure for result in results if result.failure is not None)
    if not reasons:
        return []
    lines = [f"{name}: {reasons.total()} of {len(results)} questions could not be scored, and count as wrong:"]
    lines += [f"  {count} x {reason}" for reason, count in reasons.most_common(most)]
    return lines + ([f"  and {len(reasons) - most} other reasons"] if len(reasons) > most else [])


def as_json(
    names: Sequence[str],
    results: Sequence[Sequence[Result]],
    summaries: Sequence[Summary],
    change: Comparison | None,
    score: Score,
) -> dict[str, Any]:
    """Data of one model, or of two and the change, for `json.dumps`.

    Returns:
        "score"; "models", each with "name" and "summary"; "comparison"; and "questions": each with its entries of the
        file and "results", one per model, with "right" and "margin" (by `score`), "log_likelihoods", "tokens" and
        "failure".
    """
    return {
        "score": score,
        "models": [{"name": name, "summary": asdict(summary)} for name, summary in zip(names, summaries, strict=True)],
        "comparison": None if change is None else asdict(change),
        "questions": [_row(each, score) for each in zip(*results, strict=True)],
    }


def _row(each: Sequence[Result], score: Score) -> dict[str, Any]:
    question = each[0].question
    return {
        "id": question.id,
        "image_path": None if question.image is None else str(question.image),
        "question": question.text,
        "choices": list(question.choices),
        "answer_index": question.answer,
        "results": [
            {
                "right": result.is_right(score),
                "margin": result.margin(score),
                "log_likelihoods": [choice.log_likelihood for choice in result.scores],
                "tokens": [choice.tokens for choice in result.scores],
                "failure": result.failure,
            }
            for result in each
        ],
    }


def _number(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if sign else ''}.3f}"


def _with(value: float | None, interval: Interval | None, *, sign: bool = False) -> str:
    ends = "" if interval is None else f" [{_number(interval[0], sign=sign)}, {_number(interval[1], sign=sign)}]"
    return _number(value, sign=sign) + ends
