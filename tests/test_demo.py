"""`craft-optim demo`: the run on digits, and what it refuses."""

import pytest
import torch

from craft_optim.anchors import AnchorCache
from craft_optim.cli import main
from craft_optim.demo import vision


def test_digits_are_all_there():
    pictures, labels = vision.digits()
    assert pictures.shape == (1797, 1, 8, 8)
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (pictures.min(), pictures.max()) == (0.0, 1.0)
    assert torch.equal(pictures * 16, (pictures * 16).round())


def test_the_base_forgets_and_the_wrapped_one_does_not(tmp_path):
    before, base, wrapped = vision.main(tmp_path)
    assert before.old > 0.95
    assert before.new == 0.0
    assert base.old < 0.2
    assert min(base.new, wrapped.new) > 0.85
    assert wrapped.old > before.old - 0.05
    assert wrapped.drift < 2 * 0.05 < base.drift
    assert len(AnchorCache.open(tmp_path / "anchors")) == vision.ANCHORS


def test_the_command_ends_with_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "vision", "--steps=5", "--epsilon=0.02", "--out=here/there"]) == 0
    said = capsys.readouterr().out
    assert "drift (epsilon 0.02)" in said
    assert "Page: here/there/report.html" in said
    assert "demo vision" in (tmp_path / "here/there/report.html").read_text("utf-8")
    assert main(["demo", "vision", "--steps=5", "--out=here/there"]) == 0, "once more, over what is there"
    assert main(["inspect", "here/there/anchors"]) == 0


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["vision", "--model.path=x"], "--model.path goes with demo chat"),
        (["robot"], "in a clone `make demo`"),
        (["vision", "--epsilon=0"], "must be a number > 0"),
        (["text"], "vision"),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, arguments, remedy):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    assert stopped.value.code == 2
    assert remedy in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_robot_runs_the_repositorys_example(tmp_path, monkeypatch):
    (tmp_path / "examples").mkdir()
    script = "import pathlib, sys; pathlib.Path('given').write_text(' '.join(sys.argv[1:])); sys.exit(3)"
    (tmp_path / "examples" / "pi0_fast_craft.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "robot", "--steps=7"])
    assert stopped.value.code == 3
    assert (tmp_path / "given").read_text() == "--out=craft-demo --steps=7"
