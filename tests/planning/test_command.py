"""craft-optim plan, in this process; of a model of the user's and of one of transformers."""

import json
import sys
from pathlib import Path

import pytest

from craft_optim.cli import main

SCRIPT = """
import torch
from torch import nn
from craft_optim.anchors import Reading

def run(model, batch):
    return model(batch["x"])

def anchors():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 4)), torch.empty(5, 6)
    return model, [{"x": x}], {"reading": Reading(run, class_dim=-1), "model_id": "mine", "shard_size": 7}

def empty():
    return nn.Linear(2, 2), []

def wrong():
    return nn.Linear(2, 2)
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    Path(tmp_path / "mine.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return "mine.py"


def config(folder, kind="Llama", head="LlamaForCausalLM", **sizes):
    """A folder with the config of a small model of transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **sizes}
    getattr(transformers, f"{kind}Config")(architectures=[head], **sizes).save_pretrained(folder)
    return str(folder)


def test_of_a_function(script, capsys):
    assert main(["plan", f"--factory={script}:anchors", "--count=100", "--gpu", "8", "24.5", "--json=p.json"]) == 0
    said = capsys.readouterr().out
    for words in (
        "Batches of 5, 5 anchors per pass",
        "GPUs of 24.5 GiB",
        "100 anchors    3.2 kB",
        "they are computed as a whole",
        "No loss of the task was given",
    ):
        assert words in said, words
    about = json.loads(Path("p.json").read_text())
    assert about["trained"] == 6 * 16 + 16 + 16 * 4 + 4
    assert about["bytes_per_anchor"] == 6 * 4 + 4 * 2
    assert [fit["gib"] for fit in about["gpus"]["without checkpointing"]] == [8.0, 24.5]


def test_json_in_the_place_of_tables(script, capsys):
    assert main(["plan", f"--factory={script}:anchors", "--top-k=2", "--train=^1", "--optimizer=SGD", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["trained"] == 16 * 4 + 4
    assert about["optimizer_state"] < 100
    assert about["bytes_per_anchor"] == 6 * 4 + 2 * 6 + 2


def test_of_a_language_model(tmp_path, capsys):
    path = config(tmp_path, vocab_size=500)
    options = ["--batch-size=4", "--anchor-batch-size=2", "--length=64", "--top-k=8", "--json"]
    found = []
    for more in ([], ["--dtype=bfloat16"], ["--autocast=bfloat16"]):
        assert main(["plan", f"--config={path}", *options, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    whole, rounded, autocast = found
    assert whole["head_left_out"]
    assert whole["logits"] == 4 * 2 * 64 * 500
    assert whole["weights"] == pytest.approx(2 * rounded["weights"], rel=0.01)
    assert autocast["weights"] == whole["weights"]
    assert whole["cost"]["1"] == pytest.approx(1.5, rel=1e-4)
    assert whole["bytes_per_anchor"] == 64 * 8 + 64 * (8 * 6 + 2)
    passes = whole["passes"]
    assert passes["with checkpointing"]["task"]["flops"] > passes["without checkpointing"]["task"]["flops"]


@pytest.mark.parametrize(
    ("kind", "head", "sizes", "inputs"),
    [
        ("ViT", "ViTForImageClassification", {"image_size": 32, "patch_size": 8}, 3 * 32 * 32),
        ("Bert", "BertForSequenceClassification", {}, 16 * 8),
        ("Bert", "BertForMaskedLM", {"vocab_size": 100}, 16 * 8),
    ],
)
def test_of_other_models(tmp_path, capsys, kind, head, sizes, inputs):
    path = config(tmp_path, kind, head, **sizes)
    assert main(["plan", f"--config={path}/config.json", "--length=16", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    outputs = 2 * (16 * 100 if "Masked" in head else 2)
    assert about["bytes_per_anchor"] == inputs + outputs


def test_configs_that_are_not_known_say_what_to_do(tmp_path, capsys):
    assert main(["plan", f"--config={config(tmp_path / 'a', head='LlamaModel')}"]) == 1
    assert "Found LlamaModel: give a function" in capsys.readouterr().err
    assert main(["plan", f"--config={config(tmp_path / 'b', head='Nobody')}"]) == 1
    assert "must name a model of transformers" in capsys.readouterr().err
    path = config(tmp_path / "c", max_position_embeddings=32)
    assert main(["plan", f"--config={path}", "--length=64"]) == 1
    assert "--length must be <= 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ([], "Pass one of --policy.path, --config and --factory"),
        (["--config=x", "--factory={script}:anchors"], "exclude each other"),
        (["--factory={script}:anchors", "--length=3"], "--length goes with --config"),
        (["--factory={script}:anchors", "--batch-size=3"], "--batch-size goes with"),
        (["--factory={script}:empty"], "there is no batch"),
        (["--factory={script}:wrong"], "must return (model, batches)"),
        (["--factory={script}:none"], "there is no function 'none'"),
        (["--factory={script}:anchors", "--gpu", "0"], "must be a number > 0. Found '0'"),
        (["--factory={script}:anchors", "--valid=2"], "must be a share > 0 and <= 1. Found '2'"),
        (["--factory={script}:anchors", "--train=("], "must be a regular expression. Found '('"),
        (["--factory={script}:anchors", "--json=none/p.json"], "there is no folder none"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(script, capsys, arguments, remedy):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *(x.format(script=script) for x in arguments)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert remedy in said
    assert said.count("\n") == 1


def test_nothing_trains(script, capsys):
    assert main(["plan", f"--factory={script}:anchors", "--train=none"]) == 1
    assert "Nothing of Sequential trains" in capsys.readouterr().err
