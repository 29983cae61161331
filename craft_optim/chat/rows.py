"""Rows: the tokens that a language model reads, with a mark on those that count."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from craft_optim.anchors.masks import IGNORED

__all__ = ["Counted", "Row", "answered", "batch_of", "category_of", "prompted"]

_LET_IT = "let the model answer (answers='sampled' of `chat_anchors`, --answers=sampled of build-anchors)"

Counted = Literal["assistant", "all"]


class Row(NamedTuple):
    """One anchor.

    Attributes:
        ids: Tokens.
        counts: For each token, True if the model's distribution for it counts.
        last_only: True if only the last of several answers counts, see `answered`.
        category: Category of the record; "" if it has none.
    """

    ids: list[int]
    counts: list[bool]
    last_only: bool = False
    category: str = ""


def answered(record: Mapping[str, Any], tokenizer: Any, counted: Counted = "assistant") -> Row:
    """Row of a record as a model sees it in training, by the tokenizer's own chat template.

    In messages the assistant's turns count, including the token that ends each; in a prompt with a completion the
    completion; in a text everything. The first token of a row has no distribution and never counts.

    Some templates, as of reasoning models, rewrite earlier turns once others follow, and hide where these begin: then
    only the last answer counts.

    Args:
        record: A record from `read_records`.
        tokenizer: A tokenizer of transformers.
        counted: "assistant", as above; or "all": every token counts, also the template's own, which never change.

    Raises:
        ValueError: There is no template for messages, or they have no answer.
    """
    messages, end = _messages(record), tokenizer.eos_token_id
    if "text" in record:
        row = _row(tokenizer, record["text"], [(0, len(record["text"]))])
    elif messages is not None:
        row = _of_messages(messages, tokenizer, record.get("tools"))
    elif "completion" in record:
        text = record["prompt"] + record["completion"]
        row = _row(tokenizer, text, [(len(record["prompt"]), len(text))])
        if end is not None and row.ids[-1] != end:
            row = Row([*row.ids, end], [*row.counts, True])
    else:
        raise ValueError(f"A prompt without a completion has no answer: {_LET_IT}.")
    counts = [False, *(counted == "all" or counts for counts in row.counts[1:])]
    return row._replace(counts=counts, category=category_of(record))


def prompted(record: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The tokens of a record that the model must continue: up to the last answer, or the whole text.

    Raises:
        ValueError: There is no template for messages, or they have nothing to answer.
    """
    messages = _messages(record, answers=False)
    if messages is None:
        return _row(tokenizer, record.get("text") or record["prompt"], []).ids
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError("Messages must hold something to answer. Found the assistant's alone.")
    asked = _templated(tokenizer, messages, record.get("tools"), add_generation_prompt=True)
    return _row(tokenizer, asked, [], templated=True).ids


def category_of(record: Mapping[str, Any]) -> str:
    """The record's category; "" if it has none."""
    return str(record.get("category") or "")


def batch_of(rows: Sequence[Row], padding: int = 0) -> dict[str, Tensor]:
    """Rows as one batch for a language model of transformers, padded on the right.

    Args:
        rows: The rows; at least one.
        padding: Padding token after shorter rows. Nothing attends to it, and it does not count.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 `[rows, T]`. Labels are the tokens that count, else -100; the
        first token of a row never counts, since it has no distribution.
    """
    shape = len(rows), max(len(row.ids) for row in rows)
    ids = torch.full(shape, padding)
    mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for i, row in enumerate(rows):
        length = len(row.ids)
        ids[i, :length], mask[i, :length] = torch.tensor(row.ids), 1
        labels[i, :length] = torch.where(torch.tensor(row.counts), ids[i, :length], IGNORED)
    labels[:, 0] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _messages(record: Mapping[str, Any], answers: bool = True) -> list[Any] | None:
    """The messages of a record; None if it has plain texts."""
    if "messages" in record:
        return list(record["messages"])
    if isinstance(record.get("prompt"), str) or "prompt" not in record:
        return None
    return [*record["prompt"], *(record.get("completion", ()) if answers else ())]


def _row(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], *, templated: bool = False) -> Row:
    """Row of a text; tokens with a character in one of the spans count.

    A token may begin before a span: the blank before a word belongs to the word. The tokenizer's special tokens before
    a text are included unless a template has written the text; those after it are not.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"The tokenizer must say which characters a token stands for. Found {type(tokenizer).__name__}, which does "
            "not: load it with AutoTokenizer, use_fast=True."
        )
    read = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    ids, places = list(read["input_ids"]), list(read["offset_mapping"])
    while not templated and len(ids) > 1 and places[-1][0] == places[-1][1]:
        ids.pop(), places.pop()
    return Row(ids, [any(a < end and b > start for start, end in spans) for a, b in places])


def _templated(tokenizer: Any, messages: Sequence[Any], tools: Any, **settings: Any) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template, and records of messages need one: take the tokenizer of "
            "the chat model, set `tokenizer.chat_template`, or give `prompt` and `completion` as texts."
        )
    settings = {"tools": tools, **settings} if tools else settings
    written: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **settings)
    return written


def _of_messages(messages: Sequence[Any], tokenizer: Any, tools: Any) -> Row:
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        raise ValueError(
            "Messages must hold an answer of the assistant. Found the roles "
            f"{', '.join(str(message['role']) for message in messages)}: {_LET_IT}."
        )
    text = _templated(tokenizer, messages, tools)
    spans = [_span(messages, place, text, tokenizer, tools) for place in places]
    if None in spans:
        messages = messages[: places[-1] + 1]
        text = _templated(tokenizer, messages, tools)
        spans = [_span(messages, places[-1], text, tokenizer, tools)]
    found = [span for span in spans if span is not None]
    if not found:
        raise ValueError(
            "The chat template does not write an answer after what it writes to ask for one "
            "(add_generation_prompt=True): nobody knows where it begins. Give `prompt` and `completion` as texts."
        )
    return _row(tokenizer, text, found, templated=True)._replace(last_only=len(found) < len(places))


def _span(messages: Sequence[Any], place: int, text: str, tokenizer: Any, tools: Any) -> tuple[int, int] | None:
    """First and last + 1 of an answer's characters; None if the template writes the text up to there in another way."""
    before = _templated(tokenizer, messages[:place], tools, add_generation_prompt=True) if place else ""
    after = _templated(tokenizer, messages[: place + 1], tools)
    if not (after.startswith(before) and text.startswith(after)) or len(after) == len(before):
        return None
    # A line break after the token that ends a turn: no model writes it
    return len(before), max(len(after.rstrip()), len(before) + 1)
