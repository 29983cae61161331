"""The sweep over epsilons, with runs of two steps in this process instead of 800 in others."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lerobot", reason="pip install --group example, Python >= 3.12")

import pi0_fast_craft
import sweep_epsilon


def test_points_and_their_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    short = ["--steps=2", "--dataset.episodes=5", "--batch-size=4", "--anchor-batch-size=4", "--rollouts=0"]
    ran = []

    def run(command, **settings):
        assert command[1].endswith("pi0_fast_craft.py")
        ran.append(command[2:])
        pi0_fast_craft.main([*command[2:], *short])
        file = Path(command[command.index("--out") + 1]) / "outcomes.json"
        (found,) = json.loads(file.read_text())
        file.write_text(json.dumps([found | {"old_success": [True, False], "new_success": [True]}]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sweep_epsilon.subprocess, "run", run)
    flags = ["--epsilons", "0.03", "--seeds=1", "--jobs=1", f"--work={tmp_path / 'work'}", f"--results={tmp_path}"]
    sweep_epsilon.main(flags)
    found = json.loads((tmp_path / "sweep-logits.json").read_text())
    ((craft,), adamw) = found["craft"], found["adamw"]
    assert (craft["epsilon"], craft["old_success"], adamw["new_success"]) == (0.03, 0.5, 1.0)
    assert craft["drift_anchor"] != adamw["drift_anchor"] > 1e-5
    assert (tmp_path / "sweep-logits.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert f"{craft['drift_heldout']:.4f}" in printed
    sweep_epsilon.main(flags)
    assert len(ran) == 2, "points that are there are not run again"
