"""The LoRA example, shortened."""

import math
from dataclasses import asdict

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import llm_lora_trainer as example


def test_adamw_forgets_and_craft_does_not(capsys):
    before, adamw, craft = example.main(["--pretraining-steps=250", "--steps=100", "--anchors=128", "--epsilon=0.05"])
    values = [value for o in (before, adamw, craft) for value in asdict(o).values() if not isinstance(value, str)]
    assert all(map(math.isfinite, values))
    assert before.old_right > 0.5
    assert before.new_right < 0.1
    assert adamw.drift > 10 * craft.drift
    assert adamw.held_out > 5 * craft.held_out
    assert craft.drift < 3 * 0.05
    assert adamw.old_right < 0.5 * before.old_right
    assert craft.old_right > adamw.old_right
    assert craft.new_loss < before.new_loss / 2
    printed = capsys.readouterr().out
    assert all(o.name in printed and f"{o.drift:.4f}" in printed for o in (before, adamw, craft))
