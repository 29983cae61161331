"""Which tokens of a record a model reads, and which of them count."""

import copy

import pytest

from craft_optim.chat.rows import Row, answered, batch_of, prompted

TURNS = [("user", "is ice hot?"), ("assistant", "no, it is cold"), ("user", "what is this"), ("assistant", "a button")]
CHAT = [{"role": role, "content": content} for role, content in TURNS]
# Earlier answers are written without their ends once others follow
FORGETFUL = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}"
    "{{ '<eos>' if m.role == 'assistant' and loop.last else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def counted(row, tokenizer):
    """The texts of the runs of tokens that count."""
    runs = [[]]
    for token, counts in zip(row.ids, row.counts, strict=True):
        if counts:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_of_a_chat_every_answer_counts_up_to_its_end(tokenizer):
    row = answered({"messages": CHAT}, tokenizer)
    assert tokenizer.decode(row.ids).startswith("USER: is ice hot?")
    assert counted(row, tokenizer) == [" no, it is cold<eos>", " a button<eos>"]
    assert not row.last_only


def test_what_follows_the_end_of_an_answer_does_not_count(tokenizer):
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = tokenizer.chat_template.replace("'<eos>'", "'<eos>\n\n'")
    row = answered({"messages": CHAT}, broken)
    assert counted(row, broken) == [" no, it is cold<eos>", " a button<eos>"]


def test_a_template_that_rewrites_earlier_answers_leaves_the_last_one(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = FORGETFUL
    row = answered({"messages": CHAT}, other)
    assert row.last_only
    assert counted(row, other) == [" a button<eos>"]
    assert answered({"messages": CHAT[:2]}, other).last_only is False


def test_a_template_that_hides_where_an_answer_begins_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = FORGETFUL.replace("%}assistant {%", "%}now: {%")
    with pytest.raises(ValueError, match="nobody knows where it begins"):
        answered({"messages": CHAT[:2]}, other)


def test_prompt_and_completion_as_texts_and_as_messages(tokenizer):
    row = answered({"prompt": "is ice hot?", "completion": " no"}, tokenizer)
    assert tokenizer.decode(row.ids) == "<bos>is ice hot? no<eos>"
    assert counted(row, tokenizer) == [" no<eos>"]
    assert answered({"prompt": CHAT[:3], "completion": CHAT[3:]}, tokenizer) == answered({"messages": CHAT}, tokenizer)
    ended = answered({"prompt": "is ice hot?", "completion": " no<eos>"}, tokenizer)
    assert ended == row, "its end is not written twice"


def test_of_a_text_all_but_the_first_token_counts(tokenizer):
    row = answered({"text": "a red drawer"}, tokenizer)
    assert row.counts == [False] + [True] * (len(row.ids) - 1)
    assert counted(row, tokenizer) == ["a red drawer"]


def test_everything_counts_if_asked_for(tokenizer):
    row = answered({"messages": CHAT}, tokenizer, "all")
    assert row.counts == [False] + [True] * (len(row.ids) - 1)


def test_prompts_end_where_the_model_is_to_go_on(tokenizer):
    asked = "USER: is ice hot? ASSISTANT: no, it is cold<eos>USER: what is this ASSISTANT: "
    assert tokenizer.decode(prompted({"messages": CHAT}, tokenizer)) == asked
    assert tokenizer.decode(prompted({"prompt": CHAT[:3], "completion": CHAT[3:]}, tokenizer)) == asked
    assert tokenizer.decode(prompted({"prompt": "is ice", "completion": "hot"}, tokenizer)) == "<bos>is ice"
    assert tokenizer.decode(prompted({"text": "is ice"}, tokenizer)) == "<bos>is ice"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": CHAT[:1]}, "Found the roles user"),
        ({"prompt": "is ice hot?"}, "let the model answer"),
    ],
)
def test_records_without_an_answer_are_refused(tokenizer, record, words):
    with pytest.raises(ValueError, match=words):
        answered(record, tokenizer)


def test_messages_need_a_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        answered({"messages": CHAT}, bare)
    with pytest.raises(ValueError, match="the assistant's alone"):
        prompted({"messages": CHAT[1:2]}, tokenizer)


def test_a_batch_is_padded_on_the_right_and_the_first_token_never_counts():
    batch = batch_of([Row([5, 6, 7], [True, False, True]), Row([8, 9], [False, True])], padding=4)
    assert {name: x.tolist() for name, x in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 4]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, -100, 7], [-100, 9, -100]],
    }
