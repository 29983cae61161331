"""The example that compares numbers of anchors, with one run of two steps."""

import pytest

pytest.importorskip("lerobot")


def test_a_run_and_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    import how_many_anchors

    few = {"anchors-64": ("8 anchors", 8, {})}
    monkeypatch.setattr(how_many_anchors, "RUNS", few)
    monkeypatch.setattr(how_many_anchors, "HELD_OUT", (4, 8))
    how_many_anchors.main(["--steps=2", f"--out={tmp_path}"])
    (_, last) = how_many_anchors.rows_of(tmp_path / "anchors-64")
    printed = capsys.readouterr().out
    assert f"{last['drift_anchors']:.3f}" in printed
    assert f"{last['drift_heldout']:.3f}" in printed
    how_many_anchors.main(["--steps=2", f"--out={tmp_path}"])
    assert "anchors-64: done before" in capsys.readouterr().out
