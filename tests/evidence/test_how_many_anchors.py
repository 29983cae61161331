"""The example that compares numbers of anchors, with one run of two steps."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("lerobot")

COMMON = Path(__file__).parents[1] / "common"


def test_a_run_and_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(str(COMMON))
    import how_many_anchors
    from warm import Python

    few = {"anchors-64": ("8 anchors", 8, {})}
    monkeypatch.setattr(how_many_anchors, "RUNS", few)
    monkeypatch.setattr(how_many_anchors, "HELD_OUT", (4, 8))
    command = tmp_path / "command.py"
    command.write_text("import runpy\nrunpy.run_module('small_pi0_fast', run_name='__main__')\n")
    # The commands are started as ever; what they import is imported once
    with Python("lerobot.scripts.lerobot_train", "craft_optim.lerobot", "craft_optim.cli") as warm:
        start = [sys.executable, *warm.runs, str(command)]
        monkeypatch.setattr(how_many_anchors, "craft_optim", lambda *given: [*start, *map(str, given)])
        how_many_anchors.main(["--steps=2", f"--out={tmp_path}"])
    (_, last) = how_many_anchors.rows_of(tmp_path / "anchors-64")
    printed = capsys.readouterr().out
    assert f"{last['drift_anchors']:.3f}" in printed
    assert f"{last['drift_heldout']:.3f}" in printed
    how_many_anchors.main(["--steps=2", f"--out={tmp_path}"])
    assert "anchors-64: done before" in capsys.readouterr().out
