"""What the model is asked besides the anchors: what words mean, to answer in a format, and a few plain questions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from craft_optim.demo.small_chat import answers
from craft_optim.evaluation import evaluate, read_questions
from craft_optim.evaluation.language_models import LanguageModelScorer

from .setup import HERE

__all__ = ["FORMATS", "SAMPLES", "follows", "words_right"]

SAMPLES = ("What is the capital of France?", "How can I fall asleep faster?", "Tell me a story about a mouse.")
THINGS = (
    "birds", "drinks", "tools", "colours", "cities", "flowers", "sports", "fruits", "games", "books", "jobs", "trees",
    "animals", "clothes", "vehicles", "hobbies",
)  # fmt: skip


def _is_list(text: str) -> bool:
    return len(re.findall(r"(?m)^\s*(?:\d+[.)]|[-*•])\s+\S", text)) >= 3


def _is_json(text: str) -> bool:
    found = re.search(r"\{[^{}]*\}", text)
    try:
        value = json.loads(found[0]) if found else None
    except ValueError:
        return False
    return isinstance(value, dict) and {"name", "price"} <= set(value)


def _is_short(text: str) -> bool:
    return 0 < len(text.split()) <= 10 and "\n" not in text.strip()


FORMATS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "list": ("Give me a list of five {}.", _is_list),
    "json": ('Write a JSON object with the keys "name" and "price" for one of these: {}.', _is_json),
    "short": ("Name one example of {}. Answer with one word only.", _is_short),
}
"""Kind -> the instruction about `THINGS`, and the rule that says whether an answer follows it"""


def follows(model: nn.Module, tokenizer: Any, limit: int | None = None) -> dict[str, list[bool]]:
    """For each of `FORMATS`, whether each answer follows the instruction."""
    return {
        kind: [rule(text) for text in answers(model, tokenizer, [form.format(x) for x in THINGS[:limit]], 48)]
        for kind, (form, rule) in FORMATS.items()
    }


def words_right(model: nn.Module, tokenizer: Any, limit: int | None = None) -> list[bool]:
    """For each of 300 nouns, whether its meaning is likelier, per token, than three others."""
    questions = read_questions(HERE / "words.jsonl")[:limit]
    scorer = LanguageModelScorer(model, tokenizer, template="{question} {choice}")
    return [result.is_right("normalized") for result in evaluate(questions, scorer)]
