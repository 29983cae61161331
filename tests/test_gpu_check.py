"""The check of a GPU runs on a CPU in small, so that it works on the day that there is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import gpu_check  # noqa: E402


def test_it_runs_in_small(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lerobot")
    asked = []
    monkeypatch.setattr(gpu_check, "tested", lambda given, seconds: asked.append(given) or "3 passed")
    report = gpu_check.main(["--mini", f"--json={tmp_path / 'found.json'}"])
    assert [given[0] for given in asked] == ["tests/kernels", "benchmarks/test_surgery.py"]
    assert all((ROOT / given[0]).exists() for given in asked)
    assert report.left_out == {}
    for found in report.trained.values():
        assert set(found["seconds"]) == set(found["peak"]) == set(gpu_check.WAYS)
        assert min(found["seconds"].values()) > 0.0
        for way in ("AdamW", gpu_check.START):
            assert found["planned"][way] == pytest.approx(found["peak"][way], rel=0.15)
    assert json.loads((tmp_path / "found.json").read_text())["trained"] == report.trained
    out = capsys.readouterr().out
    assert "kernels: 3 passed" in out
    assert "| pi0_fast | 0.0" in out


def test_what_does_not_fit_is_said(monkeypatch, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr(gpu_check, "tested", lambda given, seconds: "3 passed")
    monkeypatch.setattr(gpu_check, "trained", too_large)
    monkeypatch.setattr(gpu_check, "language_model", lambda *_: None)
    monkeypatch.setattr(gpu_check, "policy", lambda *_: None)
    report = gpu_check.main(["--mini"])
    assert report.left_out["pi0_fast"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB."
    assert "left out: pi0_fast: OutOfMemoryError" in capsys.readouterr().out
    report = gpu_check.main(["--mini", "--minutes=0.1"])
    assert set(report.left_out.values()) == {"the time is over"}
    assert len(report.left_out) == 4


def test_a_test_that_fails_ends_it(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "1 failed", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="1 failed"):
        gpu_check.tested(["tests/kernels"], 9.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "there is no GPU: --mini" in capsys.readouterr().err
