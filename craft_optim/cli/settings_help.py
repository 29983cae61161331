"""The settings of `craft-optim train` in words, read from the source that declares them.

To import them takes the seconds that lerobot takes.
"""

import ast
import textwrap
from collections.abc import Mapping
from pathlib import Path

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
    ours, rules = _classes(_SETTINGS), _classes(_RULES)
    anew = _described(ours["CraftSettings"])  # of rules, too, where lerobot's runs differ
    found = _declared(ours, "CraftSettings")
    found += [(name, default, anew.get(name, text)) for name, default, text in _declared(rules, "Rules")]
    return [(f"--craft.{name}", default, text) for name, default, text in found if name != _OF_THE_RUN]


def _classes(file: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ClassDef)}


def _declared(classes: Mapping[str, ast.ClassDef], kind: str) -> list[tuple[str, object, str]]:
    """Name, default and description of the fields of a dataclass; those of another of the classes behind a dot."""
    texts, found = _described(classes[kind]), list[tuple[str, object, str]]()
    for node in classes[kind].body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value):
            continue
        name, inner = node.target.id, ast.unparse(node.annotation)
        if inner in classes:
            found += [(f"{name}.{below}", default, text) for below, default, text in _declared(classes, inner)]
        else:
            found.append((name, _default(node.value), texts[name]))
    return found


def _default(value: ast.expr) -> object:
    """The value; of the one call that there is, `field(default_factory=dict)`, an empty dict."""
    return {} if isinstance(value, ast.Call) else ast.literal_eval(value)


def _described(kind: ast.ClassDef) -> dict[str, str]:
    """Name -> text of the attributes that a class's docstring lists."""
    found, name = dict[str, str](), ""
    _, _, listed = (ast.get_docstring(kind) or "").partition("Attributes:\n")
    for line in listed.partition("\n\n")[0].splitlines():
        if line.startswith("     "):  # goes on
            found[name] += f" {line.strip()}"
        else:
            name, _, text = line.strip().partition(": ")
            found[name] = text
    return found
