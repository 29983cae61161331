"""What the README points at exists, and its code for users parses."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\]\(([^)#]+)\)", TEXT)
COMMANDS = re.findall(r"`[^`]*?(?<!tests/)(examples/\w+\.py)[^`]*`", TEXT)


@pytest.mark.parametrize("target", sorted({*LINKS, *COMMANDS}))
def test_what_it_points_at_exists(target):
    assert (ROOT / target).exists()


def test_every_cell_of_the_table_has_a_test():
    """Or is empty: no claim without one."""
    table = TEXT.split("## Works with")[1].split("\n\n")[2]
    rows = [line.split("|")[2:-1] for line in table.splitlines()[2:]]
    assert len(rows) == 6
    for cell in (cell.strip() for row in rows for cell in row):
        assert re.sub(r"\[[^]]+\]\(tests/[^)]+\.py\)", "", cell).strip(",; ") == "", cell


def test_its_code_parses():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block.replace("..., ", ""))
