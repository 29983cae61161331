"""Results, their summary and the comparison of two models, on scores made by hand."""

import math

import pytest

from craft_optim.evaluation import ChoiceScore, Question, compare, evaluate, summarise
from craft_optim.evaluation.statistics import paired_difference, wilson

stats = pytest.importorskip("scipy.stats", reason="pip install 'craft-optim[evaluation]'")

TWO = Question("2 + 2?", ("4", "5"), 0)
THREE = Question("2 + 3?", ("4", "5", "6"), 1)


def scorer(table):
    """Question -> (log-likelihood, tokens) of its choices, or an error to raise."""

    def score(question):
        found = table[question]
        if isinstance(found, Exception):
            raise found
        return [ChoiceScore(*pair) for pair in found]

    return score


def questions(count, choices=("a", "b"), answer=0):
    return [Question(f"{i}?", choices, answer) for i in range(count)]


def asked(margins):
    """Results of one-token choices with these margins; None is a failure."""
    table = {
        q: ValueError("broken") if m is None else [(-9.0, 1), (-9.0 - m, 1)]
        for q, m in zip(questions(len(margins)), margins, strict=True)
    }
    return evaluate(table, scorer(table))


def test_the_longer_choice_is_not_punished_when_scores_are_normalized():
    (result,) = evaluate([TWO], scorer({TWO: [(-4.0, 4), (-3.0, 1)]}))
    assert result.margin("sum") == -1.0
    assert result.margin("normalized") == 2.0
    assert (result.is_right("sum"), result.is_right("normalized")) == (False, True)


def test_the_margin_is_to_the_best_wrong_choice():
    (result,) = evaluate([THREE], scorer({THREE: [(-2.0, 1), (-0.5, 1), (-1.0, 1)]}))
    assert result.margin("sum") == 0.5


@pytest.mark.parametrize("answer", [0, 1])
def test_a_tie_is_not_right_wherever_the_answer_stands(answer):
    results = evaluate(questions(4, answer=answer), lambda q: [ChoiceScore(-1.0, 2)] * 2)
    measure = summarise(results).normalized
    assert (measure.right, measure.accuracy, measure.ties, measure.margin) == (0, 0.0, 4, 0.0)


def test_ties_among_wrong_choices_do_not_matter():
    (result,) = evaluate([THREE], scorer({THREE: [(-2.0, 1), (-1.0, 1), (-2.0, 1)]}))
    assert result.is_right("sum")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_scores_that_are_not_finite_are_failures(value):
    (result,) = evaluate([TWO], scorer({TWO: [(-1.0, 1), (value, 1)]}))
    assert result.failure == f"The log-likelihood of '5' is {value}."
    assert result.margin("sum") is None
    assert not result.is_right("sum")


def test_failures_stay_in_the_denominator_with_their_reason():
    table = {TWO: [(-1.0, 1), (-2.0, 1)], THREE: ValueError("There is no picture a.png.")}
    results = evaluate(table, scorer(table))
    assert [result.question for result in results] == [TWO, THREE]
    assert results[1].failure == "There is no picture a.png."
    summary = summarise(results)
    assert (summary.questions, summary.failed) == (2, 1)
    assert summary.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    for measure in (summary.sum, summary.normalized):
        assert measure.accuracy == 0.5
        assert measure.accuracy_answered == 1.0
        assert measure.accuracy_interval == wilson(1, 2)
        assert measure.margin == 1.0
        assert measure.margin_interval is None


def test_if_all_failed_nothing_is_right_and_nothing_is_claimed():
    summary = summarise(asked([None, None, None]))
    assert (summary.failed, summary.sum.accuracy) == (3, 0.0)
    assert summary.sum.accuracy_answered is None
    assert summary.sum.margin is None


def test_the_summary_of_many():
    margins = [1.0, -0.5, 2.0, 0.0, None, 0.25, -3.0, 0.5]
    measure = summarise(asked(margins)).sum
    there = [m for m in margins if m is not None]
    assert measure.right == 4
    assert measure.accuracy == 4 / 8
    assert measure.accuracy_answered == 4 / 7
    assert measure.accuracy_interval == wilson(4, 8)
    assert measure.ties == 1
    assert measure.margin == pytest.approx(sum(there) / 7)
    expected = stats.ttest_1samp(there, 0.0).confidence_interval(0.95)
    assert measure.margin_interval == pytest.approx((expected.low, expected.high))


def test_other_errors_are_not_failures_of_a_question():
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate([TWO], scorer({TWO: RuntimeError("out of memory")}))


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        ([(-1.0, 1)], "each of 2 choices. Found 1"),
        ([(-1.0, 1), (-1.0, 1), (-1.0, 1)], "each of 2 choices. Found 3"),
        ([(-1.0, 1), (0.5, 1)], "needs a minus sign"),
        ([(-1.0, 0), (-1.0, 1)], "at least one token"),
    ],
)
def test_a_scorer_that_returns_no_scores_is_an_error(scores, complaint):
    with pytest.raises(ValueError, match=complaint):
        evaluate([TWO], scorer({TWO: scores}))


def test_two_models_are_compared_question_by_question():
    before = asked([1.0, 1.0, 1.0, -1.0, -1.0, 0.5, None, None, 2.0])
    after = asked([2.0, -1.0, 0.0, 1.0, -2.0, None, 1.0, None, -4.0])
    change = compare(before, after, "sum")
    assert (change.both, change.lost, change.won, change.neither) == (1, 4, 2, 2)
    assert change.failed_in_one == 2
    assert change.accuracy == pytest.approx(-2 / 9)
    assert change.accuracy == pytest.approx(summarise(after).sum.accuracy - summarise(before).sum.accuracy)
    assert change.accuracy_interval == paired_difference(1, 4, 2, 2)
    assert change.p_value == pytest.approx(stats.binomtest(4, 6).pvalue)
    changes = [1.0, -2.0, -1.0, 2.0, -1.0, -6.0]
    assert change.margin == pytest.approx(sum(changes) / 6)
    expected = stats.ttest_1samp(changes, 0.0).confidence_interval(0.95)
    assert change.margin_interval == pytest.approx((expected.low, expected.high))


def test_a_model_and_itself():
    results = asked([1.0, -1.0, 0.0, None, 2.0])
    change = compare(results, results)
    assert (change.lost, change.won, change.accuracy, change.p_value, change.margin) == (0, 0, 0.0, 1.0, 0.0)
    low, high = change.accuracy_interval
    assert low < -0.2
    assert high > 0.2


def test_the_score_decides_the_comparison():
    before = evaluate([TWO], scorer({TWO: [(-4.0, 4), (-3.0, 1)]}))
    after = evaluate([TWO], scorer({TWO: [(-1.0, 1), (-2.0, 4)]}))
    assert compare(before, after, "normalized").lost == 1
    assert compare(before, after, "sum").won == 1


def test_only_the_same_questions_can_be_compared():
    three = asked([1.0, 1.0, 1.0])
    other = evaluate(questions(3, answer=1), lambda q: [ChoiceScore(-1.0, 1)] * 2)
    for first, second, found in (
        ([], [], "Found 0 and 0"),
        (three, three[:2], "Found 3 and 2"),
        (three, other, "other"),
    ):
        with pytest.raises(ValueError, match=found):
            compare(first, second)
    with pytest.raises(ValueError, match="Found 'mean'"):
        compare(three, three, "mean")
    with pytest.raises(ValueError, match="at least one question"):
        summarise([])
