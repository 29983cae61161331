"""Multiple-choice questions by likelihood: a model must find the right choice likelier than every other.

    questions = read_questions("questions.jsonl")
    before = evaluate(questions, load_scorer("pretrained/"))
    after = evaluate(questions, load_scorer("fine_tuned/"))
    print(summarise(after), compare(before, after))

A choice's score is the log-likelihood of its tokens after the question: their sum, or their mean, which does not favour
short choices. An answer is right if the right choice's score is above all others'. A tie is not right, as the file's
order would decide. A question that could not be scored is not right either: it stays in the denominator, and is
counted.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple, Protocol, get_args

from craft_optim.evaluation.questions import Question
from craft_optim.evaluation.statistics import Interval, mcnemar, mean_interval, paired_difference, wilson

__all__ = [
    "ChoiceScore",
    "Comparison",
    "Measure",
    "Result",
    "Score",
    "Scorer",
    "Summary",
    "compare",
    "evaluate",
    "summarise",
]

Score = Literal["normalized", "sum"]
"""The mean over a choice's tokens, or their sum"""


class ChoiceScore(NamedTuple):
    """Likelihood of a choice for a model.

    Attributes:
        log_likelihood: Sum over the choice's tokens after the question, in nats; <= 0.
        tokens: Number of these tokens; >= 1.
    """

    log_likelihood: float
    tokens: int

    def by(self, score: Score) -> float:
        """The sum or the mean over the tokens."""
        return self.log_likelihood if score == "sum" else self.log_likelihood / self.tokens


class Scorer(Protocol):
    """Scores the choices of a question: a model with its tokenizer and its template, or any function."""

    def __call__(self, question: Question) -> Sequence[ChoiceScore]:
        """Scores of the choices, in order; a ValueError has the reason why the question cannot be scored."""
        ...


@dataclass(frozen=True)
class Result:
    """The scores of one question.

    Attributes:
        failure: Reason why it could not be scored, then without scores; None if it could.
    """

    question: Question
    scores: tuple[ChoiceScore, ...] = ()
    failure: str | None = None

    def margin(self, score: Score) -> float | None:
        """The right choice's score minus the best wrong one's, in nats (per token); None without scores."""
        if self.failure is not None:
            return None
        by_place = [choice.by(score) for choice in self.scores]
        right = by_place.pop(self.question.answer)
        return right - max(by_place)

    def is_right(self, score: Score) -> bool:
        """True if the right choice is above all others."""
        margin = self.margin(score)
        return margin is not None and margin > 0.0


def evaluate(questions: Iterable[Question], scorer: Scorer) -> list[Result]:
    """Scores all questions, in order. One that cannot be scored is a result, too, with the reason.

    Args:
        scorer: Scorer of a model. Its ValueErrors (a missing picture, a question too long, ...) and scores that are not
            finite are failures of the question; other errors are raised.

    Raises:
        ValueError: The scorer's results cannot be scores.

    Example:
        >>> question = Question("2 + 2 =", ("4", "5"), answer=0)
        >>> (result,) = evaluate([question], lambda q: [ChoiceScore(-0.1, 1), ChoiceScore(-3.1, 1)])
        >>> result.is_right("sum"), result.margin("sum")
        (True, 3.0)
    """
    return [_result(question, scorer) for question in questions]


def _result(question: Question, scorer: Scorer) -> Result:
    try:
        scores = tuple(scorer(question))
    except ValueError as error:
        return Result(question, failure=str(error))
    if len(scores) != len(question.choices):
        raise ValueError(f"The scorer must score each of {len(question.choices)} choices. Found {len(scores)}.")
    for choice, score in zip(question.choices, scores, strict=True):
        if score.tokens < 1 or score.log_likelihood > 0.0:
            raise ValueError(
                f"A score must have a log-likelihood <= 0 and at least one token. Found {score} for {choice!r}: a loss "
                "needs a minus sign."
            )
        if not math.isfinite(score.log_likelihood):
            return Result(question, failure=f"The log-likelihood of {choice!r} is {score.log_likelihood}.")
    return Result(question, scores)


@dataclass(frozen=True)
class Measure:
    """Accuracy and margin of a model by one kind of score. Intervals are those of 95 %.

    Attributes:
        right: Questions answered rightly.
        accuracy: Share of all questions, including failed ones, answered rightly.
        accuracy_interval: Wilson's interval.
        accuracy_answered: Share of the questions that did not fail answered rightly; None if all failed.
        ties: Questions on which the right choice and the best wrong one have the same score.
        margin: Mean over the questions that did not fail, in nats (per token); None if all failed.
        margin_interval: Student's interval; None for fewer than two questions.
    """

    right: int
    accuracy: float
    accuracy_interval: Interval
    accuracy_answered: float | None
    ties: int
    margin: float | None
    margin_interval: Interval | None


@dataclass(frozen=True)
class Summary:
    """Accuracy and margin of a model.

    Attributes:
        failed: Number of questions that could not be scored.
        chance: Accuracy of guessing.
        normalized: Measure by the mean over a choice's tokens.
        sum: Measure by the sum over a choice's tokens.
    """

    questions: int
    failed: int
    chance: float
    normalized: Measure
    sum: Measure

    def by(self, score: Score) -> Measure:
        """The measure by this kind of score."""
        return self.sum if score == "sum" else self.normalized


def summarise(results: Sequence[Result]) -> Summary:
    """Accuracy and margin, with their intervals.

    Raises:
        ValueError: There are no results.
    """
    if not results:
        raise ValueError("`results` must have at least one question. Found none.")
    return Summary(
        questions=len(results),
        failed=sum(result.failure is not None for result in results),
        chance=fmean(1.0 / len(result.question.choices) for result in results),
        normalized=_measure(results, "normalized"),
        sum=_measure(results, "sum"),
    )


def _measure(results: Sequence[Result], score: Score) -> Measure:
    margins = [margin for result in results if (margin := result.margin(score)) is not None]
    right = sum(result.is_right(score) for result in results)
    return Measure(
        right=right,
        accuracy=right / len(results),
        accuracy_interval=wilson(right, len(results)),
        accuracy_answered=right / len(margins) if margins else None,
        ties=sum(margin == 0.0 for margin in margins),
        margin=fmean(margins) if margins else None,
        margin_interval=mean_interval(margins),
    )


@dataclass(frozen=True)
class Comparison:
    """Two models on the same questions, the second against the first. Intervals are those of 95 %.

    Attributes:
        both: Questions that both answer rightly.
        lost: Questions that only the first answers rightly.
        won: Questions that only the second answers rightly.
        neither: Questions that none answers rightly.
        failed_in_one: Questions that only one could not score; that counts as not right.
        accuracy: The second's minus the first's, over all questions.
        accuracy_interval: Newcombe's interval for pairs.
        p_value: McNemar's test of `lost` against `won`, exact and two-sided.
        margin: Mean difference of the margins of questions that both scored, in nats (per token); None without any.
        margin_interval: Student's interval of the differences; None for fewer than two.
    """

    both: int
    lost: int
    won: int
    neither: int
    failed_in_one: int
    accuracy: float
    accuracy_interval: Interval
    p_value: float
    margin: float | None
    margin_interval: Interval | None


def compare(first: Sequence[Result], second: Sequence[Result], score: Score = "normalized") -> Comparison:
    """Counts the questions that the second model has lost and won against the first, and tests the difference.

    Args:
        first: Results of `evaluate`, such as before fine-tuning.
        second: Results on the same questions in the same order.

    Raises:
        ValueError: The questions are not the same, there are none, or there is no such score.
    """
    if score not in get_args(Score):
        raise ValueError(f"`score` must be one of {get_args(Score)}. Found {score!r}.")
    if not first or [result.question for result in first] != [result.question for result in second]:
        raise ValueError(
            f"Both models must have been given the same questions, in the same order, at least one. Found {len(first)} "
            f"and {len(second)} results{', of other questions' if len(first) == len(second) > 0 else ''}."
        )
    pairs = list(zip(first, second, strict=True))
    right = [(a.is_right(score), b.is_right(score)) for a, b in pairs]
    both, lost, won, neither = (
        right.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))
    )
    margins = [(a.margin(score), b.margin(score)) for a, b in pairs]
    changes = [b - a for a, b in margins if a is not None and b is not None]
    return Comparison(
        both=both,
        lost=lost,
        won=won,
        neither=neither,
        failed_in_one=sum((a is None) != (b is None) for a, b in margins),
        accuracy=(won - lost) / len(pairs),
        accuracy_interval=paired_difference(both, lost, won, neither),
        p_value=mcnemar(lost, won),
        margin=fmean(changes) if changes else None,
        margin_interval=mean_interval(changes),
    )
