"""The mutation check on a module of a few lines: all changes but one are killed, and that one has to be explained."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools/mutants.py"
TOY = '''
def raised(x: float, low: float = 0.0) -> float:
    """At least 1, at most 2."""
    if x > 1.0:
        return 2.0
    return max(x, low) + 1
'''
TEST = """
from toy import raised

def test_raised():
    assert [raised(x) for x in (-1.0, 0.5, 1.5, 3.0)] == [1.0, 1.5, 2.0, 2.0]
"""
SURVIVOR = "toy.py raised: if x {> -> >=} 1.0:"
KILLED = "toy.py raised: return max(x, low) + {1 -> 2}"


@pytest.mark.parametrize(
    ("test", "explained", "status", "said"),
    [
        (TEST, f"{SURVIVOR}  # both are 2 at 1", 0, ["10 mutants, 90.0% killed", f"{SURVIVOR}  # both are 2 at 1"]),
        (
            TEST,
            f"{KILLED}  # no",
            1,
            [f"{SURVIVOR}  # NOT EXPLAINED", f"does not survive, take the line out: {KILLED}"],
        ),
        (TEST.replace("1.5, 2", "1.5, 3"), "", 1, ["its tests must pass before it is changed"]),
    ],
)
def test_a_survivor_must_be_explained(tmp_path, test, explained, status, said):
    for name, text in [("toy.py", TOY), ("test_toy.py", test), ("explained.txt", explained)]:
        (tmp_path / name).write_text(text, "utf-8")
    command = [sys.executable, str(TOOL), "toy.py=test_toy.py", "--explained=explained.txt"]
    quick = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=quick, capture_output=True, text=True)
    assert all(part in done.stdout + done.stderr for part in said), done.stdout + done.stderr
    assert done.returncode == status
