"""HTML of this package's pages: elements, tables, and a page around them that loads nothing.

Styles and scripts are in the page, pictures are data URIs, and it forbids itself everything else: a script runs only if
its hash is in the page's own policy, so that nothing in a name or a prompt can become one.
"""

import base64
import hashlib
import html
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

__all__ = ["Markup", "asset", "folded", "page", "table", "tag"]

_VOID = ("img", "input", "meta")


class Markup(str):
    """Text that is HTML already; everything else is escaped."""


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """An element.

    Args:
        children: Text is escaped, `Markup` is not.
        attributes: An underscore at the end is dropped (`class_`), others become hyphens.

    Example:
        >>> tag("p", "a < b", tag("b", "!"), class_="quiet")
        '<p class="quiet">a &lt; b<b>!</b></p>'
    """
    inner = "".join(x if isinstance(x, Markup) else html.escape(x) for x in children)
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    return Markup(f"<{name}{words}>" if name in _VOID else f"<{name}{words}>{inner}</{name}>")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table in a box that scrolls sideways where it is too wide."""
    head = tag("tr", *(tag("th", column) for column in columns))
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex=0)


def folded(summary: str, *children: str) -> Markup:
    """A part of the page that opens on a click."""
    return tag("details", tag("summary", summary), *children)


def page(title: str, sections: Sequence[str], style: str = "", scripts: Sequence[str] = ()) -> str:
    """A whole page, light or dark as the reader's system is.

    Args:
        sections: HTML, from top to bottom.
        scripts: JavaScript to run when everything else is there; no text of users may be in it.
    """
    allowed = "".join(f" '{_hash(script)}'" for script in scripts)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{'; script-src' if scripts else ''}{allowed}"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(f"{asset('pages.css')}\n{style}")),
    ]
    body = [tag("main", *sections), *(tag("script", Markup(script)) for script in scripts)]
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', *body), lang='en')}\n"


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


@cache
def asset(name: str) -> str:
    """A file of the folder static: a style or a script."""
    return files(__package__).joinpath("static", name).read_text(encoding="utf-8").strip()
