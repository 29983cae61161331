"""Questions that a chat model writes itself: anchors without data of the old tasks.

The model continues the template's opening of a user's turn, as it has seen users write (Xu et al. 2024, "Magpie").
Turns that do not end, loops and near-duplicates are dropped.
"""

import logging
import re
from collections import Counter
from typing import Any

import torch
from torch import nn

from craft_optim._numbers import whole
from craft_optim.anchors.generation import sampling
from craft_optim.anchors.passes import device_of, isolated_rng, steady
from craft_optim.anchors.sampling import mixed_seed

__all__ = ["is_loop", "opening_and_end", "self_questions", "too_similar"]

_log = logging.getLogger("craft_optim")
_MARK = "\ue000"  # a private-use character of Unicode: no template has it
_TRIES = 8  # tries per wanted question
_ALIKE = 0.7  # share of common words of two questions


def self_questions(
    model: nn.Module,
    tokenizer: Any,
    count: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """Records with one user turn each, written by the model; the same at every call on one machine.

    Args:
        model: A chat model of transformers, before it is fine-tuned.
        tokenizer: The model's tokenizer, with its chat template.
        count: Number of records; fewer if eight times as many turns do not give enough, as a log line then says.
        seed: Seed of the sampling.
        temperature: Divisor of the logits; > 0. Samples come from the whole distribution.
        max_new_tokens: Largest number of tokens of a turn. Longer turns are dropped.
        batch_size: Turns per batch.

    Raises:
        ValueError: There is no chat template, it changes a user's turn, or no turn is usable.
    """
    count, batch_size = whole("count", count), whole("batch_size", batch_size)
    settings = {**sampling(temperature), "num_beams": 1, "max_new_tokens": whole("max_new_tokens", max_new_tokens)}
    opening, end = opening_and_end(tokenizer)
    device, writer = device_of(model), getattr(model, "generate", None)
    if writer is None:
        raise ValueError(f"The model must have `generate`, as transformers' have. Found {type(model).__name__}.")
    ids = torch.tensor([tokenizer(opening, add_special_tokens=False)["input_ids"]], device=device)
    found: list[str] = []
    dropped: Counter[str] = Counter()
    stop = getattr(model, "generation_config", None)
    pad = next((x for x in (getattr(stop, "pad_token_id", None), tokenizer.pad_token_id) if x is not None), 0)
    for number_of in range(-(-_TRIES * count // batch_size)):
        with torch.no_grad(), steady(model), isolated_rng(device, mixed_seed(seed, number_of)):
            rows = ids.expand(batch_size, -1)
            out = writer(input_ids=rows, attention_mask=torch.ones_like(rows), pad_token_id=pad, **settings)
        for text in tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=False):
            question, ended, _ = text.partition(end)
            question = question.strip()
            why = _unusable(question, bool(ended), found)
            if why:
                dropped[why] += 1
            elif len(found) < count:
                found.append(question)
        if len(found) == count:
            break
    said = ", ".join(f"{number_of} {why}" for why, number_of in dropped.most_common())
    if not found:
        raise ValueError(
            f"The model wrote no usable question ({said}): it may be no chat model, or the template not its own. Pass "
            "questions as `data`."
        )
    level = logging.INFO if len(found) == count else logging.WARNING
    _log.log(level, "The model wrote %d of %d questions; dropped: %s.", len(found), count, said or "none")
    return [{"messages": [{"role": "user", "content": question}]} for question in found]


def opening_and_end(tokenizer: Any) -> tuple[str, str]:
    """The template's text before a user's first turn, and the text right after the turn.

    Raises:
        ValueError: There is no template, or it changes a turn.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{type(tokenizer).__name__} has no chat template: take the tokenizer of a chat model.")
    turn = [{"role": "user", "content": _MARK}]
    text: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    opening, mark, rest = text.partition(_MARK)
    if not mark or not rest.strip():
        raise ValueError("The chat template must write a user's turn as it is, and something after it.")
    return opening, rest.strip().split()[0]


def _unusable(question: str, ended: bool, before: list[str]) -> str | None:
    if not ended:
        return "without an end"
    if len(question.split()) < 2:
        return "too short"
    if is_loop(question):
        return "loops"
    return "near-duplicates" if any(too_similar(question, other) for other in before) else None


def is_loop(text: str) -> bool:
    """True if less than half of a text's runs of four words are distinct."""
    words = _words(text)
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(runs) > 1 and 2 * len(set(runs)) < len(runs)


def too_similar(one: str, other: str) -> bool:
    """True if two texts have seven tenths of their words in common."""
    a, b = set(_words(one)), set(_words(other))
    return len(a & b) >= _ALIKE * len(a | b)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
