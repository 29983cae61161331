"""What others ask of a closure they ask by its public names."""

import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def test_closures_are_asked_and_not_opened(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    import house

    assert house.opened_closures() == []
    monkeypatch.setattr(house, "ROOT", tmp_path)
    monkeypatch.setattr(house, "PACKAGE", tmp_path)
    (tmp_path / "other.py").write_text("x = retention._sampler.rank + self.retention.batch_size\n")
    assert house.opened_closures() == ["other.py:1: retention._sampler"]
