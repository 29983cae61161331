"""The two commands of the README that show anchors, on what the repository ships."""

import sys
from pathlib import Path

import pytest

from craft_optim import cli

pytest.importorskip("lerobot")
FACTORY = f"--factory={Path(__file__).parents[2] / 'examples' / 'pi0_fast_anchors.py'}:drawer"


def test_build_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # a factory's folder is put on it
    assert cli.main(["build-anchors", str(tmp_path / "anchors"), FACTORY]) == 0
    assert "full logits of" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert cli.main(["inspect", str(tmp_path / "anchors"), FACTORY, f"--html={page}", "--count=4", "--verify"]) == 0
    said = capsys.readouterr().out
    assert "fits this model" in said
    assert "Checksums: all" in said
    assert page.read_text().count("<img") == 4
