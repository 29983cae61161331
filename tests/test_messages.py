"""What the package says to its users: nothing points to a file that a wheel does not have."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "craft_optim"


def spoken(module):
    """The texts of a module but for docstrings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(module) if isinstance(node, kinds)]
    alone = {id(node.value) for body in bodies for node in body if isinstance(node, ast.Expr)}
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.lineno, node.value


def test_no_message_names_a_page_of_the_repository():
    found = [
        (file.relative_to(PACKAGE).as_posix(), line, text)
        for file in PACKAGE.rglob("*.py")
        for line, text in spoken(ast.parse(file.read_text("utf-8")))
        if re.search(r"\b(docs|benchmarks|tests)/\w", text)
    ]
    assert found == []
