"""Where choices begin among tokens, templates, and the likelihood of tokens: without any model."""

import pytest
import torch

from craft_optim.evaluation.answer_tokens import answer_tokens, log_likelihoods
from craft_optim.evaluation.templates import QUESTION_ANSWER, parse_template

BOS, EOS = 1, 2


def test_bos_and_eos_are_no_part_of_a_choice():
    # BOS "a:" "b" EOS and BOS "a:" "c" "d" EOS; tokens that were added end at 0
    rows = [[BOS, 5, 6, EOS], [BOS, 5, 7, 8, EOS]]
    assert answer_tokens(rows, [[0, 2, 3, 0], [0, 2, 3, 4, 0]], [2, 2]) == (2, [3, 4])


def test_a_token_across_the_boundary_is_the_choices_and_moves_the_beginning_of_all():
    # "a" ":b" and "a" ":" "c" "d": both are conditioned on "a" alone
    rows = [[BOS, 5, 6], [BOS, 5, 7, 8, 9]]
    assert answer_tokens(rows, [[0, 1, 3], [0, 1, 2, 3, 4]], [2, 2]) == (2, [3, 5])


def test_a_choice_that_changes_tokens_far_before_it():
    # the second row's prompt is split differently from its second token on
    rows = [[BOS, 5, 6, 7], [BOS, 8, 9, 7]]
    assert answer_tokens(rows, [[0, 1, 4, 5], [0, 2, 4, 5]], [4, 4]) == (1, [4, 4])


def test_what_choices_have_in_common_is_scored():
    rows = [[BOS, 5, 6, 7], [BOS, 5, 6, 8]]
    assert answer_tokens(rows, [[0, 1, 2, 3]] * 2, [1, 1]) == (2, [4, 4])


def test_text_after_the_choice_is_not_scored():
    rows = [[BOS, 5, 6, 9], [BOS, 5, 7, 9]]
    assert answer_tokens(rows, [[0, 1, 2, 7]] * 2, [1, 1], [2, 2]) == (2, [3, 3])


@pytest.mark.parametrize(
    ("rows", "ends", "complaint"),
    [
        ([[BOS, 5, 6], [BOS, 5]], [[0, 2, 3], [0, 2]], "nothing of choice 1"),
        ([[5, 6], [5, 7]], [[3, 4], [3, 4]], "no token before"),
        ([[BOS, 5, 3], [BOS, 5, 6], [BOS, 5, 3]], [[0, 2, 3]] * 3, "Choices 0 and 2 are the same tokens"),
    ],
)
def test_choices_that_cannot_be_scored(rows, ends, complaint):
    with pytest.raises(ValueError, match=complaint):
        answer_tokens(rows, ends, [2] * len(rows))


def test_likelihoods_are_sums_of_log_softmax_without_padding():
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 0] = logits[0, 0]
    targets, lengths = torch.tensor([[1, 2, 3, 4], [6, 0, 0, 0], [5, 6, 0, 0]]), [4, 1, 2]
    for found, row, target, length in zip(
        log_likelihoods(logits, targets, lengths), logits, targets, lengths, strict=True
    ):
        total = 0.0
        for i in range(length):
            total += float(row[i, target[i]]) - float(row[i].exp().sum().log())
        assert found.log_likelihood == pytest.approx(total, rel=1e-12)
        assert found.tokens == length


def test_half_precision_logits_are_summed_in_single():
    logits = torch.zeros(1, 300, 3, dtype=torch.bfloat16)
    (found,) = log_likelihoods(logits, torch.zeros(1, 300, dtype=torch.long), [300])
    assert found.log_likelihood == pytest.approx(-300 * 1.0986122886, rel=1e-6)


def test_a_model_that_looks_ahead_is_found_out():
    logits = torch.zeros(2, 2, 3)
    logits[1, 0, 2] = 3.0
    with pytest.raises(ValueError, match="sees the choice"):
        log_likelihoods(logits, torch.zeros(2, 2, dtype=torch.long), [1, 1])


def test_templates():
    assert parse_template(QUESTION_ANSWER).head("Why?") == "Question: Why?\nAnswer: "
    assert parse_template("Question: {question}\\nAnswer:").head("{Why}?") == "Question: {Why}?\nAnswer: "
    assert parse_template("{question} {}{choice}").head("{choice}") == "{choice} {}"


@pytest.mark.parametrize(
    "text", ["", "Q:", "{question}{question}", "{question}{choice}{choice}", "{question}{choice}."]
)
def test_templates_that_cannot_be_used(text):
    with pytest.raises(ValueError, match=r"must have \{question\} once"):
        parse_template(text)
