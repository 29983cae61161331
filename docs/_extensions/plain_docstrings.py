"""Docstrings as this package writes them, for Sphinx: Google's sections, `code`, and formulas in indented blocks.

reStructuredText reads `code` as a title, |g| as a substitution and an indented block as a quotation. Before napoleon
sees a docstring, this makes of it what is meant.
"""

import re
from typing import Any

__all__ = ["restructured", "setup"]

_SECTION = re.compile(r"(Args|Attributes|Example|Raises|Returns|Cost|Source):$")
_ITEM = re.compile(r"\s*([-*]|\d\.) ")
_CODE = re.compile(r"``[^`]+``|`[^`]+`")
_NAME = re.compile(r"(craft_optim\.)?[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    # Before napoleon, which listens with the usual priority of 500.
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = restructured(lines)


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    # Fields of a named tuple: what they are is among its attributes.
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def restructured(lines: list[str]) -> list[str]:
    """A docstring in reStructuredText, but for Google's sections, which are napoleon's.

    Args:
        lines: The docstring's, without common indentation.
    """
    made: list[str] = []
    text: list[str] = []  # lines of running text, converted together: `code` may go over the end of a line
    section, before, at = "", "", 0  # the last line that was not blank, and the next one
    while at < len(lines):
        line = lines[at]
        if line and not line.startswith(" "):
            section = line if _SECTION.fullmatch(line) else ""
        end, block = at + 1, None
        if line.lstrip().startswith(">>>"):
            end = next((i for i in range(at, len(lines)) if not lines[i].strip()), len(lines))
            block = lines[at:end]
        elif section == "Example:" and line.startswith(" ") and not _ITEM.match(line) and "`" not in line:
            end = _end(lines, at, 0)
            block = ["    .. code-block:: python", "", *(f"    {x}".rstrip() for x in lines[at:end]), ""]
        elif line == "Returns:":
            # As a field: napoleon takes what stands before a colon for the type.
            end = _end(lines, at + 1, 0)
            first, *more = [x.strip() for x in lines[at + 1 : end]]
            text += [f":returns: {first}", *(f"    {x}".rstrip() for x in more)]
        elif _begins_block(lines, at, before):
            end = _end(lines, at, _indent(before))
            block = [f"{' ' * _indent(before)}::", "", *lines[at:end]]
        else:
            text.append(line)
        if block is not None:
            made += [*_inline(text), *block]
            text = []
        before = next((x for x in reversed(lines[at:end]) if x.strip()), before)
        at = end
    return made + _inline(text)


def _begins_block(lines: list[str], at: int, before: str) -> bool:
    """Whether an indented block begins there: after a blank line, and not within a list or a section."""
    follows_blank = at > 0 and not lines[at - 1].strip()
    deeper = bool(lines[at].strip()) and _indent(lines[at]) > _indent(before)
    return follows_blank and deeper and not _ITEM.match(before) and not _SECTION.fullmatch(before)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _end(lines: list[str], start: int, margin: int) -> int:
    """The end of the block that begins there and is indented by more than `margin`, without blank lines at its end."""
    inside = (i for i in range(start, len(lines)) if lines[i].strip() and _indent(lines[i]) <= margin)
    end = next(inside, len(lines))
    while not lines[end - 1].strip():
        end -= 1
    return end


def _inline(text: list[str]) -> list[str]:
    """Running text: code and links instead of `code`, and nothing else that has a meaning but *emphasis*."""
    if not text:
        return []
    joined, made, place = "\n".join(text), [], 0
    for found in _CODE.finditer(joined):
        made += [_plain(joined[place : found.start()]), _code(found[0].strip("`"))]
        place = found.end()
    return "".join([*made, _plain(joined[place:])]).split("\n")


def _code(code: str) -> str:
    # Names become links where they are found: `LogitRetention`, `craft_optim.dual`. Others stay code.
    if _NAME.fullmatch(code) and ("." in code or code[0].isupper()):
        return f":py:obj:`{code}`" if code.startswith("craft_optim") else f":py:obj:`.{code}`"
    return f"``{code}``"


def _plain(text: str) -> str:
    # A trailing underscore would be a reference.
    return re.sub(r"(\*\w[\w ]*\*)|([\\|*])|(?<=\w)_(?=\W|$)", lambda found: found[1] or f"\\{found[0]}", text)
