"""Questions that a model writes itself."""

import copy
import logging
import re

import pytest
import torch

from craft_optim.anchors import AnchorCache
from craft_optim.anchors.processes import Team
from craft_optim.chat import chat_anchors
from craft_optim.chat.questions import is_loop, opening_and_end, self_questions, too_similar
from craft_optim.cli import main

TEXTS = [
    "what is this",  # the first three are dropped: it is said twice, has no end, and is a loop
    "what is this?",
    *("is ice hot? " * 9,),
    "is ice cold or is it hot",
    "a red drawer and a green button",
    "hm",
]


@pytest.fixture
def written(llama, tokenizer, monkeypatch):
    """The model writes the texts above, one after the other, and its calls are counted."""
    calls = []

    def generate(input_ids, attention_mask, **settings):
        calls.append(settings)
        ends = ["ASSISTANT: ", "ASSISTANT: ", "ASSISTANT: ", "ASSISTANT: more", "", "ASSISTANT: "]
        texts = [f"{text} {end}" for text, end in zip(TEXTS, ends, strict=True)][: len(input_ids)]
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        width = max(map(len, rows))
        new = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return torch.cat([input_ids[: len(rows)], new], 1)

    monkeypatch.setattr(llama, "generate", generate)
    return calls


def test_the_opening_is_the_template_up_to_the_users_turn(tokenizer):
    assert opening_and_end(tokenizer) == ("USER: ", "ASSISTANT:")
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        opening_and_end(bare)
    bare.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(ValueError, match="write a user's turn as it is"):
        opening_and_end(bare)


def test_loops_duplicates_and_what_has_no_end_are_dropped(llama, tokenizer, written, caplog):
    with caplog.at_level(logging.INFO, "craft_optim"):
        found = self_questions(llama, tokenizer, 2, batch_size=6)
    assert [record["messages"][0]["content"] for record in found] == ["what is this", "is ice cold or is it hot"]
    (said,) = [line for line in caplog.messages if "wrote" in line]
    assert said.startswith("The model wrote 2 of 2 questions; dropped: ")
    assert set(re.findall(r"1 ([\w -]+)", said)) == {"near-duplicates", "loops", "without an end", "too short"}
    assert len(written) == 1
    assert written[0]["top_k"] == 0


def test_it_gives_up_with_a_word(llama, tokenizer, written, caplog):
    assert len(self_questions(llama, tokenizer, 3, batch_size=6)) == 2
    assert "The model wrote 2 of 3 questions" in caplog.text
    assert len(written) == 4, "eight times as many"
    with pytest.raises(ValueError, match="wrote no usable question"):
        self_questions(copy.deepcopy(llama), silent(tokenizer), 1)


def silent(tokenizer):
    """With a template whose end no model here writes."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("ASSISTANT: ", "never written")
    return other


@pytest.mark.parametrize(
    ("text", "loops"), [("a b c d a b c d a b c d a b c d", True), ("a b c d e f g h", False), ("no no", False)]
)
def test_loops(text, loops):
    assert is_loop(text) == loops


def test_similar_texts():
    assert too_similar("What is the moon?", "what is The Moon")
    assert not too_similar("What is the moon?", "What is bread made of?")


def test_anchors_from_nothing_go_on_with_the_same_questions(llama, tokenizer, written, tmp_path, monkeypatch):
    generate = type(llama).generate
    fake = llama.generate

    def either(**given):  # the answers are the model's
        return generate(llama, **given) if given["input_ids"].shape[0] != 16 else fake(**given)

    monkeypatch.setattr(llama, "generate", lambda **given: either(**given))
    cache = chat_anchors(llama, tokenizer, "self", tmp_path, count=2, max_new_tokens=4, batch_size=2)
    assert len(cache) == 2
    assert cache.features.tokens == "sampled at temperature 1, at most 4"
    assert len(written) == 1
    again = chat_anchors(llama, tokenizer, "self", tmp_path, count=2, max_new_tokens=4, batch_size=2)
    assert len(written) == 1, "they are read again"
    assert again.fingerprint == cache.fingerprint
    assert AnchorCache.open(tmp_path).first_anchors == cache.first_anchors
    chat_anchors(llama, tokenizer, "self", tmp_path, count=2, max_new_tokens=4, batch_size=2, overwrite=True)
    assert len(written) == 2


def test_given_answers_and_no_number_are_refused(llama, tokenizer, tmp_path):
    for given, words in (({"answers": "given"}, "answers='given'"), ({"count": None}, "count=None")):
        with pytest.raises(ValueError, match=f"need answers of its own and a number. Found {words}"):
            chat_anchors(llama, tokenizer, "self", tmp_path / "a", **given)


def test_the_command_says_what_it_cannot_do(llama, tokenizer, tmp_path, capsys):
    for made in (llama, silent(tokenizer)):
        made.save_pretrained(tmp_path / "model")
    build = ["build-anchors", str(tmp_path / "a"), f"--model.path={tmp_path / 'model'}", "--data=self", "--count=1"]
    assert main(build) == 1
    assert "wrote no usable question" in capsys.readouterr().err


def test_of_several_processes_the_first_ones_questions_are_those_of_all(
    llama, tokenizer, written, tmp_path, monkeypatch
):
    import craft_optim.chat.anchors as chat

    firsts = [{"messages": [{"role": "user", "content": "is ice cold"}]}]

    class Second(Team):
        def gather(self, value):
            return [None if value is None else firsts, value]

    generate, fake = type(llama).generate, llama.generate
    monkeypatch.setattr(
        llama, "generate", lambda **given: (fake if len(given["input_ids"]) == 16 else generate.__get__(llama))(**given)
    )
    monkeypatch.setattr(chat, "find_team", lambda *_: Second(None, 1, 2))
    cache = chat_anchors(llama, tokenizer, "self", tmp_path, count=1, max_new_tokens=4)
    assert tokenizer.decode(cache.read([0]).inputs["input_ids"][0]).startswith("USER: is ice cold ASSISTANT: ")
    assert not (tmp_path / "questions.jsonl").exists(), "the first process writes them"
