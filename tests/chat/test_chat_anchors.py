"""Caches of chats: what is held, what is left out, and that retention holds it."""

import copy
import json

import pytest
import torch

from craft_optim import CraftOptimizer, calibrate
from craft_optim.anchors import AnchorCache, AnchorMismatchError
from craft_optim.chat import chat_anchors, load_language_model
from craft_optim.chat.rows import answered
from craft_optim.cli import main

WORDS = ["no", "no, it is cold", "blue", "a green button, or a red drawer", "a drawer"]
DATA = [
    {"messages": [{"role": "user", "content": "what is this"}, {"role": "assistant", "content": word}]}
    for word in WORDS
]


def test_given_answers_count_and_nothing_else(llama, tokenizer, tmp_path):
    cache = chat_anchors(llama, tokenizer, DATA, tmp_path / "a", batch_size=2, dtype=torch.float32)
    rows = sorted((answered(record, tokenizer) for record in DATA), key=lambda row: -len(row.ids))
    assert len(cache) == 5
    assert cache.positions == sum(sum(row.counts) for row in rows)
    assert f"5 anchors with {cache.positions} positions, full logits of" in cache.describe()
    for place, row in enumerate(rows):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            expected = llama(ids).logits[0, :-1].log_softmax(-1)[torch.tensor(row.counts[1:])]
        anchor = cache.read([place])
        assert anchor.inputs["input_ids"][0, : len(row.ids)].tolist() == row.ids
        torch.testing.assert_close(anchor.features["logprobs"], expected, atol=1e-5, rtol=1e-4)


def test_the_cache_alone_is_enough_to_hold_them(llama, tokenizer, tmp_path):
    chat_anchors(llama, tokenizer, DATA, tmp_path / "a")
    model = copy.deepcopy(llama)
    retention = AnchorCache.open(tmp_path / "a").retention(model, batch_size=4)
    assert retention.drift() == pytest.approx(0.0, abs=1e-5)
    optimizer = CraftOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), retention, epsilon=0.05)
    ids = torch.tensor([answered({"text": "is ice hot?"}, tokenizer).ids])
    for _ in range(10):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert 0.0 < retention.drift() < 0.2


@pytest.mark.parametrize("answers", ["given", "greedy"])
def test_drift_is_told_of_each_category_of_the_records(llama, tokenizer, tmp_path, answers):
    data = [record | {"category": "short" if len(WORDS[i]) < 5 else "long", "id": i} for i, record in enumerate(DATA)]
    data[1] = DATA[1]
    cache = chat_anchors(llama, tokenizer, data, tmp_path / "a", answers=answers, max_new_tokens=4, batch_size=2)
    rows = [tokenizer.decode(cache.read([place]).inputs["input_ids"][0]) for place in range(5)]
    assert sorted(cache.categories) == ["", "long", "long", "short", "short"]
    if answers == "given":  # the questions are alike
        for row, category in zip(rows, cache.categories, strict=True):
            assert ("drawer" in row) == (category == "long")
            assert ("cold" in row) == (category == "")


@pytest.mark.parametrize("answers", ["sampled", "greedy"])
def test_the_model_answers_with_seeds_of_its_own(llama, tokenizer, tmp_path, answers):
    held = []
    for name in ("a", "b"):
        torch.manual_seed(len(held))  # what the caller has drawn has no part in it
        cache = chat_anchors(llama, tokenizer, DATA, tmp_path / name, answers=answers, max_new_tokens=6, batch_size=2)
        held.append(cache.read(range(5)))
        assert 5 <= cache.positions <= 30
        assert cache.retention(copy.deepcopy(llama), batch_size=5).drift() == pytest.approx(0.0, abs=1e-4)
    assert torch.equal(held[0].inputs["input_ids"], held[1].inputs["input_ids"])
    written = {tuple(x[m].tolist()) for x, m in zip(held[0].inputs["input_ids"], held[0].features["mask"], strict=True)}
    assert len(written) == (5 if answers == "sampled" else 1), "each prompt is the same, and has an answer of its own"


def test_long_rows_are_cut_and_left_out_with_a_word(llama, tokenizer, tmp_path, caplog):
    length = len(answered(DATA[0], tokenizer).ids)
    cache = chat_anchors(llama, tokenizer, [*DATA, {"text": "a red drawer"}], tmp_path / "a", max_length=length)
    assert len(cache) == 6
    assert f"3 of 6 records are cut to {length} tokens." in caplog.messages
    caplog.clear()
    cache = chat_anchors(llama, tokenizer, [*DATA, {"text": "a red drawer"}], tmp_path / "b", max_length=length - 2)
    assert len(cache) == 1
    assert "5 of 6 records are left out, since nothing that counts is left of them." in caplog.messages
    with pytest.raises(ValueError, match="no record has anything that counts"):
        chat_anchors(llama, tokenizer, DATA, tmp_path / "c", max_length=3)
    with pytest.raises(ValueError, match=r"`max_length` - `max_new_tokens` = -28 tokens"):
        chat_anchors(llama, tokenizer, DATA, tmp_path / "c", answers="sampled", max_length=100)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"answers": "model"}, "`answers` must be one of 'given', 'sampled', 'greedy'. Found 'model'"),
        ({"counted": "user"}, "`counted` must be one of"),
        ({"counted": "all", "answers": "greedy"}, "goes with answers='given'"),
        ({"temperature": 0.0, "answers": "sampled"}, "`temperature` must be a finite number > 0"),
    ],
)
def test_wrong_arguments_are_refused(llama, tokenizer, tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        chat_anchors(llama, tokenizer, DATA, tmp_path / "a", **given)


def test_a_model_in_bfloat16_is_held_in_float32(llama, tokenizer, tmp_path):
    """As the page trains it: what the two precisions differ in is rounding, other weights are not."""
    with torch.no_grad():
        for p in llama.parameters():
            p.mul_(6.5)  # so that rounding is seen
    cache = chat_anchors(llama.bfloat16(), tokenizer, DATA, tmp_path / "a", dtype=torch.float32)
    assert cache.teacher_dtypes == [torch.bfloat16]
    retention = cache.retention(llama.float(), batch_size=5)
    assert retention.tolerance == 5e-3
    assert 1e-4 < retention().item() < 5e-3, "more than what float32 alone may differ by"
    with torch.no_grad():
        llama.lm_head.weight.mul_(1.2)
    with pytest.raises(AnchorMismatchError):
        cache.retention(llama, batch_size=5)()


def test_drift_can_be_calibrated_where_the_model_has_answered(llama, tokenizer, tmp_path):
    cache = chat_anchors(llama, tokenizer, DATA, tmp_path / "a", answers="greedy", max_new_tokens=4)
    assert cache.kinds == ("logits", "tokens")
    assert calibrate(llama, cache).unit == cache.retention(llama, "logits", 5).unit


@pytest.fixture
def saved(llama, tokenizer, tmp_path):
    """Folders of a model with its tokenizer, of the same after fine-tuning, and a file of chats."""
    for made in (llama, tokenizer):
        made.save_pretrained(tmp_path / "model")
    moved = copy.deepcopy(llama)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    for made in (moved, tokenizer):
        made.save_pretrained(tmp_path / "moved")
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in DATA), encoding="utf-8")
    return tmp_path


def test_on_the_command_line_to_a_verdict(saved, monkeypatch, capsys):
    monkeypatch.chdir(saved)
    assert main(["build-anchors", "a", "--model.path=model", "--data=chats.jsonl", "--batch-size=2"]) == 0
    out, err = capsys.readouterr()
    positions = AnchorCache.open("a").positions
    assert f"5, {positions} positions" in out
    assert "AnchorCache.open('a').retention(model)" in out
    assert "are free" in err
    assert main(["drift", "a", "--model.path", "model", "moved", "--epsilon=0.001", "--json"]) == 0
    same, moved = json.loads(capsys.readouterr().out)["checkpoints"]
    assert same["drift"]["logits"]["mean"] == pytest.approx(0.0, abs=1e-4)
    assert moved["drift"]["logits"]["mean"] > 0.001
    assert main(["inspect", "a", "--model.path=moved", "--html=page.html"]) == 0
    assert "a green button" in (saved / "page.html").read_text(encoding="utf-8")
    written = ["build-anchors", "b", "--model.path=model", "--data=chats.jsonl", "--answers=sampled"]
    assert main([*written, "--max-new-tokens=4", "--count=3", "--temperature=0.7"]) == 0
    assert len(AnchorCache.open("b")) == 3
    assert AnchorCache.open("b").features.tokens == "sampled at temperature 0.7, at most 4"
    capsys.readouterr()
    assert main(["drift", "b", "--model.path=moved", "--epsilon=0.001", "--json"]) == 0  # of what `retention` holds
    found = json.loads(capsys.readouterr().out)
    assert found["epsilon"] == {"logits": 0.001}
    assert found["checkpoints"][0]["drift"].keys() == {"logits", "tokens"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--model.path=model"], "pass --data"),
        (["--model.path=model", "--data=chats.jsonl", "--keep=logits"], "--keep does not go with --model.path"),
        (["--model.path=model", "--data=chats.jsonl", "--temperature=2"], "--temperature needs --answers=sampled"),
        (["--model.path=model", "--policy.path=p"], "exclude each other"),
        (["--data=chats.jsonl"], "--data goes with --model.path"),
    ],
)
def test_options_that_do_not_go_together(saved, monkeypatch, capsys, given, words):
    monkeypatch.chdir(saved)
    with pytest.raises(SystemExit):
        main(["build-anchors", "a", *given])
    assert words in capsys.readouterr().err


def test_what_is_wrong_with_the_data_is_found_before_the_model_is_read(saved, monkeypatch, capsys):
    monkeypatch.chdir(saved)
    (saved / "wrong.jsonl").write_text('{"question": "a"}\n')
    assert main(["build-anchors", "a", "--model.path=nowhere", "--data=wrong.jsonl"]) == 1
    assert "Found question" in capsys.readouterr().err


def test_adapters_are_loaded_with_their_model(saved, llama, tokenizer):
    peft = pytest.importorskip("peft")
    model, _ = load_language_model(str(saved / "model"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(saved / "adapters")
    found, read = load_language_model(str(saved / "adapters"))
    ids = torch.tensor([answered(DATA[0], tokenizer).ids])
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, adapted(ids).logits)
    assert read.chat_template == tokenizer.chat_template


def test_a_checkpoint_that_lacks_weights_is_refused(saved):
    from safetensors.torch import load_file, save_file

    file = saved / "model" / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors of LlamaForCausalLM, such as 'model\.norm\.weight'"):
        load_language_model(str(saved / "model"))
