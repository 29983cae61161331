"""What strangers get: the README on a package index, an sdist whose tests run, one version of the linter."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
REPOSITORY = PROJECT["project"]["urls"]["Repository"]
LINK = re.compile(r"(!?)\[[^]]*\]\(([^)]+)\)")


def test_each_path_of_the_readme_is_an_address_on_a_package_index():
    """Of a file that is there, and of a picture the picture itself."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "--quiet", "--long-description"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    here = LINK.findall((ROOT / "README.md").read_text("utf-8"))
    there = LINK.findall(shown)
    assert [picture for picture, _ in there] == [picture for picture, _ in here]
    for picture, target in there:
        address, is_ours, path = target.partition(f"{REPOSITORY}/{'raw' if picture else 'blob'}/main/")
        assert (ROOT / path).is_file() if is_ours and not address else re.match("https?://", target), target


def test_the_sdist_holds_what_the_tests_read(monkeypatch):
    filelist = pytest.importorskip("setuptools.command.egg_info").FileList
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a clone")
    monkeypatch.chdir(ROOT)
    found = filelist()
    for line in Path("MANIFEST.in").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            found.process_template_line(line)
    # Setuptools adds these itself.
    of_itself = re.compile(r"craft_optim/|pyproject\.toml|setup\.py|README\.md|LICENSE|MANIFEST\.in")
    ours_alone = re.compile(r"\.ci/|\.github/|\.gitignore|findings/")
    missing = {name for name in tracked if not (of_itself.match(name) or ours_alone.match(name))} - set(found.files)
    assert not missing


def test_one_version_of_ruff():
    (pinned,) = (line.removeprefix("ruff==") for line in PROJECT["dependency-groups"]["ruff"])
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text("utf-8")


def test_lower_bounds_are_those_of_the_project():
    command = [sys.executable, "tools/lower_bounds.py", "transformers", "docs"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert printed[0] == PROJECT["project"]["dependencies"][0].replace(">=", "==")
    assert "transformers==4.57" in printed
    assert any(line.startswith("sphinx==") for line in printed)
