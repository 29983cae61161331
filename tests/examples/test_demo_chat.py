"""`craft-optim demo chat`, and the same in TRL, on the small model."""

import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from craft_optim.cli import main
from craft_optim.demo import chat, small_chat


def find(monkeypatch, found):
    """Has the example find this, and nobody else: libraries ask what is there when they are imported."""
    util = SimpleNamespace(find_spec=lambda name: found)
    monkeypatch.setattr(small_chat, "importlib", SimpleNamespace(util=util))


@pytest.fixture(autouse=True)
def without_the_package(monkeypatch):
    """Whoever has the real model waits for minutes."""
    find(monkeypatch, None)


def check(adamw, craft):
    values = [value for o in (adamw, craft) for value in asdict(o).values() if isinstance(value, float)]
    assert all(map(math.isfinite, values))
    assert adamw.drift > 10 * craft.drift
    assert adamw.held_out > 5 * craft.held_out
    assert craft.drift < 2 * 0.05
    assert craft.answers[0] == "Paris"
    assert adamw.answers[0] != "Paris"
    assert craft.answers[2].startswith("{")
    assert max(adamw.new_loss, craft.new_loss) < 0.5, "both learn, and at a rate that suits AdamW"


def test_in_a_loop_of_ones_own_adamw_forgets_and_craft_does_not(tmp_path, capsys):
    before, adamw, craft = chat.main(tmp_path)
    check(adamw, craft)
    assert before.drift == pytest.approx(0.0, abs=1e-6)
    assert before.answers[0] == "Paris"
    assert before.new_loss > 5
    printed = capsys.readouterr().out
    assert all(o.name in printed and f"{o.drift:.4f}" in printed for o in (before, adamw, craft))


def test_the_command_is_that_with_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "chat", "--steps=3", "--epsilon=0.1"]) == 0
    said = capsys.readouterr().out
    assert "drift (epsilon 0.1)" in said
    assert "Page: craft-demo/report.html" in said
    assert "craft-optim inspect craft-demo/anchors" in said
    assert "chat" in (tmp_path / "craft-demo" / "report.html").read_text("utf-8")
    (tmp_path / "mine").mkdir()
    assert main(["demo", "chat", "--model.path=mine"]) == 1, "that one is taken, and not the small one"
    assert "mine" in capsys.readouterr().err


def test_in_trl_adamw_forgets_and_craft_does_not(capsys):
    pytest.importorskip("trl")
    import llm_sft_trl

    adamw, craft = llm_sft_trl.main([])
    check(adamw, craft)
    assert "CraftOptimizer(AdamW)" in capsys.readouterr().out


def test_chats_for_measuring_are_others(capsys):
    data = small_chat.chats()
    for one, other in ((data.old, data.held_out), (data.new, data.new_held_out)):
        assert len(one) == 3 * len(other)
        assert not [record for record in other if record in one]


def test_the_real_model_is_taken_where_its_package_is(monkeypatch):
    class Found:
        submodule_search_locations = ("folder",)

    class Model:
        def float(self):
            return self

    find(monkeypatch, Found)
    monkeypatch.setattr(small_chat, "load_language_model", lambda path: (Model(), path))
    model, tokenizer, *_ = small_chat.chat_model()
    assert isinstance(model, Model)
    assert tokenizer == "folder"
    assert small_chat.chat_model("mine")[1] == "mine"
