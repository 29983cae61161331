"""Scorers for models of transformers: language models, and vision-language models with their processors."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from craft_optim.anchors.names import unwrapped
from craft_optim.anchors.passes import device_of, is_encoder_decoder, steady
from craft_optim.evaluation.answer_tokens import answer_tokens, log_likelihoods
from craft_optim.evaluation.mcq import ChoiceScore
from craft_optim.evaluation.questions import Question, open_picture
from craft_optim.evaluation.templates import ANSWER_EN, CHAT, QUESTION_ANSWER, Template, parse_template

__all__ = ["LanguageModelScorer", "VisionLanguageScorer"]

_MARK = "\ue000"  # a private-use character of Unicode: no question or chat template has it


class _Encoded(NamedTuple):
    """Some choices of a question, each after the prompt, as inputs of the model.

    Attributes:
        ends: End of each token in its text, `[B, T]`, for `answer_tokens`.
        heads: Beginning of each choice in its text.
        lasts: End of each choice in its text.
    """

    inputs: Mapping[str, Tensor]
    ends: Tensor
    heads: list[int]
    lasts: list[int]

    def valid(self, x: Tensor) -> list[list[int]]:
        """The entries of each row `[B, T]` that are not padding."""
        return [row[there].tolist() for row, there in zip(x, self.inputs["attention_mask"].bool(), strict=True)]


class _TransformersScorer(ABC):
    """A decoder of transformers as a scorer; subclasses define how it reads a question.

    Dropout is off while it scores; the model's flags are restored afterwards.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be >= 1. Found batch_size={batch_size}.")
        if is_encoder_decoder(model):
            raise ValueError(f"`model` must be a decoder. Found {type(model).__name__}: it has an encoder, too.")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"The tokenizer must say which characters a token stands for. Found {type(tokenizer).__name__}, which "
                "does not: load it with AutoTokenizer, use_fast=True."
            )
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._config = getattr(unwrapped(model), "config", None)
        self._accepted = inspect.signature(unwrapped(model).forward).parameters

    def __call__(self, question: Question) -> list[ChoiceScore]:
        """Scores the choices, at most one batch of them per forward."""
        size, choices = self._batch_size, question.choices
        batches = [self._encode(question, choices[at : at + size]) for at in range(0, len(choices), size)]
        rows = [row for batch in batches for row in batch.valid(batch.inputs["input_ids"])]
        ends = [row for batch in batches for row in batch.valid(batch.ends)]
        heads = [head for batch in batches for head in batch.heads]
        lasts = [last for batch in batches for last in batch.lasts]
        if len(set(heads)) > 1:
            raise ValueError("The tokenizer leaves characters of some choices out: it does not know them.")
        start, stops = answer_tokens(rows, ends, heads, lasts)
        self._check_length(max(map(len, rows)))
        scores: list[ChoiceScore] = []
        for batch in batches:
            lengths = [stop - start for stop in stops[len(scores) :][: len(batch.heads)]]
            scores += self._score(batch.inputs, start, lengths)
        return scores

    @abstractmethod
    def _encode(self, question: Question, choices: Sequence[str]) -> _Encoded: ...

    @torch.no_grad()
    def _score(self, inputs: Mapping[str, Tensor], start: int, lengths: list[int]) -> list[ChoiceScore]:
        ids, device = inputs["input_ids"], device_of(self._model)
        keep = ids.shape[1] - start + 1  # the choices and the position before them, without the prompt's logits
        settings = {"use_cache": False, "logits_to_keep": keep}
        dtype = getattr(unwrapped(self._model), "dtype", None)  # of pictures, too: not all models cast them
        passed = {
            name: x.to(device=device, dtype=dtype if x.is_floating_point() else None)
            for name, x in inputs.items()
            if name in self._accepted and name != "labels"
        }
        with steady(self._model):
            logits = self._model(**passed, **{k: x for k, x in settings.items() if k in self._accepted}).logits
        return log_likelihoods(logits[:, -keep:-1], ids[:, start:], lengths)

    def _check_length(self, length: int) -> None:
        text_config = getattr(self._config, "get_text_config", lambda: self._config)()
        limit = getattr(text_config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(f"The question has {length} tokens, of which the model takes {limit}.")

    def _adds_specials(self, head: str) -> bool:
        """True if the tokenizer must add its BOS: chat templates write it themselves."""
        bos = self._tokenizer.bos_token
        return not (bos and head.startswith(bos))


class LanguageModelScorer(_TransformersScorer):
    """Scores the choices of questions without pictures by a causal language model, `batch_size` in one forward.

    Args:
        template: Text for `parse_template`, or "chat" for the tokenizer's chat template.

    Raises:
        ValueError: The model is of another kind, its tokenizer is not a fast one, or the template is unusable.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, template: str = QUESTION_ANSWER, batch_size: int = 16
    ) -> None:
        super().__init__(model, tokenizer, batch_size)
        self._template = _parsed(template, tokenizer)

    def _encode(self, question: Question, choices: Sequence[str]) -> _Encoded:
        if question.image is not None:
            raise ValueError(f"{type(self._model).__name__} reads text only. Found a picture, {question.image}.")
        named = self._template
        head = _chat_head(self._tokenizer, question.text, _MARK) if named is None else named.head(question.text)
        found = self._tokenizer(
            [head + choice for choice in choices],
            add_special_tokens=self._adds_specials(head),
            return_offsets_mapping=True,
        )
        # Padded here: some tokenizers have no padding token, and padding is never seen.
        ids = [torch.tensor(row) for row in found["input_ids"]]
        ends = [torch.tensor([end for _, end in row]) for row in found["offset_mapping"]]
        return _Encoded(
            {
                "input_ids": pad_sequence(ids, batch_first=True),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            },
            pad_sequence(ends, batch_first=True),
            [len(head)] * len(choices),
            [len(head + choice) for choice in choices],
        )


class VisionLanguageScorer(_TransformersScorer):
    """Scores the choices of questions about pictures, or none, by a vision-language model, `batch_size` in one forward.

    The processor scales pictures for the model, and makes room for them in the text. PaliGemma's attention is
    bidirectional in the prompt and causal in the choice, as in its training.

    Args:
        template: Text for `parse_template`, or "chat" for the processor's chat template. None: "chat" if there is a
            chat template; else "answer en {question}" for PaliGemma, and "Question: {question}\\nAnswer:" for others.
            The processor's image token is put in front if a template lacks it.

    Raises:
        ValueError: The model is of another kind, its tokenizer is not a fast one, or the template is unusable.
    """

    def __init__(self, model: nn.Module, processor: Any, *, template: str | None = None, batch_size: int = 16) -> None:
        tokenizer = getattr(processor, "tokenizer", None)
        # Without a padding token rows cannot share a forward.
        super().__init__(model, tokenizer, batch_size if getattr(tokenizer, "pad_token", None) is not None else 1)
        self._processor = processor
        self._is_paligemma = getattr(self._config, "model_type", None) == "paligemma"
        if template is None:
            template = CHAT if processor.chat_template else ANSWER_EN if self._is_paligemma else QUESTION_ANSWER
        self._template = _parsed(template, processor)
        if self._is_paligemma and (self._template is None or not self._template.after.endswith("\n")):
            raise ValueError(f"`template` of PaliGemma must have a new line before {{choice}}. Found {template!r}.")

    def _encode(self, question: Question, choices: Sequence[str]) -> _Encoded:
        head = self._head(question)
        pictures = None if question.image is None else [[open_picture(question.image)] for _ in choices]
        settings = {
            "padding": len(choices) > 1,
            "padding_side": "right",
            "return_offsets_mapping": True,
            "return_tensors": "pt",
        }
        if self._is_paligemma:
            if pictures is None:
                raise ValueError("PaliGemma needs a picture. Found a question without one.")
            # The processor ends the prompt with a new line, and marks the text after it as the choice.
            texts = [head.removesuffix("\n")] * len(choices)
            found = self._processor(text=texts, images=pictures, suffix=list(choices), **settings)
            ends = found["offset_mapping"][..., 1] * found["token_type_ids"]
            return _Encoded(found, ends, [0] * len(choices), [len(choice) for choice in choices])
        texts = [head + choice for choice in choices]
        if not self._adds_specials(head):
            settings["add_special_tokens"] = False
        found = self._processor(text=texts, images=pictures, **settings)
        if "offset_mapping" not in found:
            raise ValueError(
                f"The processor must say which characters a token stands for. Found {type(self._processor).__name__}, "
                "which does not: write a scorer of your own for it."
            )
        ends = found["offset_mapping"][..., 1]
        # The processor has made room for the picture in the text, somewhere before the choice.
        lasts = [int(own.max()) for own in ends]
        heads = [last - len(choice) for last, choice in zip(lasts, choices, strict=True)]
        return _Encoded(found, ends, heads, lasts)

    def _head(self, question: Question) -> str:
        if self._template is None:
            content: list[dict[str, str]] = [{"type": "text", "text": question.text}]
            if question.image is not None:
                content.insert(0, {"type": "image"})
            return _chat_head(self._processor, content, [{"type": "text", "text": _MARK}])
        head, token = self._template.head(question.text), getattr(self._processor, "image_token", None)
        return head if question.image is None or token is None or token in head else f"{token}{head}"


def _parsed(template: str, renderer: Any) -> Template | None:
    """The parsed template; None for the chat template, which the tokenizer or processor must have."""
    if template != CHAT:
        return parse_template(template)
    if not renderer.chat_template:
        raise ValueError(f"template={CHAT!r} needs a chat template. Found none in {type(renderer).__name__}.")
    return None


def _chat_head(renderer: Any, question: Any, mark: Any) -> str:
    """Text before the answer in a chat with this question."""
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": mark}]
    before, found, _ = renderer.apply_chat_template(chat, tokenize=False).partition(_MARK)
    if not found:
        raise ValueError("The chat template leaves the assistant's words out: pass a template of your own.")
    return str(before)
