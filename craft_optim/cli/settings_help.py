"""The settings of `craft-optim train` in words, read from the source that declares them.

To import them takes the seconds that lerobot takes.
"""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

__all__ = ["settings", "settings_in_words"]

_PACKAGE = Path(__file__).parents[1]
_SETTINGS, _RULES = _PACKAGE / "lerobot" / "settings.py", _PACKAGE / "_step" / "rules.py"
_OF_THE_RUN = "total_steps"  # lerobot's own `steps`


def settings_in_words(width: int = 100) -> str:
    """Each setting with its default, and what it is."""
    lines = list[str]()
    for flag, default, text in settings():
        lines.append(f"  {flag}={'null' if default is None else default}")
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def settings() -> list[tuple[str, object, str]]:
    """Flag, default and description of each setting."""
    own, texts = _declared(_SETTINGS, "CraftSettings")
    rules, _ = _declared(_RULES, "Rules", texts)
    return [(f"--craft.{name}", default, text) for name, default, text in own + rules if name != _OF_THE_RUN]


def _declared(
    file: Path, kind: str, said: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[tuple[str, object, str]], dict[str, str]]:
    """Name, default and description of the fields of a dataclass, and all descriptions in its docstring.

    Args:
        file: Where it is declared. Fields of a class within it, of the same file, are named behind a dot.
        kind: Its name.
        said: Descriptions that go before its own.
    """
    classes = {node.name: node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ClassDef)}
    texts = _described(ast.get_docstring(classes[kind]) or "") | dict(said)
    found = list[tuple[str, object, str]]()
    for node in classes[kind].body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value):
            continue
        name, inner = node.target.id, ast.unparse(node.annotation)
        if inner in classes:
            found += [(f"{name}.{below}", default, text) for below, default, text in _declared(file, inner)[0]]
        else:
            found.append((name, _default(node.value), texts[name]))
    return found, texts


def _default(value: ast.expr) -> object:
    if isinstance(value, ast.Call):  # field(default_factory=dict)
        (factory,) = (ast.unparse(keyword.value) for keyword in value.keywords)
        return {"dict": {}, "list": []}[factory]
    return ast.literal_eval(value)


def _described(docstring: str) -> dict[str, str]:
    """Name -> text of the attributes that a docstring lists."""
    found, name = dict[str, str](), ""
    _, _, listed = inspect.cleandoc(docstring).partition("Attributes:\n")
    for line in listed.partition("\n\n")[0].splitlines():
        if line.startswith("     "):  # goes on
            found[name] += f" {line.strip()}"
        else:
            name, _, text = line.strip().partition(": ")
            found[name] = text
    return found
