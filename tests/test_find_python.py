"""`make` has to find an interpreter that runs, on machines where the first one on PATH does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "find_python"
pytestmark = pytest.mark.skipif(
    os.name != "posix" or sys.version_info < (3, 12), reason="needs a POSIX shell and an interpreter new enough to find"
)


def fake(path: Path, works: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = f'exec "{sys.executable}" "$@"' if works else "echo 'command not found' >&2; exit 127"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def find(tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    # Nothing of this machine's own but the shell.
    (tmp_path / "bin").mkdir(exist_ok=True)
    env = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path / "pyenv")} | env
    return subprocess.run(["/bin/sh", str(SCRIPT), *arguments], env=env, capture_output=True, text=True, check=False)


def test_the_first_on_path_that_runs(tmp_path):
    fake(tmp_path / "bin" / "python3.13", works=False)  # as a pyenv shim of a version that is not selected
    good = fake(tmp_path / "bin" / "python3.12", works=True)
    fake(tmp_path / "bin" / "python3", works=True)
    assert find(tmp_path).stdout.strip() == str(good)


def test_then_pyenvs_versions(tmp_path):
    fake(tmp_path / "bin" / "python3", works=False)
    good = fake(tmp_path / "pyenv" / "versions" / "3.12.1" / "bin" / "python", works=True)
    fake(tmp_path / "pyenv" / "versions" / "3.11.7" / "bin" / "python", works=True)
    assert find(tmp_path).stdout.strip() == str(good)


def test_the_oldest_that_is_asked_for(tmp_path):
    fake(tmp_path / "bin" / "python3.12", works=True)
    oldest = fake(tmp_path / "pyenv" / "versions" / "3.11.7" / "bin" / "python", works=True)
    assert find(tmp_path, "11").stdout.strip() == str(oldest)
    assert "Python >= 3.99 found" in find(tmp_path, "99").stderr


def test_a_named_one_wins_or_is_refused(tmp_path):
    good = fake(tmp_path / "elsewhere" / "python", works=True)
    fake(tmp_path / "bin" / "python3", works=True)
    assert find(tmp_path, PYTHON=str(good)).stdout.strip() == str(good)
    bad = fake(tmp_path / "elsewhere" / "broken", works=False)
    refused = find(tmp_path, PYTHON=str(bad))
    assert refused.returncode == 1
    assert str(bad) in refused.stderr


def test_none_is_a_clear_message(tmp_path):
    missing = find(tmp_path)
    assert missing.returncode == 1
    assert "make PYTHON=" in missing.stderr
