"""`chat_anchors`: a cache of anchors from chats, prompts or texts."""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from craft_optim._numbers import number, whole
from craft_optim._paths import local
from craft_optim.anchors.build import build
from craft_optim.anchors.cache import AnchorCache
from craft_optim.anchors.folders import write_aside
from craft_optim.anchors.generation import greedy, sampled
from craft_optim.anchors.processes import Team, find_team
from craft_optim.anchors.reading import Reading
from craft_optim.chat.questions import self_questions
from craft_optim.chat.records import read_records
from craft_optim.chat.rows import Counted, Row, answered, batch_of, category_of, prompted

__all__ = ["Answers", "chat_anchors"]

Answers = Literal["given", "sampled", "greedy"]
QUESTIONS = "questions.jsonl"

T = TypeVar("T")

_log = logging.getLogger("craft_optim")


def chat_anchors(
    model: nn.Module,
    tokenizer: Any,
    data: str | Path | Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    answers: Answers | None = None,
    counted: Counted = "assistant",
    count: int | None = 512,
    max_length: int = 1024,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
    **settings: Any,
) -> AnchorCache:
    """Builds a cache of a language model's anchors: its distributions, before fine-tuning, at the tokens that count.

        cache = chat_anchors(model, tokenizer, "old_chats.jsonl", "anchors/")
        retention = cache.retention(model)

    A *position* here is a token of an anchor whose distribution is compared: L_ret, and so epsilon, is the mean over
    positions in nats. By default these are the tokens of answers. System prompts and templates are the same in every
    anchor and hardly move: if they counted, they would be most of the mean.

    Rows of about the same length share a batch. Rows longer than `max_length` are cut, or left out if no counted token
    remains; a log line says how many. Too long prompts for the model to answer are left out, not cut.

    Args:
        model: A causal language model of transformers, before it is fine-tuned; with adapters or without.
        tokenizer: The model's tokenizer, with its chat template.
        data: Records or their source, see `read_records`. "self": the model also writes the questions, see
            `self_questions`; they are kept as `questions.jsonl` in the cache's folder, and read from there next time.
        path: The cache's folder. A finished cache with the same settings is opened, a half-built one is continued; see
            `anchors.build`.
        answers: Source of the answers. "given": the records, the default if they have any. "sampled" or "greedy": the
            model answers each prompt, with at most `max_new_tokens`, sampled at `temperature` with its own seed for
            each, or the likeliest. On one machine they are the same each time.
        counted: "assistant", the tokens of answers, or "all" tokens. For given answers only.
        count: Largest number of records, evenly spaced. None: all.
        max_length: Largest number of tokens of a row, prompt and answer.
        max_new_tokens: Largest number of tokens of an answer that the model writes.
        temperature: Temperature of "sampled".
        batch_size: Rows per forward of the teacher.
        autocast: Dtype of autocast, as in `Reading`.
        settings: Further arguments of `anchors.build`, such as `top_k`, `dtype` and `overwrite`.

    Returns:
        The cache; `len(cache)` anchors with `cache.positions` positions.

    Raises:
        ImportError: datasets is not installed, and a file is to be read.
        ValueError: A record or an argument is invalid, or no row is left.
        AnchorCacheError: As for `anchors.build`.
    """
    if answers is None:
        answers = "sampled" if data == "self" else "given"
    if answers not in get_args(Answers):
        raise ValueError(f"`answers` must be one of {', '.join(map(repr, get_args(Answers)))}. Found {answers!r}.")
    if counted not in get_args(Counted):
        raise ValueError(f"`counted` must be one of {', '.join(map(repr, get_args(Counted)))}. Found {counted!r}.")
    if answers != "given" and counted != "assistant":
        raise ValueError(f"counted={counted!r} goes with answers='given': what the model writes is what counts.")
    if data == "self" and (answers == "given" or count is None):
        found = "answers='given'" if answers == "given" else "count=None"
        raise ValueError(f"Questions that the model writes need answers of its own and a number. Found {found}.")
    max_length, batch_size = whole("max_length", max_length), whole("batch_size", batch_size)
    if data == "self":
        team, anew = find_team(model, settings.get("process_group")), settings.get("overwrite", False)
        records = _own_questions(model, tokenizer, local(path) / QUESTIONS, whole("count", count), team, anew=anew)
    else:
        records = read_records(data, count)
    if answers == "given":
        rows = _fitting(_each(records, lambda record: answered(record, tokenizer, counted)), max_length)
        reading = Reading(mask="labels", output="classes", class_dim=-1)
    else:
        new, heat = whole("max_new_tokens", max_new_tokens), number("temperature", temperature, least=0.0, above=True)
        rows = _open_ended(records, tokenizer, max_length - new)
        writes = greedy(new) if answers == "greedy" else sampled(new, heat)
        reading = Reading(tokens=writes, output="classes", class_dim=-1)
    batches = _Batches(rows, batch_size, _padding(tokenizer), labelled=answers == "given")
    own = {"model_id": getattr(getattr(model, "config", None), "name_or_path", None) or None}
    return build(model, batches, path, replace(reading, autocast=autocast), **{**own, **settings})


def _own_questions(
    model: nn.Module, tokenizer: Any, file: Path, count: int, team: Team, *, anew: bool
) -> list[dict[str, Any]]:
    """The model's questions, written once: a build that continues after an interruption needs the same ones.

    Several processes all run the model, and all take the first one's questions.
    """
    there = None
    if file.is_file() and not anew:
        lines = file.read_text(encoding="utf-8").splitlines()
        there = [json.loads(line) for line in lines] if len(lines) <= count else None
    if (records := team.gather(there)[0]) is None:
        records = team.gather(self_questions(model, tokenizer, count))[0]
        if team.rank == 0 and team.writes:
            file.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(f"{json.dumps(record)}\n" for record in records)
            write_aside(file, lambda aside: aside.write_text(text, encoding="utf-8"))
    found: list[dict[str, Any]] = records
    return found


def _each(records: Sequence[Mapping[str, Any]], function: Callable[[Mapping[str, Any]], T]) -> list[T]:
    """The function of each record; errors have its number."""
    found = []
    for place, record in enumerate(records):
        try:
            found.append(function(record))
        except ValueError as error:
            raise ValueError(f"Record {place} of {len(records)}: {error}") from error
    return found


def _fitting(rows: Sequence[Row], most: int) -> list[Row]:
    """The rows cut to a length, those with counted tokens only."""
    cut = [row._replace(ids=row.ids[:most], counts=row.counts[:most]) for row in rows]
    kept = [row for row in cut if any(row.counts[1:])]
    said = Counter(
        {
            f"are cut to {most} tokens": sum(len(row.ids) > most for row in rows),
            "are left out, since nothing that counts is left of them": len(rows) - len(kept),
            "have several answers of which the last alone counts, as the chat template rewrites earlier ones": sum(
                row.last_only for row in kept
            ),
        }
    )
    _say(said, len(rows))
    _require(kept, f"`max_length` is {most}, and no record has anything that counts within it: take a larger one.")
    return kept


def _open_ended(records: Sequence[Mapping[str, Any]], tokenizer: Any, most: int) -> list[Row]:
    """The prompts that leave room for an answer; none of their tokens count."""
    prompts = _each(records, lambda record: (prompted(record, tokenizer), category_of(record)))
    kept = [Row(ids, [False] * len(ids), category=category) for ids, category in prompts if 0 < len(ids) <= most]
    _say(Counter({f"are left out: their prompt is longer than {most} tokens": len(prompts) - len(kept)}), len(prompts))
    _require(kept, f"No prompt fits: they may have `max_length` - `max_new_tokens` = {most} tokens. Take a larger one.")
    return kept


def _say(found: Mapping[str, int], total: int) -> None:
    for words, number_of in found.items():
        if number_of:
            _log.warning("%d of %d records %s.", number_of, total, words)


def _require(rows: Sequence[Row], otherwise: str) -> None:
    if not rows:
        raise ValueError(otherwise)


def _padding(tokenizer: Any) -> int:
    """A padding token, whichever: nothing attends to it, and it does not count."""
    return next((x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)


class _Batches:
    """Batches of rows of about the same length, the longest first: too little memory shows at once."""

    def __init__(self, rows: Sequence[Row], size: int, padding: int, *, labelled: bool) -> None:
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
        self._rows, self._size, self._padding, self._labelled = [rows[i] for i in order], size, padding, labelled
        self._told_apart = any(row.category for row in rows)

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self._size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for at in range(0, len(self._rows), self._size):
            some = self._rows[at : at + self._size]
            batch: dict[str, Any] = batch_of(some, self._padding)
            if not self._labelled:
                del batch["labels"]
            if self._told_apart:
                batch["category"] = [row.category for row in some]
            yield batch
