"""craft-optim inspect: its JSON, and words by the tokenizer that a teacher's folder names."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from craft_optim import anchors
from craft_optim.cli import main

pytest.importorskip("PIL.Image", reason="pip install 'craft-optim[report]'")

SCRIPT = """
import torch
from torch import nn
def model(scale):
    made = nn.Linear(6, 3)
    with torch.no_grad():
        made.weight.copy_(scale * torch.arange(18.0).reshape(3, 6) / 18)
        made.bias.zero_()
    return made
def same():
    return model(1.0), []
def moved():
    return model(1.5), []
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the cache `a` of ten anchors, and its model in a script."""
    monkeypatch.chdir(tmp_path)
    Path("made.py").write_text(SCRIPT)
    space = {}
    exec(SCRIPT, space)
    x = torch.linspace(-1, 1, 60).reshape(10, 6)
    anchors.build(space["model"](1.0), [x[:4], x[4:]], "a", class_dim=-1, dtype=torch.float32, model_id="mine")
    return tmp_path


def test_json_in_the_place_of_the_tables(here, capsys):
    assert main(["inspect", "a", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cache"], found["anchors"], found["verified"]) == ("a", 10, False)
    assert found["facts"]["Teacher"] == "mine · Linear"
    tensors = {row.pop("name"): row for row in found["tensors"]}
    assert tensors["features.logprobs"] == {"shape": "3", "dtype": "float32"}
    assert tensors["inputs.0"] == {"shape": "6", "dtype": "float32"}
    assert (found["drift"], found["page"], found["kept"]) == (None, None, {})


def test_json_has_the_drift_of_each_anchor(here, capsys):
    options = ["--factory=made.py:moved", "--count=3", "--verify", "--html=page.html", "--json"]
    assert main(["inspect", "a", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verified"], found["page"]) == (True, "page.html")
    assert Path("page.html").is_file()
    drift = found["drift"]
    assert drift["places"] == [*range(10)], "--count is about the page"
    assert not drift["fits"]
    assert "has drifted from the cache" in drift["words"]
    x = torch.linspace(-1, 1, 60).reshape(10, 6) @ torch.arange(18.0).reshape(3, 6).T / 18
    old, new = x.log_softmax(-1), (1.5 * x).log_softmax(-1)
    each = (old.exp() * (old - new)).sum(-1)
    (logits,) = drift["measured"]
    assert (logits["kind"], logits["unit"]) == ("logits", "nats per position (KL)")
    assert logits["each"] == pytest.approx(each.tolist(), rel=1e-3)
    assert logits["value"] == pytest.approx(float(each.mean()), rel=1e-3)
    page = Path("page.html").read_text()
    worst = [f"Anchor {place}" for place in each.argsort(descending=True)[:3].tolist()]
    assert re.findall(r"<h3>(.*?)</h3>", page) == worst
    assert "3 of all 10; the largest drift first." in page


def test_json_to_a_file_and_the_tables(here, capsys):
    assert main(["inspect", "a", "--factory=made.py:same", "--json=all.json"]) == 0
    assert json.loads(Path("all.json").read_text())["drift"]["fits"]
    said = capsys.readouterr().out
    assert "mine · Linear" in said
    assert "The cache fits this model" in said
    with pytest.raises(SystemExit):
        main(["inspect", "a", "--json=no/where.json"])
    assert "--json=no/where.json cannot be written" in capsys.readouterr().err


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(400, 8), nn.Linear(8, 400)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


@pytest.mark.parametrize("files", ["own", "config", "preprocessor", "none"])
def test_the_page_shows_words_by_the_tokenizer_of_the_teachers_folder(tmp_path, monkeypatch, files):
    """A language model's folder has one; a policy's names one, by a path that is relative to the folder."""
    pytest.importorskip("transformers", reason="pip install 'craft-optim[transformers]'")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "evaluation"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "common"))
    toys = pytest.importorskip("toys")
    monkeypatch.chdir(tmp_path)
    teacher = tmp_path / "teacher"
    made = toys.tokenizer(bos=False)
    made.save_pretrained(teacher if files == "own" else teacher / "tokenizers" / "text")
    if files == "config":
        (teacher / "config.json").write_text(json.dumps({"text_tokenizer_name": "tokenizers/text"}))
    if files == "preprocessor":
        steps = [{"registry_name": "other"}, {"config": {"tokenizer_name": "tokenizers/text"}}]
        (teacher / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    ids = torch.tensor([made("is ice hot?")["input_ids"]])
    anchors.build(Reader(), [{"input_ids": ids}], "a", model_id="teacher", class_dim=-1)
    assert main(["inspect", "a", "--html=page.html"]) == 0
    text = Path("page.html").read_text()
    (shown,) = re.findall(r'<dt title="input_ids">prompt</dt><dd class="[^"]*">([^<]*)</dd>', text)
    assert shown == (" ".join(map(str, ids[0].tolist())) if files == "none" else "is ice hot?")
    assert ("the teacher&#x27;s tokenizer is not here" in text) == (files == "none")
