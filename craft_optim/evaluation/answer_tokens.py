"""Answer tokens of a choice, and their likelihood: the common part of all scorers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from craft_optim.evaluation.mcq import ChoiceScore

__all__ = ["AnswerTokens", "answer_tokens", "log_likelihoods"]

_SAME_CONTEXT = 0.05


class AnswerTokens(NamedTuple):
    """Tokens of each choice's row to score: `row[start:stop]`.

    Attributes:
        start: Place of the first, the same in all rows: the tokens before are equal.
        stops: Place after the last in each row.
    """

    start: int
    stops: list[int]


def answer_tokens(
    rows: Sequence[Sequence[int]],
    ends: Sequence[Sequence[int]],
    heads: Sequence[int],
    lasts: Sequence[int] | None = None,
) -> AnswerTokens:
    """Finds the tokens of the choices in rows of a prompt and a choice tokenised together.

    A tokenizer may merge the end of the prompt and the beginning of some choices into one token. All choices are then
    scored from the first place where rows differ, so that their likelihoods have the same condition.

    Args:
        rows: Token ids of each choice's row, without padding.
        ends: End of each token in its row's text, in characters; 0 for tokens that the tokenizer adds, such as BOS
            and EOS, wherever they are.
        heads: Beginning of the choice in its row's text.
        lasts: End of the choice; None if it ends the text.

    Raises:
        ValueError: A choice has no token or nothing before it, or two choices have the same tokens.

    Example:
        >>> rows = [[1, 5, 6, 7, 2], [1, 5, 8, 2]]  # BOS a :b c EOS, BOS a :d EOS
        >>> answer_tokens(rows, [[0, 1, 3, 4, 0], [0, 1, 3, 0]], heads=[2, 2])
        AnswerTokens(start=2, stops=[4, 3])
    """
    firsts, stops = [], []
    for row, (own, head) in enumerate(zip(ends, heads, strict=True)):
        last = max(own) if lasts is None else lasts[row]
        places = [place for place, end in enumerate(own) if head < end <= last]
        if not places:
            raise ValueError(f"The tokenizer leaves nothing of choice {row}: it does not know its characters.")
        firsts.append(places[0])
        stops.append(places[-1] + 1)
    start = next((place for place in range(min(firsts)) if len({row[place] for row in rows}) > 1), min(firsts))
    if start == 0:
        raise ValueError("There is no token before the choices: the template must have words before {choice}.")
    answers = [tuple(row[start:stop]) for row, stop in zip(rows, stops, strict=True)]
    for place, answer in enumerate(answers):
        if answer in answers[:place]:
            raise ValueError(
                f"Choices {answers.index(answer)} and {place} are the same tokens to this tokenizer: the model cannot "
                "tell them apart."
            )
    return AnswerTokens(start, stops)


def log_likelihoods(logits: Tensor, targets: Tensor, lengths: Sequence[int]) -> list[ChoiceScore]:
    """Sum over each row's tokens of log p(token | tokens before), for each row.

    Args:
        logits: Logits `[B, L, vocabulary]`; entry i of a row predicts entry i of its targets.
        targets: Token ids, `[B, L]`.
        lengths: Number of tokens of each row that count.

    Raises:
        ValueError: The rows' first distributions differ though their contexts are the same: the model looks ahead.
    """
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    _require_same_context(logprobs[:, 0])
    chosen = logprobs.gather(-1, targets.to(logits.device)[..., None])[..., 0].cpu().double()
    return [ChoiceScore(float(row[:length].sum()), length) for row, length in zip(chosen, lengths, strict=True)]


def _require_same_context(logprobs: Tensor) -> None:
    """Raises if distributions `[B, vocabulary]` at the same context differ by more than rounding."""
    first = logprobs.exp()
    distance = float((first - first[:1]).abs().sum(-1).max()) / 2.0
    if distance > _SAME_CONTEXT:
        raise ValueError(
            f"The model sees the choice that it is asked about: before its first token the distributions differ by "
            f"{distance:.2g} between choices. Its attention is not causal there; scores would mean nothing."
        )
