"""What the likeliest classes leave out of a drift: the table of the page, and a run of a tiny model."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import top_k
from _paths import RESULTS, ROOT
from top_k import KS, main, markdown


def test_the_page_has_the_results():
    result = json.loads((RESULTS / "top_k.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert markdown(result) in text, markdown(result)
    assert f"{result['positions']:,} positions" in text
    assert [row["k"] for row in result["rows"]] == list(KS)


def test_a_tiny_one(tmp_path, capsys, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", *(f"w{i}" for i in range(70)), "What", "is", "the", "a"])}
    made = Tokenizer(models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    small = ["--questions=3", "--tokens=5", "--length=16", "--rows=2", "--lr=0.01", "--looks", "1", "3"]
    monkeypatch.setattr(top_k, "KS", (8, 64, 1024))
    result = main([str(tmp_path), *small, f"--results={tmp_path}"])
    assert markdown(result) in capsys.readouterr().out
    assert json.loads((tmp_path / "top_k.json").read_text(encoding="utf-8")) == result
    assert result["classes"] == len(words)
    assert 0.0 < result["drifts"][0] < result["drifts"][1]
    eight, sixty = result["rows"]  # of 1,024 there are not as many classes
    assert 0.0 < eight["mass"] < sixty["mass"] < 1.0
    for row in (eight, sixty):
        assert all(0.0 < share < 1.0 for share in row["lost"])
    assert max(sixty["lost"]) < min(eight["lost"])
