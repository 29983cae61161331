"""The settings as `craft-optim train --help` lists them: the classes' names and defaults, their docstrings' texts."""

import inspect
import textwrap
from operator import attrgetter
from typing import Any

from craft_optim.lerobot.settings import PREFIX, AnchorSettings, CraftSettings, setting_names

__all__ = ["settings_in_words"]


def settings_in_words(width: int = 100) -> str:
    """Each setting with its default, and what it is."""
    texts = _described(CraftSettings) | {f"anchors.{name}": text for name, text in _described(AnchorSettings).items()}
    lines, defaults = [], CraftSettings()
    for name in setting_names():
        default = attrgetter(name)(defaults)
        lines.append(f"  {PREFIX}{name}={'null' if default is None else default}")
        lines += textwrap.wrap(texts.get(name, ""), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _described(kind: Any) -> dict[str, str]:
    """Name -> text of the attributes in the docstrings of a class and those before it, which it may say anew."""
    found: dict[str, str] = {}
    for one in reversed(inspect.getmro(kind)):
        name = ""
        _, _, listed = inspect.cleandoc(one.__doc__ or "").partition("Attributes:\n")
        for line in listed.partition("\n\n")[0].splitlines():
            if line.startswith("     "):  # goes on
                found[name] += f" {line.strip()}"
            else:
                name, _, text = line.strip().partition(": ")
                found[name] = text
    return found
